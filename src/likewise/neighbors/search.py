"""Exact nearest neighbors by cosine similarity among admissible rows.

Results depend neither on block sizes nor on the device (see `_bf16_scan`). Equal vectors are searched once
and expanded afterwards, with round-robin tie breaking: each of several equal rows has the next one as its
nearest neighbor, and the last has the first. Images with the same caption thus do not all share one partner,
and more images become partners. Other ties go to the lower row. A row is excluded from its own neighbors by
its index, not by dropping the first hit, which with repeated captions is often another row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from likewise.neighbors._bf16_scan import (
    EXACT_PRECISION,
    Vectors,
    block_sizes,
    fastest_precision,
    to_sparse_if_sparse,
    topk_columns,
)
from likewise.neighbors.vectors import SearchConstraints

UNCONSTRAINED = SearchConstraints()
_HASH_CHUNK_BYTES = 2**19


@dataclass(frozen=True)
class Deduplicated:
    """Groups of equal rows.

    Attributes:
        first_rows: (u,) int64, the first row of each group, ascending.
        group_ids: (n,) int64, the group of each row.
        members: (n,) int64, all rows, sorted by group and then by row.
        group_starts: (u + 1,) int64, the start of each group in `members`.
    """

    first_rows: np.ndarray
    group_ids: np.ndarray
    members: np.ndarray
    group_starts: np.ndarray


def deduplicate_rows(vectors: np.ndarray, constraints: SearchConstraints = UNCONSTRAINED) -> Deduplicated:
    """Group rows whose vectors and constraint codes are bitwise equal.

    Rows are compared by two independent 64-bit multiply-add hashes: the probability of a false match among
    10⁹ rows is below 10⁻²⁰.

    Args:
        vectors: (n, d) float32, may be memory-mapped.
        constraints: Codes of the rows.
    """
    id_columns = [column[:, None] for column in constraints.exclusion_columns()]
    if constraints.require is not None:
        id_columns.append(constraints.require[:, None])
    num_words = (vectors.shape[1] + 1) // 2 + len(id_columns)
    multipliers = (
        np.random.default_rng(0).integers(1, 2**63, size=(2, num_words), dtype=np.int64).astype(np.uint64)
    )
    hashes = np.empty((2, len(vectors)), np.uint64)
    chunk_size = max(1, _HASH_CHUNK_BYTES // (8 * max(1, num_words)))
    for start in range(0, len(vectors), chunk_size):
        part = slice(start, start + chunk_size)
        values = _as_uint64(vectors[part], [column[part] for column in id_columns])
        for i in range(2):
            products = values * (multipliers[i] | np.uint64(1))
            products ^= products >> np.uint64(31)
            hashes[i, part] = products.sum(axis=1, dtype=np.uint64)
    return _group_by_hash(hashes)


def _as_uint64(vectors: np.ndarray, id_columns: list[np.ndarray]) -> np.ndarray:
    """Return rows as 64-bit words that are nonzero for zero components."""
    is_odd = vectors.shape[1] % 2
    padded = np.pad(vectors, ((0, 0), (0, 1))) if is_odd else np.ascontiguousarray(vectors)
    columns = [
        padded.view(np.uint64),
        *(np.ascontiguousarray(column).view(np.uint64) for column in id_columns),
    ]
    return np.concatenate(columns, axis=1) + np.uint64(1)


def _group_by_hash(hashes: np.ndarray) -> Deduplicated:
    n = hashes.shape[1]
    order = np.lexsort((hashes[1], hashes[0]))  # stable: keeps the order of rows in a group
    sorted_hashes = hashes[:, order]
    is_first = np.ones(n, bool)
    is_first[1:] = (sorted_hashes[:, 1:] != sorted_hashes[:, :-1]).any(axis=0)
    first_rows = order[is_first]
    by_appearance = np.argsort(first_rows)
    rank = np.empty_like(by_appearance)
    rank[by_appearance] = np.arange(len(first_rows))
    group_ids = np.empty(n, np.int64)
    group_ids[order] = rank[np.cumsum(is_first) - 1]
    members = np.argsort(group_ids, kind="stable")
    group_starts = np.concatenate([[0], np.cumsum(np.bincount(group_ids, minlength=len(first_rows)))])
    return Deduplicated(first_rows[by_appearance], group_ids, members, group_starts)


DEFAULT_MEMORY_BYTES = 512 * 2**20
_MAX_WASTED_PAIRS = 2**17  # comparing these takes about as long as another block

SearchResult = tuple[np.ndarray, np.ndarray]


class Index(ABC):
    """Index of vectors that returns the nearest admissible other rows of its rows."""

    @abstractmethod
    def search(self, rows: np.ndarray, k: int) -> SearchResult:
        """Return the k nearest admissible other rows of each query row.

        Args:
            rows: Query rows, (m,) int64; thousands per call are faster than several small calls.
            k: Number of neighbors, at least 1.

        Returns:
            Rows (m, k) int64, nearest first, padded with -1; and cosine similarities (m, k) float32, padded
            with -inf. With `SearchConstraints.image_ids`, at most one row per image, its nearest.
        """


class ExactIndex(Index):
    """Exact search over all rows.

    ::

        index = ExactIndex(vectors, SearchConstraints(require=group_ids))
        neighbors, similarity = index.search(np.arange(len(vectors)), k=10)
    """

    def __init__(
        self,
        vectors: np.ndarray,
        constraints: SearchConstraints = UNCONSTRAINED,
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        device: str = "cpu",
    ) -> None:
        """Deduplicate the rows.

        Args:
            vectors: (n, d) float32, unit length or zero, may be memory-mapped.
            constraints: Which rows may be neighbors.
            memory_bytes: Memory of blocks in bytes, in addition to about 50 bytes per row and, for sparse
                vectors, 24 per nonzero component.
            device: Device of dense products; sparse ones run on the CPU.

        Raises:
            InvalidInputError: if the constraints do not have one code per row.
        """
        constraints.validate(len(vectors))
        self.vectors, self.constraints = vectors, constraints
        self.dedup = deduplicate_rows(vectors, constraints)
        self._search_vectors = to_sparse_if_sparse(vectors)
        self._memory_bytes, self._device = memory_bytes, device

    def search(self, rows: np.ndarray, k: int) -> SearchResult:
        """See `Index.search`."""
        if self.constraints.image_ids is None:
            return self.search_rows(rows, k)
        return topk_per_image(self.search_rows, rows, k, self.constraints.image_ids)

    def search_rows(self, rows: np.ndarray, k: int) -> SearchResult:
        """Search like `search`, but allow several rows of one image among the neighbors."""
        return exact_topk(
            self._search_vectors,
            self.dedup,
            rows,
            k,
            constraints=self.constraints,
            memory_bytes=self._memory_bytes,
            device=self._device,
        )


def exact_topk(
    vectors: Vectors,
    dedup: Deduplicated,
    queries: np.ndarray,
    k: int,
    *,
    constraints: SearchConstraints = UNCONSTRAINED,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    device: str = "cpu",
) -> SearchResult:
    """Return the k nearest admissible other rows of each query row.

    Args:
        vectors: (n, d) float32, unit length or zero, may be memory-mapped; or the result of
            `to_sparse_if_sparse`.
        dedup: Result of `deduplicate_rows` for the same vectors and constraints.
        queries: Query rows, (m,) int64.
        k: Number of neighbors.
        constraints: Which rows may be neighbors.
        memory_bytes: Memory of blocks of scores and their candidates, in bytes.
        device: Device of dense products.

    Returns:
        Neighbors (m, k) int64, nearest first, padded with -1; and cosine similarities (m, k) float32, padded
        with -inf. Ties are ordered by the first row of each group of equal rows, and within a group by
        round-robin tie breaking.
    """
    groups, inverse = np.unique(dedup.group_ids[queries], return_inverse=True)
    best_groups = np.full((len(groups), k + 1), -1, np.int64)
    scores = np.full((len(groups), k + 1), -np.inf)
    precision = fastest_precision(device) if isinstance(vectors, np.ndarray) else EXACT_PRECISION
    query_block_size, column_block_size = block_sizes(vectors.shape[1], k + 1, memory_bytes)
    for block, columns in _query_blocks(dedup, groups, constraints.require, query_block_size):
        # k + 1, because the group of the query row is among the best and may have no other member.
        rows = dedup.first_rows[groups[block]]
        matches, scores[block] = topk_columns(
            vectors, rows, columns, k + 1, constraints, precision, column_block_size
        )
        best_groups[block] = np.where(matches < 0, -1, dedup.group_ids[columns[matches]])
    return expand_duplicates(queries, best_groups, scores, inverse, dedup, k)


def _query_blocks(
    dedup: Deduplicated, groups: np.ndarray, require: np.ndarray | None, block_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of queries: (indices into `groups`, rows to search), both int64."""
    if require is None:
        blocks = [(np.arange(len(groups)), dedup.first_rows)]
    else:
        blocks = _group_blocks(require[dedup.first_rows[groups]], require[dedup.first_rows], dedup.first_rows)
    for positions, columns in blocks:
        for start in range(0, len(positions), block_size):
            yield positions[start : start + block_size], columns


def _group_blocks(
    query_group_ids: np.ndarray, column_group_ids: np.ndarray, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of queries and the rows with the same codes, several small codes per block."""
    order = np.argsort(query_group_ids, kind="stable")
    order = order[np.searchsorted(query_group_ids[order], 0) :]
    column_order = np.argsort(column_group_ids, kind="stable")
    unique_ids, query_starts = np.unique(query_group_ids[order], return_index=True)
    query_ends = np.append(query_starts[1:], len(order))
    column_starts = np.searchsorted(column_group_ids[column_order], unique_ids)
    column_ends = np.searchsorted(column_group_ids[column_order], unique_ids, side="right")
    num_pairs = (query_ends - query_starts) * (column_ends - column_starts)
    num_useful, block_start = 0, 0
    for i, count in enumerate(num_pairs):
        num_useful += count
        if i + 1 < len(unique_ids):
            num_compared = (query_ends[i + 1] - query_starts[block_start]) * (
                column_ends[i + 1] - column_starts[block_start]
            )
            if num_compared - num_useful - num_pairs[i + 1] <= _MAX_WASTED_PAIRS:
                continue
        yield (
            order[query_starts[block_start] : query_ends[i]],
            rows[column_order[column_starts[block_start] : column_ends[i]]],
        )
        num_useful, block_start = 0, i + 1


def expand_duplicates(
    rows: np.ndarray,
    best_groups: np.ndarray,
    scores: np.ndarray,
    inverse: np.ndarray,
    dedup: Deduplicated,
    k: int,
) -> SearchResult:
    """Expand groups of equal rows to rows, without the query row itself.

    Round-robin tie breaking: the members of a group after the query row come first, then those before it. If
    the lowest member always came first, all images with one caption would share one partner.

    Args:
        rows: Query rows, (m,) int64.
        best_groups: (g, j) int64 groups, best first, padded with -1; j > k, or j is the number of groups.
        scores: (g, j) float64 similarities.
        inverse: (m,) int64, the row of `best_groups` for each query row.
        dedup: The groups.
        k: Number of neighbors.

    Returns:
        Rows (m, k) int64 and similarities (m, k) float32, padded with -1 and -inf.
    """
    neighbors = np.full((len(rows), k), -1, np.int64)
    similarity = np.full((len(rows), k), -np.inf, np.float32)
    group_sizes = np.diff(dedup.group_starts)
    max_members = min(k + 1, int(group_sizes.max(initial=0)))
    # These keys sort like `members`, so that a binary search gives the position of a row in a group.
    sort_keys = dedup.group_ids[dedup.members] * len(dedup.group_ids) + dedup.members
    chunk_size = max(1, 2**18 // max(1, best_groups.shape[1] * max_members))
    offsets = np.arange(max_members)
    for start in range(0, len(rows), chunk_size):
        chunk = slice(start, start + chunk_size)
        groups = best_groups[inverse[chunk]]
        is_valid = (groups[:, :, None] >= 0) & (offsets < group_sizes[groups][:, :, None])
        insertion_points = np.searchsorted(
            sort_keys, groups * len(dedup.group_ids) + rows[chunk, None], side="right"
        )
        rotated = (insertion_points - dedup.group_starts[groups])[:, :, None] + offsets
        member_index = np.where(
            is_valid,
            dedup.group_starts[groups][:, :, None] + rotated % np.maximum(group_sizes[groups], 1)[:, :, None],
            0,
        )
        candidate_rows = np.where(is_valid, dedup.members[member_index], -1).reshape(len(member_index), -1)
        candidate_scores = np.repeat(scores[inverse[chunk]], max_members, axis=1)
        candidate_scores = np.where(
            (candidate_rows < 0) | (candidate_rows == rows[chunk, None]), -np.inf, candidate_scores
        )
        order = np.argsort(-candidate_scores, axis=1, kind="stable")[:, :k]
        topk_scores = np.take_along_axis(candidate_scores, order, axis=1)
        topk_rows = np.where(np.isfinite(topk_scores), np.take_along_axis(candidate_rows, order, axis=1), -1)
        neighbors[chunk, : order.shape[1]] = topk_rows
        similarity[chunk, : order.shape[1]] = topk_scores
    return neighbors, similarity


def topk_per_image(
    search_fn: Callable[[np.ndarray, int], SearchResult], rows: np.ndarray, k: int, image_ids: np.ndarray
) -> SearchResult:
    """Return the nearest row of each of the k nearest images, by doubling the number of rows.

    Args:
        search_fn: Returns the nearest rows of query rows, like `Index.search`.
        rows: Query rows, (m,) int64.
        k: Number of images.
        image_ids: (n,) int64, the image of each row.

    Returns:
        Rows (m, k) int64 of different images, nearest first, and similarities (m, k) float32, padded with -1
        and -inf.
    """
    neighbors = np.full((len(rows), k), -1, np.int64)
    similarity = np.full((len(rows), k), -np.inf, np.float32)
    pending, num_requested = np.arange(len(rows)), k
    while len(pending):
        num_requested = min(2 * num_requested, max(1, len(image_ids)))
        candidate_rows, candidate_scores = search_fn(rows[pending], num_requested)
        is_new_image = _is_first_occurrence(np.where(candidate_rows < 0, -1, image_ids[candidate_rows])) & (
            candidate_rows >= 0
        )
        rank = np.cumsum(is_new_image, axis=1) - 1
        row, column = np.nonzero(is_new_image & (rank < k))
        neighbors[pending[row], rank[row, column]] = candidate_rows[row, column]
        similarity[pending[row], rank[row, column]] = candidate_scores[row, column]
        is_done = (
            (is_new_image.sum(axis=1) >= k) | (candidate_rows[:, -1] < 0) | (num_requested >= len(image_ids))
        )
        pending = pending[~is_done]
    return neighbors, similarity


def _is_first_occurrence(ids: np.ndarray) -> np.ndarray:
    """Return which codes occur for the first time in their row: (m, k) int64 -> (m, k) bool."""
    order = np.argsort(ids, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(ids, order, axis=1)
    is_first = np.ones(ids.shape, bool)
    np.put_along_axis(is_first, order[:, 1:], sorted_ids[:, 1:] != sorted_ids[:, :-1], axis=1)
    return is_first
