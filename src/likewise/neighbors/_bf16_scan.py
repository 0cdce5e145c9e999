"""Exact top-k in one pass over all columns: low-precision scores with an error bound, rescored in float64.

A low-precision product with its error bound gives an interval that contains the similarity. A pair is pruned
only if the intervals of k others of its row lie entirely above its own; the remaining pairs are rescored in
float64. The result is therefore exact and independent of precision, block sizes and device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, vstack
from torch import Tensor

from likewise.neighbors.vectors import SearchConstraints

# (n, d): a float32 array or a float64 scipy csr_array, whose annotations lack indexing.
Vectors = Any
_MAX_SPARSE_DENSITY = 1 / 64  # nonzero fraction below which a sparse product is faster than a dense one
_SPARSE_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class MatmulPrecision:
    """Precision of block products, with its error.

    Attributes:
        device: Device of the products.
        dtype: Type that the vectors are rounded to.
        rel_error: Relative error of a product beyond that of rounding the vectors.
        output_error: Relative error of rounding the result.
    """

    device: str
    dtype: torch.dtype
    rel_error: float
    output_error: float


EXACT_PRECISION = MatmulPrecision("cpu", torch.float64, 0.0, 0.0)


def to_sparse_if_sparse(vectors: np.ndarray) -> Vectors:
    """Return vectors (n, d) float32 as sparse float64 if nearly all components are zero, as in word counts.

    Such vectors have many equal similarities. Their sparse product is the exact one, summed column by column
    in float64, so that ties need no rescoring.
    """
    sample = vectors[:: max(1, len(vectors) // 1000)]
    if not len(vectors) or np.count_nonzero(sample) > _MAX_SPARSE_DENSITY * sample.size:
        return vectors
    starts = range(0, len(vectors), _SPARSE_CHUNK_ROWS)
    return csr_array(
        vstack(
            [csr_array(vectors[start : start + _SPARSE_CHUNK_ROWS], dtype=np.float64) for start in starts],
            "csr",
        )
    )


def fastest_precision(device: str) -> MatmulPrecision:
    """Return the fastest precision with a known error bound.

    On the CPU bfloat16 (8 bits, sums in float32) if it has such instructions, else float32. On a GPU float32,
    which may be TensorFloat-32 (11 bits), as the caller has set it.
    """
    if device != "cpu":
        return MatmulPrecision(device, torch.float32, 2.0**-9, 0.0)
    if _has_native_bf16():
        return MatmulPrecision(device, torch.bfloat16, 0.0, 2.0**-8)
    return MatmulPrecision(device, torch.float32, 0.0, 0.0)


@cache
def _has_native_bf16() -> bool:
    # Older releases of torch lack this function.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True)
class QuantizedRows:
    """Rounded vectors, with their norms and the norms of their rounding errors, (n,) float64."""

    values: Tensor
    norms: np.ndarray
    errors: np.ndarray


def quantize_rows(vectors: np.ndarray, precision: MatmulPrecision) -> QuantizedRows:
    """Round vectors (n, d) float32 to the precision."""
    values = torch.from_numpy(vectors).to(precision.dtype)
    if precision.dtype == torch.float32:
        return QuantizedRows(values.to(precision.device), _norms(vectors), np.zeros(len(vectors)))
    dequantized = values.float().numpy()
    return QuantizedRows(values.to(precision.device), _norms(dequantized), _norms(vectors - dequantized))


def _norms(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", vectors, vectors).astype(np.float64))


def error_bound(queries: QuantizedRows, columns: QuantizedRows, precision: MatmulPrecision) -> np.ndarray:
    """Bound |x·y - fl(x̃·ỹ)| before the result is rounded, for each query and any of the columns: (m,).

    With x = x̃ + e and y = ỹ + f it is at most |e||y| + |x̃||f| (Cauchy-Schwarz); summing d products in
    float32 adds at most d 2⁻²⁴ |x̃||ỹ|, doubled here to cover rounding modes and underflow of the hardware.
    """
    max_norm, max_error = columns.norms.max(), columns.errors.max()
    rel_error = precision.rel_error + columns.values.shape[1] * 2.0**-23
    return 1.0001 * (
        queries.errors * (max_norm + max_error) + queries.norms * (max_error + rel_error * max_norm)
    )


def score_interval(
    scores: np.ndarray, error: np.ndarray, precision: MatmulPrecision
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the intervals that contain the exact products of computed scores."""
    margin = error + precision.output_error * np.abs(scores)
    return scores - margin, scores + margin


def matmul(queries: QuantizedRows, columns: QuantizedRows) -> Tensor:
    """Return the products of all pairs, (m, c) in the dtype of the vectors."""
    if queries.values.device.type == "cpu" and queries.values.dtype == torch.float32:
        # Settings may lower the precision of torch's float32 product, but not of numpy's.
        return torch.from_numpy(queries.values.numpy() @ columns.values.numpy().T)
    return queries.values @ columns.values.T


def at_least(scores: Tensor, threshold: np.ndarray) -> Tensor:
    """Return which scores of a block reach the threshold of their row: (m, c) bool.

    The threshold is rounded as the block was. Rounding is monotone, so no score above it is lost.
    """
    bound = torch.from_numpy(threshold).to(scores.device, scores.dtype)[:, None]
    if scores.dtype == torch.bfloat16 and scores.device.type == "cpu" and bool((bound > 0).all()):
        # Positive floats are ordered as their bits, and numpy compares those four times as fast.
        score_bits, bound_bits = scores.view(torch.int16).numpy(), bound.view(torch.int16).numpy()
        return torch.from_numpy(score_bits >= bound_bits)
    return scores >= bound


def make_block_scorer(
    vectors: Vectors, rows: np.ndarray, precision: MatmulPrecision
) -> Callable[[np.ndarray], tuple[Tensor, np.ndarray]]:
    """Return a function from columns (c,) to scores (m, c) and their error bounds (m,) float64."""
    if not isinstance(vectors, np.ndarray):
        query_vectors, zero_error = vectors[rows], np.zeros(len(rows))
        return lambda columns: (torch.from_numpy((query_vectors @ vectors[columns].T).toarray()), zero_error)
    queries = quantize_rows(vectors[rows], precision)

    def score_block(columns: np.ndarray) -> tuple[Tensor, np.ndarray]:
        column_block = quantize_rows(_gather_rows(vectors, columns), precision)
        return matmul(queries, column_block), error_bound(queries, column_block, precision)

    return score_block


def _gather_rows(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Copy rows, by a slice if they are contiguous."""
    if rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return np.array(vectors[rows[0] : rows[-1] + 1])
    return vectors[rows]


_RESCORE_CHUNK_BYTES = 2**19
_MIN_SCORE = -1e30  # below all similarities, and above masked scores
_BYTES_PER_HIT = 120  # per candidate pair, including the buffers of sorting


class TopKAccumulator:
    """The pairs that may still be in the top k of their row, each with an interval that contains its score.

    Attributes:
        lower_bound: (m,) float64, a score that at least k columns of the row reach.
    """

    def __init__(
        self, num_rows: int, k: int, score_fn: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> None:
        """Start empty; `score_fn` scores pairs (rows, columns) in float64."""
        self.k = k
        self.lower_bound = np.full(num_rows, -np.inf)
        self._rescored_bound = np.full(num_rows, -np.inf)
        self._score_fn = score_fn
        # The k greatest lower ends of intervals per row, rounded down; lower bounds derive from them.
        self._top_lower_bounds = torch.full((num_rows, k), -torch.inf)
        self._candidates = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))]
        self._num_candidates = 0

    @property
    def threshold(self) -> np.ndarray:
        """Score that a later column must reach, (m,) float64; ties go to the earlier column."""
        return np.maximum(self.lower_bound, np.nextafter(self._rescored_bound, np.inf))

    def add(self, rows: np.ndarray, columns: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Add pairs, (p,) int64 each, rows ascending, with the bounds of their intervals, (p,) float64.

        The columns of a row must be added in ascending order.
        """
        self._raise_bounds(rows, low)
        self._candidates.append((rows, columns, low, high))
        self._num_candidates += len(rows)
        if self._num_candidates > 6 * self.k * len(self.lower_bound):
            self._prune()
            if self._num_candidates > 3 * self.k * len(self.lower_bound):
                self._rescore()

    def _raise_bounds(self, rows: np.ndarray, low: np.ndarray) -> None:
        """Raise the lower bounds by new pairs."""
        starts = np.searchsorted(rows, np.arange(len(self.lower_bound)))
        rank = np.arange(len(rows)) - starts[rows]
        # Further pairs of a row are ignored here, which leaves its bound lower but valid.
        width = min(int(rank.max(initial=-1)) + 1, 4 * self.k)
        new_bounds = np.full((len(self.lower_bound), width), -np.inf, np.float32)
        is_within = rank < width
        new_bounds[rows[is_within], rank[is_within]] = np.nextafter(
            low[is_within].astype(np.float32), np.float32(-np.inf)
        )
        merged = torch.cat([self._top_lower_bounds, torch.from_numpy(new_bounds)], dim=1)
        self._top_lower_bounds = merged.topk(self.k, dim=1, sorted=False).values
        self.lower_bound = np.maximum(self.lower_bound, self._top_lower_bounds.amin(dim=1).numpy())

    def _prune(self) -> None:
        """Remove pairs that can no longer be in the top k."""
        rows, columns, low, high = (np.concatenate(parts) for parts in zip(*self._candidates, strict=True))
        mask = high >= self.lower_bound[rows]
        self._candidates = [(rows[mask], columns[mask], low[mask], high[mask])]
        self._num_candidates = int(mask.sum())

    def _rescore(self) -> np.ndarray:
        """Rescore the remaining pairs, sort and keep the top k of each row; return the rank of each."""
        rows, columns, low, high = self._candidates[0]
        is_uncertain = low < high
        score = low.copy()
        if is_uncertain.any():
            score[is_uncertain] = self._score_fn(rows[is_uncertain], columns[is_uncertain])
        order = np.lexsort((columns, -score, rows))
        rows, columns, score = rows[order], columns[order], score[order]
        rank = np.arange(len(rows)) - np.searchsorted(rows, np.arange(len(self.lower_bound)))[rows]
        is_kth = rank == self.k - 1
        self._rescored_bound[rows[is_kth]] = score[is_kth]
        self.lower_bound[rows[is_kth]] = np.maximum(self.lower_bound[rows[is_kth]], score[is_kth])
        mask = rank < self.k
        self._candidates = [(rows[mask], columns[mask], score[mask], score[mask])]
        self._num_candidates = int(mask.sum())
        return rank[mask]

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the top k columns of each row, (m, k) int64 padded with -1, and scores (m, k) float64."""
        self._prune()
        rank = self._rescore()
        rows, columns, score, _ = self._candidates[0]
        best = np.full((len(self.lower_bound), self.k), -1, np.int64)
        scores = np.full((len(self.lower_bound), self.k), -np.inf)
        best[rows, rank], scores[rows, rank] = columns, score
        return best, scores


def exact_scores(vectors: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Score pairs in float64; the score of a pair depends on its two vectors only."""
    scores = np.empty(len(rows))
    chunk_size = max(1, _RESCORE_CHUNK_BYTES // (4 * max(1, vectors.shape[1])))
    for start in range(0, len(rows), chunk_size):
        chunk = slice(start, start + chunk_size)
        scores[chunk] = (vectors[rows[chunk]].astype(np.float64) * vectors[columns[chunk]]).sum(axis=1)
    return scores


def block_sizes(dim: int, k: int, memory_bytes: int) -> tuple[int, int]:
    """Return the numbers of query rows and columns per block within a memory limit; at least 32 each."""
    rows, columns = 4096, 1024

    def num_bytes() -> int:
        return (rows + columns) * dim * 12 + rows * columns * 14 + rows * k * 8 * _BYTES_PER_HIT

    while num_bytes() > memory_bytes and max(rows, columns) > 32:
        rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
    return rows, columns


@torch.inference_mode()
def topk_columns(
    vectors: Vectors,
    rows: np.ndarray,
    columns: np.ndarray,
    k: int,
    constraints: SearchConstraints,
    precision: MatmulPrecision,
    block_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the top k admissible columns of each row.

    Args:
        vectors: (n, d) float32, or the result of `to_sparse_if_sparse`.
        rows: (m,) int64, the query rows of `vectors`.
        columns: (c,) int64, the rows of `vectors` to search.
        k: Number of columns per row.
        constraints: Which rows may be neighbors.
        precision: Precision of block products.
        block_size: Columns per block.

    Returns:
        Indices into `columns` (m, k) int64, best first, ties to the lower, padded with -1; and similarities
        (m, k) float64, padded with -inf.
    """
    accumulator = TopKAccumulator(
        len(rows),
        k,
        lambda row_index, column_index: exact_scores(vectors, rows[row_index], columns[column_index]),
    )
    score_block = make_block_scorer(vectors, rows, precision)
    if len(columns) > 4 * block_size:
        # Bounds from a sample first: if similar rows are adjacent, the first block is not representative.
        sample = columns[:: len(columns) // block_size]
        scores, error = score_block(sample)
        constraints.mask_scores(scores, rows, sample)
        _raise_bounds_from_block(scores, accumulator, error, precision)
    for start in range(0, len(columns), block_size):
        block = columns[start : start + block_size]
        scores, error = score_block(block)
        hits = _select_hits(scores, accumulator, error, precision, constraints, (rows, block))
        for chunk in hits.split(_dense_limit(accumulator)):
            chunk_scores = scores.flatten()[chunk].double().cpu().numpy()
            row_index, column_index = np.divmod(chunk.cpu().numpy(), len(block))
            accumulator.add(
                row_index, column_index + start, *score_interval(chunk_scores, error[row_index], precision)
            )
    return accumulator.result()


def _dense_limit(accumulator: TopKAccumulator) -> int:
    """Return the number of hits of a block above which it is masked as a whole."""
    return 2 * accumulator.k * len(accumulator.lower_bound)


def _count_true(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else mask.count_nonzero())


def _raise_bounds_from_block(
    scores: Tensor, accumulator: TopKAccumulator, error: np.ndarray, precision: MatmulPrecision
) -> None:
    """Raise each lower bound to what k columns of a block reach for certain."""
    if accumulator.k <= scores.shape[1]:
        kth_scores = scores.topk(accumulator.k, dim=1, sorted=False).values.amin(dim=1).double().cpu().numpy()
        is_full = np.isfinite(kth_scores)
        low, _ = score_interval(kth_scores[is_full], error[is_full], precision)
        accumulator.lower_bound[is_full] = np.maximum(accumulator.lower_bound[is_full], low)


def _select_hits(
    scores: Tensor,
    accumulator: TopKAccumulator,
    error: np.ndarray,
    precision: MatmulPrecision,
    constraints: SearchConstraints,
    block: tuple[np.ndarray, np.ndarray],
) -> Tensor:
    """Return the flat indices of admissible pairs of a block that may be in their row's top k, ascending.

    If there are many, the constraints mask the whole block, which then raises the lower bounds.
    """

    def select() -> Tensor:
        return at_least(scores, np.maximum(accumulator.threshold - error, _MIN_SCORE))

    hits, is_masked = select(), constraints.is_trivial
    if not is_masked and _count_true(hits) > _dense_limit(accumulator):
        constraints.mask_scores(scores, *block)
        hits, is_masked = select(), True
    if _count_true(hits) > _dense_limit(accumulator):
        _raise_bounds_from_block(scores, accumulator, error, precision)
        hits = select()
    if hits.device.type == "cpu":
        hits = torch.from_numpy(np.flatnonzero(hits.numpy()))
    else:
        hits = hits.flatten().nonzero().flatten()
    if is_masked:
        return hits
    row_index, column_index = np.divmod(hits.cpu().numpy(), scores.shape[1])
    return hits[
        torch.from_numpy(constraints.admissible(block[0][row_index], block[1][column_index])).to(hits.device)
    ]
