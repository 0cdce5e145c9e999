"""Image cache: all images decoded once, downscaled and stored in memory-mapped shards.

Pairs need random access to images. Images are stored as raw RGB up to a short side of `RAW_LIMIT` pixels, and
above it if the whole cache stays below about `RAW_BYTES`, because a crop of raw pixels costs a fraction of
decoding a JPEG. Otherwise they are stored as JPEG at a lower resolution (`cache_resolution`). Each shard is
one flat `.npy` file of bytes and an index with (offset, length, height, width) per image; length 0 marks an
unreadable image.
"""

import io
import logging
import math
from collections import Counter
from dataclasses import asdict
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
from likewise.data.config import BandSelection, select_bands
from likewise.data.dataset import CaptionDataset, Sample
from likewise.data.images import UnreadableImageError, decode_image, read_image
from likewise.parallel import default_num_workers, prefetch_map
from likewise.progress import NULL_PROGRESS, Progress

logger = logging.getLogger(__name__)

ARTIFACT_KIND = "image cache"
RAW_LIMIT = 192
RAW_BYTES = 4 * 2**30
_MAX_SHARD_ROWS = 1024
_SHARD_BYTES = 2**27  # approximate memory use while a shard is built
_JPEG_QUALITY = 90
_MAX_OPEN_SHARDS = 256  # each mapped file uses a file descriptor; the default limit per process is 1,024


def downscale(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """Resize an image to a short side in pixels, without upscaling: (h, w, 3) uint8 -> (h', w', 3) uint8."""
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def cache_resolution(view_size: int, num_images: int) -> int:
    """Return the short side, in pixels, at which images are cached.

    It is 1.5 times the view size if raw pixels fit, so that small crops keep detail. Otherwise it is 8/7 of
    the view size (256 for 224, the common preparation of ImageNet), because the time to decode a JPEG grows
    with its pixels, but at least `RAW_LIMIT` if the preferred size exceeds that.

    Args:
        view_size: Side of the square views that are cropped from the images, in pixels.
        num_images: Number of images in the cache.
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
    """Return the number of bytes of a raw image with an aspect ratio of 4:3."""
    return 4 * short_side**2


def build_image_cache(
    dataset: CaptionDataset,
    short_side: int,
    *,
    num_workers: int | None = None,
    progress: Progress = NULL_PROGRESS,
) -> "ImageCache":
    """Cache all images of a dataset in `DATASET/image_cache/`; an interrupted build resumes.

    Args:
        dataset: The dataset.
        short_side: Short side of the cached images, in pixels; smaller images keep their size.
        num_workers: Threads that decode images; defaults to the number of CPU cores.
        progress: Receives the progress.

    Raises:
        ArtifactError: if the disk is full or the image folder is missing.
    """
    dataset.require_images()
    is_raw = _fits_raw(short_side, len(dataset))
    # JPEGs are small: smaller shards would only add files, and the number of open files is limited.
    shard_rows = (
        max(1, min(_MAX_SHARD_ROWS, _SHARD_BYTES // _raw_num_bytes(short_side)))
        if is_raw
        else _MAX_SHARD_ROWS
    )
    codec = "rgb" if is_raw else f"jpeg-{_JPEG_QUALITY}"
    path = dataset.path / "image_cache" / f"{short_side}px-{codec}"
    settings = {
        "short_side": short_side,
        "codec": codec,
        "rows": shard_rows,
        "bands": None if dataset.bands is None else asdict(dataset.bands),
    }
    with Artifact.exclusive(path, ARTIFACT_KIND, settings, {"dataset": dataset.key}) as artifact:
        if artifact.is_complete:
            return ImageCache(artifact)
        num_workers = default_num_workers() if num_workers is None else num_workers
        cache = ImageCache(_cache_missing(dataset, artifact, num_workers, progress))
    num_unreadable = len(cache) - len(cache.readable)
    if num_unreadable:
        logger.warning(f"{num_unreadable:,} images are no longer readable and are excluded")
    return cache


def _cache_missing(
    dataset: CaptionDataset, artifact: Artifact, num_workers: int, progress: Progress
) -> Artifact:
    """Write the missing shards and finish the artifact."""
    path, settings = artifact.path, artifact.manifest.settings
    shard_rows, short_side, is_raw = settings["rows"], settings["short_side"], settings["codec"] == "rgb"
    shards = range(-(-len(dataset) // shard_rows))
    done_shards = {i for i in shards if (path / shard_name("index", i, "npy")).is_file()}
    num_done = sum(min(shard_rows, len(dataset) - i * shard_rows) for i in done_shards)
    with progress.task("caching", len(dataset), "images", num_done) as bar:
        for shard in shards:
            if shard in done_shards:
                continue
            start, stop = shard * shard_rows, min((shard + 1) * shard_rows, len(dataset))
            samples = (dataset[i] for i in range(start, stop))
            blobs = []
            for blob in prefetch_map(
                lambda sample: _encode_sample(sample, dataset.root, short_side, is_raw=is_raw),
                samples,
                num_workers,
            ):
                blobs.append(blob)
                bar.update()
            _write_shard(path, shard, blobs)
    return _finalize(artifact, len(shards))


def _encode_sample(
    sample: Sample, root: Path, short_side: int, *, is_raw: bool
) -> tuple[np.ndarray, int, int]:
    """Return an image as flat bytes with its height and width; no bytes if it is unreadable."""
    try:
        pixels = downscale(read_image(sample.image, root, short_side), short_side)
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
    # The index is written last: if it exists, the shard is complete.
    write_array(path / shard_name("index", shard, "npy"), np.column_stack([offsets, lengths, sizes]))


def _finalize(artifact: Artifact, num_shards: int) -> Artifact:
    lengths = [load_array(artifact.path / shard_name("index", i, "npy"))[:, 1] for i in range(num_shards)]
    num_unreadable = int(sum((shard_lengths == 0).sum() for shard_lengths in lengths))
    num_images = sum(len(shard_lengths) for shard_lengths in lengths)
    skipped = Counter({"no longer readable": num_unreadable}) if num_unreadable else {}
    return artifact.finish({"images": num_images, "shards": num_shards}, skipped)


class ImageCache:
    """Random access to the cached pixels of a dataset."""

    def __init__(self, artifact: Artifact | Path) -> None:
        """Open a complete cache.

        Raises:
            ArtifactError: if the path holds no complete cache.
        """
        artifact = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact, ARTIFACT_KIND)
        self.path = artifact.path
        self.is_raw = artifact.manifest.settings["codec"] == "rgb"
        self.shard_rows: int = artifact.manifest.settings["rows"]
        self.key = artifact.manifest.key
        bands = artifact.manifest.settings["bands"]
        self.bands: BandSelection | None = bands and select_bands(
            tuple(bands["bands"]), tuple(bands["percentiles"])
        )
        num_shards = artifact.manifest.counts["shards"]
        self.index = np.concatenate(
            [load_array(self.path / shard_name("index", i, "npy")) for i in range(num_shards)]
        )
        self._shard_bytes = lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._mmap_shard)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def readable_mask(self) -> np.ndarray:
        """The images that could be decoded, (n,) bool."""
        mask = np.zeros(len(self), bool)
        mask[self.readable] = True
        return mask

    @property
    def readable(self) -> np.ndarray:
        """Indices of the readable images, (m,) int64, ascending."""
        return np.flatnonzero(self.index[:, 1] > 0)

    def shapes(self, indices: np.ndarray) -> np.ndarray:
        """Return the (height, width) of images: indices (m,) -> (m, 2) int64."""
        return self.index[indices, 2:]

    def pixels(self, index: int) -> np.ndarray:
        """Return one image, (h, w, 3) uint8; raw images are read-only views of the mapped file."""
        offset, length, height, width = self.index[index]
        buffer = self._shard_bytes(int(index) // self.shard_rows)[offset : offset + length]
        return buffer.reshape(height, width, 3) if self.is_raw else decode_image(buffer.tobytes())

    def _mmap_shard(self, shard: int) -> np.ndarray:
        return mmap_array(self.path / shard_name("bytes", shard, "npy"))
