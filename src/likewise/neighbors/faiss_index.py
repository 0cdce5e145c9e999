"""Approximate nearest neighbors: faiss's inverted lists, probed until a measured recall is reached.

Vectors are put into lists by k-means, and a query looks only into the lists whose centers are nearest to it
(Jégou, Douze and Schmid 2011, section IV). What is found is scored again in float64.
"""

from typing import Any

import numpy as np

from likewise.errors import DependencyError
from likewise.neighbors._bf16_scan import exact_scores
from likewise.neighbors.search import MEMORY, ExactIndex, Found, Index, nearest_of_each_record, spell_out

RECALL = 0.95
_RECALL_AT = 10
_SAMPLE = 500
_LISTS_PER_ROOT = 2
_TRAINED_PER_LIST = 64
_LEAST_PER_LIST = 39  # where faiss begins to warn
_ADDED_ROWS = 65_536
_MOST_ASKED = 16  # times k + 1; rows that so many cannot fill are searched exactly


class IvfIndex(Index):
    """Search in the nearest of faiss's inverted lists, with measured recall.

    Attributes:
        recall: The share of the exact 10 nearest that was found, over a sample of rows, with this `nprobe`.
        nprobe: How many lists are looked into.
        nlist: How many lists there are.
        sample: How many rows the recall was measured on.
    """

    def __init__(
        self,
        vectors: np.ndarray,
        *,
        differ: np.ndarray | None = None,
        same: np.ndarray | None = None,
        record: np.ndarray | None = None,
        memory: int = MEMORY,
        device: str = "cpu",
        recall: float = RECALL,
        seed: int = 0,
    ) -> None:
        """Build the lists and double `nprobe` until the recall is reached, or all lists are searched.

        There are 2 √u lists of u distinct vectors; they hold u d 4 bytes in memory beside the mapped vectors,
        and where nearly all numbers are 0, 12 bytes for each other one.

        Args:
            vectors: (n, d) float32 of unit length or zero, may be memory-mapped.
            differ: (n, m) int64 codes or None: rows with an equal code >= 0 in any column are kept apart.
            same: (n,) int64 codes or None: only rows with an equal code >= 0 come together.
            record: (n,) int64 codes >= 0 or None: rows of one record are kept apart, and of another record
                only the nearest row is found.
            memory: Bytes that blocks may take beside the lists.
            device: Where the exact search runs, of the sample and of rows that the lists cannot fill.
            recall: The least recall@10 to reach on the sample.
            seed: Draws what k-means begins with, what it is trained on, and the sample.

        Raises:
            DependencyError: where faiss is not installed.
            InputError: for codes that are not one a row.
        """
        self._faiss = _import_faiss()
        self._exact = ExactIndex(
            vectors, differ=differ, same=same, record=record, memory=memory, device=device
        )
        self._memory = memory
        self._first = self._exact.grouped.first
        distinct = len(self._first)
        self.nlist = max(1, min(round(_LISTS_PER_ROOT * distinct**0.5), distinct // _LEAST_PER_LIST))
        rng = np.random.default_rng(seed)
        self._lists = self._build(rng, seed)
        rows = np.sort(rng.permutation(len(vectors))[:_SAMPLE])
        wanted, _ = self._exact.search(rows, _RECALL_AT)
        self.sample, self.nprobe = len(rows), 1
        self.recall = self._measured(rows, wanted)
        while self.recall < recall and self.nprobe < self.nlist:
            self.nprobe = min(2 * self.nprobe, self.nlist)
            self.recall = self._measured(rows, wanted)

    def search(self, rows: np.ndarray, k: int) -> Found:
        """See `Index.search`."""
        record = self._exact.record
        return self._near(rows, k) if record is None else nearest_of_each_record(self._near, rows, k, record)

    def _build(self, rng: np.random.Generator, seed: int) -> Any:
        vectors, first = self._exact.vectors, self._first
        dimension = vectors.shape[1]
        lists = self._faiss.IndexIVFFlat(
            self._faiss.IndexFlatIP(dimension), dimension, self.nlist, self._faiss.METRIC_INNER_PRODUCT
        )
        lists.cp.seed = seed
        lists.cp.spherical = True
        trained = np.sort(rng.permutation(len(first))[: _TRAINED_PER_LIST * self.nlist])
        lists.train(vectors[first[trained]])
        for start in range(0, len(first), _ADDED_ROWS):
            lists.add(vectors[first[start : start + _ADDED_ROWS]])
        return lists

    def _measured(self, rows: np.ndarray, wanted: np.ndarray) -> float:
        found = self.search(rows, _RECALL_AT)[0]
        hit = (wanted[:, :, None] == found[:, None, :]).any(axis=2) & (wanted >= 0)
        return float(hit.sum() / max(1, (wanted >= 0).sum()))

    def _near(self, rows: np.ndarray, k: int) -> Found:
        groups, back = np.unique(self._exact.grouped.group[rows], return_inverse=True)
        best = np.full((len(groups), k + 1), -1, np.int64)
        scores = np.full((len(groups), k + 1), -np.inf)
        short, asked, distinct = np.arange(len(groups)), 0, len(self._first)
        while len(short) and asked < min(distinct, _MOST_ASKED * (k + 1)):
            asked = min(distinct, max(2 * asked, k + 1))
            some, values = self._admissible(groups[short], asked)
            here = slice(0, min(asked, k + 1))
            best[short, here], scores[short, here] = some[:, here], values[:, here]
            short = short[best[short, k] < 0]
        neighbors, similarity = spell_out(rows, best, scores, back, self._exact.grouped, k)
        left = neighbors[:, k - 1] < 0
        if left.any():
            neighbors[left], similarity[left] = self._exact.nearest_rows(rows[left], k)
        return neighbors, similarity

    def _admissible(self, groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return those of the nearest groups that are admissible, best first, and their exact scores."""
        first = self._first
        parameters = self._faiss.SearchParametersIVF(nprobe=self.nprobe)
        best = np.full((len(groups), count), -1, np.int64)
        scores = np.full(best.shape, -np.inf)
        step = max(1, self._memory // (count * 60 + self._exact.vectors.shape[1] * 4))
        for start in range(0, len(groups), step):
            part = slice(start, start + step)
            rows = first[groups[part]]
            found = self._lists.search(self._exact.vectors[rows], count, params=parameters)[1]
            at, place = np.nonzero(found >= 0)
            others = first[found[at, place]]
            kept = self._exact.admission.pairs(rows[at], others)
            at, place, others = at[kept], place[kept], others[kept]
            value = np.full(found.shape, -np.inf)
            value[at, place] = exact_scores(self._exact.vectors, rows[at], others)
            found = np.where(np.isfinite(value), found, len(first))
            order = np.lexsort((found, -value))
            scores[part] = np.take_along_axis(value, order, axis=1)
            found = np.take_along_axis(found, order, axis=1)
            best[part] = np.where(found < len(first), found, -1)
        return best, scores


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            "the approximate search needs faiss; run: pip install 'likewise[approximate]'"
        ) from error
    return faiss
