"""Exact nearest neighbors by cosine: a blockwise self-join with running top-k.

Blocks are compared in float32, and only what could still enter a row's best k (within `_SLACK`) is scored
again in float64, so results do not depend on the size of blocks or on the device. Equal vectors are searched
for once. Ties go to the lower position. Nobody is their own neighbor, by identity and not by dropping the
first hit: with repeated captions, the first hit is often somebody else.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SLACK = 1e-4  # more than float32 dot products of unit vectors err by
_QUERY_ROWS = 1024
_EXACT_ROWS = 16_384


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


def group_equal(vectors: np.ndarray) -> Grouped:
    """Find rows that are equal to the bit: (n, d) float32 -> groups.

    Rows are told apart by two independent 64-bit multiply-add hashes, so a false match among 10⁹ rows has a
    probability below 10⁻²⁰.
    """
    words = vectors.shape[1]
    multipliers = (
        np.random.default_rng(0).integers(1, 2**63, size=(words, 2), dtype=np.int64).astype(np.uint64)
    )
    hashes = np.empty((len(vectors), 2), np.uint64)
    for start in range(0, len(vectors), _EXACT_ROWS):
        bits = np.ascontiguousarray(vectors[start : start + _EXACT_ROWS]).view(np.uint32).astype(np.uint64)
        mixed = (bits[:, :, None] + np.uint64(1)) * (multipliers | np.uint64(1))
        hashes[start : start + _EXACT_ROWS] = (mixed ^ (mixed >> np.uint64(31))).sum(axis=1, dtype=np.uint64)
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first)
    rank = np.empty_like(by_appearance)
    rank[by_appearance] = np.arange(len(by_appearance))
    group = rank[inverse.reshape(-1)]
    members = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(first)))])
    return Grouped(first[by_appearance], group, members, starts)


@torch.inference_mode()
def top_k(
    vectors: np.ndarray,
    grouped: Grouped,
    queries: np.ndarray,
    k: int,
    *,
    memory: int = 512 * 2**20,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest other rows of some query rows.

    Args:
        vectors: (n, d) float32 unit vectors, may be memory-mapped.
        grouped: What `group_equal` made of them.
        queries: (m,) int64 rows.
        k: How many neighbors; rows with fewer than k others are padded.
        memory: Bytes that a block of similarities and its selection may take.
        device: Where blocks are compared.

    Returns:
        Neighbors (m, k) int64, nearest first, -1 where there are no more; and their cosine similarity
        (m, k) float32, -inf there.
    """
    neighbors = np.full((len(queries), k), -1, np.int64)
    similarity = np.full((len(queries), k), -np.inf, np.float32)
    for start in range(0, len(queries), _QUERY_ROWS):
        block = queries[start : start + _QUERY_ROWS]
        # One more than k, because a row's own group is among its best and may hold nobody else.
        groups, scores = _nearest_groups(vectors, block, grouped.first, k + 1, memory, device)
        here = slice(start, start + len(block))
        neighbors[here], similarity[here] = _spell_out(block, groups, scores, grouped, k)
    return neighbors, similarity


def _nearest_groups(
    vectors: np.ndarray, rows: np.ndarray, distinct: np.ndarray, k: int, memory: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best groups of each query row and their float64 similarity, best first."""
    queries = np.asarray(vectors[rows])
    best = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf)
    columns = max(1024, memory // (len(queries) * 10))
    on_device = torch.from_numpy(queries).to(device)
    for start in range(0, len(distinct), columns):
        block = np.asarray(vectors[distinct[start : start + columns]])
        similar = on_device @ torch.from_numpy(block).to(device).T
        which, hits = _could_enter(similar, scores[:, -1], k)
        exact = _exact(queries, block, which, hits)
        best, scores = _merge(best, scores, which, hits + start, exact)
    return best, scores


def _could_enter(similar: Tensor, worst: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the (row, column) places of a block that may belong to their row's best k."""
    floor = torch.from_numpy(worst).to(similar)
    if not np.isfinite(worst).all():
        floor = torch.maximum(floor, similar.topk(min(k, similar.shape[1]), dim=1).values[:, -1])
        if similar.shape[1] < k:
            floor.fill_(-torch.inf)
    places = (similar >= (floor - _SLACK)[:, None]).nonzero().cpu().numpy()
    return places[:, 0], places[:, 1]


def _exact(queries: np.ndarray, block: np.ndarray, rows: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Score pairs in float64; each pair's value depends on nothing but its two vectors."""
    scores = np.empty(len(rows))
    for start in range(0, len(rows), _EXACT_ROWS):
        part = slice(start, start + _EXACT_ROWS)
        scores[part] = (queries[rows[part]].astype(np.float64) * block[hits[part]]).sum(axis=1)
    return scores


def _merge(
    best: np.ndarray, scores: np.ndarray, rows: np.ndarray, hits: np.ndarray, exact: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keep each row's k best of what it had and what came, ties to the lower column."""
    n, k = best.shape
    all_rows = np.concatenate([np.repeat(np.arange(n), k), rows])
    all_hits = np.concatenate([best.ravel(), hits])
    all_scores = np.concatenate([scores.ravel(), exact])
    order = np.lexsort((all_hits, -all_scores, all_rows))
    place = np.arange(len(order)) - np.searchsorted(all_rows[order], np.arange(n))[all_rows[order]]
    kept = order[place < k]
    return all_hits[kept].reshape(n, k), all_scores[kept].reshape(n, k)


def _spell_out(
    rows: np.ndarray, groups: np.ndarray, scores: np.ndarray, grouped: Grouped, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turn each row's best groups into its best k rows, itself left out."""
    neighbors = np.full((len(rows), k), -1, np.int64)
    similarity = np.full((len(rows), k), -np.inf, np.float32)
    sizes = np.diff(grouped.starts)
    # A group lends at most k + 1 of its rows; the lowest come first, so no better one is passed over.
    lent = min(k + 1, int(sizes.max(initial=0)))
    chunk = max(1, 2**22 // (groups.shape[1] * lent))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        nth = np.arange(lent)
        there = (groups[part, :, None] >= 0) & (nth < sizes[groups[part]][:, :, None])
        at = np.where(there, grouped.starts[groups[part]][:, :, None] + nth, 0)
        ids = np.where(there, grouped.members[at], -1).reshape(len(at), -1)
        value = np.repeat(scores[part], lent, axis=1)
        value = np.where((ids < 0) | (ids == rows[part, None]), -np.inf, value)
        order = np.lexsort((ids, -value))[:, :k]
        chosen = np.take_along_axis(value, order, axis=1)
        filled = np.where(np.isfinite(chosen), np.take_along_axis(ids, order, axis=1), -1)
        neighbors[part, : order.shape[1]] = filled
        similarity[part, : order.shape[1]] = chosen
    return neighbors, similarity
