"""Rules on tables of candidates: each takes some away or changes their order, none adds any.

A table has a row an image (or a caption), nearest first, and ends in -1 where there are no more.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import log_ndtr

ROUNDING = 1e-6  # equal unit vectors in float32 are this far from a cosine of 1
_CSLS_NEIGHBORS = 10
_MERGED_ROWS = 16_384


@dataclass(frozen=True)
class Candidates:
    """Who may become a partner.

    Attributes:
        positions: (n, k) int64, best first, -1 where there is none.
        similarity: (n, k) float32 cosine, -inf where there is none.
    """

    positions: np.ndarray
    similarity: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """Where there is a candidate: (n, k) bool."""
        return self.positions >= 0

    def first(self, k: int) -> "Candidates":
        """Return the best k of every row."""
        return Candidates(self.positions[:, :k], self.similarity[:, :k])

    def keep(self, kept: np.ndarray) -> "Candidates":
        """Return the candidates where `kept` (n, k) bool holds, in their order, closed up to the left."""
        kept = kept & self.found
        order = np.argsort(~kept, axis=1, kind="stable")
        positions = np.where(kept, self.positions, -1)
        similarity = np.where(kept, self.similarity, -np.inf).astype(np.float32)
        return Candidates(
            np.take_along_axis(positions, order, axis=1), np.take_along_axis(similarity, order, axis=1)
        )

    def by(self, score: np.ndarray) -> "Candidates":
        """Return the candidates in the order of another score (n, k), best first, ties as they stood."""
        order = np.argsort(-np.where(self.found, score, -np.inf), axis=1, kind="stable")
        return Candidates(
            np.take_along_axis(self.positions, order, axis=1),
            np.take_along_axis(self.similarity, order, axis=1),
        )


def among(candidates: Candidates, allowed: np.ndarray) -> Candidates:
    """Keep candidates that are allowed at all: `allowed` is (images,) bool."""
    allowed = np.append(allowed, False)  # the last place answers for -1
    return candidates.keep(allowed[candidates.positions])


def at_least(candidates: Candidates, similarity: float) -> Candidates:
    """Keep candidates of at least this cosine similarity, give or take what float32 rounds."""
    return candidates.keep(candidates.similarity >= similarity - ROUNDING)


def clearly_nearest(candidates: Candidates, ratio: float) -> Candidates:
    """Keep rows whose second candidate is farther than the first by a factor, as in Lowe's ratio test.

    The distance is 1 - cosine. A row with one candidate passes. (The LGSSL code reads such a ratio from its
    pairs and drops those below a threshold, but what writes it was not published; Lowe 2004, section 7.1.)
    """
    if candidates.positions.shape[1] < 2:
        return candidates
    distance = np.maximum(1 - candidates.similarity[:, :2].astype(np.float64), 0)
    clear = distance[:, 1] >= ratio * distance[:, 0]
    alone = candidates.positions[:, 1] < 0
    return candidates.keep(np.broadcast_to((clear | alone)[:, None], candidates.positions.shape))


def mutual(candidates: Candidates, m: int) -> Candidates:
    """Keep pairs that are among each other's first m; rows must be images, in order of position.

    What is kept is symmetric: with j in i's row, i is in j's.
    """
    first = candidates.first(m)
    n = len(first.positions)
    rows, places = np.nonzero(first.found)
    others = first.positions[rows, places]
    both = np.zeros(candidates.positions.shape, bool)
    both[rows, places] = np.isin(others * n + rows, rows * n + others)
    return candidates.keep(both)


def csls_scores(candidates: Candidates, base: Candidates) -> np.ndarray:
    """Score candidates by cross-domain similarity local scaling (Conneau et al. 2018, eq. 2).

    CSLS(x, y) = 2 cos(x, y) - r(x) - r(y), with r the mean similarity to the ten nearest in `base`, whose
    rows are images; r(x) does not change the order within a row and is left out. (n, k) float64.
    """
    near = base.first(_CSLS_NEIGHBORS)
    counts = near.found.sum(axis=1)
    sums = np.where(near.found, near.similarity, 0).sum(axis=1, dtype=np.float64)
    r = np.append(sums / np.maximum(counts, 1), 0)
    return 2 * candidates.similarity.astype(np.float64) - r[candidates.positions]


def mutual_proximity_scores(candidates: Candidates, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Score candidates by Gaussian mutual proximity (Schnitzer et al. 2012, eq. 3), its logarithm.

    MP(x, y) = P(S_x < s) P(S_y < s), where S_x is the similarity of x to any other image, taken as normal
    with `mean` and `std` (n,) and independent of S_y. The logarithm keeps apart what would round to 1.
    """
    mean, std = np.append(mean, 0), np.append(np.maximum(std, 1e-12), 1)
    s = candidates.similarity.astype(np.float64)
    own = (s - mean[:-1, None]) / std[:-1, None]
    other = (s - mean[candidates.positions]) / std[candidates.positions]
    return log_ndtr(own) + log_ndtr(other)


def reciprocal_ranks(
    words: Candidates, looks: Candidates, image_weight: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fuse two tables by reciprocal rank (Cormack et al. 2009): sum of weight / (60 + rank), ranks from 1.

    `image_weight` (n, 1) is the weight of looks in each row, from 0 to 1.

    Returns:
        The best k of both, (n, k) int64 (-1 where there are no more), and their scores (n, k) float64.
    """
    scores = []
    for table, weight in ((words, 1 - image_weight), (looks, image_weight)):
        ranks = np.arange(1, table.positions.shape[1] + 1, dtype=np.float64)
        scores.append(np.where(table.found, weight / (60 + ranks), 0))
    return merged(words.positions, looks.positions, scores[0], scores[1], k)


def union(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return who stands in either of two tables: (n, a), (n, b) -> (n, a + b) int64, -1 at the end."""
    k = first.shape[1] + second.shape[1]
    return merged(first, second, np.zeros(first.shape), np.zeros(second.shape), k)[0]


def merged(
    first: np.ndarray, second: np.ndarray, score: np.ndarray, other: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add up the scores of two tables, candidate by candidate, and return the best k of each row.

    Candidates (n, a) and (n, b) int64 with scores of the same shapes; ties go to the lower position.
    """
    k = min(k, first.shape[1] + second.shape[1])
    best, scores = np.empty((len(first), k), np.int64), np.empty((len(first), k))
    for start in range(0, len(first), _MERGED_ROWS):
        part = slice(start, start + _MERGED_ROWS)
        best[part], scores[part] = _merged(
            np.concatenate([first[part], second[part]], axis=1),
            np.concatenate([score[part], other[part]], axis=1),
            k,
        )
    return best, scores


def _merged(positions: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(positions, axis=1, kind="stable")
    positions, scores = (np.take_along_axis(each, order, axis=1) for each in (positions, scores))
    twin = np.zeros(positions.shape, bool)
    twin[:, 1:] = positions[:, 1:] == positions[:, :-1]
    # A candidate stands in each table at most once, so that twins come in twos.
    scores[:, :-1] += np.where(twin[:, 1:], scores[:, 1:], 0)
    gone = twin | (positions < 0)
    positions, scores = np.where(gone, -1, positions), np.where(gone, -np.inf, scores)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(positions, best, axis=1), np.take_along_axis(scores, best, axis=1)
