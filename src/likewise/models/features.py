"""Features of many images under a frozen encoder, computed once and cached on disk."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from likewise.artifacts import (
    Artifact,
    atomic_write,
    config_hash,
    load_array,
    mmap_array,
    read_json,
    shard_name,
    write_array,
    write_json,
)
from likewise.data.dataset import ImageRef
from likewise.models.encoders import ImageEncoder
from likewise.progress import NULL_PROGRESS, Progress, ProgressBar

ARTIFACT_KIND = "features"
FEATURES_FILE = "features.npy"
_SHARD_SIZE = 2048


@runtime_checkable
class ImageSource(Protocol):
    """Images in a fixed order, such as an evaluation dataset or a `CaptionDataset`."""

    @property
    def name(self) -> str:
        """Name in messages."""
        ...

    @property
    def key(self) -> str:
        """Fingerprint of the images."""
        ...

    @property
    def root(self) -> Path:
        """Folder that paths are relative to."""
        ...

    def __len__(self) -> int: ...

    def image_refs(self, start: int, stop: int) -> Sequence[ImageRef]:
        """Return the locations of the images from `start` to `stop`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of a dataset."""

    vectors: np.ndarray
    """(n, d) float32, memory-mapped, one row per image; NaN for unreadable images."""
    indices: np.ndarray
    """(m,) int64, the rows of usable images, ascending."""
    skipped: dict[str, int]
    """Number of unreadable images, and of images whose features are not finite, by reason."""


def extract_features(
    encoder: ImageEncoder,
    dataset: ImageSource,
    cache_dir: Path,
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    progress: Progress = NULL_PROGRESS,
) -> Features:
    """Compute the features of all images of a dataset, or read them from the cache.

    The cache is keyed by weights, structure, transform, precision and dataset. An interrupted call resumes at
    the missing shards.

    Args:
        encoder: The encoder; features are computed on its device.
        dataset: The dataset.
        cache_dir: Folder of the cache.
        batch_size: Images per forward pass; defaults to a fast one for the device and image size.
        num_workers: Threads that read images; defaults to the number of cores.
        progress: Progress reporter.

    Raises:
        ModelError: if the encoder returns NaN or infinity for a readable image; nothing of it is cached.
    """
    settings = encoder.to_dict() | {
        "dataset": dataset.name,
        # GPUs compute in half precision, which differs from float32 in the last digits.
        "precision": "half" if encoder.device.type == "cuda" else "float32",
    }
    inputs = {"encoder": encoder.fingerprint, "dataset": dataset.key}
    # The name of an encoder does not change its features.
    key = config_hash(ARTIFACT_KIND, {k: v for k, v in settings.items() if k != "name"}, inputs)
    path = cache_dir / f"{dataset.name}-{key[:8]}"
    with Artifact.exclusive(path, ARTIFACT_KIND, settings, inputs, non_hashed=("name",)) as artifact:
        if not artifact.is_complete:
            _extract_missing(encoder, dataset, artifact, batch_size, num_workers, progress)
        # Only now: a call that is killed before this line merges the shards again.
        for shard in path.glob("vectors-*.npy"):
            shard.unlink()
    vectors = mmap_array(path / FEATURES_FILE)
    indices = np.concatenate([
        start + np.flatnonzero(np.isfinite(vectors[start : start + _SHARD_SIZE]).all(axis=1))
        for start in range(0, len(vectors), _SHARD_SIZE)
    ])  # fmt: skip
    skipped = Artifact.open(path, ARTIFACT_KIND).manifest.skipped
    return Features(vectors=vectors, indices=indices, skipped=skipped)


def _extract_missing(
    encoder: ImageEncoder,
    dataset: ImageSource,
    artifact: Artifact,
    batch_size: int | None,
    num_workers: int | None,
    progress: Progress,
) -> None:
    starts = range(0, len(dataset), _SHARD_SIZE)
    paths = [artifact.path / shard_name("vectors", i, "npy") for i in range(len(starts))]
    num_done = sum(
        min(_SHARD_SIZE, len(dataset) - start)
        for start, path in zip(starts, paths, strict=True)
        if path.is_file()
    )
    skipped = Counter[str]()
    with progress.task(f"features {dataset.name}", len(dataset), "images", num_done) as bar:
        for index, (start, path) in enumerate(zip(starts, paths, strict=True)):
            reasons_path = artifact.path / shard_name("skipped", index, "json")
            if not path.is_file():
                refs = dataset.image_refs(start, min(start + _SHARD_SIZE, len(dataset)))
                vectors, reasons = _extract_shard(encoder, refs, dataset.root, batch_size, num_workers, bar)
                write_json(reasons_path, reasons)
                write_array(path, vectors)
            skipped.update(reason for reason in read_json(reasons_path) if reason)
    _merge_shards(artifact.path / FEATURES_FILE, paths, (len(dataset), encoder.feature_dim))
    artifact.finish({"images": len(dataset)}, skipped)


def _extract_shard(
    encoder: ImageEncoder,
    refs: Sequence[ImageRef],
    root: Path,
    batch_size: int | None,
    num_workers: int | None,
    bar: ProgressBar,
) -> tuple[np.ndarray, list[str]]:
    """Return features (s, d), NaN for unreadable images, and per image the reason or an empty string."""
    vectors, reasons = [], []
    for features, errors in encoder.encode_batches(
        refs, root=root, batch_size=batch_size, num_workers=num_workers
    ):
        vectors.append(features)
        is_finite = np.all(np.isfinite(features), axis=1)
        reasons += [
            str(error) if error is not None else "" if finite else "features are not finite"
            for error, finite in zip(errors, is_finite, strict=True)
        ]
        bar.update(len(features))
    return np.concatenate(vectors), reasons


def _merge_shards(out_path: Path, shards: Sequence[Path], shape: tuple[int, int]) -> None:
    """Merge shards into one file that can be memory-mapped, with one shard in memory at a time."""
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
        "fortran_order": False,
        "shape": shape,
    }
    # Not through a memory-mapped file: on a full disk the operating system would end the process.
    with atomic_write(out_path) as tmp_path, tmp_path.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for shard in shards:
            stream.write(load_array(shard).astype(np.float32, copy=False).tobytes())
