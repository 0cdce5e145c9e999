"""The packed cache: every image decoded once, made as small as training needs, and laid end to end.

Pairs need two images from anywhere in the collection at once. Raw RGB is kept up to a short side of
`RAW_LIMIT` pixels, and above it as long as all images together take about `RAW_BYTES` or less, because a
crop of it costs a fraction of decoding a JPEG; else JPEG, of fewer pixels (`side_to_pack`). Each shard is one
flat `.npy` of bytes, mapped into memory, with an index of (offset, length, height, width) per image; length 0
marks an image that could not be read any more.
"""

import io
import math
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from likewise.artifacts import Artifact, begin, load_array, open_artifact, read_array, shard_name, write_array
from likewise.data.dataset import Collection, Record
from likewise.data.images import BadImageError, decode, read_bytes
from likewise.errors import ArtifactError
from likewise.parallel import default_workers, ordered_map
from likewise.progress import SILENT, Progress

KIND = "packed images"
RAW_LIMIT = 192
RAW_BYTES = 4 * 2**30
_ROWS = 1024  # images a shard, at most
_SHARD_BYTES = 2**27  # about what packing holds in memory
_QUALITY = 90
_OPEN_SHARDS = 256  # each mapped file holds a descriptor, of which a process usually has 1,024


def shrink(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """Make the short side `short_side`, never enlarging: (h, w, 3) uint8 -> (h', w', 3) uint8."""
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def side_to_pack(view: int, images: int) -> int:
    """Return the short side in pixels at which to pack so many images for square views of a side.

    Half as large again as views where raw pixels fit, so that small crops keep detail. Else 8/7 of the view
    (256 for 224, as ImageNet is often kept), because a JPEG takes as long as it has pixels, or what always
    fits.
    """
    roomy = math.ceil(1.5 * view)
    return roomy if _fits_raw(roomy, images) else max(min(roomy, RAW_LIMIT), math.ceil(view * 8 / 7))


def _fits_raw(short_side: int, images: int) -> bool:
    return short_side <= RAW_LIMIT or images * _raw_size(short_side) <= RAW_BYTES


def _raw_size(short_side: int) -> int:
    """Return the bytes of a raw image whose sides are as 4 to 3."""
    return 4 * short_side**2


def pack_images(
    collection: Collection, short_side: int, *, workers: int | None = None, progress: Progress = SILENT
) -> "PackedImages":
    """Pack all images of a collection at a short side in pixels; finished shards are kept on a rerun.

    Raises:
        ArtifactError: where the disk is full or the folder of the images is gone.
    """
    if not collection.root.is_dir():
        raise ArtifactError(f"{collection.root}, which holds the images of {collection.path}, is not there")
    raw = _fits_raw(short_side, len(collection))
    # JPEGs are small: fewer of them a shard would only be more files, of which few are open at a time.
    rows = max(1, min(_ROWS, _SHARD_BYTES // _raw_size(short_side))) if raw else _ROWS
    codec = "rgb" if raw else f"jpeg-{_QUALITY}"
    path = collection.path / "packed" / f"{short_side}px-{codec}"
    settings = {"short_side": short_side, "codec": codec, "rows": rows}
    artifact = begin(path, KIND, settings, {"collection": collection.key})
    if artifact.complete:
        return PackedImages(artifact)

    shards = range(-(-len(collection) // rows))
    ready = {i for i in shards if (path / shard_name("index", i, "npy")).is_file()}
    done = sum(min(rows, len(collection) - i * rows) for i in ready)
    with progress.task("packing", len(collection), "images", done) as task:
        for shard in shards:
            if shard in ready:
                continue
            first, last = shard * rows, min((shard + 1) * rows, len(collection))
            records = (collection[i] for i in range(first, last))
            blobs = []
            for blob in ordered_map(
                lambda record: _encode(record, collection.root, short_side, raw=raw),
                records,
                default_workers() if workers is None else workers,
            ):
                blobs.append(blob)
                task.advance()
            _write_shard(path, shard, blobs)
    packed = PackedImages(_finish(artifact, len(shards)))
    lost = len(packed) - len(packed.usable)
    if lost:
        progress.say(f"warning: {lost:,} images could not be read any more and take no part")
    return packed


def _encode(record: Record, root: Path, short_side: int, *, raw: bool) -> tuple[np.ndarray, int, int]:
    """Return one image as flat bytes with its height and width; no bytes where it can no longer be read."""
    try:
        pixels = shrink(decode(read_bytes(record.image, root), short_side), short_side)
    except BadImageError:
        return np.empty(0, np.uint8), 0, 0
    height, width = pixels.shape[:2]
    if raw:
        return pixels.reshape(-1), height, width
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return np.frombuffer(buffer.getvalue(), np.uint8), height, width


def _write_shard(path: Path, shard: int, blobs: list[tuple[np.ndarray, int, int]]) -> None:
    lengths = np.array([len(blob) for blob, _, _ in blobs], np.int64)
    sides = np.array([(height, width) for _, height, width in blobs], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    write_array(path / shard_name("bytes", shard, "npy"), np.concatenate([blob for blob, _, _ in blobs]))
    # The index comes last: where it exists, its bytes are whole.
    write_array(path / shard_name("index", shard, "npy"), np.column_stack([offsets, lengths, sides]))


def _finish(artifact: Artifact, shards: int) -> Artifact:
    lengths = [load_array(artifact.path / shard_name("index", i, "npy"))[:, 1] for i in range(shards)]
    lost = int(sum((column == 0).sum() for column in lengths))
    images = sum(len(column) for column in lengths)
    skipped = Counter({"no longer readable": lost}) if lost else {}
    return artifact.finish({"images": images, "shards": shards}, skipped)


class PackedImages:
    """Random access to packed pixels."""

    def __init__(self, source: Artifact | Path) -> None:
        """Open a finished cache; raises ArtifactError where there is none."""
        artifact = source if isinstance(source, Artifact) else open_artifact(source, KIND)
        self.path = artifact.path
        self.raw = artifact.manifest.settings["codec"] == "rgb"
        self.rows: int = artifact.manifest.settings["rows"]
        self.key = artifact.manifest.key
        shards = artifact.manifest.counts["shards"]
        self.index = np.concatenate(
            [load_array(self.path / shard_name("index", i, "npy")) for i in range(shards)]
        )
        self._bytes = lru_cache(maxsize=_OPEN_SHARDS)(self._open_bytes)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def usable(self) -> np.ndarray:
        """The positions of the images that can be read: (m,) int64, ascending."""
        return np.flatnonzero(self.index[:, 1] > 0)

    def shapes(self, positions: np.ndarray) -> np.ndarray:
        """Return the (height, width) of some images: (m,) -> (m, 2) int64."""
        return self.index[positions, 2:]

    def pixels(self, position: int) -> np.ndarray:
        """Return one image as (h, w, 3) uint8, read-only where it is mapped."""
        offset, length, height, width = self.index[position]
        flat = self._bytes(int(position) // self.rows)[offset : offset + length]
        return flat.reshape(height, width, 3) if self.raw else decode(flat.tobytes())

    def _open_bytes(self, shard: int) -> np.ndarray:
        return read_array(self.path / shard_name("bytes", shard, "npy"))
