"""Approximate nearest neighbors: faiss's inverted lists, probed until a measured recall is reached.

Vectors are put into lists by k-means, and a query looks only into the lists whose centers are nearest to it
(Jégou, Douze and Schmid 2011, section IV). What is found is scored again in float64.
"""

from typing import Any

import numpy as np

from likewise.errors import DependencyError
from likewise.neighbors._bf16_scan import exact_scores
from likewise.neighbors.search import (
    DEFAULT_MEMORY_BYTES,
    ExactIndex,
    Index,
    SearchResult,
    expand_duplicates,
    topk_per_image,
)

DEFAULT_TARGET_RECALL = 0.95
_RECALL_K = 10
_RECALL_SAMPLE_SIZE = 500
_LISTS_PER_SQRT_ROW = 2
_TRAIN_ROWS_PER_LIST = 64
_MIN_ROWS_PER_LIST = 39  # where faiss begins to warn
_ADD_BATCH_SIZE = 65_536
_MAX_OVERSAMPLING = 16  # times k + 1; rows that so many cannot fill are searched exactly


class IVFIndex(Index):
    """Search in the nearest of faiss's inverted lists, with measured recall.

    Attributes:
        recall: The share of the exact 10 nearest that was found, over a sample of rows, with this `nprobe`.
        nprobe: How many lists are looked into.
        nlist: How many lists there are.
        sample_size: How many rows the recall was measured on.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        *,
        exclude: np.ndarray | None = None,
        require: np.ndarray | None = None,
        image_ids: np.ndarray | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        device: str = "cpu",
        target_recall: float = DEFAULT_TARGET_RECALL,
        seed: int = 0,
    ) -> None:
        """Build the lists and double `nprobe` until the recall is reached, or all lists are searched.

        There are 2 √u lists of u distinct vectors; they hold u d 4 bytes in memory beside the mapped vectors,
        and where nearly all numbers are 0, 12 bytes for each other one.

        Args:
            vectors: (n, d) float32 of unit length or zero, may be memory-mapped.
            exclude: (n, m) int64 codes or None: rows with an equal code >= 0 in any column are kept apart.
            require: (n,) int64 codes or None: only rows with an equal code >= 0 come together.
            image_ids: (n,) int64 codes >= 0 or None: rows of one record are kept apart, and of another record
                only the nearest row is found.
            memory_bytes: Bytes that blocks may take beside the lists.
            device: Where the exact search runs, of the sample and of rows that the lists cannot fill.
            target_recall: The least recall@10 to reach on the sample.
            seed: Draws what k-means begins with, what it is trained on, and the sample.

        Raises:
            DependencyError: where faiss is not installed.
            InputError: for codes that are not one a row.
        """
        self._faiss = _import_faiss()
        self._exact = ExactIndex(
            vectors,
            exclude=exclude,
            require=require,
            image_ids=image_ids,
            memory_bytes=memory_bytes,
            device=device,
        )
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
        image_ids = self._exact.image_ids
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
        """Return those of the nearest groups that are admissible, best first, and their exact scores."""
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
            "the approximate search needs faiss; run: pip install 'likewise[approximate]'"
        ) from error
    return faiss
