"""Embed all captions or images of a dataset, shard by shard, into an artifact."""

import logging
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np

from likewise.artifacts import (
    MANIFEST,
    Artifact,
    config_hash,
    mmap_array,
    read_json,
    shard_name,
    slugify,
    write_array,
    write_json,
)
from likewise.data.dataset import CaptionDataset, Sample
from likewise.data.images import UnreadableImageError, read_image
from likewise.embeddings.base import Corpus, EncoderSpec, TextEncoder, l2_normalize
from likewise.embeddings.config import DEFAULT_OPTIONS, EncoderOptions
from likewise.embeddings.registry import DEFAULT_ENCODER, SCHEMES, load_text_encoder, resolve_encoder
from likewise.embeddings.store import ARTIFACT_KIND, Embeddings
from likewise.errors import ArtifactError, InvalidInputError
from likewise.parallel import default_num_workers, prefetch_map, resolve_device
from likewise.progress import NULL_PROGRESS, Progress, ProgressBar

logger = logging.getLogger(__name__)

_BATCHES_PER_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class EmbeddedShard:
    """Embeddings of one shard."""

    vectors: np.ndarray
    """Embeddings, (n, d) float16."""
    image_ids: np.ndarray
    """Index of the sample of each row, (n,) int64, ascending."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of skipped samples by reason."""


class ShardEmbedder(ABC):
    """Embeds the shards of a dataset with a loaded encoder."""

    dim: int
    """Dimension of the embeddings."""

    @abstractmethod
    def embed_shard(self, shard: int, bar: ProgressBar) -> EmbeddedShard:
        """Embed one shard and update the progress bar."""


@final
class CaptionEmbedder(ShardEmbedder):
    """Embeds captions, one row per caption; each distinct caption of a shard is encoded once."""

    def __init__(self, dataset: CaptionDataset, encoder: TextEncoder, batch_size: int) -> None:
        """Set the dataset and the loaded encoder."""
        self._dataset, self._encoder, self._batch_size = dataset, encoder, batch_size
        self.dim = encoder.dim

    def embed_shard(self, shard: int, bar: ProgressBar) -> EmbeddedShard:
        """Embed the captions of one shard."""
        captions = self._dataset.read_columns(shard, ["captions"])["captions"]
        image_ids = (
            np.repeat(np.arange(len(captions)), [len(image_captions) for image_captions in captions])
            + self._dataset.shard_offsets[shard]
        )
        text_index: dict[str, int] = {}
        inverse = [
            text_index.setdefault(text, len(text_index))
            for image_captions in captions
            for text in image_captions
        ]
        unique_texts, counts = list(text_index), np.bincount(inverse, minlength=len(text_index))
        vectors = np.empty((len(unique_texts), self.dim), np.float16)
        # Captions are sorted by length to reduce padding (encoders sort each chunk by tokens), and encoded in
        # chunks of a few batches to update the progress bar.
        order = np.argsort([-len(text) for text in unique_texts], kind="stable")
        for start in range(0, len(order), _BATCHES_PER_CHUNK * self._batch_size):
            chunk = order[start : start + _BATCHES_PER_CHUNK * self._batch_size]
            vectors[chunk] = self._encoder.encode([unique_texts[i] for i in chunk], self._batch_size)
            bar.update(int(counts[chunk].sum()))
        # If all captions are distinct, they are already in order, and a copy would double the memory.
        return EmbeddedShard(
            vectors=vectors if len(unique_texts) == len(inverse) else vectors[np.array(inverse)],
            image_ids=image_ids,
        )


@final
class ImageEmbedder(ShardEmbedder):
    """Embeds images, one row per readable image; unreadable images are skipped and counted."""

    def __init__(
        self, dataset: CaptionDataset, spec: EncoderSpec, batch_size: int, device: str | None
    ) -> None:
        """Load the encoder.

        Raises:
            ModelError: if it cannot be loaded.
        """
        import torch

        from likewise.models.encoders import load_encoder

        self._dataset, self._batch_size = dataset, batch_size
        self._encoder = load_encoder(spec.name_or_path)
        self._device = torch.device(resolve_device(device))
        self._encoder.model.to(self._device).to(memory_format=torch.channels_last)
        self.dim = self._encoder.feature_dim

    def embed_shard(self, shard: int, bar: ProgressBar) -> EmbeddedShard:
        """Embed the images of one shard."""
        vectors, image_ids, skipped = [np.empty((0, self.dim), np.float16)], [], Counter[str]()
        offset = self._dataset.shard_offsets[shard]
        for crops, reasons in prefetch_map(self._load, self._batches(shard), default_num_workers()):
            readable = [i for i, reason in enumerate(reasons) if not reason]
            if readable:
                vectors.append(self._forward(crops[readable]).astype(np.float16))
            image_ids += [offset + i for i in readable]
            offset += len(reasons)
            skipped.update(reason for reason in reasons if reason)
            bar.update(len(reasons))
        return EmbeddedShard(
            vectors=np.concatenate(vectors), image_ids=np.array(image_ids, np.int64), skipped=skipped
        )

    def _batches(self, shard: int) -> Iterator[list[Sample]]:
        """Yield the samples in batches, as they may contain image bytes."""
        shard_start, shard_stop = self._dataset.shard_offsets[shard : shard + 2]
        for start in range(shard_start, shard_stop, self._batch_size):
            yield [self._dataset[i] for i in range(start, min(start + self._batch_size, shard_stop))]

    def _load(self, samples: list[Sample]) -> tuple[np.ndarray, list[str]]:
        """Return center crops, (b, size, size, 3) uint8, and the reason per unreadable image, else ''."""
        transform = self._encoder.transform
        crops, reasons = np.zeros((len(samples), transform.image_size, transform.image_size, 3), np.uint8), []
        for i, sample in enumerate(samples):
            try:
                pixels = read_image(sample.image, self._dataset.root, transform.resize_size)
                crops[i] = transform.center_crop(pixels)
                reasons.append("")
            except UnreadableImageError as error:
                reasons.append(str(error))
        return crops, reasons

    def _forward(self, crops: np.ndarray) -> np.ndarray:
        import torch

        chunks = torch.from_numpy(crops).split(self._encoder.inference_batch_size(self._device))
        with torch.inference_mode():
            inputs = (self._encoder.transform.normalize(chunk.to(self._device)) for chunk in chunks)
            features = torch.cat([self._encoder.model(chunk).float() for chunk in inputs])
        return l2_normalize(features.cpu().numpy())


def embed(
    dataset: CaptionDataset | str | Path,
    encoder: str = DEFAULT_ENCODER,
    *,
    options: EncoderOptions = DEFAULT_OPTIONS,
    batch_size: int = 64,
    device: str | None = None,
    progress: Progress = NULL_PROGRESS,
) -> Embeddings:
    """Embed all captions or images of a dataset in `DATASET/embeddings/`; an interrupted call resumes.

    Args:
        dataset: The dataset or its path.
        encoder: A sentence-transformers model by hub name or folder, or `SCHEME:MODEL` with a scheme of
            `likewise.embeddings.registry.SCHEMES`; `image:MODEL` embeds images.
        options: Options of the encoder.
        batch_size: Captions or images per forward pass.
        device: Device of the model; selected automatically by default.
        progress: Receives the progress.

    Returns:
        Embeddings on disk: float16 unit vectors, one row per caption or readable image.

    Raises:
        InvalidInputError: if no image has a caption, or no image is readable.
        ModelError: if the encoder cannot be loaded.
        ArtifactError: if embeddings are not finite, or their dimension differs from that of an interrupted
            call.
    """
    dataset = CaptionDataset.open(dataset)
    if batch_size < 1:
        raise InvalidInputError(f"`batch_size` must be at least 1, got {batch_size}", field="batch_size")
    device = None if device is None else resolve_device(device)
    spec = resolve_encoder(encoder, options)
    if spec.modality == "captions" and dataset.artifact.manifest.counts["captions"] == 0:
        raise InvalidInputError(
            f"no image of {dataset.path} has a caption; embed the images with an `encoder` such as "
            f"{SCHEMES['image'].example}",
            field="encoder",
        )
    path, settings, inputs = _artifact_spec(dataset, spec)
    # The encoder is loaded first, so that no folder is created if it cannot be loaded.
    embedder = None if (path / MANIFEST).is_file() else _open_embedder(dataset, spec, batch_size, device)
    with Artifact.exclusive(path, ARTIFACT_KIND, settings, inputs) as artifact:
        if artifact.is_complete:
            logger.info(f"embeddings of {len(dataset):,} images by {spec.name} exist: {path}")
        else:
            embedder = _open_embedder(dataset, spec, batch_size, device) if embedder is None else embedder
            _embed_missing_shards(dataset, spec, artifact, embedder, progress)
    return Embeddings(path)


def _artifact_spec(dataset: CaptionDataset, spec: EncoderSpec) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Return the folder of the embeddings, and the settings and inputs that determine its key."""
    settings: dict[str, Any] = {"encoder": spec.name, "dtype": "float16"} | spec.options.overrides
    if spec.modality == "images":
        settings["modality"] = "images"
    inputs = {"dataset": dataset.key, "encoder": spec.weights_id}
    key = config_hash(ARTIFACT_KIND, settings, inputs)
    # The folder name contains the scheme, or only the last part of a hub name without a scheme.
    name = spec.name.replace("/", "-").replace(":", "-") if spec.scheme else spec.name
    return dataset.path / "embeddings" / f"{slugify(name)}-{key[:8]}", settings, inputs


def _embed_missing_shards(
    dataset: CaptionDataset,
    spec: EncoderSpec,
    artifact: Artifact,
    embedder: ShardEmbedder,
    progress: Progress,
) -> None:
    shards = range(len(dataset.shard_paths))
    finished = [i for i in shards if (artifact.path / shard_name("ids", i, "npy")).is_file()]
    totals = _RunningTotals()
    for shard in finished:
        vectors = mmap_array(artifact.path / shard_name("vectors", shard, "npy"))
        _check_dim(vectors, embedder.dim, artifact, spec)
        totals.add(vectors, _read_skipped(artifact, shard))
    total = len(dataset) if spec.modality == "images" else dataset.artifact.manifest.counts[spec.modality]
    with progress.task("embedding", total, spec.modality, totals.num_rows + totals.skipped.total()) as bar:
        for shard in shards:
            if shard in finished:
                continue
            embedded = embedder.embed_shard(shard, bar)
            _check_finite(embedded.vectors, spec)
            if embedded.skipped:
                write_json(artifact.path / shard_name("skipped", shard, "json"), dict(embedded.skipped))
            write_array(artifact.path / shard_name("vectors", shard, "npy"), embedded.vectors)
            write_array(artifact.path / shard_name("ids", shard, "npy"), embedded.image_ids)
            totals.add(embedded.vectors, embedded.skipped)
            del embedded  # free the memory before the next shard is embedded
    if not totals.num_rows:
        shutil.rmtree(artifact.path)  # a later call must read the images again
        reasons = ", ".join(f"{count} {reason}" for reason, count in totals.skipped.items())
        raise InvalidInputError(f"no image of {dataset.path} is readable: {reasons}", path=dataset.path)
    counts = {
        spec.modality: totals.num_rows,
        "dim": embedder.dim,
        "shards": len(shards),
        "num_zero_vectors": totals.num_zero_vectors,
    }
    artifact.finish(counts, totals.skipped)


def _open_embedder(
    dataset: CaptionDataset, spec: EncoderSpec, batch_size: int, device: str | None
) -> ShardEmbedder:
    if spec.modality == "images":
        return ImageEmbedder(dataset, spec, batch_size, device)
    return CaptionEmbedder(dataset, load_text_encoder(spec, device, _caption_corpus(dataset)), batch_size)


def _caption_corpus(dataset: CaptionDataset) -> Corpus:
    def iter_captions() -> Iterator[list[str]]:
        for shard in range(len(dataset.shard_paths)):
            yield [
                text
                for image_captions in dataset.read_columns(shard, ["captions"])["captions"]
                for text in image_captions
            ]

    return iter_captions


class _RunningTotals:
    """Counts of the manifest, summed over shards."""

    def __init__(self) -> None:
        self.num_rows, self.num_zero_vectors = 0, 0
        self.skipped = Counter[str]()

    def add(self, vectors: np.ndarray, skipped: Mapping[str, int]) -> None:
        self.num_rows += len(vectors)
        self.num_zero_vectors += int((~vectors.any(axis=1)).sum())
        self.skipped.update(skipped)


def _read_skipped(artifact: Artifact, shard: int) -> Mapping[str, int]:
    path = artifact.path / shard_name("skipped", shard, "json")
    return read_json(path) if path.is_file() else {}


def _check_dim(vectors: np.ndarray, dim: int, artifact: Artifact, spec: EncoderSpec) -> None:
    """Check that the model is the one that an interrupted call used."""
    if vectors.shape[1] != dim:
        raise ArtifactError(
            f"{artifact.path} contains embeddings of dimension {vectors.shape[1]} from an interrupted run, "
            f"but {spec.name} now has {dim}: the model has changed; delete the folder to embed again",
            path=artifact.path,
        )


def _check_finite(vectors: np.ndarray, spec: EncoderSpec) -> None:
    # Row sums need less memory than `isfinite` of all values.
    num_nonfinite = int((~np.isfinite(vectors.sum(axis=1, dtype=np.float32))).sum())
    if num_nonfinite:
        raise ArtifactError(
            f"the encoder {spec.name} returns NaN or infinity for {num_nonfinite:,} of {len(vectors):,} "
            f"{spec.modality} of a shard, which was not saved; its weights are damaged",
            field="encoder",
        )
