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

from likewise.errors import InputError
from likewise.neighbors._bf16_scan import (
    EXACT,
    Admission,
    Vectors,
    best_columns,
    block_sizes,
    compact,
    fast_arithmetic,
)

_HASHED_BYTES = 2**19


@dataclass(frozen=True)
class Grouped:
    """Vectors with the repeats taken out.

    Attributes:
        first: (u,) int64, the first row of each distinct vector, ascending.
        group: (n,) int64, the distinct vector of each row.
        members: (n,) int64, all rows ordered by group and then by row.
        starts: (u + 1,) int64, where each group begins in `members`.
    """

    first: np.ndarray
    group: np.ndarray
    members: np.ndarray
    starts: np.ndarray


def group_equal(
    vectors: np.ndarray, differ: np.ndarray | None = None, same: np.ndarray | None = None
) -> Grouped:
    """Find rows that are equal to the bit, vectors (n, d) float32 and codes alike.

    Rows are told apart by two independent 64-bit multiply-add hashes, so a false match among 10⁹ rows has a
    probability below 10⁻²⁰.

    Args:
        vectors: (n, d) float32, may be memory-mapped.
        differ: (n, m) int64 codes, or None.
        same: (n,) int64 codes, or None.
    """
    codes = [part.reshape(len(vectors), -1) for part in (differ, same) if part is not None]
    words = (vectors.shape[1] + 1) // 2 + sum(part.shape[1] for part in codes)
    draws = np.random.default_rng(0).integers(1, 2**63, size=(2, words), dtype=np.int64).astype(np.uint64)
    hashes = np.empty((2, len(vectors)), np.uint64)
    step = max(1, _HASHED_BYTES // (8 * max(1, words)))
    for start in range(0, len(vectors), step):
        part = slice(start, start + step)
        bits = _as_words(vectors[part], [code[part] for code in codes])
        for nth in range(2):
            mixed = bits * (draws[nth] | np.uint64(1))
            mixed ^= mixed >> np.uint64(31)
            hashes[nth, part] = mixed.sum(axis=1, dtype=np.uint64)
    return _grouped(hashes)


def _as_words(vectors: np.ndarray, codes: list[np.ndarray]) -> np.ndarray:
    """Lay rows out as 64-bit words, none of them zero for a zero component."""
    odd = vectors.shape[1] % 2
    even = np.pad(vectors, ((0, 0), (0, 1))) if odd else np.ascontiguousarray(vectors)
    words = [even.view(np.uint64), *(np.ascontiguousarray(code).view(np.uint64) for code in codes)]
    return np.concatenate(words, axis=1) + np.uint64(1)


def _grouped(hashes: np.ndarray) -> Grouped:
    n = hashes.shape[1]
    order = np.lexsort((hashes[1], hashes[0]))  # stable: rows of a group stay in their order
    ordered = hashes[:, order]
    begins = np.ones(n, bool)
    begins[1:] = (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)
    first = order[begins]
    by_appearance = np.argsort(first)
    rank = np.empty_like(by_appearance)
    rank[by_appearance] = np.arange(len(first))
    group = np.empty(n, np.int64)
    group[order] = rank[np.cumsum(begins) - 1]
    members = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(first)))])
    return Grouped(first[by_appearance], group, members, starts)


MEMORY = 512 * 2**20
_WASTED_PAIRS = 2**17  # comparing so many takes about as long as beginning another block

Found = tuple[np.ndarray, np.ndarray]


class Index(ABC):
    """Vectors that can be asked for the nearest admissible others of their rows."""

    @abstractmethod
    def search(self, rows: np.ndarray, k: int) -> Found:
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
        differ: np.ndarray | None = None,
        same: np.ndarray | None = None,
        record: np.ndarray | None = None,
        memory: int = MEMORY,
        device: str = "cpu",
    ) -> None:
        """Group equal rows.

        Args:
            vectors: (n, d) float32 of unit length or zero, may be memory-mapped.
            differ: (n, m) int64 codes or None: rows with an equal code >= 0 in any column are kept apart.
            same: (n,) int64 codes or None: only rows with an equal code >= 0 come together.
            record: (n,) int64 codes >= 0 or None: rows of one record are kept apart, and of another record
                only the nearest row is found.
            memory: Bytes that blocks may take; about 50 bytes a row and 4 a code come on top, and 24 for
                each number that is not 0 where nearly all are.
            device: Where blocks are compared; those of nearly nothing but zeros are on the processor.

        Raises:
            InputError: for codes that are not one a row.
        """
        self.vectors, self.record = vectors, record
        self.admission = Admission(_all_that_differ(vectors, differ, same, record), same)
        self.grouped = group_equal(vectors, self.admission.differ, same)
        self._searched = compact(vectors)
        self._memory, self._device = memory, device

    def search(self, rows: np.ndarray, k: int) -> Found:
        """See `Index.search`."""
        if self.record is None:
            return self.nearest_rows(rows, k)
        return nearest_of_each_record(self.nearest_rows, rows, k, self.record)

    def nearest_rows(self, rows: np.ndarray, k: int) -> Found:
        """Search as `search` does, and leave several rows of one record among what is found."""
        differ, same = self.admission.differ, self.admission.same
        return top_k(
            self._searched,
            self.grouped,
            rows,
            k,
            differ=differ,
            same=same,
            memory=self._memory,
            device=self._device,
        )


def _all_that_differ(
    vectors: np.ndarray, differ: np.ndarray | None, same: np.ndarray | None, record: np.ndarray | None
) -> np.ndarray:
    """Check that there is a code a row, and add the record to what must differ: (n, m) int64.

    Raises:
        InputError: for codes that are not one a row.
    """
    for name, codes in (("differ", differ), ("same", same), ("record", record)):
        if codes is not None and (len(codes) != len(vectors) or codes.ndim != 1 + (name == "differ")):
            raise InputError(f"codes `{name}` have the shape {codes.shape}, for {len(vectors)} vectors")
    parts = [codes.reshape(len(vectors), -1) for codes in (differ, record) if codes is not None]
    return np.concatenate([np.empty((len(vectors), 0), np.int64), *parts], axis=1)


def top_k(
    vectors: Vectors,
    grouped: Grouped,
    queries: np.ndarray,
    k: int,
    *,
    differ: np.ndarray | None = None,
    same: np.ndarray | None = None,
    memory: int = MEMORY,
    device: str = "cpu",
) -> Found:
    """Return the k nearest admissible other rows of some query rows.

    Args:
        vectors: (n, d) float32 of unit length or zero, may be memory-mapped; or what `compact` made of them.
        grouped: What `group_equal` made of them and of the same codes.
        queries: (m,) int64 rows.
        k: How many neighbors; rows with fewer than k admissible others are padded.
        differ: (n, m) int64 codes or None: rows with an equal code >= 0 in any column are kept apart.
        same: (n,) int64 codes or None: only rows with an equal code >= 0 come together.
        memory: Bytes that blocks of similarities and what is selected of them may take.
        device: Where blocks are compared.

    Returns:
        Neighbors (m, k) int64, nearest first, -1 where there are no more; and their cosine similarity (m, k)
        float32, -inf there. Of rows that are equally near, those equal to each other (in codes too) stand
        together, ordered by their lowest; among them come first those after the query row.
    """
    groups, back = np.unique(grouped.group[queries], return_inverse=True)
    best = np.full((len(groups), k + 1), -1, np.int64)
    scores = np.full((len(groups), k + 1), -np.inf)
    admission = Admission(np.empty((vectors.shape[0], 0), np.int64) if differ is None else differ, same)
    arithmetic = fast_arithmetic(device) if isinstance(vectors, np.ndarray) else EXACT
    height, width = block_sizes(vectors.shape[1], k + 1, memory)
    for some, columns in _tasks(grouped, groups, same, height):
        # One more than k, because a row's own group is among its best and may hold nobody else.
        rows = grouped.first[groups[some]]
        found, scores[some] = best_columns(vectors, rows, columns, k + 1, admission, arithmetic, width)
        best[some] = np.where(found < 0, -1, grouped.group[columns[found]])
    return spell_out(queries, best, scores, back, grouped, k)


def _tasks(
    grouped: Grouped, groups: np.ndarray, same: np.ndarray | None, height: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide query groups into blocks: (places in `groups`, rows to search among), both int64."""
    if same is None:
        blocks = [(np.arange(len(groups)), grouped.first)]
    else:
        blocks = _scopes(same[grouped.first[groups]], same[grouped.first], grouped.first)
    for places, columns in blocks:
        for start in range(0, len(places), height):
            yield places[start : start + height], columns


def _scopes(
    codes: np.ndarray, column_codes: np.ndarray, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Bring queries and columns of the same code together, several small codes at a time."""
    order = np.argsort(codes, kind="stable")
    order = order[np.searchsorted(codes[order], 0) :]
    by_code = np.argsort(column_codes, kind="stable")
    found, begins = np.unique(codes[order], return_index=True)
    ends = np.append(begins[1:], len(order))
    low = np.searchsorted(column_codes[by_code], found)
    high = np.searchsorted(column_codes[by_code], found, side="right")
    needed = (ends - begins) * (high - low)
    useful, first = 0, 0
    for here, own in enumerate(needed):
        useful += own
        if here + 1 < len(found):
            compared = (ends[here + 1] - begins[first]) * (high[here + 1] - low[first])
            if compared - useful - needed[here + 1] <= _WASTED_PAIRS:
                continue
        yield order[begins[first] : ends[here]], rows[by_code[low[first] : high[here]]]
        useful, first = 0, here + 1


def spell_out(
    rows: np.ndarray, best: np.ndarray, scores: np.ndarray, back: np.ndarray, grouped: Grouped, k: int
) -> Found:
    """Turn best groups into best rows, each row itself left out.

    Of the rows of a group, those after the row itself come first, and then those before it: were the lowest
    always first, all images of one caption would share one partner.

    Args:
        rows: (m,) int64.
        best: (g, j) int64 groups, best first, -1 padded; j > k, or all there are.
        scores: (g, j) float64 similarities.
        back: (m,) int64, the place in `best` that answers for each row.
        grouped: Who is in which group.
        k: How many.

    Returns:
        Rows (m, k) int64 and similarities (m, k) float32, padded with -1 and -inf.
    """
    neighbors = np.full((len(rows), k), -1, np.int64)
    similarity = np.full((len(rows), k), -np.inf, np.float32)
    sizes = np.diff(grouped.starts)
    lent = min(k + 1, int(sizes.max(initial=0)))
    # Members in order are also in the order of these numbers, which tell where a row would stand among them.
    ranks = grouped.group[grouped.members] * len(grouped.group) + grouped.members
    chunk = max(1, 2**18 // max(1, best.shape[1] * lent))
    nth = np.arange(lent)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        groups = best[back[part]]
        there = (groups[:, :, None] >= 0) & (nth < sizes[groups][:, :, None])
        after = np.searchsorted(ranks, groups * len(grouped.group) + rows[part, None], side="right")
        turned = (after - grouped.starts[groups])[:, :, None] + nth
        at = np.where(
            there, grouped.starts[groups][:, :, None] + turned % np.maximum(sizes[groups], 1)[:, :, None], 0
        )
        ids = np.where(there, grouped.members[at], -1).reshape(len(at), -1)
        value = np.repeat(scores[back[part]], lent, axis=1)
        value = np.where((ids < 0) | (ids == rows[part, None]), -np.inf, value)
        order = np.argsort(-value, axis=1, kind="stable")[:, :k]
        chosen = np.take_along_axis(value, order, axis=1)
        filled = np.where(np.isfinite(chosen), np.take_along_axis(ids, order, axis=1), -1)
        neighbors[part, : order.shape[1]] = filled
        similarity[part, : order.shape[1]] = chosen
    return neighbors, similarity


def nearest_of_each_record(
    find: Callable[[np.ndarray, int], Found], rows: np.ndarray, k: int, record: np.ndarray
) -> Found:
    """Return the nearest rows of the k nearest records, by looking for more and more rows.

    Args:
        find: Returns the best rows of some rows, as `Index.search` does.
        rows: (m,) int64.
        k: How many records.
        record: (n,) int64, the record of each row.

    Returns:
        Rows (m, k) int64 of different records, best first, and similarities (m, k) float32, padded.
    """
    neighbors = np.full((len(rows), k), -1, np.int64)
    similarity = np.full((len(rows), k), -np.inf, np.float32)
    short, count = np.arange(len(rows)), k
    while len(short):
        count = min(2 * count, max(1, len(record)))
        ids, values = find(rows[short], count)
        kept = _first_of_each(np.where(ids < 0, -1, record[ids])) & (ids >= 0)
        place = np.cumsum(kept, axis=1) - 1
        at, column = np.nonzero(kept & (place < k))
        neighbors[short[at], place[at, column]] = ids[at, column]
        similarity[short[at], place[at, column]] = values[at, column]
        done = (kept.sum(axis=1) >= k) | (ids[:, -1] < 0) | (count >= len(record))
        short = short[~done]
    return neighbors, similarity


def _first_of_each(codes: np.ndarray) -> np.ndarray:
    """Tell where a code stands for the first time in its row: (m, k) int64 -> (m, k) bool."""
    order = np.argsort(codes, axis=1, kind="stable")
    ordered = np.take_along_axis(codes, order, axis=1)
    first = np.ones(codes.shape, bool)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first
