"""Features of a labelled set under a frozen encoder, computed once and kept."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from likewise.artifacts import (
    Artifact,
    atomic,
    begin,
    key_of,
    load_array,
    read_array,
    read_json,
    shard_name,
    write_array,
    write_json,
)
from likewise.data.dataset import ImageRef
from likewise.data.images import BadImageError, decode, read_bytes
from likewise.evaluation.datasets.labeled import ImageSet
from likewise.models.encoders import ImageEncoder
from likewise.parallel import default_workers, ordered_map, resolve_device
from likewise.progress import SILENT, Progress

KIND = "features"
VECTORS = "features.npy"
_ROWS = 2048


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features of the readable images of a set.

    Attributes:
        vectors: (n, d) float32, mapped from disk, one row an image of the set; NaN where it cannot be read.
        rows: (m,) int64, the readable ones, ascending.
        skipped: Images left out, by reason.
    """

    vectors: np.ndarray
    rows: np.ndarray
    skipped: dict[str, int]


def extract_features(
    encoder: ImageEncoder,
    images: ImageSet,
    folder: Path,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = SILENT,
) -> Features:
    """Compute the features of all images of a set, or take those kept under `folder`.

    The key covers weights, structure, transform, precision and set; finished shards are kept on a rerun.
    """
    on = torch.device(resolve_device(device))
    # What graphics processors compute in half precision is not to the last digit what others do in float32.
    settings = encoder.told() | {"set": images.name, "precision": "half" if on.type == "cuda" else "float32"}
    inputs = {"weights": encoder.identity, "set": images.key}
    # What an encoder is called does not change what it sees.
    key = key_of(KIND, {k: v for k, v in settings.items() if k != "name"}, inputs)
    artifact = begin(folder / f"{images.name}-{key[:8]}", KIND, settings, inputs, volatile=("name",))
    if not artifact.complete:
        taken = encoder.at_once(on) if batch_size is None else batch_size
        artifact = _extract_missing(encoder, images, artifact, taken, workers, on, progress)
    vectors = read_array(artifact.path / VECTORS)
    rows = np.concatenate([
        start + np.flatnonzero(np.isfinite(vectors[start : start + _ROWS]).all(axis=1))
        for start in range(0, len(vectors), _ROWS)
    ])  # fmt: skip
    return Features(vectors=vectors, rows=rows, skipped=artifact.manifest.skipped)


def _extract_missing(
    encoder: ImageEncoder,
    images: ImageSet,
    artifact: Artifact,
    batch_size: int,
    workers: int | None,
    device: torch.device,
    progress: Progress,
) -> Artifact:
    encoder.model.to(device).to(memory_format=torch.channels_last)
    starts = range(0, len(images), _ROWS)
    paths = [artifact.path / shard_name("vectors", i, "npy") for i in range(len(starts))]
    done = sum(min(_ROWS, len(images) - s) for s, p in zip(starts, paths, strict=True) if p.is_file())
    threads = default_workers() if workers is None else workers
    with progress.task(f"features {images.name}", len(images), "images", done) as task:
        for index, (start, path) in enumerate(zip(starts, paths, strict=True)):
            if path.is_file():
                continue
            files = images.files[start : start + _ROWS]
            batches = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
            vectors, faults = [], []
            for crops, reasons in ordered_map(lambda b: _load(b, images.root, encoder), batches, threads):
                vectors.append(_forward(encoder, crops, device))
                faults += reasons
                task.advance(len(crops))
            write_json(artifact.path / shard_name("skipped", index, "json"), faults)
            write_array(path, _mark(np.concatenate(vectors), faults))
    told = [read_json(artifact.path / shard_name("skipped", i, "json")) for i in range(len(starts))]
    skipped = Counter(reason for faults in told for reason in faults if reason)
    _join(artifact.path / VECTORS, paths, (len(images), encoder.width))
    finished = artifact.finish({"images": len(images)}, skipped)
    # Only now: killed before, a rerun joins them again.
    for path in paths:
        path.unlink()
    return finished


def _load(files: tuple[str, ...], root: Path, encoder: ImageEncoder) -> tuple[np.ndarray, list[str]]:
    """Return the crops of files, (b, size, size, 3) uint8, and why each that is black could not be read."""
    size = encoder.transform.size
    crops, reasons = np.zeros((len(files), size, size, 3), np.uint8), []
    for place, file in enumerate(files):
        try:
            pixels = decode(read_bytes(ImageRef(path=file), root), encoder.transform.resize)
            crops[place] = encoder.transform.crop(pixels)
            reasons.append("")
        except BadImageError as fault:
            reasons.append(str(fault))
    return crops, reasons


@torch.inference_mode()
def _forward(encoder: ImageEncoder, crops: np.ndarray, device: torch.device) -> np.ndarray:
    images = encoder.transform.standardise(torch.from_numpy(crops).to(device))
    with torch.autocast(device.type, enabled=device.type == "cuda"):
        features = encoder.model(images)
    return features.float().cpu().numpy()


def _mark(vectors: np.ndarray, faults: list[str]) -> np.ndarray:
    """Mark unreadable images by NaN, which no sound feature is."""
    vectors[[bool(reason) for reason in faults]] = np.nan
    return vectors


def _join(target: Path, shards: Sequence[Path], shape: tuple[int, int]) -> None:
    """Bring shards together in one file that can be mapped, one shard in memory at a time."""
    with atomic(target) as temporary:
        whole = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        for index, shard in enumerate(shards):
            whole[index * _ROWS : (index + 1) * _ROWS] = load_array(shard)
        whole.flush()
