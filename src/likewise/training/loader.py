"""Batches of pairs, each a function of its step alone, so that a run may stop and go on anywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from likewise.artifacts import Artifact, load_array, mmap_array, shard_name, write_array
from likewise.data.dataset import CaptionDataset
from likewise.data.image_cache import ImageCache
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
from likewise.training.config import ViewSpec
from likewise.training.methods.base import Batch

ARTIFACT_KIND = "tokens"
_TOKENIZE_BATCH_SIZE = 1024


class CaptionTokens:
    """Random access to the tokens of captions."""

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
        """Which images have a caption: (n,) bool."""
        return self._captions_per_image > 0

    def sample(self, positions: np.ndarray, *, seed: int, epoch: int) -> Tensor:
        """Return one caption an image, drawn evenly: (b,) int64 -> (b, t) int64, t as the longest needs."""
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
    """Tokenise all captions of a collection; finished shards are kept on a rerun.

    Args:
        dataset: The captions.
        caption_mask: Which of them count, (captions,) bool; all of them where not given.
        progress: Where to report.

    Raises:
        DependencyError: where open_clip, whose tokenizer it is, is not installed.
    """
    path = dataset.path / "tokens"
    artifact = Artifact.create_or_resume(
        path, ARTIFACT_KIND, {"tokenizer": "clip", "context": CONTEXT_LENGTH}, {"collection": dataset.key}
    )
    if artifact.is_complete:
        return CaptionTokens(artifact, caption_mask)
    shards = range(len(dataset.shard_paths))
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
                # It comes last: where it exists, its tokens are whole.
                write_array(
                    path / shard_name("counts", shard, "npy"),
                    np.array([len(image_captions) for image_captions in captions], np.int64),
                )
            progress_bar.update(len(captions))
    return CaptionTokens(artifact.finish({"shards": len(shards), "images": len(dataset)}), caption_mask)


@dataclass(frozen=True)
class HostBatch:
    """A batch of b pairs, of which this process shows `part`, before colours are changed.

    Attributes:
        anchors: (b,) int64 positions in the collection.
        partners: One array (b,) for each partner that is shown, equal to the anchor's where it is paired with
            itself.
        rank_sizes: How many pairs each process shows.
        crops: A tensor (part, 3, side, side) uint8 for each view, channels last in memory.
        color_params: An array (part, 9) of draws in [0, 1) for each view.
        caption_embeddings: (2, b, d) float32 unit vectors of what describes anchors and first partners,
            zero where
            nothing does; None where no method asks for them.
        tokens: (part, t) int64, a caption of each anchor or its partner; None where no method asks for them.
        labels: (b,) int64 labels; None where pairs are not made by them.
    """

    anchors: np.ndarray
    partners: Sequence[np.ndarray]
    rank_sizes: tuple[int, ...]
    crops: Sequence[Tensor]
    color_params: Sequence[np.ndarray]
    caption_embeddings: Tensor | None = None
    tokens: Tensor | None = None
    labels: Tensor | None = None

    def to_device(
        self, augmentations: Sequence[AugmentationConfig], device: torch.device, train_fraction: float = 0.0
    ) -> Batch:
        """Finish the views on a device, each by its recipe, and send what else a method needs there."""
        views = [
            normalize(color_augment(_to_float(crops.to(device, non_blocking=True)), params, augmentation))
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
    """Return pixels (b, 3, h, w) uint8 as float32 in [0, 1], each channel by itself."""
    # In place, as fresh memory for a large batch takes longer than the division.
    return crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


@dataclass(frozen=True, kw_only=True)
class CaptionInputs:
    """What a method wants to know of captions beside the images.

    Attributes:
        vectors: Their embeddings, an image.
        tokens: They themselves.
        use_partner_caption: Whether an anchor's caption is that of its partner.
        has_caption: Images that have a caption, (n,) bool; the others take no part. None where all do.
    """

    vectors: ImageVectors | None = None
    tokens: CaptionTokens | None = None
    use_partner_caption: bool = True
    has_caption: np.ndarray | None = None


NO_CAPTIONS, SINGLE_PROCESS = CaptionInputs(), DistributedContext()


class PairLoader:
    """The batches of a whole run."""

    def __init__(
        self,
        image_cache: ImageCache,
        pairs: Pairs,
        view_specs: Sequence[ViewSpec],
        *,
        batch_size: int,
        seed: int,
        caption_inputs: CaptionInputs = NO_CAPTIONS,
        dist: DistributedContext = SINGLE_PROCESS,
    ) -> None:
        """Serve pairs of images that take part; each is an anchor once an epoch, but for an incomplete batch.

        Args:
            image_cache: Their pixels; those that cannot be read take no part.
            pairs: Who is shown with whom.
            view_specs: The views of a pair.
            batch_size: Pairs a batch, over all processes.
            seed: Decides order, partners and views.
            caption_inputs: What is wanted of the captions.
            dist: Which part of each batch is this process's.
        """
        self.image_cache, self.pairs, self.view_specs, self.caption_inputs = (
            image_cache,
            pairs,
            tuple(view_specs),
            caption_inputs,
        )
        self.augmentations = tuple(
            get_augmentation(spec.augmentation, spec.crop_scale) for spec in view_specs
        )
        self.batch_size, self.seed, self.dist = batch_size, seed, dist
        self.anchors = np.intersect1d(image_cache.readable, pairs.anchors)
        if caption_inputs.has_caption is not None:
            self.anchors = self.anchors[caption_inputs.has_caption[self.anchors]]
        self._num_partners = max(spec.source for spec in view_specs)
        self._cached_epoch_order = lru_cache(maxsize=2)(self._epoch_order)

    @property
    def steps_per_epoch(self) -> int:
        """How many whole batches an epoch has."""
        return len(self.anchors) // self.batch_size

    def batch_at(self, step: int) -> HostBatch:
        """Make the batch of a step counted from 0."""
        epoch, batch_index = divmod(step, self.steps_per_epoch)
        anchors = self._cached_epoch_order(epoch)[
            batch_index * self.batch_size : (batch_index + 1) * self.batch_size
        ]
        return self._make_batch(anchors, self._sample_partners(anchors, epoch), epoch)

    def batch_of(self, anchors: np.ndarray, partners: np.ndarray) -> HostBatch:
        """Make a batch of given pairs, shown as in the first epoch."""
        return self._make_batch(anchors, [partners], 0)

    def iterate(self, start: int, stop: int, num_workers: int) -> Iterator[HostBatch]:
        """Yield the batches of steps start to stop, made ahead of time by `num_workers` threads."""
        return prefetch_map(self.batch_at, range(start, stop), num_workers)

    def _make_batch(self, anchors: np.ndarray, partners: list[np.ndarray], epoch: int) -> HostBatch:
        local = self.dist.local_slice(len(anchors))
        sources = [array[local] for array in (anchors, *partners)]
        # All views are drawn for the anchor: two anchors that share a partner must not share its view.
        view_params = [
            sample_view_params(sources[0], view_index, seed=self.seed, epoch=epoch)
            for view_index in range(len(self.view_specs))
        ]
        return HostBatch(
            anchors,
            partners,
            self.dist.shard_sizes(len(anchors)),
            self._crop_views(sources, view_params),
            [params.color for params in view_params],
            self._caption_embeddings(anchors, partners),
            self._caption_tokens(anchors[local], [array[local] for array in partners], epoch),
            None if self.pairs.labels is None else torch.from_numpy(self.pairs.labels[anchors]),
        )

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return self.anchors[epoch_permutation(len(self.anchors), seed=self.seed, epoch=epoch)]

    def _sample_partners(self, anchors: np.ndarray, epoch: int) -> list[np.ndarray]:
        """Draw as many partners as are shown, and one at least, whose caption may be wanted."""
        num_partners = max(1, self._num_partners)
        return [
            self.pairs.sample_partners(anchors, seed=self.seed, epoch=epoch, offset=i / num_partners)
            for i in range(num_partners)
        ]

    def _caption_embeddings(self, anchors: np.ndarray, partners: Sequence[np.ndarray]) -> Tensor | None:
        if self.caption_inputs.vectors is None:
            return None
        vectors = self.caption_inputs.vectors.get(np.concatenate([anchors, partners[0]]))
        return torch.from_numpy(vectors).unflatten(0, (2, len(anchors)))

    def _caption_tokens(
        self, anchors: np.ndarray, partners: Sequence[np.ndarray], epoch: int
    ) -> Tensor | None:
        tokens = self.caption_inputs.tokens
        if tokens is None:
            return None
        positions = anchors
        if self.caption_inputs.use_partner_caption:
            positions = np.where(tokens.has_caption[partners[0]], partners[0], anchors)
        return tokens.sample(positions, seed=self.seed, epoch=epoch)

    def _crop_views(self, sources: Sequence[np.ndarray], view_params: Sequence[ViewParams]) -> list[Tensor]:
        """Cut all views, a pair at a time: an image that is shown more than once in it is decoded once."""
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
                    crop_resize(decoded[position], boxes[view][row], spec.image_size, flip=flip)
                )
        # Pixels lie as they were cut, channels last: to lay each channel by itself is left to the device.
        return [torch.stack([view.permute(1, 2, 0) for view in spec]).permute(0, 3, 1, 2) for spec in views]
