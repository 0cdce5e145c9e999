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

from likewise.artifacts import Artifact, mmap_array, shard_name, write_array
from likewise.data.dataset import CaptionDataset, Sample
from likewise.data.images import UnreadableImageError, decode_image, read_image_bytes
from likewise.errors import ArtifactError, InvalidInputError
from likewise.parallel import default_num_workers, prefetch_map
from likewise.progress import NULL_PROGRESS, Progress

ARTIFACT_KIND = "perceptual hashes"
MAX_HAMMING = 3
HAMMING_LIMIT = 8
MAX_THUMBNAIL_RMS = 0.07  # copies saved anew stay below it; from 0.08 on, chains of like products form
MIN_CONTRAST = 1.0
_DECODE_SIZE = 128  # smaller decoding is faster and moves bits
_THUMBNAIL_SIZE = 8
_ROW_DTYPE = np.dtype(
    [("bits", "<u8"), ("thumbnail", "u1", (_THUMBNAIL_SIZE, _THUMBNAIL_SIZE, 3)), ("readable", "?")]
)
_NUM_THUMBNAIL_VALUES = _THUMBNAIL_SIZE * _THUMBNAIL_SIZE * 3
_MAX_BUCKET_SIZE = 1024  # images in one bucket, above which it is parted again by the bits that are left
_MAX_SPLITS = 2  # runs of images that are truly alike do not part, so it is not tried for ever
_PAIR_BATCH_SIZE = 1_000_000
_MATCH_BATCH_SIZE = 16_384


def difference_hash(pixels: np.ndarray) -> int:
    """Return the difference hash of an image: (h, w, 3) uint8 -> 64 bits.

    Bits go row by row from the top left, the first one the most significant; a bit is set where a pixel is
    brighter than the one left of it.
    """
    gray = (
        Image.fromarray(pixels)
        .convert("L")
        .resize((_THUMBNAIL_SIZE + 1, _THUMBNAIL_SIZE), Image.Resampling.BILINEAR)
    )
    values = np.asarray(gray)
    return int.from_bytes(np.packbits(values[:, 1:] > values[:, :-1]).tobytes(), "big")


@dataclass(frozen=True, kw_only=True, eq=False)
class PerceptualHashes:
    """What is known of the looks of each of n images.

    Attributes:
        hashes: Difference hashes, (n,) uint64; 0 where the image cannot be read.
        readable: Whether the image could be read, (n,) bool.
        mean: Mean of the values of the thumbnail, (n,) float64, in levels of 255.
        contrast: Standard deviation of them from the mean of their channel, (n,) float64.
        shard_paths: The files, whose rows hold the thumbnails.
        shard_offsets: The position of each file's first image, and last the number of images.
    """

    hashes: np.ndarray
    readable: np.ndarray
    mean: np.ndarray
    contrast: np.ndarray
    shard_paths: tuple[Path, ...]
    shard_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def uniform(self) -> np.ndarray:
        """The readable images of one colour, (n,) bool: their hashes say nothing."""
        return self.readable & (self.contrast < MIN_CONTRAST)

    def thumbnails(self, positions: np.ndarray) -> np.ndarray:
        """Return the thumbnails of some images: (m,) -> (m, 8, 8, 3) uint8."""
        thumbnails = np.empty((len(positions), _THUMBNAIL_SIZE, _THUMBNAIL_SIZE, 3), np.uint8)
        shard_indices = np.searchsorted(self.shard_offsets, positions, side="right") - 1
        for shard in np.unique(shard_indices):
            mask = shard_indices == shard
            thumbnails[mask] = _mmap_shard(self.shard_paths[shard])["thumbnail"][
                positions[mask] - self.shard_offsets[shard]
            ]
        return thumbnails


@lru_cache(maxsize=256)  # each mapped file holds a descriptor, of which a process usually has 1,024
def _mmap_shard(path: Path) -> np.ndarray:
    return mmap_array(path)


def compute_perceptual_hashes(
    dataset: CaptionDataset | str | Path, num_workers: int | None = None, progress: Progress = NULL_PROGRESS
) -> PerceptualHashes:
    """Hash every image of a collection into `COLLECTION/hashes/`; finished shards are kept on a rerun.

    Raises:
        ArtifactError: where the disk is full or the folder of the images is gone.
    """
    dataset = CaptionDataset.open(dataset)
    settings = {"hash": "difference 9x8", "decoded_side": _DECODE_SIZE, "thumbnail": _THUMBNAIL_SIZE}
    artifact = Artifact.create_or_resume(
        dataset.path / "hashes", ARTIFACT_KIND, settings, {"dataset": dataset.key}
    )
    if not artifact.is_complete:
        artifact = _hash_missing(
            dataset, artifact, default_num_workers() if num_workers is None else num_workers, progress
        )
    return _load_hashes(artifact, dataset)


def _hash_missing(
    dataset: CaptionDataset, artifact: Artifact, num_workers: int, progress: Progress
) -> Artifact:
    if dataset[0].image.bytes is None and not dataset.root.is_dir():
        raise ArtifactError(f"{dataset.root}, which holds the images of {dataset.path}, is not there")
    files = _shard_files(artifact, dataset)
    is_done = [file.is_file() for file in files]
    num_done = sum(
        int(size) for size, exists in zip(np.diff(dataset.shard_offsets), is_done, strict=True) if exists
    )
    with progress.task("hashing", len(dataset), "images", num_done) as bar:
        for shard, file in enumerate(files):
            if is_done[shard]:
                continue
            samples = (
                dataset[i] for i in range(dataset.shard_offsets[shard], dataset.shard_offsets[shard + 1])
            )
            rows = []
            for row in prefetch_map(lambda sample: _hash_sample(sample, dataset.root), samples, num_workers):
                rows.append(row)
                bar.update()
            write_array(file, np.array(rows, _ROW_DTYPE))
    num_unreadable = sum(int((~mmap_array(file)["readable"]).sum()) for file in files)
    skipped = {"no longer readable": num_unreadable} if num_unreadable else {}
    return artifact.finish({"images": len(dataset), "shards": len(files)}, skipped)


def _hash_sample(sample: Sample, root: Path) -> tuple[int, np.ndarray, bool]:
    try:
        pixels = decode_image(read_image_bytes(sample.image, root), _DECODE_SIZE)
    except UnreadableImageError:
        return 0, np.zeros((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE, 3), np.uint8), False
    thumbnail = Image.fromarray(pixels).resize((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE), Image.Resampling.BILINEAR)
    return difference_hash(pixels), np.asarray(thumbnail), True


def _shard_files(artifact: Artifact, dataset: CaptionDataset) -> list[Path]:
    return [artifact.path / shard_name("hashes", i, "npy") for i in range(len(dataset.shard_paths))]


def _load_hashes(artifact: Artifact, dataset: CaptionDataset) -> PerceptualHashes:
    num_images, files = len(dataset), _shard_files(artifact, dataset)
    hashes, readable = np.empty(num_images, np.uint64), np.empty(num_images, bool)
    mean, contrast = np.empty(num_images), np.empty(num_images)
    for shard, file in enumerate(files):
        rows, shard_slice = (
            mmap_array(file),
            slice(dataset.shard_offsets[shard], dataset.shard_offsets[shard + 1]),
        )
        hashes[shard_slice], readable[shard_slice] = rows["bits"], rows["readable"]
        mean[shard_slice], contrast[shard_slice] = brightness_and_contrast(rows["thumbnail"])
    return PerceptualHashes(
        hashes=hashes,
        readable=readable,
        mean=mean,
        contrast=contrast,
        shard_paths=tuple(files),
        shard_offsets=np.array(dataset.shard_offsets),
    )


def brightness_and_contrast(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and contrast of thumbnails: (n, 8, 8, 3) uint8 -> (n,) float64 and (n,) float64."""
    return thumbnails.mean((1, 2, 3)), np.sqrt(thumbnails.var((1, 2)).mean(1))


def find_near_duplicate_clusters(hashes: PerceptualHashes, max_hamming: int = MAX_HAMMING) -> np.ndarray:
    """Number the groups of images that show the same thing: (n,) int64, −1 for an image with no copy.

    Two images are copies where their hashes differ in at most `max_hamming` of 64 bits and their thumbnails a
    and b by RMS(a − b) ≤ 0.07 √((s_a² + s_b²) / 2 + 1), s the contrast; groups are the connected
    components, numbered by their first image. All such pairs are found, by the pigeonhole principle: hashes
    that differ in d bits agree in one of d + 1 bands. Images of one colour have no copies.

    Raises:
        InputError: where `max_hamming` is negative or above 8.
    """
    validate_max_hamming(max_hamming)
    union_find = _UnionFind(len(hashes))
    matcher = _ThumbnailMatcher(hashes)
    valid = np.flatnonzero(hashes.readable & ~hashes.uniform)
    representatives = _merge_identical(hashes, matcher, union_find, valid)
    for first, second in _rebatch(
        find_close_pairs(hashes.hashes, representatives, np.arange(64), max_hamming)
    ):
        matcher.merge_matches(union_find, first, second)
    return union_find.labels()


def validate_max_hamming(max_hamming: int) -> None:
    """Raise InputError for a distance at which hashes cannot be compared, or say nothing any more."""
    if not 0 <= max_hamming <= HAMMING_LIMIT:
        raise InvalidInputError(
            f"the distance of hashes is {max_hamming}; it must lie between 0 and {HAMMING_LIMIT}"
        )


def _merge_identical(
    hashes: PerceptualHashes, matcher: "_ThumbnailMatcher", union_find: "_UnionFind", valid: np.ndarray
) -> np.ndarray:
    """Join images with the same hash and thumbnail, and return one of each: a million copies cost a sort."""
    keys = (hashes.contrast[valid], hashes.mean[valid], hashes.hashes[valid])
    order = np.lexsort(keys)
    is_equal = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in keys])
    first = valid[order][:-1][is_equal]
    second = valid[order][1:][is_equal]
    matcher.merge_matches(union_find, first, second)
    is_merged = union_find.find(first) == union_find.find(second)
    return np.setdiff1d(valid, second[is_merged])


class _ThumbnailMatcher:
    """Compares thumbnails."""

    def __init__(self, hashes: PerceptualHashes) -> None:
        self.hashes, self.mean, self.contrast = hashes, hashes.mean, hashes.contrast

    def merge_matches(self, union_find: "_UnionFind", first: np.ndarray, second: np.ndarray) -> None:
        """Join the pairs that look alike; those already together are not looked at."""
        max_rms = MAX_THUMBNAIL_RMS * np.sqrt(
            (self.contrast[first] ** 2 + self.contrast[second] ** 2) / 2 + 1
        )
        # RMS(a - b) is at least the difference of means, and at least that of contrasts.
        is_plausible = np.abs(self.mean[first] - self.mean[second]) <= max_rms
        is_plausible &= np.abs(self.contrast[first] - self.contrast[second]) <= max_rms
        first, second, max_rms = first[is_plausible], second[is_plausible], max_rms[is_plausible]
        for start in range(0, len(first), _MATCH_BATCH_SIZE):
            batch = slice(start, start + _MATCH_BATCH_SIZE)
            is_separate = union_find.find(first[batch]) != union_find.find(second[batch])
            a, b = first[batch][is_separate], second[batch][is_separate]
            is_match = self._rms_difference(a, b) <= max_rms[batch][is_separate]
            union_find.union(a[is_match], b[is_match])

    def _rms_difference(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return RMS(a − b) of pairs of thumbnails: (m,) and (m,) -> (m,) float64."""
        difference = self.hashes.thumbnails(first).astype(np.int32) - self.hashes.thumbnails(second)
        return np.sqrt((difference.reshape(len(first), _NUM_THUMBNAIL_VALUES) ** 2).mean(1))


class _UnionFind:
    """Disjoint sets of positions; all operations take whole arrays."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size)

    def find(self, positions: np.ndarray) -> np.ndarray:
        """Return the smallest known position of each one's set."""
        # Each step halves the way of all at once, so that a chain of a million takes twenty.
        while not np.array_equal(parents := self.parent[positions], grandparents := self.parent[parents]):
            self.parent[positions] = grandparents
        return grandparents

    def union(self, first: np.ndarray, second: np.ndarray) -> None:
        """Make one set of the sets of each pair."""
        while True:
            root_a, root_b = self.find(first), self.find(second)
            is_separate = root_a != root_b
            if not is_separate.any():
                return
            first, second, root_a, root_b = (
                first[is_separate],
                second[is_separate],
                root_a[is_separate],
                root_b[is_separate],
            )
            np.minimum.at(self.parent, np.maximum(root_a, root_b), np.minimum(root_a, root_b))

    def labels(self) -> np.ndarray:
        """Number the sets of two or more from 0, by their smallest positions; −1 for the others."""
        roots = self.find(np.arange(len(self.parent)))
        _, inverse, sizes = np.unique(roots, return_inverse=True, return_counts=True)
        labels = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, -1)
        return labels[inverse]


def _rebatch(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the same pairs, many small batches made one."""
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    for batch in pairs:
        if len(batch[0]):
            pending.append(batch)
            count += len(batch[0])
        if count >= _PAIR_BATCH_SIZE:
            yield _concat(pending)
            pending, count = [], 0
    if pending:
        yield _concat(pending)


def _concat(batches: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([first for first, _ in batches]), np.concatenate([second for _, second in batches])


def find_close_pairs(
    hashes: np.ndarray,
    indices: np.ndarray,
    free_bits: np.ndarray,
    max_hamming: int,
    max_splits: int = _MAX_SPLITS,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each pair of members once whose hashes differ in at most `max_hamming` of the free bits.

    The members agree in all bits that are not free; long runs of equal bands are parted so many times.
    """
    masks: list[np.uint64] = []
    for band in np.array_split(free_bits, max_hamming + 1):
        mask = np.bitwise_or.reduce(np.uint64(1) << band.astype(np.uint64))
        order = np.argsort(hashes[indices] & mask, kind="stable")
        sorted_indices = indices[order]
        for first, second in _pairs_within_buckets(
            hashes, sorted_indices, mask, np.setdiff1d(free_bits, band), max_hamming, max_splits
        ):
            difference = hashes[first] ^ hashes[second]
            is_new = np.bitwise_count(difference) <= max_hamming
            for earlier_mask in masks:  # a pair is told in the first band that agrees, and not again
                is_new &= (difference & earlier_mask) != 0
            yield first[is_new], second[is_new]
        masks.append(mask)


def _pairs_within_buckets(
    hashes: np.ndarray,
    indices: np.ndarray,
    mask: np.uint64,
    free_bits: np.ndarray,
    max_hamming: int,
    max_splits: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs within each run of rows whose masked bits agree, parting long runs further."""
    keys = hashes[indices] & mask
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(indices)])
    lengths = np.diff(np.append(starts, len(indices)))
    is_split = (lengths > _MAX_BUCKET_SIZE) & (max_splits > 0)
    for start, length in zip(starts[is_split], lengths[is_split], strict=True):
        yield from find_close_pairs(
            hashes, indices[start : start + length], free_bits, max_hamming, max_splits - 1
        )
    ends = np.repeat(np.where(is_split, 0, starts + lengths), lengths)
    yield from _pairs_within_runs(indices, ends)


def _pairs_within_runs(indices: np.ndarray, ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all pairs of each run, a distance within the run at a time: never more than there are rows."""
    left = np.arange(len(indices))
    offset = 1
    while len(left := left[left + offset < ends[left]]):
        yield indices[left], indices[left + offset]
        offset += 1
