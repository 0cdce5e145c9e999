"""The packed cache: every image decoded once, made as small as training needs, and laid end to end.

Pairs need two images from anywhere in the collection at once. Raw RGB is kept up to a short side of
`RAW_LIMIT` pixels, and above it as long as all images together take about `RAW_BYTES` or less, because a
crop of it costs a fraction of decoding a JPEG; else JPEG, of fewer pixels (`side_to_pack`). Each shard is one
flat `.npy` of bytes, mapped into memory, with an index of (offset, length, height, width) per image; length 0
marks an image that could not be read any more.
"""

import io
import logging
import math
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from likewise.artifacts import (
    Artifact,
    load_array,
    mmap_array,
    shard_name,
    write_array,
)
from likewise.data.dataset import CaptionDataset, Sample
from likewise.data.images import UnreadableImageError, decode_image, read_image_bytes
from likewise.errors import ArtifactError
from likewise.parallel import default_num_workers, prefetch_map
from likewise.progress import NULL_PROGRESS, Progress

logger = logging.getLogger(__name__)

ARTIFACT_KIND = "image cache"
RAW_LIMIT = 192
RAW_BYTES = 4 * 2**30
_MAX_SHARD_ROWS = 1024  # images a shard, at most
_SHARD_BYTES = 2**27  # about what packing holds in memory
_JPEG_QUALITY = 90
_MAX_OPEN_SHARDS = 256  # each mapped file holds a descriptor, of which a process usually has 1,024


def downscale(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """Make the short side `short_side`, never enlarging: (h, w, 3) uint8 -> (h', w', 3) uint8."""
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def cache_resolution(view_size: int, num_images: int) -> int:
    """Return the short side in pixels at which to pack so many images for square views of a side.

    Half as large again as views where raw pixels fit, so that small crops keep detail. Else 8/7 of the view
    (256 for 224, as ImageNet is often kept), because a JPEG takes as long as it has pixels, or what always
    fits.
    """
    preferred = math.ceil(1.5 * view_size)
    return (
        preferred
        if _fits_raw(preferred, num_images)
        else max(min(preferred, RAW_LIMIT), math.ceil(view_size * 8 / 7))
    )


def _fits_raw(short_side: int, num_images: int) -> bool:
    return short_side <= RAW_LIMIT or num_images * _raw_num_bytes(short_side) <= RAW_BYTES


def _raw_num_bytes(short_side: int) -> int:
    """Return the bytes of a raw image whose sides are as 4 to 3."""
    return 4 * short_side**2


def build_image_cache(
    dataset: CaptionDataset,
    short_side: int,
    *,
    num_workers: int | None = None,
    progress: Progress = NULL_PROGRESS,
) -> "ImageCache":
    """Pack all images of a collection at a short side in pixels; finished shards are kept on a rerun.

    Raises:
        ArtifactError: where the disk is full or the folder of the images is gone.
    """
    if not dataset.root.is_dir():
        raise ArtifactError(f"{dataset.root}, which holds the images of {dataset.path}, is not there")
    is_raw = _fits_raw(short_side, len(dataset))
    # JPEGs are small: fewer of them a shard would only be more files, of which few are open at a time.
    shard_rows = (
        max(1, min(_MAX_SHARD_ROWS, _SHARD_BYTES // _raw_num_bytes(short_side)))
        if is_raw
        else _MAX_SHARD_ROWS
    )
    codec = "rgb" if is_raw else f"jpeg-{_JPEG_QUALITY}"
    path = dataset.path / "image_cache" / f"{short_side}px-{codec}"
    settings = {"short_side": short_side, "codec": codec, "rows": shard_rows}
    artifact = Artifact.create_or_resume(path, ARTIFACT_KIND, settings, {"dataset": dataset.key})
    if artifact.is_complete:
        return ImageCache(artifact)

    shards = range(-(-len(dataset) // shard_rows))
    done_shards = {i for i in shards if (path / shard_name("index", i, "npy")).is_file()}
    num_done = sum(min(shard_rows, len(dataset) - i * shard_rows) for i in done_shards)
    with progress.task("packing", len(dataset), "images", num_done) as bar:
        for shard in shards:
            if shard in done_shards:
                continue
            start, stop = shard * shard_rows, min((shard + 1) * shard_rows, len(dataset))
            samples = (dataset[i] for i in range(start, stop))
            blobs = []
            for blob in prefetch_map(
                lambda sample: _encode_sample(sample, dataset.root, short_side, is_raw=is_raw),
                samples,
                default_num_workers() if num_workers is None else num_workers,
            ):
                blobs.append(blob)
                bar.update()
            _write_shard(path, shard, blobs)
    cache = ImageCache(_finalize(artifact, len(shards)))
    num_unreadable = len(cache) - len(cache.readable)
    if num_unreadable:
        logger.info(f"warning: {num_unreadable:,} images could not be read any more and take no part")
    return cache


def _encode_sample(
    sample: Sample, root: Path, short_side: int, *, is_raw: bool
) -> tuple[np.ndarray, int, int]:
    """Return one image as flat bytes with its height and width; no bytes where it can no longer be read."""
    try:
        pixels = downscale(decode_image(read_image_bytes(sample.image, root), short_side), short_side)
    except UnreadableImageError:
        return np.empty(0, np.uint8), 0, 0
    height, width = pixels.shape[:2]
    if is_raw:
        return pixels.reshape(-1), height, width
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return np.frombuffer(buffer.getvalue(), np.uint8), height, width


def _write_shard(path: Path, shard: int, blobs: list[tuple[np.ndarray, int, int]]) -> None:
    lengths = np.array([len(blob) for blob, _, _ in blobs], np.int64)
    sizes = np.array([(height, width) for _, height, width in blobs], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    write_array(path / shard_name("bytes", shard, "npy"), np.concatenate([blob for blob, _, _ in blobs]))
    # The index comes last: where it exists, its bytes are whole.
    write_array(path / shard_name("index", shard, "npy"), np.column_stack([offsets, lengths, sizes]))


def _finalize(artifact: Artifact, num_shards: int) -> Artifact:
    lengths = [load_array(artifact.path / shard_name("index", i, "npy"))[:, 1] for i in range(num_shards)]
    num_unreadable = int(sum((shard_lengths == 0).sum() for shard_lengths in lengths))
    num_images = sum(len(shard_lengths) for shard_lengths in lengths)
    skipped = Counter({"no longer readable": num_unreadable}) if num_unreadable else {}
    return artifact.finish({"images": num_images, "shards": num_shards}, skipped)


class ImageCache:
    """Random access to packed pixels."""

    def __init__(self, artifact: Artifact | Path) -> None:
        """Open a finished cache; raises ArtifactError where there is none."""
        artifact = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact, ARTIFACT_KIND)
        self.path = artifact.path
        self.is_raw = artifact.manifest.settings["codec"] == "rgb"
        self.shard_rows: int = artifact.manifest.settings["rows"]
        self.key = artifact.manifest.key
        num_shards = artifact.manifest.counts["shards"]
        self.index = np.concatenate(
            [load_array(self.path / shard_name("index", i, "npy")) for i in range(num_shards)]
        )
        self._shard_bytes = lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._mmap_shard)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def readable(self) -> np.ndarray:
        """The positions of the images that can be read: (m,) int64, ascending."""
        return np.flatnonzero(self.index[:, 1] > 0)

    def shapes(self, positions: np.ndarray) -> np.ndarray:
        """Return the (height, width) of some images: (m,) -> (m, 2) int64."""
        return self.index[positions, 2:]

    def pixels(self, position: int) -> np.ndarray:
        """Return one image as (h, w, 3) uint8, read-only where it is mapped."""
        offset, length, height, width = self.index[position]
        buffer = self._shard_bytes(int(position) // self.shard_rows)[offset : offset + length]
        return buffer.reshape(height, width, 3) if self.is_raw else decode_image(buffer.tobytes())

    def _mmap_shard(self, shard: int) -> np.ndarray:
        return mmap_array(self.path / shard_name("bytes", shard, "npy"))
