"""Exact nearest neighbors by cosine among admissible rows.

Results depend neither on the size of blocks nor on the device (see `scan`). Equal vectors are searched once.
Of equal vectors each finds those after itself first, and round, so that the images of one caption do not all
share one partner; other ties go to the lower position. Nobody is their own neighbor, by identity and not by
dropping the first hit: with repeated captions, the first hit is often somebody else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from likewise.errors import InvalidInputError
from likewise.neighbors._bf16_scan import (
    EXACT_PRECISION,
    SearchConstraints,
    Vectors,
    block_sizes,
    fastest_precision,
    to_sparse_if_sparse,
    topk_columns,
)

_HASH_CHUNK_BYTES = 2**19


@dataclass(frozen=True)
class Deduplicated:
    """Vectors with the repeats taken out.

    Attributes:
        first_rows: (u,) int64, the first row of each distinct vector, ascending.
        group_ids: (n,) int64, the distinct vector of each row.
        members: (n,) int64, all rows ordered by group and then by row.
        group_starts: (u + 1,) int64, where each group begins in `members`.
    """

    first_rows: np.ndarray
    group_ids: np.ndarray
    members: np.ndarray
    group_starts: np.ndarray


def deduplicate_rows(
    vectors: np.ndarray, exclude: np.ndarray | None = None, require: np.ndarray | None = None
) -> Deduplicated:
    """Find rows that are equal to the bit, vectors (n, d) float32 and codes alike.

    Rows are told apart by two independent 64-bit multiply-add hashes, so a false match among 10⁹ rows has a
    probability below 10⁻²⁰.

    Args:
        vectors: (n, d) float32, may be memory-mapped.
        exclude: (n, m) int64 codes, or None.
        require: (n,) int64 codes, or None.
    """
    id_columns = [part.reshape(len(vectors), -1) for part in (exclude, require) if part is not None]
    num_words = (vectors.shape[1] + 1) // 2 + sum(part.shape[1] for part in id_columns)
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
    """Lay rows out as 64-bit words, none of them zero for a zero component."""
    is_odd = vectors.shape[1] % 2
    padded = np.pad(vectors, ((0, 0), (0, 1))) if is_odd else np.ascontiguousarray(vectors)
    columns = [
        padded.view(np.uint64),
        *(np.ascontiguousarray(column).view(np.uint64) for column in id_columns),
    ]
    return np.concatenate(columns, axis=1) + np.uint64(1)


def _group_by_hash(hashes: np.ndarray) -> Deduplicated:
    n = hashes.shape[1]
    order = np.lexsort((hashes[1], hashes[0]))  # stable: rows of a group stay in their order
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
_MAX_WASTED_PAIRS = 2**17  # comparing so many takes about as long as beginning another block

SearchResult = tuple[np.ndarray, np.ndarray]


class Index(ABC):
    """Vectors that can be asked for the nearest admissible others of their rows."""

    @abstractmethod
    def search(self, rows: np.ndarray, k: int) -> SearchResult:
        """Return the k nearest admissible other rows of some rows.

        Args:
            rows: (m,) int64; thousands at a time are faster than the same in small parts.
            k: How many, at least 1; rows with fewer admissible others are padded.

        Returns:
            Rows (m, k) int64, nearest first, -1 where there are no more; and their cosine
            similarity (m, k) float32, -inf there. Where records were given, at most one row of each record:
            its nearest.
        """


class ExactIndex(Index):
    """Exact search over all rows."""

    def __init__(
        self,
        vectors: np.ndarray,
        *,
        exclude: np.ndarray | None = None,
        require: np.ndarray | None = None,
        image_ids: np.ndarray | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        device: str = "cpu",
    ) -> None:
        """Group equal rows.

        Args:
            vectors: (n, d) float32 of unit length or zero, may be memory-mapped.
            exclude: (n, m) int64 codes or None: rows with an equal code >= 0 in any column are kept apart.
            require: (n,) int64 codes or None: only rows with an equal code >= 0 come together.
            image_ids: (n,) int64 codes >= 0 or None: rows of one record are kept apart, and of another record
                only the nearest row is found.
            memory_bytes: Bytes that blocks may take; about 50 bytes a row and 4 a code come on top, and 24
                for
                each number that is not 0 where nearly all are.
            device: Where blocks are compared; those of nearly nothing but zeros are on the processor.

        Raises:
            InputError: for codes that are not one a row.
        """
        self.vectors, self.image_ids = vectors, image_ids
        self.constraints = SearchConstraints(
            _exclusion_columns(vectors, exclude, require, image_ids), require
        )
        self.dedup = deduplicate_rows(vectors, self.constraints.exclude, require)
        self._search_vectors = to_sparse_if_sparse(vectors)
        self._memory_bytes, self._device = memory_bytes, device

    def search(self, rows: np.ndarray, k: int) -> SearchResult:
        """See `Index.search`."""
        if self.image_ids is None:
            return self.search_rows(rows, k)
        return topk_per_image(self.search_rows, rows, k, self.image_ids)

    def search_rows(self, rows: np.ndarray, k: int) -> SearchResult:
        """Search as `search` does, and leave several rows of one record among what is found."""
        exclude, require = self.constraints.exclude, self.constraints.require
        return exact_topk(
            self._search_vectors,
            self.dedup,
            rows,
            k,
            exclude=exclude,
            require=require,
            memory_bytes=self._memory_bytes,
            device=self._device,
        )


def _exclusion_columns(
    vectors: np.ndarray, exclude: np.ndarray | None, require: np.ndarray | None, image_ids: np.ndarray | None
) -> np.ndarray:
    """Check that there is a code a row, and add the record to what must differ: (n, m) int64.

    Raises:
        InputError: for codes that are not one a row.
    """
    for name, ids in (("exclude", exclude), ("require", require), ("image_ids", image_ids)):
        if ids is not None and (len(ids) != len(vectors) or ids.ndim != 1 + (name == "exclude")):
            raise InvalidInputError(f"codes `{name}` have the shape {ids.shape}, for {len(vectors)} vectors")
    columns = [ids.reshape(len(vectors), -1) for ids in (exclude, image_ids) if ids is not None]
    return np.concatenate([np.empty((len(vectors), 0), np.int64), *columns], axis=1)


def exact_topk(
    vectors: Vectors,
    dedup: Deduplicated,
    queries: np.ndarray,
    k: int,
    *,
    exclude: np.ndarray | None = None,
    require: np.ndarray | None = None,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    device: str = "cpu",
) -> SearchResult:
    """Return the k nearest admissible other rows of some query rows.

    Args:
        vectors: (n, d) float32 of unit length or zero, may be memory-mapped; or what `compact` made of them.
        dedup: What `group_equal` made of them and of the same codes.
        queries: (m,) int64 rows.
        k: How many neighbors; rows with fewer than k admissible others are padded.
        exclude: (n, m) int64 codes or None: rows with an equal code >= 0 in any column are kept apart.
        require: (n,) int64 codes or None: only rows with an equal code >= 0 come together.
        memory_bytes: Bytes that blocks of similarities and what is selected of them may take.
        device: Where blocks are compared.

    Returns:
        Neighbors (m, k) int64, nearest first, -1 where there are no more; and their cosine similarity (m, k)
        float32, -inf there. Of rows that are equally near, those equal to each other (in codes too) stand
        together, ordered by their lowest; among them come first those after the query row.
    """
    groups, inverse = np.unique(dedup.group_ids[queries], return_inverse=True)
    best_groups = np.full((len(groups), k + 1), -1, np.int64)
    scores = np.full((len(groups), k + 1), -np.inf)
    constraints = SearchConstraints(
        np.empty((vectors.shape[0], 0), np.int64) if exclude is None else exclude, require
    )
    precision = fastest_precision(device) if isinstance(vectors, np.ndarray) else EXACT_PRECISION
    query_block_size, column_block_size = block_sizes(vectors.shape[1], k + 1, memory_bytes)
    for block, columns in _query_blocks(dedup, groups, require, query_block_size):
        # One more than k, because a row's own group is among its best and may hold nobody else.
        rows = dedup.first_rows[groups[block]]
        matches, scores[block] = topk_columns(
            vectors, rows, columns, k + 1, constraints, precision, column_block_size
        )
        best_groups[block] = np.where(matches < 0, -1, dedup.group_ids[columns[matches]])
    return expand_duplicates(queries, best_groups, scores, inverse, dedup, k)


def _query_blocks(
    dedup: Deduplicated, groups: np.ndarray, require: np.ndarray | None, block_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide query groups into blocks: (places in `groups`, rows to search among), both int64."""
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
    """Bring queries and columns of the same code together, several small codes at a time."""
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
    """Turn best groups into best rows, each row itself left out.

    Of the rows of a group, those after the row itself come first, and then those before it: were the lowest
    always first, all images of one caption would share one partner.

    Args:
        rows: (m,) int64.
        best_groups: (g, j) int64 groups, best first, -1 padded; j > k, or all there are.
        scores: (g, j) float64 similarities.
        inverse: (m,) int64, the place in `best_groups` that answers for each row.
        dedup: Who is in which group.
        k: How many.

    Returns:
        Rows (m, k) int64 and similarities (m, k) float32, padded with -1 and -inf.
    """
    neighbors = np.full((len(rows), k), -1, np.int64)
    similarity = np.full((len(rows), k), -np.inf, np.float32)
    group_sizes = np.diff(dedup.group_starts)
    max_members = min(k + 1, int(group_sizes.max(initial=0)))
    # Members in order are also in the order of these numbers, which tell where a row would stand among them.
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
    """Return the nearest rows of the k nearest records, by looking for more and more rows.

    Args:
        search_fn: Returns the best rows of some rows, as `Index.search` does.
        rows: (m,) int64.
        k: How many records.
        image_ids: (n,) int64, the record of each row.

    Returns:
        Rows (m, k) int64 of different records, best first, and similarities (m, k) float32, padded.
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
    """Tell where a code stands for the first time in its row: (m, k) int64 -> (m, k) bool."""
    order = np.argsort(ids, axis=1, kind="stable")
    sorted_ids = np.take_along_axis(ids, order, axis=1)
    is_first = np.ones(ids.shape, bool)
    np.put_along_axis(is_first, order[:, 1:], sorted_ids[:, 1:] != sorted_ids[:, :-1], axis=1)
    return is_first
