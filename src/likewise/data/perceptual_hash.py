"""Perceptual hashes of images and clusters of near-duplicates.

The hash is the 64-bit difference hash (N. Krawetz, "Kind of Like That", 2013): the image is reduced to 9 × 8
gray pixels, and each pixel is compared with its left neighbor. The hash describes outlines only: product
photos of different shoes on a white background have nearly equal hashes. Therefore, pairs with close hashes
are verified by color thumbnails, relative to their contrast.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from likewise.artifacts import Artifact, mmap_array, shard_name, write_array
from likewise.data.dataset import CaptionDataset, Sample
from likewise.data.images import UnreadableImageError, read_image
from likewise.errors import InvalidInputError
from likewise.parallel import default_num_workers, prefetch_map
from likewise.progress import NULL_PROGRESS, Progress

ARTIFACT_KIND = "perceptual hashes"
MAX_HAMMING = 3
HAMMING_LIMIT = 8
MAX_THUMBNAIL_RMS = 0.07  # re-encoded copies stay below it; from 0.08 on, similar products form chains
MIN_CONTRAST = 1.0
_DECODE_SIZE = 128  # a smaller size is faster to decode but changes bits
_THUMBNAIL_SIZE = 8
_ROW_DTYPE = np.dtype(
    [("bits", "<u8"), ("thumbnail", "u1", (_THUMBNAIL_SIZE, _THUMBNAIL_SIZE, 3)), ("readable", "?")]
)
_NUM_THUMBNAIL_VALUES = _THUMBNAIL_SIZE * _THUMBNAIL_SIZE * 3
_MAX_BUCKET_SIZE = 1024  # larger buckets are split by the remaining bits
_MAX_SPLITS = 2  # buckets of images with equal hashes cannot be split
_PAIR_BATCH_SIZE = 2**17
_MATCH_BATCH_SIZE = 16_384


def difference_hash(pixels: np.ndarray) -> int:
    """Return the difference hash of an image: (h, w, 3) uint8 -> 64-bit integer.

    A bit is set if a pixel is brighter than its left neighbor. Bits are in row-major order, the most
    significant bit first.
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
    """Perceptual hashes and thumbnails of n images."""

    hashes: np.ndarray
    """Difference hashes, (n,) uint64; 0 for unreadable images."""
    readable: np.ndarray
    """Mask of the readable images, (n,) bool."""
    mean: np.ndarray
    """Mean pixel value of the thumbnail, (n,) float64, in [0, 255]."""
    contrast: np.ndarray
    """Standard deviation of the pixel values from the mean of their channel, (n,) float64."""
    shard_paths: tuple[Path, ...]
    """Files with the thumbnails."""
    shard_offsets: np.ndarray
    """Index of the first image of each file, followed by the number of images."""

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def uniform(self) -> np.ndarray:
        """Mask of the readable images of a single color, (n,) bool; their hashes are meaningless."""
        return self.readable & (self.contrast < MIN_CONTRAST)

    def thumbnails(self, indices: np.ndarray) -> np.ndarray:
        """Return thumbnails of images: indices (m,) -> (m, 8, 8, 3) uint8."""
        thumbnails = np.empty((len(indices), _THUMBNAIL_SIZE, _THUMBNAIL_SIZE, 3), np.uint8)
        shard_indices = np.searchsorted(self.shard_offsets, indices, side="right") - 1
        for shard in np.unique(shard_indices):
            mask = shard_indices == shard
            thumbnails[mask] = _mmap_shard(self.shard_paths[shard])["thumbnail"][
                indices[mask] - self.shard_offsets[shard]
            ]
        return thumbnails


@lru_cache(maxsize=256)  # each mapped file uses a file descriptor; the default limit per process is 1,024
def _mmap_shard(path: Path) -> np.ndarray:
    return mmap_array(path)


def compute_perceptual_hashes(
    dataset: CaptionDataset | str | Path, num_workers: int | None = None, progress: Progress = NULL_PROGRESS
) -> PerceptualHashes:
    """Compute the perceptual hashes of a dataset in `DATASET/hashes/`; an interrupted call resumes.

    Args:
        dataset: The dataset or its path.
        num_workers: Threads that decode images; defaults to the number of CPU cores.
        progress: Receives the progress.

    Raises:
        ArtifactError: if the disk is full or the image folder is missing.
    """
    dataset = CaptionDataset.open(dataset)
    settings = {"hash": "difference 9x8", "decoded_side": _DECODE_SIZE, "thumbnail": _THUMBNAIL_SIZE}
    path, inputs = dataset.path / "hashes", {"dataset": dataset.key}
    with Artifact.exclusive(path, ARTIFACT_KIND, settings, inputs) as artifact:
        if not artifact.is_complete:
            num_workers = default_num_workers() if num_workers is None else num_workers
            _hash_missing(dataset, artifact, num_workers, progress)
    return _load_hashes(Artifact.open(path, ARTIFACT_KIND), dataset)


def _hash_missing(dataset: CaptionDataset, artifact: Artifact, num_workers: int, progress: Progress) -> None:
    dataset.require_images()
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
    artifact.finish({"images": len(dataset), "shards": len(files)}, skipped)


def _hash_sample(sample: Sample, root: Path) -> tuple[int, np.ndarray, bool]:
    try:
        pixels = read_image(sample.image, root, _DECODE_SIZE)
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
    """Return the mean and contrast of thumbnails: (n, 8, 8, 3) uint8 -> (n,) float64 and (n,) float64."""
    return thumbnails.mean((1, 2, 3)), np.sqrt(thumbnails.var((1, 2)).mean(1))


def find_near_duplicate_clusters(hashes: PerceptualHashes, max_hamming: int = MAX_HAMMING) -> np.ndarray:
    """Assign near-duplicate images to clusters.

    Two images are near-duplicates if their hashes differ in at most `max_hamming` bits and their thumbnails
    a and b satisfy RMS(a − b) ≤ 0.07 √((s_a² + s_b²) / 2 + 1), where s is the contrast. Clusters are the
    connected components. All such pairs are found, by the pigeonhole principle: hashes that differ in d bits
    agree in at least one of d + 1 bands. Uniform images have no near-duplicates.

    Returns:
        Cluster ids, (n,) int64, numbered by their first image; −1 for an image without near-duplicates.

    Raises:
        InvalidInputError: if `max_hamming` is negative or above 8.
    """
    validate_max_hamming(max_hamming)
    valid = np.flatnonzero(hashes.readable & ~hashes.uniform)
    components = np.arange(len(hashes))
    components = _merge_components(components, *_filter_similar(hashes, *_identical_pairs(hashes, valid)))
    # One image per component suffices: a million identical copies cost no more than a sort.
    representatives = valid[np.unique(components[valid], return_index=True)[1]]
    for first, second in _rebatch(
        find_close_pairs(hashes.hashes, representatives, np.arange(64), max_hamming)
    ):
        is_separate = components[first] != components[second]
        similar = _filter_similar(hashes, first[is_separate], second[is_separate])
        components = _merge_components(components, *similar)
    return _number_clusters(components)


def validate_max_hamming(max_hamming: int) -> None:
    """Raise InvalidInputError for a Hamming distance outside of the supported range."""
    if not 0 <= max_hamming <= HAMMING_LIMIT:
        raise InvalidInputError(
            f"`max_hamming` must be between 0 and {HAMMING_LIMIT}, got {max_hamming}", field="max_hamming"
        )


def _identical_pairs(hashes: PerceptualHashes, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of images with equal hash, mean and contrast, adjacent in the sorted order."""
    keys = (hashes.contrast[valid], hashes.mean[valid], hashes.hashes[valid])
    order = np.lexsort(keys)
    is_equal = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in keys])
    return valid[order][:-1][is_equal], valid[order][1:][is_equal]


def _filter_similar(
    hashes: PerceptualHashes, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of images with similar thumbnails: (m,) and (m,) -> (k,) and (k,)."""
    mean, contrast = hashes.mean, hashes.contrast
    max_rms = MAX_THUMBNAIL_RMS * np.sqrt((contrast[first] ** 2 + contrast[second] ** 2) / 2 + 1)
    # RMS(a − b) is at least the difference of the means, and at least the difference of the contrasts.
    is_plausible = np.abs(mean[first] - mean[second]) <= max_rms
    is_plausible &= np.abs(contrast[first] - contrast[second]) <= max_rms
    first, second, max_rms = first[is_plausible], second[is_plausible], max_rms[is_plausible]
    is_similar = np.empty(len(first), bool)
    for start in range(0, len(first), _MATCH_BATCH_SIZE):
        batch = slice(start, start + _MATCH_BATCH_SIZE)
        is_similar[batch] = _rms_difference(hashes, first[batch], second[batch]) <= max_rms[batch]
    return first[is_similar], second[is_similar]


def _rms_difference(hashes: PerceptualHashes, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return RMS(a − b) of pairs of thumbnails: (m,) and (m,) -> (m,) float64."""
    difference = hashes.thumbnails(first).astype(np.int32) - hashes.thumbnails(second)
    return np.sqrt((difference.reshape(len(first), _NUM_THUMBNAIL_VALUES) ** 2).mean(1))


def _merge_components(components: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Connect the components of pairs of images: (n,) component of each image -> (n,) merged components."""
    if not len(first):
        return components
    edges = (np.ones(len(first), bool), (components[first], components[second]))
    graph = coo_matrix(edges, shape=(len(components), len(components)))
    return connected_components(graph, directed=False)[1][components]


def _number_clusters(components: np.ndarray) -> np.ndarray:
    """Number components of two or more images by their first image; −1 for the others."""
    _, first_indices, inverse, sizes = np.unique(
        components, return_index=True, return_inverse=True, return_counts=True
    )
    clusters = np.flatnonzero(sizes > 1)
    cluster_ids = np.full(len(sizes), -1)
    cluster_ids[clusters[np.argsort(first_indices[clusters])]] = np.arange(len(clusters))
    return cluster_ids[inverse]


def _rebatch(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Merge small batches of pairs into larger ones."""
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
    """Yield each pair of images once whose hashes differ in at most `max_hamming` bits.

    Args:
        hashes: Hashes of all images, (n,) uint64.
        indices: Images to compare, (m,) int64; they agree in all bits outside of `free_bits`.
        free_bits: Bits that may differ, (b,) int64.
        max_hamming: Maximum Hamming distance.
        max_splits: Number of times that large buckets are split further.
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
            for earlier_mask in masks:  # a pair is yielded only for the first band that agrees
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
    """Yield the pairs within each bucket of images whose masked bits agree, splitting large buckets."""
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
    """Yield all pairs within each run, one offset at a time: a batch has at most one pair per row."""
    left = np.arange(len(indices))
    offset = 1
    while len(left := left[left + offset < ends[left]]):
        yield indices[left], indices[left + offset]
        offset += 1
