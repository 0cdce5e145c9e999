"""The vectors that a search compares, and the constraints on which rows may be neighbors of each other."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from likewise.artifacts import disk_full_as_error, tmp_path
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import DatasetView
from likewise.data.perceptual_hash import compute_perceptual_hashes, find_near_duplicate_clusters
from likewise.embeddings.store import Embeddings
from likewise.errors import InvalidInputError
from likewise.neighbors.config import SearchConfig
from likewise.progress import NULL_PROGRESS, Progress

_NON_WORD = re.compile(r"[\W_]+")
_MAX_OPEN_SHARDS = 64  # each mapped file takes a file descriptor, of which the default limit is 1,024
_BLOCK_BYTES = 2**25


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchConstraints:
    """Which of n rows may be neighbors of each other; all of them by default.

    Attributes:
        exclude: (n, m) int64; rows with an equal code >= 0 in any column are no neighbors.
        require: (n,) int64; only rows with an equal code >= 0 are neighbors.
        image_ids: (n,) int64 >= 0, the image of each row; rows of one image are no neighbors, and of another
            image only the nearest row is one.
    """

    exclude: np.ndarray | None = None
    require: np.ndarray | None = None
    image_ids: np.ndarray | None = None

    def validate(self, num_rows: int) -> None:
        """Check the shapes.

        Raises:
            InvalidInputError: if an array does not have one code per row.
        """
        for name, ndim in (("exclude", 2), ("require", 1), ("image_ids", 1)):
            codes = getattr(self, name)
            if codes is not None and (len(codes) != num_rows or codes.ndim != ndim):
                raise InvalidInputError(
                    f"`{name}` has the shape {codes.shape}, for {num_rows} vectors", field=name
                )

    def exclusion_columns(self) -> Iterator[np.ndarray]:
        """Yield the codes that must differ, (n,) int64 each: the columns of `exclude`, and `image_ids`."""
        if self.exclude is not None:
            yield from self.exclude.T
        if self.image_ids is not None:
            yield self.image_ids

    @property
    def is_trivial(self) -> bool:
        """Return whether all rows may be neighbors."""
        return self.require is None and next(self.exclusion_columns(), None) is None

    def admissible(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Return which pairs are admissible: (p,), (p,) -> (p,) bool."""
        mask = np.ones(len(rows), bool)
        for ids in self.exclusion_columns():
            row_ids = ids[rows]
            mask &= (row_ids != ids[columns]) | (row_ids < 0)
        if self.require is not None:
            row_ids = self.require[rows]
            mask &= (row_ids == self.require[columns]) & (row_ids >= 0)
        return mask

    def mask_scores(self, scores: Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
        """Set the inadmissible scores of a block to -inf: (m, c), of rows (m,) and columns (c,)."""
        for ids in self.exclusion_columns():
            row_ids = np.where(ids[rows] < 0, -2, ids[rows])
            scores.masked_fill_(_pairwise_equal(row_ids, ids[columns], scores.device), -torch.inf)
        if self.require is not None:
            is_equal = _pairwise_equal(
                np.where(self.require[rows] < 0, -2, self.require[rows]), self.require[columns], scores.device
            )
            scores.masked_fill_(is_equal.logical_not_(), -torch.inf)


def _pairwise_equal(rows: np.ndarray, columns: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device)[:, None] == torch.from_numpy(columns).to(device)


def corpus_constraints(
    view: DatasetView,
    search_config: SearchConfig,
    image_ids: np.ndarray,
    caption_ids: np.ndarray | None = None,
    *,
    progress: Progress = NULL_PROGRESS,
) -> SearchConstraints:
    """Return the constraints of a search config for the rows of a search.

    Args:
        view: The dataset and what its filter leaves.
        search_config: The search.
        image_ids: The image of each row, (m,) int64.
        caption_ids: The caption of each row, (m,) int64, if rows are captions.
        progress: Progress reporter.

    Raises:
        InvalidInputError: if `group_scope` requires groups and the dataset has none.
    """
    exclude, require = [], None
    if search_config.exclude_near_duplicates:
        hashes = compute_perceptual_hashes(view.dataset, progress=progress)
        exclude.append(find_near_duplicate_clusters(hashes)[image_ids])
    if search_config.group_scope != "any":
        group_ids = _encode_groups(view.dataset, search_config)[image_ids]
        # An image without a group has no neighbors, in a different group neither.
        require = group_ids if search_config.group_scope == "same" else np.where(group_ids >= 0, 0, -1)
        if search_config.group_scope == "different":
            exclude.append(group_ids)
    if search_config.exclude_identical_captions:
        hashes = caption_hashes(view, per_caption=caption_ids is not None)
        exclude.append(hashes[image_ids if caption_ids is None else caption_ids])
    return SearchConstraints(
        exclude=np.column_stack(exclude) if exclude else None,
        require=require,
        image_ids=None if caption_ids is None else image_ids,
    )


def _encode_groups(dataset: CaptionDataset, search_config: SearchConfig) -> np.ndarray:
    group_ids = encode_column(dataset, "group")
    if (group_ids < 0).all():
        raise InvalidInputError(
            f"no image of {dataset.path} has a group, which `group_scope` {search_config.group_scope!r} "
            "requires; import the dataset with `group_column`",
            field="group_scope",
        )
    return group_ids


def encode_column(dataset: CaptionDataset, column: str) -> np.ndarray:
    """Return the values of `group` or `label` as integer codes: (n,) int64, -1 for images without one."""
    id_of: dict[str, int] = {}
    ids = [
        -1 if value is None else id_of.setdefault(value, len(id_of))
        for shard in range(len(dataset.shard_paths))
        for value in dataset.read_columns(shard, [column])[column]
    ]
    return np.array(ids, np.int64)


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
    """Return a caption in lower case, reduced to words and single spaces."""
    return _NON_WORD.sub(" ", caption.casefold()).strip()


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def rows_per_block(dim: int) -> int:
    """Return the number of float32 vectors per block of 32 MiB."""
    return max(256, _BLOCK_BYTES // (4 * dim))


class ImageVectors:
    """Random access to the vectors of images: the normalized mean of the embeddings of each.

    Attributes:
        dim: Dimension of the vectors.
        key: Key of the embeddings.
        embedding_rows: (m,) int64, the row in the embeddings of each included caption (or image).
        image_ids: (m,) int64, the image of each, ascending.
        first_caption: (n,) int64, the index of the first included caption of each image.
        captions_per_image: (n,) int64, the number of included captions of each image.
    """

    def __init__(
        self, embeddings: Embeddings, num_images: int, caption_mask: np.ndarray | None = None
    ) -> None:
        """Memory-map the shards; takes 16 bytes per caption and 16 per image.

        Args:
            embeddings: Embeddings of captions or images.
            num_images: Number of images of the dataset.
            caption_mask: Rows of the embeddings to include, (num_captions,) bool; all by default.
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
        """Return the vectors of images: (b,) int64 -> (b, d) float32, zero for images without any."""
        counts = self.captions_per_image[positions]
        sums = np.zeros((len(positions), self.dim), np.float32)
        for i in range(counts.max(initial=0)):
            has_caption = counts > i
            sums[has_caption] += self.caption_vectors(self.first_caption[positions[has_caption]] + i)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        return np.where(norms > 1e-6, sums / np.maximum(norms, 1e-6), 0)

    def similarity(self, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return the cosine similarity of images and their candidates: (n,), (n, k) -> (n, k), 0 at -1."""
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

        They follow from the sum and the second moment of all vectors, in O(n d²). Both are 0 for images
        without a vector.
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
        """Return the vectors of captions by their index among the included ones: (m,) -> (m, d) float32."""
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
        vectors: (m, d) float32 unit vectors, memory-mapped.
        image_ids: (m,) int64, the image of each row, ascending.
        row_ids: (m,) int64, the index of each row among all images or included captions, ascending.
        all_image_ids: (t,) int64, the image of each of all images or included captions, also of those
            without a vector.
        constraints: Which rows may be neighbors.
    """

    vectors: np.ndarray
    image_ids: np.ndarray
    row_ids: np.ndarray
    all_image_ids: np.ndarray
    constraints: SearchConstraints


@contextmanager
def build_search_corpus(
    view: DatasetView,
    embeddings: Embeddings,
    search_config: SearchConfig,
    folder: Path,
    *,
    progress: Progress = NULL_PROGRESS,
) -> Iterator[SearchCorpus]:
    """Write the vectors of a search into a temporary file in `folder`, which the context deletes.

    Zero vectors are excluded.

    Raises:
        ArtifactError: if the disk is full.
        InvalidInputError: if `group_scope` requires groups and the dataset has none.
    """
    use_image_embeddings = embeddings.modality == "images"
    dataset, image_mask = view.dataset, view.image_mask
    image_vectors = ImageVectors(
        embeddings, len(dataset), None if use_image_embeddings else view.caption_mask
    )
    by_caption = search_config.caption_pooling != "mean" and not use_image_embeddings
    all_image_ids = image_vectors.image_ids if by_caption else np.arange(len(dataset))
    scratch_path = tmp_path(folder / "vectors")
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
        constraints = corpus_constraints(view, search_config, image_ids, caption_ids, progress=progress)
        yield SearchCorpus(mmap_vectors, image_ids, row_ids, all_image_ids, constraints)
    finally:
        scratch_path.unlink(missing_ok=True)


def _normalize_rows(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
