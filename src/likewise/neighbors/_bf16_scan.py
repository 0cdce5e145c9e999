"""One pass over all columns: fast inexact products first, exact ones for the few pairs that they leave.

A fast product gives an interval that holds the similarity. A pair is dropped only when the intervals of k
others of its row lie wholly above its own, and what is left is scored again in float64. So the result is
exact, and the same whatever the arithmetic, the block sizes and the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor

# (n, d): an array of float32, or scipy's csr_array of float64, whose annotations lack indexing.
Vectors = Any
_SPARSE = 1 / 64  # nonzero share below which a sparse product is faster than a dense one
_ROWS = 4096


@dataclass(frozen=True)
class Arithmetic:
    """How blocks are multiplied, and by how much that errs.

    Attributes:
        device: Where.
        dtype: What vectors are rounded to before.
        inner: Relative error of a product beyond the rounding of what goes in.
        outer: Relative error of rounding the result.
    """

    device: str
    dtype: torch.dtype
    inner: float
    outer: float


EXACT = Arithmetic("cpu", torch.float64, 0.0, 0.0)


def compact(vectors: np.ndarray) -> Vectors:
    """Return vectors (n, d) float32 as sparse float64 where nearly all of it is zero, as in word counts.

    Such vectors have few different similarities, many of them 0. Their fast product is the exact one, summed
    column by column in float64, so that ties need not be told apart by scoring each pair again.
    """
    sample = vectors[:: max(1, len(vectors) // 1000)]
    if not len(vectors) or np.count_nonzero(sample) > _SPARSE * sample.size:
        return vectors
    starts = range(0, len(vectors), _ROWS)
    return csr_array(vstack([csr_array(vectors[at : at + _ROWS], dtype=np.float64) for at in starts], "csr"))


def fast_arithmetic(device: str) -> Arithmetic:
    """Choose the fastest multiplication whose error is known.

    bfloat16 (8 bits of precision, sums in float32) where the processor multiplies it; float32 elsewhere,
    which on a GPU may mean TensorFloat-32 of 11 bits, as the caller has set it.
    """
    if device != "cpu":
        return Arithmetic(device, torch.float32, 2.0**-9, 0.0)
    if _multiplies_bfloat16():
        return Arithmetic(device, torch.bfloat16, 0.0, 2.0**-8)
    return Arithmetic(device, torch.float32, 0.0, 0.0)


@cache
def _multiplies_bfloat16() -> bool:
    # Older releases of torch do not tell.
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


@dataclass(frozen=True)
class Rounded:
    """Vectors as they are multiplied, with what rounding did to them: norms of both, (n,) float64."""

    values: Tensor
    norms: np.ndarray
    errors: np.ndarray


def rounded(vectors: np.ndarray, arithmetic: Arithmetic) -> Rounded:
    """Make vectors (n, d) float32 ready to be multiplied."""
    values = torch.from_numpy(vectors).to(arithmetic.dtype)
    if arithmetic.dtype == torch.float32:
        return Rounded(values.to(arithmetic.device), _norms(vectors), np.zeros(len(vectors)))
    back = values.float().numpy()
    return Rounded(values.to(arithmetic.device), _norms(back), _norms(vectors - back))


def _norms(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors).astype(np.float64))


def radius(queries: Rounded, columns: Rounded, arithmetic: Arithmetic) -> np.ndarray:
    """Bound |x·y - fl(x̃·ỹ)| before the result is rounded, for each query and any of the columns: (m,).

    With x = x̃ + e and y = ỹ + f it is at most |e||y| + |x̃||f| by Cauchy and Schwarz, and summing d products
    in float32 adds at most d 2⁻²⁴ |x̃||ỹ|, doubled here for what hardware does with rounding and underflow.
    """
    norm, error = columns.norms.max(), columns.errors.max()
    relative = arithmetic.inner + columns.values.shape[1] * 2.0**-23
    return 1.0001 * (queries.errors * (norm + error) + queries.norms * (error + relative * norm))


def ends(value: np.ndarray, off: np.ndarray, arithmetic: Arithmetic) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of intervals that hold the true products, from computed ones and their radius."""
    away = off + arithmetic.outer * np.abs(value)
    return value - away, value + away


def multiply(queries: Rounded, columns: Rounded) -> Tensor:
    """Return the products of all pairs, (m, c) of the type that is multiplied."""
    if queries.values.device.type == "cpu" and queries.values.dtype == torch.float32:
        # No setting lowers the precision of numpy's product, as it may that of torch's.
        return torch.from_numpy(queries.values.numpy() @ columns.values.numpy().T)
    return queries.values @ columns.values.T


def reaches(similar: Tensor, least: np.ndarray) -> Tensor:
    """Tell which places of a block reach their row's least value: (m, c) bool.

    The bound is rounded as the block was. Rounding is monotone, so what reached it before, reaches it after.
    """
    bound = torch.from_numpy(least).to(similar.device, similar.dtype)[:, None]
    if similar.dtype == torch.bfloat16 and similar.device.type == "cpu" and bool((bound > 0).all()):
        # Positive floats are ordered as their bits are, and numpy compares those four times as fast.
        bits, least_bits = similar.view(torch.int16).numpy(), bound.view(torch.int16).numpy()
        return torch.from_numpy(bits >= least_bits)
    return similar >= bound


def compare_with(
    vectors: Vectors, rows: np.ndarray, arithmetic: Arithmetic
) -> Callable[[np.ndarray], tuple[Tensor, np.ndarray]]:
    """Return what multiplies some rows with others: (c,) -> products (m, c) and their radius (m,) float64."""
    if not isinstance(vectors, np.ndarray):
        own, exact = vectors[rows], np.zeros(len(rows))
        return lambda others: (torch.from_numpy((own @ vectors[others].T).toarray()), exact)
    dense = rounded(vectors[rows], arithmetic)

    def compare(others: np.ndarray) -> tuple[Tensor, np.ndarray]:
        block = rounded(_gather(vectors, others), arithmetic)
        return multiply(dense, block), radius(dense, block, arithmetic)

    return compare


def _gather(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Copy some rows, at once where they lie side by side."""
    if rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return np.array(vectors[rows[0] : rows[-1] + 1])
    return vectors[rows]


_RESCORED_BYTES = 2**19
_LEAST = -1e30  # below all similarities, and above what is struck out
_HIT_BYTES = 120  # of a pair that is kept, with what sorting it takes


@dataclass(frozen=True)
class Admission:
    """Who may be whose neighbor, by row.

    Attributes:
        differ: (n, m) int64; rows with an equal code >= 0 in any column are kept apart.
        same: (n,) int64 or None; only rows with an equal code >= 0 come together.
    """

    differ: np.ndarray
    same: np.ndarray | None

    @property
    def open(self) -> bool:
        """Whether anybody may be anybody's neighbor."""
        return self.same is None and not self.differ.shape[1]

    def pairs(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return which of some pairs are admissible: (p,), (p,) -> (p,) bool."""
        kept = np.ones(len(rows), bool)
        for codes in self.differ.T:
            own = codes[rows]
            kept &= (own != codes[others]) | (own < 0)
        if self.same is not None:
            own = self.same[rows]
            kept &= (own == self.same[others]) & (own >= 0)
        return kept

    def strike(self, similar: Tensor, rows: np.ndarray, others: np.ndarray) -> None:
        """Set a block's inadmissible places to -inf: similar (m, c), rows (m,), others (c,)."""
        for codes in self.differ.T:
            own = np.where(codes[rows] < 0, -2, codes[rows])
            similar.masked_fill_(_equal(own, codes[others], similar.device), -torch.inf)
        if self.same is not None:
            equal = _equal(
                np.where(self.same[rows] < 0, -2, self.same[rows]), self.same[others], similar.device
            )
            similar.masked_fill_(equal.logical_not_(), -torch.inf)


def _equal(rows: np.ndarray, columns: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device)[:, None] == torch.from_numpy(columns).to(device)


class Best:
    """The pairs that may still be among their row's k best, each with an interval that holds its score.

    Attributes:
        floor: (m,) float64, what k of the row's columns are known to reach.
    """

    def __init__(self, rows: int, k: int, exact: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        """Begin with nothing; `exact` scores pairs (rows, columns) in float64."""
        self.k = k
        self.floor = np.full(rows, -np.inf)
        self._settled = np.full(rows, -np.inf)
        self._exact = exact
        # The k greatest lower ends that were seen of each row, rounded down: floors come from here.
        self._reached = torch.full((rows, k), -torch.inf)
        self._held = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))]
        self._count = 0

    @property
    def least(self) -> np.ndarray:
        """What a later column must reach, (m,) float64: beyond k settled ones, as ties go to the earlier."""
        return np.maximum(self.floor, np.nextafter(self._settled, np.inf))

    def add(self, rows: np.ndarray, columns: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Take new pairs on: (p,) int64 each, rows ascending; and their intervals' ends (p,) float64.

        Columns must come in ascending order of each row.
        """
        self._raise(rows, low)
        self._held.append((rows, columns, low, high))
        self._count += len(rows)
        if self._count > 6 * self.k * len(self.floor):
            self._drop()
            if self._count > 3 * self.k * len(self.floor):
                self._settle()

    def _raise(self, rows: np.ndarray, low: np.ndarray) -> None:
        """Raise floors by new pairs."""
        begins = np.searchsorted(rows, np.arange(len(self.floor)))
        place = np.arange(len(rows)) - begins[rows]
        # A row's pairs beyond so many are passed over here, which leaves its floor lower and still true.
        width = min(int(place.max(initial=-1)) + 1, 4 * self.k)
        seen = np.full((len(self.floor), width), -np.inf, np.float32)
        few = place < width
        seen[rows[few], place[few]] = np.nextafter(low[few].astype(np.float32), np.float32(-np.inf))
        both = torch.cat([self._reached, torch.from_numpy(seen)], dim=1)
        self._reached = both.topk(self.k, dim=1, sorted=False).values
        self.floor = np.maximum(self.floor, self._reached.amin(dim=1).numpy())

    def _drop(self) -> None:
        """Let go of what can no longer be among the best."""
        rows, columns, low, high = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
        kept = high >= self.floor[rows]
        self._held = [(rows[kept], columns[kept], low[kept], high[kept])]
        self._count = int(kept.sum())

    def _settle(self) -> np.ndarray:
        """Score exactly what is left and keep k a row, in order; return each one's place in its row."""
        rows, columns, low, high = self._held[0]
        unsure = low < high
        score = low.copy()
        if unsure.any():
            score[unsure] = self._exact(rows[unsure], columns[unsure])
        order = np.lexsort((columns, -score, rows))
        rows, columns, score = rows[order], columns[order], score[order]
        place = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(self.floor)))[rows]
        last = place == self.k - 1
        self._settled[rows[last]] = score[last]
        self.floor[rows[last]] = np.maximum(self.floor[rows[last]], score[last])
        kept = place < self.k
        self._held = [(rows[kept], columns[kept], score[kept], score[kept])]
        self._count = int(kept.sum())
        return place[kept]

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best columns of every row (m, k) int64, -1 padded, and scores (m, k) float64."""
        self._drop()
        place = self._settle()
        rows, columns, score, _ = self._held[0]
        best = np.full((len(self.floor), self.k), -1, np.int64)
        scores = np.full((len(self.floor), self.k), -np.inf)
        best[rows, place], scores[rows, place] = columns, score
        return best, scores


def exact_scores(vectors: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Score pairs in float64; each pair's value depends on nothing but its two vectors."""
    scores = np.empty(len(rows))
    step = max(1, _RESCORED_BYTES // (4 * max(1, vectors.shape[1])))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        scores[part] = (vectors[rows[part]].astype(np.float64) * vectors[others[part]]).sum(axis=1)
    return scores


def block_sizes(dimension: int, k: int, memory: int) -> tuple[int, int]:
    """Return how many query rows and columns to compare at a time, within some bytes; at least 32 of each."""
    rows, columns = 4096, 1024

    def size() -> int:
        return (rows + columns) * dimension * 12 + rows * columns * 14 + rows * k * 8 * _HIT_BYTES

    while size() > memory and max(rows, columns) > 32:
        rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
    return rows, columns


@torch.inference_mode()
def best_columns(
    vectors: Vectors,
    rows: np.ndarray,
    columns: np.ndarray,
    k: int,
    admission: Admission,
    arithmetic: Arithmetic,
    width: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best admissible columns of each row.

    Args:
        vectors: (n, d) float32, or what `compact` made of them.
        rows: (m,) int64 rows of `vectors` to search for.
        columns: (c,) int64 rows of `vectors` to search among.
        k: How many.
        admission: Who may be whose.
        arithmetic: How to multiply blocks.
        width: Columns a block.

    Returns:
        Indices into `columns` (m, k) int64, best first, ties to the lower, -1 where there are no more; and
        similarities (m, k) float64, -inf there.
    """
    best = Best(len(rows), k, lambda mine, theirs: exact_scores(vectors, rows[mine], columns[theirs]))
    compare = compare_with(vectors, rows, arithmetic)
    if len(columns) > 4 * width:
        # A sample first: where like lies beside like, the first block alone would say little of the others.
        sample = columns[:: len(columns) // width]
        similar, off = compare(sample)
        admission.strike(similar, rows, sample)
        _raise_floors(similar, best, off, arithmetic)
    for start in range(0, len(columns), width):
        others = columns[start : start + width]
        similar, off = compare(others)
        places = _places(similar, best, off, arithmetic, admission, (rows, others))
        for part in places.split(_crowd(best)):
            value = similar.flatten()[part].double().cpu().numpy()
            mine, theirs = np.divmod(part.cpu().numpy(), len(others))
            best.add(mine, theirs + start, *ends(value, off[mine], arithmetic))
    return best.result()


def _crowd(best: Best) -> int:
    """Return how many pairs of a block are too many to look at one by one."""
    return 2 * best.k * len(best.floor)


def _count(chosen: Tensor) -> int:
    return int(np.count_nonzero(chosen.numpy()) if chosen.device.type == "cpu" else chosen.count_nonzero())


def _raise_floors(similar: Tensor, best: Best, off: np.ndarray, arithmetic: Arithmetic) -> None:
    """Raise each row's floor to what k columns of a block reach for certain."""
    if best.k <= similar.shape[1]:
        reached = similar.topk(best.k, dim=1, sorted=False).values.amin(dim=1).double().cpu().numpy()
        full = np.isfinite(reached)
        low, _ = ends(reached[full], off[full], arithmetic)
        best.floor[full] = np.maximum(best.floor[full], low)


def _places(
    similar: Tensor,
    best: Best,
    off: np.ndarray,
    arithmetic: Arithmetic,
    admission: Admission,
    block: tuple[np.ndarray, np.ndarray],
) -> Tensor:
    """Return the flat places of a block that are admissible and may belong to their row's best, ascending.

    Where they crowd, the codes of the whole block are compared, and floors are raised by what it holds.
    """

    def chosen() -> Tensor:
        return reaches(similar, np.maximum(best.least - off, _LEAST))

    places, struck = chosen(), admission.open
    if not struck and _count(places) > _crowd(best):
        admission.strike(similar, *block)
        places, struck = chosen(), True
    if _count(places) > _crowd(best):
        _raise_floors(similar, best, off, arithmetic)
        places = chosen()
    if places.device.type == "cpu":
        places = torch.from_numpy(np.flatnonzero(places.numpy()))
    else:
        places = places.flatten().nonzero().flatten()
    if struck:
        return places
    mine, theirs = np.divmod(places.cpu().numpy(), similar.shape[1])
    return places[torch.from_numpy(admission.pairs(block[0][mine], block[1][theirs])).to(places.device)]
