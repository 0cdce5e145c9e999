"""Features of a labelled set under a frozen encoder, computed once and kept."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

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
from likewise.data.images import UnreadableImageError, decode_image, read_image_bytes
from likewise.evaluation.datasets.labeled import ImageDataset
from likewise.models.encoders import ImageEncoder
from likewise.parallel import default_num_workers, prefetch_map, resolve_device
from likewise.progress import NULL_PROGRESS, Progress

ARTIFACT_KIND = "features"
FEATURES_FILE = "features.npy"
_SHARD_SIZE = 2048


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of the readable images of a set.

    Attributes:
        vectors: (n, d) float32, mapped from disk, one row an image of the set; NaN where it cannot be read.
        indices: (m,) int64, the readable ones, ascending.
        skipped: Images left out, by reason.
    """

    vectors: np.ndarray
    indices: np.ndarray
    skipped: dict[str, int]


def extract_features(
    encoder: ImageEncoder,
    dataset: ImageDataset,
    cache_dir: Path,
    *,
    batch_size: int | None = None,
    num_workers: int | None = None,
    device: str | None = None,
    progress: Progress = NULL_PROGRESS,
) -> Features:
    """Compute the features of all images of a set, or take those kept under `cache_dir`.

    The key covers weights, structure, transform, precision and set; finished shards are kept on a rerun.
    """
    torch_device = torch.device(resolve_device(device))
    # What graphics processors compute in half precision is not to the last digit what others do in float32.
    settings = encoder.to_dict() | {
        "dataset": dataset.name,
        "precision": "half" if torch_device.type == "cuda" else "float32",
    }
    inputs = {"encoder": encoder.fingerprint, "dataset": dataset.key}
    # What an encoder is called does not change what it sees.
    key = config_hash(ARTIFACT_KIND, {k: v for k, v in settings.items() if k != "name"}, inputs)
    artifact = Artifact.create_or_resume(
        cache_dir / f"{dataset.name}-{key[:8]}", ARTIFACT_KIND, settings, inputs, non_hashed=("name",)
    )
    if not artifact.is_complete:
        inference_batch_size = (
            encoder.inference_batch_size(torch_device) if batch_size is None else batch_size
        )
        artifact = _extract_missing(
            encoder, dataset, artifact, inference_batch_size, num_workers, torch_device, progress
        )
    vectors = mmap_array(artifact.path / FEATURES_FILE)
    indices = np.concatenate([
        start + np.flatnonzero(np.isfinite(vectors[start : start + _SHARD_SIZE]).all(axis=1))
        for start in range(0, len(vectors), _SHARD_SIZE)
    ])  # fmt: skip
    return Features(vectors=vectors, indices=indices, skipped=artifact.manifest.skipped)


def _extract_missing(
    encoder: ImageEncoder,
    dataset: ImageDataset,
    artifact: Artifact,
    batch_size: int,
    num_workers: int | None,
    device: torch.device,
    progress: Progress,
) -> Artifact:
    encoder.model.to(device).to(memory_format=torch.channels_last)
    starts = range(0, len(dataset), _SHARD_SIZE)
    paths = [artifact.path / shard_name("vectors", i, "npy") for i in range(len(starts))]
    num_done = sum(
        min(_SHARD_SIZE, len(dataset) - start)
        for start, path in zip(starts, paths, strict=True)
        if path.is_file()
    )
    num_workers = default_num_workers() if num_workers is None else num_workers
    with progress.task(f"features {dataset.name}", len(dataset), "images", num_done) as bar:
        for index, (start, path) in enumerate(zip(starts, paths, strict=True)):
            if path.is_file():
                continue
            files = dataset.files[start : start + _SHARD_SIZE]
            batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
            vectors, shard_reasons = [], []
            for crops, reasons in prefetch_map(
                lambda batch: _load_crops(batch, dataset.root, encoder), batches, num_workers
            ):
                vectors.append(_forward(encoder, crops, device))
                shard_reasons += reasons
                bar.update(len(crops))
            write_json(artifact.path / shard_name("skipped", index, "json"), shard_reasons)
            write_array(path, _mark_unreadable(np.concatenate(vectors), shard_reasons))
    reasons_by_shard = [
        read_json(artifact.path / shard_name("skipped", i, "json")) for i in range(len(starts))
    ]
    skipped = Counter(reason for shard_reasons in reasons_by_shard for reason in shard_reasons if reason)
    _merge_shards(artifact.path / FEATURES_FILE, paths, (len(dataset), encoder.feature_dim))
    finished_artifact = artifact.finish({"images": len(dataset)}, skipped)
    # Only now: killed before, a rerun joins them again.
    for path in paths:
        path.unlink()
    return finished_artifact


def _load_crops(files: tuple[str, ...], root: Path, encoder: ImageEncoder) -> tuple[np.ndarray, list[str]]:
    """Return the crops of files, (b, size, size, 3) uint8, and why each that is black could not be read."""
    image_size = encoder.transform.image_size
    crops, reasons = np.zeros((len(files), image_size, image_size, 3), np.uint8), []
    for i, file in enumerate(files):
        try:
            pixels = decode_image(read_image_bytes(ImageRef(path=file), root), encoder.transform.resize_size)
            crops[i] = encoder.transform.center_crop(pixels)
            reasons.append("")
        except UnreadableImageError as error:
            reasons.append(str(error))
    return crops, reasons


@torch.inference_mode()
def _forward(encoder: ImageEncoder, crops: np.ndarray, device: torch.device) -> np.ndarray:
    images = encoder.transform.normalize(torch.from_numpy(crops).to(device))
    with torch.autocast(device.type, enabled=device.type == "cuda"):
        features = encoder.model(images)
    return features.float().cpu().numpy()


def _mark_unreadable(vectors: np.ndarray, reasons: list[str]) -> np.ndarray:
    """Mark unreadable images by NaN, which no sound feature is."""
    vectors[[bool(reason) for reason in reasons]] = np.nan
    return vectors


def _merge_shards(out_path: Path, shards: Sequence[Path], shape: tuple[int, int]) -> None:
    """Bring shards together in one file that can be mapped, one shard in memory at a time."""
    with atomic_write(out_path) as tmp_path:
        merged = np.lib.format.open_memmap(tmp_path, mode="w+", dtype=np.float32, shape=shape)
        for index, shard in enumerate(shards):
            merged[index * _SHARD_SIZE : (index + 1) * _SHARD_SIZE] = load_array(shard)
        merged.flush()
