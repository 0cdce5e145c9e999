"""Approximate nearest neighbors: a faiss inverted file (IVF) whose `nprobe` is set by measured recall.

k-means assigns vectors to lists, and a query searches the lists with the nearest centroids only (Jégou, Douze
and Schmid 2011, section IV). Results are rescored in float64.
"""

from typing import Any

import numpy as np

from likewise.errors import DependencyError
from likewise.neighbors._bf16_scan import exact_scores
from likewise.neighbors.search import (
    DEFAULT_MEMORY_BYTES,
    UNCONSTRAINED,
    ExactIndex,
    Index,
    SearchResult,
    expand_duplicates,
    topk_per_image,
)
from likewise.neighbors.vectors import SearchConstraints

DEFAULT_TARGET_RECALL = 0.95
_RECALL_K = 10
_RECALL_SAMPLE_SIZE = 500
_LISTS_PER_SQRT_ROW = 2
_TRAIN_ROWS_PER_LIST = 64
_MIN_ROWS_PER_LIST = 39  # below it faiss warns
_ADD_BATCH_SIZE = 65_536
_MAX_OVERSAMPLING = 16  # times k + 1; rows with fewer results are searched exactly


class IVFIndex(Index):
    """Approximate search in a faiss inverted file with measured recall.

    Attributes:
        recall: Recall at 10 against the exact search, on a sample of rows.
        nprobe: Number of lists that a query searches.
        nlist: Number of lists.
        sample_size: Number of rows in the sample.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        constraints: SearchConstraints = UNCONSTRAINED,
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        device: str = "cpu",
        target_recall: float = DEFAULT_TARGET_RECALL,
        seed: int = 0,
    ) -> None:
        """Build the lists, and double `nprobe` until the target recall is reached or all lists are searched.

        u distinct vectors are assigned to 2 √u lists, which take 4 u d bytes of memory in addition to the
        memory-mapped vectors, and 12 bytes per nonzero component of sparse ones.

        Args:
            vectors: (n, d) float32, unit length or zero, may be memory-mapped.
            constraints: Which rows may be neighbors.
            memory_bytes: Memory of blocks in bytes, in addition to the lists.
            device: Device of the exact search, of the sample and of rows that the lists leave incomplete.
            target_recall: Minimum recall at 10 on the sample.
            seed: Seed of k-means and of the sample.

        Raises:
            DependencyError: if faiss is not installed.
            InvalidInputError: if the constraints do not have one code per row.
        """
        self._faiss = _import_faiss()
        self._exact = ExactIndex(vectors, constraints, memory_bytes=memory_bytes, device=device)
        self._memory_bytes = memory_bytes
        self._first_rows = self._exact.dedup.first_rows
        num_unique = len(self._first_rows)
        self.nlist = max(
            1, min(round(_LISTS_PER_SQRT_ROW * num_unique**0.5), num_unique // _MIN_ROWS_PER_LIST)
        )
        rng = np.random.default_rng(seed)
        self._ivf = self._build_ivf(rng, seed)
        rows = np.sort(rng.permutation(len(vectors))[:_RECALL_SAMPLE_SIZE])
        expected, _ = self._exact.search(rows, _RECALL_K)
        self.sample_size, self.nprobe = len(rows), 1
        self.recall = self._measure_recall(rows, expected)
        while self.recall < target_recall and self.nprobe < self.nlist:
            self.nprobe = min(2 * self.nprobe, self.nlist)
            self.recall = self._measure_recall(rows, expected)

    def search(self, rows: np.ndarray, k: int) -> SearchResult:
        """See `Index.search`."""
        image_ids = self._exact.constraints.image_ids
        return (
            self._search_rows(rows, k)
            if image_ids is None
            else topk_per_image(self._search_rows, rows, k, image_ids)
        )

    def _build_ivf(self, rng: np.random.Generator, seed: int) -> Any:
        vectors, first_rows = self._exact.vectors, self._first_rows
        dim = vectors.shape[1]
        ivf = self._faiss.IndexIVFFlat(
            self._faiss.IndexFlatIP(dim), dim, self.nlist, self._faiss.METRIC_INNER_PRODUCT
        )
        ivf.cp.seed = seed
        ivf.cp.spherical = True
        train_rows = np.sort(rng.permutation(len(first_rows))[: _TRAIN_ROWS_PER_LIST * self.nlist])
        ivf.train(vectors[first_rows[train_rows]])
        for start in range(0, len(first_rows), _ADD_BATCH_SIZE):
            ivf.add(vectors[first_rows[start : start + _ADD_BATCH_SIZE]])
        return ivf

    def _measure_recall(self, rows: np.ndarray, expected: np.ndarray) -> float:
        retrieved = self.search(rows, _RECALL_K)[0]
        is_hit = (expected[:, :, None] == retrieved[:, None, :]).any(axis=2) & (expected >= 0)
        return float(is_hit.sum() / max(1, (expected >= 0).sum()))

    def _search_rows(self, rows: np.ndarray, k: int) -> SearchResult:
        groups, inverse = np.unique(self._exact.dedup.group_ids[rows], return_inverse=True)
        best_groups = np.full((len(groups), k + 1), -1, np.int64)
        scores = np.full((len(groups), k + 1), -np.inf)
        pending, num_requested, num_unique = np.arange(len(groups)), 0, len(self._first_rows)
        while len(pending) and num_requested < min(num_unique, _MAX_OVERSAMPLING * (k + 1)):
            num_requested = min(num_unique, max(2 * num_requested, k + 1))
            candidates, candidate_scores = self._search_groups(groups[pending], num_requested)
            columns = slice(0, min(num_requested, k + 1))
            best_groups[pending, columns], scores[pending, columns] = (
                candidates[:, columns],
                candidate_scores[:, columns],
            )
            pending = pending[best_groups[pending, k] < 0]
        neighbors, similarity = expand_duplicates(rows, best_groups, scores, inverse, self._exact.dedup, k)
        is_unfilled = neighbors[:, k - 1] < 0
        if is_unfilled.any():
            neighbors[is_unfilled], similarity[is_unfilled] = self._exact.search_rows(rows[is_unfilled], k)
        return neighbors, similarity

    def _search_groups(self, groups: np.ndarray, num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the admissible ones of the nearest groups, best first, and their exact scores."""
        first_rows = self._first_rows
        search_params = self._faiss.SearchParametersIVF(nprobe=self.nprobe)
        best_groups = np.full((len(groups), num_candidates), -1, np.int64)
        scores = np.full(best_groups.shape, -np.inf)
        batch_size = max(1, self._memory_bytes // (num_candidates * 60 + self._exact.vectors.shape[1] * 4))
        for start in range(0, len(groups), batch_size):
            batch = slice(start, start + batch_size)
            rows = first_rows[groups[batch]]
            candidates = self._ivf.search(self._exact.vectors[rows], num_candidates, params=search_params)[1]
            row, column = np.nonzero(candidates >= 0)
            candidate_rows = first_rows[candidates[row, column]]
            is_admissible = self._exact.constraints.admissible(rows[row], candidate_rows)
            row, column, candidate_rows = (
                row[is_admissible],
                column[is_admissible],
                candidate_rows[is_admissible],
            )
            candidate_scores = np.full(candidates.shape, -np.inf)
            candidate_scores[row, column] = exact_scores(self._exact.vectors, rows[row], candidate_rows)
            candidates = np.where(np.isfinite(candidate_scores), candidates, len(first_rows))
            order = np.lexsort((candidates, -candidate_scores))
            scores[batch] = np.take_along_axis(candidate_scores, order, axis=1)
            candidates = np.take_along_axis(candidates, order, axis=1)
            best_groups[batch] = np.where(candidates < len(first_rows), candidates, -1)
        return best_groups, scores


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            "the approximate search requires faiss: pip install 'likewise[approximate]'"
        ) from error
    return faiss
