"""`PairDataset` and `PairLoader`: augmented views of positive pairs, in batches.

Every batch is a function of the seed and the step alone, so that a run can stop and resume at any step.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from likewise.artifacts import Artifact, load_array, mmap_array, shard_name, write_array
from likewise.data.dataset import CaptionDataset
from likewise.data.image_cache import ImageCache, build_image_cache, cache_resolution
from likewise.distributed import DistributedContext
from likewise.models.text_tower import CONTEXT_LENGTH, tokenize
from likewise.neighbors.vectors import ImageVectors
from likewise.pairs.sampling import Pairs
from likewise.parallel import prefetch_map
from likewise.progress import NULL_PROGRESS, Progress
from likewise.rng import Stream, epoch_permutation, uniform
from likewise.training.augmentations import (
    AugmentationConfig,
    ViewParams,
    color_augment,
    compute_crop_boxes,
    crop_resize,
    get_augmentation,
    normalize,
    sample_view_params,
)
from likewise.training.config import DEFAULT_PREPROCESSING, Preprocessing, ViewSpec, default_augmentation
from likewise.training.methods.base import Batch

ARTIFACT_KIND = "tokens"
_TOKENIZE_BATCH_SIZE = 1024


class CaptionTokens:
    """Random access to tokenized captions."""

    def __init__(self, artifact: Artifact, caption_mask: np.ndarray | None = None) -> None:
        """Map the shards; `caption_mask` (num_captions,) bool selects captions (default: all)."""
        shard_indices = range(artifact.manifest.counts["shards"])
        self.key = artifact.manifest.key
        self._shards = [mmap_array(artifact.path / shard_name("tokens", i, "npy")) for i in shard_indices]
        counts = np.concatenate(
            [load_array(artifact.path / shard_name("counts", i, "npy")) for i in shard_indices]
        )
        self._shard_offsets = np.concatenate([[0], np.cumsum([len(shard) for shard in self._shards])])
        image_positions = np.repeat(np.arange(len(counts)), counts)
        self._caption_rows = (
            np.arange(len(image_positions)) if caption_mask is None else np.flatnonzero(caption_mask)
        )
        image_positions = image_positions[self._caption_rows]
        self._first_caption = np.searchsorted(image_positions, np.arange(len(counts)))
        self._captions_per_image = (
            np.searchsorted(image_positions, np.arange(len(counts)), side="right") - self._first_caption
        )

    @property
    def has_caption(self) -> np.ndarray:
        """(num_images,) bool, True for images with a caption."""
        return self._captions_per_image > 0

    def sample(self, positions: np.ndarray, *, seed: int, epoch: int) -> Tensor:
        """Sample one caption per image: (b,) int64 -> (b, t) int64, padded to the longest of them."""
        u = uniform(positions, 1, seed=seed, epoch=epoch, stream=Stream.CAPTIONS)[:, 0]
        caption_rows = self._caption_rows[
            self._first_caption[positions] + (u * self._captions_per_image[positions]).astype(np.int64)
        ]
        shard_indices = np.searchsorted(self._shard_offsets, caption_rows, side="right") - 1
        tokens = np.stack([
            self._shards[s][row - self._shard_offsets[s]] for s, row in zip(
                shard_indices.tolist(), caption_rows.tolist(), strict=True
            )
        ])  # fmt: skip
        max_length = int((tokens > 0).sum(axis=1).max())
        return torch.from_numpy(tokens[:, :max_length].astype(np.int64))


def tokenize_captions(
    dataset: CaptionDataset, caption_mask: np.ndarray | None = None, *, progress: Progress = NULL_PROGRESS
) -> CaptionTokens:
    """Tokenize all captions of a dataset; an interrupted call resumes at the missing shards.

    Args:
        dataset: The dataset.
        caption_mask: (num_captions,) bool, the captions to use; defaults to all.
        progress: Progress bars.

    Raises:
        DependencyError: if open_clip, which has the tokenizer, is not installed.
    """
    path = dataset.path / "tokens"
    settings, inputs = {"tokenizer": "clip", "context": CONTEXT_LENGTH}, {"collection": dataset.key}
    with Artifact.exclusive(path, ARTIFACT_KIND, settings, inputs) as artifact:
        if not artifact.is_complete:
            _tokenize_missing(dataset, artifact, progress)
    return CaptionTokens(Artifact.open(path, ARTIFACT_KIND), caption_mask)


def _tokenize_missing(dataset: CaptionDataset, artifact: Artifact, progress: Progress) -> None:
    """Write the missing shards and finish the artifact."""
    path, shards = artifact.path, range(len(dataset.shard_paths))
    with progress.task("tokens", len(dataset), "images") as progress_bar:
        for shard in shards:
            captions = dataset.read_columns(shard, ["captions"])["captions"]
            if not (path / shard_name("counts", shard, "npy")).is_file():
                texts = [caption for image_captions in captions for caption in image_captions]
                chunks = [
                    tokenize(texts[i : i + _TOKENIZE_BATCH_SIZE]).numpy()
                    for i in range(0, len(texts), _TOKENIZE_BATCH_SIZE)
                ]
                tokens = np.concatenate([np.empty((0, CONTEXT_LENGTH)), *chunks]).astype(np.uint16)
                write_array(path / shard_name("tokens", shard, "npy"), tokens)
                # Written last: it marks the shard as complete.
                write_array(
                    path / shard_name("counts", shard, "npy"),
                    np.array([len(image_captions) for image_captions in captions], np.int64),
                )
            progress_bar.update(len(captions))
    artifact.finish({"shards": len(shards), "images": len(dataset)})


@dataclass(frozen=True, kw_only=True)
class CaptionInputs:
    """Captions as inputs of a method.

    Attributes:
        vectors: Caption embeddings; None if the method does not use them.
        tokens: Tokenized captions; None if the method does not use them.
        use_partner_caption: Take the caption of the partner instead of the anchor's.
        has_caption: (num_images,) bool, the images to train on; None for all.
    """

    vectors: ImageVectors | None = None
    tokens: CaptionTokens | None = None
    use_partner_caption: bool = True
    has_caption: np.ndarray | None = None


NO_CAPTIONS, SINGLE_PROCESS = CaptionInputs(), DistributedContext()


@dataclass(frozen=True)
class HostBatch:
    """A batch of b pairs in host memory, before color augmentation.

    Attributes:
        anchors: (b,) int64, positions of the anchors in the dataset.
        partners: Positions of each partner, (b,) int64 per partner; equal to the anchor's for a self pair.
        rank_sizes: Pairs per process.
        crops: The local crops of each view, (local, 3, size, size) uint8, channels last in memory.
        color_params: The random numbers of the color augmentation of each view, (local, 9) in [0, 1).
        caption_embeddings: (2, b, d) float32, the caption embeddings of anchors and first partners, of unit
            length; zero without a caption. None if the method does not use them.
        tokens: (local, t) int64, a tokenized caption per pair; None if the method does not use them.
        labels: (b,) int64, the label of each pair; None unless pairs are sampled by label.
        preprocessing: The normalization of the views.
    """

    anchors: np.ndarray
    partners: Sequence[np.ndarray]
    rank_sizes: tuple[int, ...]
    crops: Sequence[Tensor]
    color_params: Sequence[np.ndarray]
    caption_embeddings: Tensor | None = None
    tokens: Tensor | None = None
    labels: Tensor | None = None
    preprocessing: Preprocessing = DEFAULT_PREPROCESSING

    def to_device(
        self, augmentations: Sequence[AugmentationConfig], device: torch.device, train_fraction: float = 0.0
    ) -> Batch:
        """Move the batch to a device, and apply color augmentation and normalization there.

        Args:
            augmentations: The augmentation of each view.
            device: The device.
            train_fraction: The completed fraction of the run, in [0, 1).
        """
        mean, std = self.preprocessing.mean, self.preprocessing.std
        views = [
            normalize(
                color_augment(_to_float(crops.to(device, non_blocking=True)), params, augmentation), mean, std
            )
            for crops, params, augmentation in zip(self.crops, self.color_params, augmentations, strict=True)
        ]
        caption_embeddings, tokens, labels = (
            None if tensor is None else tensor.to(device, non_blocking=True)
            for tensor in (self.caption_embeddings, self.tokens, self.labels)
        )
        return Batch(
            views=views,
            rank_sizes=self.rank_sizes,
            caption_embeddings=caption_embeddings,
            tokens=tokens,
            labels=labels,
            train_fraction=train_fraction,
        )


def _to_float(crops: Tensor) -> Tensor:
    """Convert pixels (b, 3, h, w) from uint8 to contiguous float32 in [0, 1]."""
    # In place, because allocating memory for a large batch takes longer than the division.
    return crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


class PairDataset(Dataset[tuple[Any, ...]]):
    """Augmented views of positive pairs, as a map-style dataset of torch.

    ::

        pairs = likewise.build_pairs(dataset, likewise.PairConfig(source="language", k=3))
        pair_dataset = likewise.PairDataset(dataset, pairs, image_size=64)
        view1, view2, index = pair_dataset[0]

    Partner and augmentation of an image are functions of the seed, the epoch and the image; call `set_epoch`
    before each epoch.
    """

    def __init__(
        self,
        dataset: CaptionDataset | ImageCache | str | Path,
        pairs: Pairs,
        *,
        image_size: int = 224,
        augmentation: str | None = None,
        seed: int = 0,
        view_specs: Sequence[ViewSpec] | None = None,
        caption_inputs: CaptionInputs = NO_CAPTIONS,
    ) -> None:
        """Combine the images of a dataset with pairs.

        Args:
            dataset: A dataset, whose images are decoded and cached on disk, or an image cache.
            pairs: The pairs; images that cannot be read are excluded.
            image_size: Height and width of the views in pixels.
            augmentation: `crop` or `simclr`; defaults to `simclr` for self pairs and to `crop` otherwise.
            seed: Seed of the order, the partners and the augmentation.
            view_specs: The views of a pair, instead of `image_size` and `augmentation`; by default one view
                of the anchor and one of its partner.
            caption_inputs: Captions that batches include.
        """
        if not isinstance(dataset, ImageCache):
            dataset = CaptionDataset.open(dataset)
            dataset = build_image_cache(dataset, cache_resolution(image_size, len(dataset)))
        if view_specs is None:
            name = default_augmentation(pairs.pair_config) if augmentation is None else augmentation
            view_specs = [ViewSpec(source=i, augmentation=name, image_size=image_size) for i in range(2)]
        self.image_cache, self.pairs, self.caption_inputs = dataset, pairs, caption_inputs
        self.view_specs = tuple(view_specs)
        self.augmentations = tuple(
            get_augmentation(spec.augmentation, spec.crop_scale) for spec in self.view_specs
        )
        self.seed, self.epoch = seed, 0
        self.anchors = np.intersect1d(self.image_cache.readable, pairs.anchors)
        if caption_inputs.has_caption is not None:
            self.anchors = self.anchors[caption_inputs.has_caption[self.anchors]]
        # At least one partner, even if no view needs it: its caption may be an input.
        self._num_partners = max(1, *(spec.source for spec in self.view_specs))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, that decides the partners and the augmentation."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of anchors, each of which has one pair per epoch."""
        return len(self.anchors)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return the views of a pair, (3, size, size) float32 each, normalized, and the anchor's position."""
        anchors = self.anchors[[index]]
        batch = self.collate(anchors, self.sample_partners(anchors, self.epoch), self.epoch)
        views = batch.to_device(self.augmentations, torch.device("cpu")).views
        return (*(view[0] for view in views), int(anchors[0]))

    def sample_partners(self, anchors: np.ndarray, epoch: int) -> list[np.ndarray]:
        """Sample the partners of anchors (b,) int64: one array (b,) int64 per partner."""
        return [
            self.pairs.sample_partners(anchors, seed=self.seed, epoch=epoch, offset=i / self._num_partners)
            for i in range(self._num_partners)
        ]

    def collate(
        self,
        anchors: np.ndarray,
        partners: Sequence[np.ndarray],
        epoch: int,
        dist_context: DistributedContext = SINGLE_PROCESS,
    ) -> HostBatch:
        """Make a batch of pairs.

        Args:
            anchors: (b,) int64, positions of the anchors.
            partners: Positions of each partner, (b,) int64 per partner.
            epoch: The epoch that decides the augmentation.
            dist_context: The process, which crops the views of its part only.
        """
        local = dist_context.local_slice(len(anchors))
        sources = [positions[local] for positions in (anchors, *partners)]
        # Parameters belong to the anchor: anchors with the same partner get different views of it.
        view_params = [
            sample_view_params(sources[0], view_index, seed=self.seed, epoch=epoch)
            for view_index in range(len(self.view_specs))
        ]
        labels = self.pairs.labels
        return HostBatch(
            anchors,
            partners,
            dist_context.shard_sizes(len(anchors)),
            self._crop_views(sources, view_params),
            [params.color for params in view_params],
            self._caption_embeddings(anchors, partners),
            self._caption_tokens(sources[0], sources[1], epoch),
            None if labels is None else torch.from_numpy(labels[anchors]),
            self.view_specs[0].preprocessing,
        )

    def _caption_embeddings(self, anchors: np.ndarray, partners: Sequence[np.ndarray]) -> Tensor | None:
        if self.caption_inputs.vectors is None:
            return None
        vectors = self.caption_inputs.vectors.get(np.concatenate([anchors, partners[0]]))
        return torch.from_numpy(vectors).unflatten(0, (2, len(anchors)))

    def _caption_tokens(self, anchors: np.ndarray, partners: np.ndarray, epoch: int) -> Tensor | None:
        tokens = self.caption_inputs.tokens
        if tokens is None:
            return None
        positions = anchors
        if self.caption_inputs.use_partner_caption:
            positions = np.where(tokens.has_caption[partners], partners, anchors)
        return tokens.sample(positions, seed=self.seed, epoch=epoch)

    def _crop_views(self, sources: Sequence[np.ndarray], view_params: Sequence[ViewParams]) -> list[Tensor]:
        """Crop all views pair by pair; an image with several views in a pair is decoded once."""
        view_positions = [sources[spec.source] for spec in self.view_specs]
        boxes = [
            compute_crop_boxes(self.image_cache.shapes(positions), params.crop, augmentation.crop_scale)
            for positions, params, augmentation in zip(
                view_positions, view_params, self.augmentations, strict=True
            )
        ]
        views: list[list[Tensor]] = [[] for _ in self.view_specs]
        for row in range(len(sources[0])):
            decoded: dict[int, np.ndarray] = {}
            for view, (spec, augmentation) in enumerate(
                zip(self.view_specs, self.augmentations, strict=True)
            ):
                position = int(view_positions[view][row])
                if position not in decoded:
                    decoded[position] = self.image_cache.pixels(position)
                flip = bool(view_params[view].crop[row, -1] < augmentation.flip_prob)
                views[view].append(
                    crop_resize(
                        decoded[position],
                        boxes[view][row],
                        spec.image_size,
                        flip=flip,
                        interpolation=spec.preprocessing.interpolation,
                    )
                )
        # Pixels stay channels last, as they were cropped; the device changes the layout.
        return [torch.stack([view.permute(1, 2, 0) for view in crops]).permute(0, 3, 1, 2) for crops in views]


class PairLoader:
    """Shuffled batches of a `PairDataset`, made ahead of time by threads; incomplete batches are dropped.

    ::

        loader = likewise.PairLoader(pair_dataset, batch_size=128)
        for epoch in range(10):
            pair_dataset.set_epoch(epoch)
            for view1, view2, index in loader:
                ...

    Views are cropped on the host and augmented in color on the device, a batch at a time, which is faster
    than a `torch.utils.data.DataLoader` of the same dataset.
    """

    def __init__(
        self,
        dataset: PairDataset,
        *,
        batch_size: int,
        num_workers: int = 1,
        device: torch.device | str = "cpu",
        dist_context: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        """Batch a dataset.

        Args:
            dataset: The pairs.
            batch_size: Pairs per batch, over all processes.
            num_workers: Threads that make batches; they do not change the result.
            device: The device of the views.
            dist_context: The process, which receives its part of each batch.
        """
        self.dataset, self.batch_size, self.num_workers = dataset, batch_size, num_workers
        self.device, self.dist_context = torch.device(device), dist_context
        self._cached_epoch_order = lru_cache(maxsize=2)(self._epoch_order)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the batches of the dataset's epoch.

        Each is the views, (b, 3, size, size) float32, normalized, and the positions of the anchors, (b,)
        int64.
        """
        first_step = self.dataset.epoch * len(self)
        for batch in self.iterate(first_step, first_step + len(self)):
            local = self.dist_context.local_slice(len(batch.anchors))
            views = batch.to_device(self.dataset.augmentations, self.device).views
            yield (*views, torch.from_numpy(batch.anchors[local]))

    def batch_at(self, step: int) -> HostBatch:
        """Make the batch of a step, counted from 0 over all epochs."""
        epoch, batch_index = divmod(step, len(self))
        start = batch_index * self.batch_size
        anchors = self._cached_epoch_order(epoch)[start : start + self.batch_size]
        return self.dataset.collate(
            anchors, self.dataset.sample_partners(anchors, epoch), epoch, self.dist_context
        )

    def iterate(self, start: int, stop: int) -> Generator[HostBatch, None, None]:
        """Yield the batches of steps `start` to `stop`, made ahead of time by `num_workers` threads."""
        return prefetch_map(self.batch_at, range(start, stop), self.num_workers)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        order = epoch_permutation(len(self.dataset), seed=self.dataset.seed, epoch=epoch)
        return self.dataset.anchors[order]
