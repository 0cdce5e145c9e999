"""Fast products of blocks of vectors, and how far off they can be."""

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
