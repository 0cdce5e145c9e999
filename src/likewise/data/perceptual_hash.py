"""Near-duplicate images: a perceptual hash of each, and groups of images that show the same thing.

The hash is the 64-bit difference hash (N. Krawetz, "Kind of Like That", 2013): grey pixels, made 9 wide and
8 high, each compared with its left neighbor. Alone it tells outlines, not pictures: on product photos before
white it takes most shoes for one shoe. A pair that is close by hash is therefore compared once more, by
thumbnails in colour, relative to their contrast.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from likewise.artifacts import Artifact, begin, read_array, shard_name, write_array
from likewise.data.dataset import Collection, Record
from likewise.data.images import BadImageError, decode, read_bytes
from likewise.errors import ArtifactError, InputError
from likewise.parallel import default_workers, ordered_map
from likewise.progress import SILENT, Progress

KIND = "image hashes"
DISTANCE = 3
MAX_DISTANCE = 8
DIFFERENCE = 0.07  # copies saved anew stay below it; from 0.08 on, chains of like products form
FLAT = 1.0
_DECODED_SIDE = 128  # smaller decoding is faster and moves bits
_SIDE = 8
_ROW = np.dtype([("bits", "<u8"), ("thumbnail", "u1", (_SIDE, _SIDE, 3)), ("readable", "?")])
_VALUES = _SIDE * _SIDE * 3
_LONG_RUN = 1024  # images in one bucket, above which it is parted again by the bits that are left
_PARTINGS = 2  # runs of images that are truly alike do not part, so it is not tried for ever
_PAIRS_AT_ONCE = 1_000_000
_LOOKED_AT_ONCE = 16_384


def difference_hash(pixels: np.ndarray) -> int:
    """Return the difference hash of an image: (h, w, 3) uint8 -> 64 bits.

    Bits go row by row from the top left, the first one the most significant; a bit is set where a pixel is
    brighter than the one left of it.
    """
    grey = Image.fromarray(pixels).convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BILINEAR)
    values = np.asarray(grey)
    return int.from_bytes(np.packbits(values[:, 1:] > values[:, :-1]).tobytes(), "big")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageHashes:
    """What is known of the looks of each of n images.

    Attributes:
        bits: Difference hashes, (n,) uint64; 0 where the image cannot be read.
        readable: Whether the image could be read, (n,) bool.
        mean: Mean of the values of the thumbnail, (n,) float64, in levels of 255.
        contrast: Standard deviation of them from the mean of their channel, (n,) float64.
        shards: The files, whose rows hold the thumbnails.
        starts: The position of each file's first image, and last the number of images.
    """

    bits: np.ndarray
    readable: np.ndarray
    mean: np.ndarray
    contrast: np.ndarray
    shards: tuple[Path, ...]
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.bits)

    @property
    def flat(self) -> np.ndarray:
        """The readable images of one colour, (n,) bool: their hashes say nothing."""
        return self.readable & (self.contrast < FLAT)

    def thumbnails(self, positions: np.ndarray) -> np.ndarray:
        """Return the thumbnails of some images: (m,) -> (m, 8, 8, 3) uint8."""
        found = np.empty((len(positions), _SIDE, _SIDE, 3), np.uint8)
        shards = np.searchsorted(self.starts, positions, side="right") - 1
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = _mapped(self.shards[shard])["thumbnail"][positions[here] - self.starts[shard]]
        return found


@lru_cache(maxsize=256)  # each mapped file holds a descriptor, of which a process usually has 1,024
def _mapped(path: Path) -> np.ndarray:
    return read_array(path)


def image_hashes(
    collection: Collection | str | Path, workers: int | None = None, progress: Progress = SILENT
) -> ImageHashes:
    """Hash every image of a collection into `COLLECTION/hashes/`; finished shards are kept on a rerun.

    Raises:
        ArtifactError: where the disk is full or the folder of the images is gone.
    """
    source = Collection.open(collection)
    settings = {"hash": "difference 9x8", "decoded_side": _DECODED_SIDE, "thumbnail": _SIDE}
    artifact = begin(source.path / "hashes", KIND, settings, {"collection": source.key})
    if not artifact.complete:
        artifact = _hash_missing(
            source, artifact, default_workers() if workers is None else workers, progress
        )
    return _read(artifact, source)


def _hash_missing(source: Collection, artifact: Artifact, workers: int, progress: Progress) -> Artifact:
    if source[0].image.bytes is None and not source.root.is_dir():
        raise ArtifactError(f"{source.root}, which holds the images of {source.path}, is not there")
    files = _files(artifact, source)
    ready = [file.is_file() for file in files]
    done = sum(int(size) for size, there in zip(np.diff(source.starts), ready, strict=True) if there)
    with progress.task("hashing", len(source), "images", done) as task:
        for shard, file in enumerate(files):
            if ready[shard]:
                continue
            records = (source[i] for i in range(source.starts[shard], source.starts[shard + 1]))
            rows = []
            for row in ordered_map(lambda record: _look(record, source.root), records, workers):
                rows.append(row)
                task.advance()
            write_array(file, np.array(rows, _ROW))
    unreadable = sum(int((~read_array(file)["readable"]).sum()) for file in files)
    skipped = {"no longer readable": unreadable} if unreadable else {}
    return artifact.finish({"images": len(source), "shards": len(files)}, skipped)


def _look(record: Record, root: Path) -> tuple[int, np.ndarray, bool]:
    try:
        pixels = decode(read_bytes(record.image, root), _DECODED_SIDE)
    except BadImageError:
        return 0, np.zeros((_SIDE, _SIDE, 3), np.uint8), False
    small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return difference_hash(pixels), np.asarray(small), True


def _files(artifact: Artifact, source: Collection) -> list[Path]:
    return [artifact.path / shard_name("hashes", i, "npy") for i in range(len(source.shards))]


def _read(artifact: Artifact, source: Collection) -> ImageHashes:
    size, files = len(source), _files(artifact, source)
    bits, readable = np.empty(size, np.uint64), np.empty(size, bool)
    mean, contrast = np.empty(size), np.empty(size)
    for shard, file in enumerate(files):
        rows, here = read_array(file), slice(source.starts[shard], source.starts[shard + 1])
        bits[here], readable[here] = rows["bits"], rows["readable"]
        mean[here], contrast[here] = tone(rows["thumbnail"])
    return ImageHashes(
        bits=bits,
        readable=readable,
        mean=mean,
        contrast=contrast,
        shards=tuple(files),
        starts=np.array(source.starts),
    )


def tone(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and contrast of thumbnails: (n, 8, 8, 3) uint8 -> (n,) float64 and (n,) float64."""
    return thumbnails.mean((1, 2, 3)), np.sqrt(thumbnails.var((1, 2)).mean(1))


def near_duplicate_clusters(hashes: ImageHashes, distance: int = DISTANCE) -> np.ndarray:
    """Number the groups of images that show the same thing: (n,) int64, −1 for an image with no copy.

    Two images are copies where their hashes differ in at most `distance` of 64 bits and their thumbnails a
    and b by RMS(a − b) ≤ 0.07 √((s_a² + s_b²) / 2 + 1), s the contrast; groups are the connected
    components, numbered by their first image. All such pairs are found, by the pigeonhole principle: hashes
    that differ in d bits agree in one of d + 1 bands. Images of one colour have no copies.

    Raises:
        InputError: where `distance` is negative or above 8.
    """
    check_distance(distance)
    sets = _Sets(len(hashes))
    looks = _Looks(hashes)
    usable = np.flatnonzero(hashes.readable & ~hashes.flat)
    distinct = _join_equal(hashes, looks, sets, usable)
    for first, second in _gathered(close_pairs(hashes.bits, distinct, np.arange(64), distance)):
        looks.join(sets, first, second)
    return sets.codes()


def check_distance(distance: int) -> None:
    """Raise InputError for a distance at which hashes cannot be compared, or say nothing any more."""
    if not 0 <= distance <= MAX_DISTANCE:
        raise InputError(f"the distance of hashes is {distance}; it must lie between 0 and {MAX_DISTANCE}")


def _join_equal(hashes: ImageHashes, looks: "_Looks", sets: "_Sets", usable: np.ndarray) -> np.ndarray:
    """Join images with the same hash and thumbnail, and return one of each: a million copies cost a sort."""
    keys = (hashes.contrast[usable], hashes.mean[usable], hashes.bits[usable])
    order = np.lexsort(keys)
    same = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in keys])
    first = usable[order][:-1][same]
    second = usable[order][1:][same]
    looks.join(sets, first, second)
    joined = sets.roots(first) == sets.roots(second)
    return np.setdiff1d(usable, second[joined])


class _Looks:
    """Compares thumbnails."""

    def __init__(self, hashes: ImageHashes) -> None:
        self.hashes, self.mean, self.contrast = hashes, hashes.mean, hashes.contrast

    def join(self, sets: "_Sets", first: np.ndarray, second: np.ndarray) -> None:
        """Join the pairs that look alike; those already together are not looked at."""
        bound = DIFFERENCE * np.sqrt((self.contrast[first] ** 2 + self.contrast[second] ** 2) / 2 + 1)
        # RMS(a - b) is at least the difference of means, and at least that of contrasts.
        hopeful = np.abs(self.mean[first] - self.mean[second]) <= bound
        hopeful &= np.abs(self.contrast[first] - self.contrast[second]) <= bound
        first, second, bound = first[hopeful], second[hopeful], bound[hopeful]
        for start in range(0, len(first), _LOOKED_AT_ONCE):
            part = slice(start, start + _LOOKED_AT_ONCE)
            apart = sets.roots(first[part]) != sets.roots(second[part])
            one, other = first[part][apart], second[part][apart]
            alike = self._difference(one, other) <= bound[part][apart]
            sets.join(one[alike], other[alike])

    def _difference(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return RMS(a − b) of pairs of thumbnails: (m,) and (m,) -> (m,) float64."""
        difference = self.hashes.thumbnails(first).astype(np.int32) - self.hashes.thumbnails(second)
        return np.sqrt((difference.reshape(len(first), _VALUES) ** 2).mean(1))


class _Sets:
    """Disjoint sets of positions; all operations take whole arrays."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size)

    def roots(self, positions: np.ndarray) -> np.ndarray:
        """Return the smallest known position of each one's set."""
        # Each step halves the way of all at once, so that a chain of a million takes twenty.
        while not np.array_equal(above := self.parent[positions], top := self.parent[above]):
            self.parent[positions] = top
        return top

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        """Make one set of the sets of each pair."""
        while True:
            one, other = self.roots(first), self.roots(second)
            apart = one != other
            if not apart.any():
                return
            first, second, one, other = first[apart], second[apart], one[apart], other[apart]
            np.minimum.at(self.parent, np.maximum(one, other), np.minimum(one, other))

    def codes(self) -> np.ndarray:
        """Number the sets of two or more from 0, by their smallest positions; −1 for the others."""
        roots = self.roots(np.arange(len(self.parent)))
        _, places, sizes = np.unique(roots, return_inverse=True, return_counts=True)
        numbers = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, -1)
        return numbers[places]


def _gathered(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the same pairs, many small batches made one."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    for batch in pairs:
        if len(batch[0]):
            waiting.append(batch)
            count += len(batch[0])
        if count >= _PAIRS_AT_ONCE:
            yield _one(waiting)
            waiting, count = [], 0
    if waiting:
        yield _one(waiting)


def _one(batches: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([first for first, _ in batches]), np.concatenate([last for _, last in batches])


def close_pairs(
    bits: np.ndarray, members: np.ndarray, free: np.ndarray, distance: int, partings: int = _PARTINGS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each pair of members once whose hashes differ in at most `distance` of the free bits.

    The members agree in all bits that are not free; long runs of equal bands are parted so many times.
    """
    masks: list[np.uint64] = []
    for band in np.array_split(free, distance + 1):
        mask = np.bitwise_or.reduce(np.uint64(1) << band.astype(np.uint64))
        order = np.argsort(bits[members] & mask, kind="stable")
        rows = members[order]
        for first, second in _in_buckets(bits, rows, mask, np.setdiff1d(free, band), distance, partings):
            differing = bits[first] ^ bits[second]
            new = np.bitwise_count(differing) <= distance
            for earlier in masks:  # a pair is told in the first band that agrees, and not again
                new &= (differing & earlier) != 0
            yield first[new], second[new]
        masks.append(mask)


def _in_buckets(
    bits: np.ndarray, rows: np.ndarray, mask: np.uint64, rest: np.ndarray, distance: int, partings: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs within each run of rows whose masked bits agree, parting long runs further."""
    keys = bits[rows] & mask
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(rows)])
    lengths = np.diff(np.append(starts, len(rows)))
    parted = (lengths > _LONG_RUN) & (partings > 0)
    for start, length in zip(starts[parted], lengths[parted], strict=True):
        yield from close_pairs(bits, rows[start : start + length], rest, distance, partings - 1)
    ends = np.repeat(np.where(parted, 0, starts + lengths), lengths)
    yield from _shifted(rows, ends)


def _shifted(rows: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all pairs of each run, a distance within the run at a time: never more than there are rows."""
    left = np.arange(len(rows))
    shift = 1
    while len(left := left[left + shift < ends[left]]):
        yield rows[left], rows[left + shift]
        shift += 1
