"""Rows that nothing tells apart: equal vectors with equal codes are searched once and spelled out after."""

from dataclasses import dataclass

import numpy as np

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
