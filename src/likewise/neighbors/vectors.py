"""One vector an image, looked up by position in the embeddings on disk."""

from functools import lru_cache

import numpy as np

from likewise.embeddings.embed import Embeddings

_OPEN_SHARDS = 64  # each mapped file holds a descriptor, of which a process usually has 1,024
_BLOCK_BYTES = 2**25


def block_rows(dimension: int) -> int:
    """Return how many vectors of float32 to hold at a time: 32 MiB of them, however long each is."""
    return max(256, _BLOCK_BYTES // (4 * dimension))


class RecordVectors:
    """Random access to pooled embeddings: the mean of an image's vectors, of unit length again."""

    def __init__(self, embeddings: Embeddings, images: int, kept: np.ndarray | None = None) -> None:
        """Map the shards; holds 16 bytes a caption and 16 an image in memory.

        `kept` tells which rows of the embeddings count, (captions,) bool; all of them where not given.
        """
        self.dimension = embeddings.dimension
        self.key = embeddings.artifact.manifest.key
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(embeddings.vectors)
        owners = [embeddings.ids(i) for i in range(embeddings.shards)]
        self._begins = np.concatenate([[0], np.cumsum([len(each) for each in owners])])
        ids = np.concatenate(owners)
        self.rows = np.arange(len(ids)) if kept is None else np.flatnonzero(kept)
        self.ids = ids[self.rows]
        self.first = np.searchsorted(self.ids, np.arange(images))
        self.count = np.searchsorted(self.ids, np.arange(images), side="right") - self.first

    def of(self, positions: np.ndarray) -> np.ndarray:
        """Return the vectors of some images: (b,) int64 -> (b, d) float32, zero where one has none."""
        counts = self.count[positions]
        sums = np.zeros((len(positions), self.dimension), np.float32)
        for nth in range(counts.max(initial=0)):
            some = counts > nth
            sums[some] += self.caption(self.first[positions[some]] + nth)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        return np.where(norms > 1e-6, sums / np.maximum(norms, 1e-6), 0)

    def similarity(self, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return the cosine of each image and its candidates: (n,), (n, k) -> (n, k) float32; 0 at -1."""
        values = np.zeros(candidates.shape, np.float32)
        step = max(1, block_rows(self.dimension) // max(1, candidates.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            there = candidates[part] >= 0
            row, _ = np.nonzero(there)
            others, which = np.unique(candidates[part][there], return_inverse=True)
            own, vectors = self.of(rows[part]), self.of(others)
            values[part][there] = np.einsum("md,md->m", own[row], vectors[which])
        return values

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of each image's similarity to all others: (n,), (n,) float64.

        From the sum and the second moment of all vectors, so that no pair is looked at. Images without a
        vector get mean 0 and deviation 0.
        """
        n, d = len(self.count), self.dimension
        total, second, m = np.zeros(d), np.zeros((d, d)), 0
        rows = block_rows(d)
        steps = [np.arange(start, min(start + rows, n)) for start in range(0, n, rows)]
        for step in steps:
            vectors = self.of(step).astype(np.float64)
            total += vectors.sum(axis=0)
            second += vectors.T @ vectors
            m += int((np.abs(vectors).sum(axis=1) > 0).sum())
        means, deviations = np.zeros(n), np.zeros(n)
        for step in steps:
            vectors = self.of(step).astype(np.float64)
            itself = (vectors**2).sum(axis=1)
            mean = (vectors @ total - itself) / max(1, m - 1)
            square = (np.einsum("nd,de,ne->n", vectors, second, vectors, optimize=True) - itself**2) / max(
                1, m - 1
            )
            means[step] = mean
            deviations[step] = np.sqrt(np.maximum(square - mean**2, 0))
        return means, deviations

    def caption(self, places: np.ndarray) -> np.ndarray:
        """Return the vectors of single captions, by their place among those that count: (m,) -> (m, d)."""
        rows = self.rows[places]
        gathered = np.empty((len(rows), self.dimension), np.float32)
        shard = np.searchsorted(self._begins, rows, side="right") - 1
        for index in np.unique(shard):
            here = shard == index
            gathered[here] = self._shard(int(index))[rows[here] - self._begins[index]]
        return gathered
