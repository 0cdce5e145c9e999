"""One vector an image, looked up by position in the embeddings on disk."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from likewise.artifacts import disk_full_as_error
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import DatasetView
from likewise.data.perceptual_hash import compute_perceptual_hashes, find_near_duplicate_clusters
from likewise.embeddings.store import Embeddings
from likewise.errors import InvalidInputError
from likewise.neighbors.config import SearchConfig
from likewise.progress import NULL_PROGRESS, Progress

_NON_WORD = re.compile(r"[\W_]+")


def caption_hashes(view: DatasetView, *, per_caption: bool) -> np.ndarray:
    """Return 63-bit hashes of captions that ignore case, spaces and punctuation.

    With `per_caption`, one hash per caption, (num_captions,) int64; otherwise one per image over its captions
    that the view includes, (n,) int64, -1 for images without any.
    """
    hashes: list[int] = []
    dataset = view.dataset
    for shard, start in enumerate(dataset.shard_offsets[:-1]):
        for position, captions in enumerate(dataset.read_columns(shard, ["captions"])["captions"], start):
            if per_caption:
                hashes += [_hash_text(normalize_text(caption)) for caption in captions]
                continue
            included = [caption for caption in captions if not view.excludes_caption(position, caption)]
            hashes.append(_hash_text("\n".join(sorted(map(normalize_text, included)))) if included else -1)
    return np.array(hashes, np.int64)


def normalize_text(caption: str) -> str:
    """Return a caption in lower case with words and single spaces alone."""
    return _NON_WORD.sub(" ", caption.casefold()).strip()


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def encode_column(dataset: CaptionDataset, column: str) -> np.ndarray:
    """Return the values of `group` or `label` as codes: (n,) int64, -1 where an image has none."""
    id_of: dict[str, int] = {}
    ids = [
        -1 if value is None else id_of.setdefault(value, len(id_of))
        for shard in range(len(dataset.shard_paths))
        for value in dataset.read_columns(shard, [column])[column]
    ]
    return np.array(ids, np.int64)


def image_constraints(
    dataset: CaptionDataset, search_config: SearchConfig, progress: Progress = NULL_PROGRESS
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return what a search rule forbids and demands of images.

    Returns:
        Codes of which none may be equal, (n, m) int64 or None; and a code that must be equal, (n,) int64 or
        None. -1 in the first is never equal; -1 in the second finds nobody.

    Raises:
        InputError: where groups are asked for and there are none.
    """
    exclude, require = [], None
    if search_config.exclude_near_duplicates:
        hashes = compute_perceptual_hashes(dataset, progress=progress)
        exclude.append(find_near_duplicate_clusters(hashes))
    if search_config.group_scope != "any":
        group_ids = encode_column(dataset, "group")
        if (group_ids < 0).all():
            raise InvalidInputError(
                f"no image of {dataset.path} has a group, so scope {search_config.group_scope} "
                f"leaves nobody; "
                "import with --group-column"
            )
        # Of another group: whoever has one at all, and not the same.
        require = group_ids if search_config.group_scope == "same" else np.where(group_ids >= 0, 0, -1)
        if search_config.group_scope == "different":
            exclude.append(group_ids)
    return (np.column_stack(exclude) if exclude else None), require


_MAX_OPEN_SHARDS = 64  # each mapped file holds a descriptor, of which a process usually has 1,024
_BLOCK_BYTES = 2**25


def rows_per_block(dim: int) -> int:
    """Return how many vectors of float32 to hold at a time: 32 MiB of them, however long each is."""
    return max(256, _BLOCK_BYTES // (4 * dim))


class ImageVectors:
    """Random access to pooled embeddings: the mean of an image's vectors, of unit length again."""

    def __init__(
        self, embeddings: Embeddings, num_images: int, caption_mask: np.ndarray | None = None
    ) -> None:
        """Map the shards; holds 16 bytes a caption and 16 an image in memory.

        `caption_mask` tells which rows of the embeddings count, (captions,) bool; all of them where not
        given.
        """
        self.dim = embeddings.dim
        self.key = embeddings.artifact.manifest.key
        self._load_shard = lru_cache(maxsize=_MAX_OPEN_SHARDS)(embeddings.load_vectors)
        shard_image_ids = [embeddings.load_image_ids(i) for i in range(embeddings.num_shards)]
        self._shard_offsets = np.concatenate(
            [[0], np.cumsum([len(shard_ids) for shard_ids in shard_image_ids])]
        )
        image_ids = np.concatenate(shard_image_ids)
        self.embedding_rows = (
            np.arange(len(image_ids)) if caption_mask is None else np.flatnonzero(caption_mask)
        )
        self.image_ids = image_ids[self.embedding_rows]
        self.first_caption = np.searchsorted(self.image_ids, np.arange(num_images))
        self.captions_per_image = (
            np.searchsorted(self.image_ids, np.arange(num_images), side="right") - self.first_caption
        )

    def get(self, positions: np.ndarray) -> np.ndarray:
        """Return the vectors of some images: (b,) int64 -> (b, d) float32, zero where one has none."""
        counts = self.captions_per_image[positions]
        sums = np.zeros((len(positions), self.dim), np.float32)
        for i in range(counts.max(initial=0)):
            has_caption = counts > i
            sums[has_caption] += self.caption_vectors(self.first_caption[positions[has_caption]] + i)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        return np.where(norms > 1e-6, sums / np.maximum(norms, 1e-6), 0)

    def similarity(self, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return the cosine of each image and its candidates: (n,), (n, k) -> (n, k) float32; 0 at -1."""
        scores = np.zeros(candidates.shape, np.float32)
        chunk_size = max(1, rows_per_block(self.dim) // max(1, candidates.shape[1]))
        for start in range(0, len(queries), chunk_size):
            chunk = slice(start, start + chunk_size)
            is_valid = candidates[chunk] >= 0
            row, _ = np.nonzero(is_valid)
            unique_candidates, inverse = np.unique(candidates[chunk][is_valid], return_inverse=True)
            query_vectors, candidate_vectors = self.get(queries[chunk]), self.get(unique_candidates)
            scores[chunk][is_valid] = np.einsum("md,md->m", query_vectors[row], candidate_vectors[inverse])
        return scores

    def similarity_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of each image's similarity to all others: (n,), (n,) float64.

        From the sum and the second moment of all vectors, so that no pair is looked at. Images without a
        vector get mean 0 and deviation 0.
        """
        n, d = len(self.captions_per_image), self.dim
        vector_sum, second_moment, num_vectors = np.zeros(d), np.zeros((d, d)), 0
        block_size = rows_per_block(d)
        blocks = [np.arange(start, min(start + block_size, n)) for start in range(0, n, block_size)]
        for block in blocks:
            vectors = self.get(block).astype(np.float64)
            vector_sum += vectors.sum(axis=0)
            second_moment += vectors.T @ vectors
            num_vectors += int((np.abs(vectors).sum(axis=1) > 0).sum())
        means, stds = np.zeros(n), np.zeros(n)
        for block in blocks:
            vectors = self.get(block).astype(np.float64)
            self_similarity = (vectors**2).sum(axis=1)
            mean = (vectors @ vector_sum - self_similarity) / max(1, num_vectors - 1)
            mean_square = (
                np.einsum("nd,de,ne->n", vectors, second_moment, vectors, optimize=True) - self_similarity**2
            ) / max(1, num_vectors - 1)
            means[block] = mean
            stds[block] = np.sqrt(np.maximum(mean_square - mean**2, 0))
        return means, stds

    def caption_vectors(self, caption_indices: np.ndarray) -> np.ndarray:
        """Return the vectors of single captions, by their place among those that count: (m,) -> (m, d)."""
        rows = self.embedding_rows[caption_indices]
        vectors = np.empty((len(rows), self.dim), np.float32)
        shard_ids = np.searchsorted(self._shard_offsets, rows, side="right") - 1
        for shard_id in np.unique(shard_ids):
            mask = shard_ids == shard_id
            vectors[mask] = self._load_shard(int(shard_id))[rows[mask] - self._shard_offsets[shard_id]]
        return vectors


@dataclass(frozen=True)
class SearchCorpus:
    """The rows of a search: images, or captions.

    Attributes:
        vectors: (m, d) float32 unit vectors, mapped from disk.
        image_ids: (m,) int64, the image of each row, ascending.
        row_ids: (m,) int64, which of all images or captions each row is, ascending.
        all_image_ids: (t,) int64, the image of each of all images or captions, also of those that are not
            searched.
        exclude: (m, c) int64 codes of which none may be equal, -1 never being equal; or None.
        require: (m,) int64 codes that must be equal, -1 finding nobody; or None.
        by_caption: Whether rows are captions, of which an image may have several.
    """

    vectors: np.ndarray
    image_ids: np.ndarray
    row_ids: np.ndarray
    all_image_ids: np.ndarray
    exclude: np.ndarray | None
    require: np.ndarray | None
    by_caption: bool


@contextmanager
def build_search_corpus(
    view: DatasetView,
    embeddings: Embeddings,
    search_config: SearchConfig,
    folder: Path,
    *,
    progress: Progress = NULL_PROGRESS,
) -> Iterator[SearchCorpus]:
    """Gather what is compared into one file in `folder`, which goes when the block ends.

    Rows without direction (zero vectors) stay out.

    Raises:
        ArtifactError: where the disk is full.
    """
    use_image_embeddings = embeddings.modality == "images"
    dataset, image_mask = view.dataset, view.image_mask
    image_vectors = ImageVectors(
        embeddings, len(dataset), None if use_image_embeddings else view.caption_mask
    )
    by_caption = search_config.caption_pooling != "mean" and not use_image_embeddings
    all_image_ids = image_vectors.image_ids if by_caption else np.arange(len(dataset))
    scratch_path = folder / f".vectors.{os.getpid()}.tmp"
    try:
        with disk_full_as_error(scratch_path), scratch_path.open("wb") as file:
            is_nonzero = image_mask[all_image_ids]
            block_size = rows_per_block(embeddings.dim)
            for start in range(0, len(all_image_ids), block_size):
                block = np.arange(start, min(start + block_size, len(all_image_ids)))
                vectors = image_vectors.caption_vectors(block) if by_caption else image_vectors.get(block)
                is_nonzero[block] &= np.abs(vectors).sum(axis=1) > 0
                file.write(_normalize_rows(vectors[is_nonzero[block]]).tobytes())
        row_ids = np.flatnonzero(is_nonzero)
        image_ids = all_image_ids[row_ids]
        shape = (len(row_ids), embeddings.dim)
        mmap_vectors = (
            np.memmap(scratch_path, np.float32, "r", shape=shape)
            if len(row_ids)
            else np.empty(shape, np.float32)
        )
        caption_ids = image_vectors.embedding_rows[row_ids] if by_caption else None
        exclude, require = _corpus_constraints(view, search_config, image_ids, caption_ids, progress)
        yield SearchCorpus(mmap_vectors, image_ids, row_ids, all_image_ids, exclude, require, by_caption)
    finally:
        scratch_path.unlink(missing_ok=True)


def _normalize_rows(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _corpus_constraints(
    view: DatasetView,
    search_config: SearchConfig,
    image_ids: np.ndarray,
    caption_ids: np.ndarray | None,
    progress: Progress,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the constraint codes of the rows of a search; `caption_ids` names the captions of the rows."""
    exclude, require = image_constraints(view.dataset, search_config, progress)
    columns = [] if exclude is None else [exclude[image_ids]]
    if search_config.exclude_identical_captions:
        hashes = caption_hashes(view, per_caption=caption_ids is not None)
        columns.append(hashes[image_ids if caption_ids is None else caption_ids][:, None])
    return (np.concatenate(columns, axis=1) if columns else None), None if require is None else require[
        image_ids
    ]
