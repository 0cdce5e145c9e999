"""Rules on tables of candidates: each takes some away or changes their order, none adds any.

A table has a row an image (or a caption), nearest first, and ends in -1 where there are no more.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from scipy.special import log_ndtr

from likewise.data.dataset import Collection
from likewise.errors import InputError

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


_MOST_PLACES = 2**28  # of 12 bytes each
_COLUMNS = ("anchor", "partner", "similarity")


def read_pairs(path: Path, collection: Collection) -> Candidates:
    """Read pairs of a collection's images from CSV, TSV or Parquet.

    Columns `anchor` and `partner` hold ids of the collection; `similarity`, if there, is a number and decides
    the order, else the order of rows does. An image may have any number of partners.

    Returns:
        A row an image of the collection; where the file gives no similarity it is 1.

    Raises:
        InputError: for a missing file or column, an id that the collection does not have, an image paired
            with itself, or a similarity that is no number, with the row.
    """
    table = _read(path)
    if table.num_rows == 0:
        raise InputError(f"{path} holds no pairs")
    anchors, partners = (_positions(path, table, name, collection) for name in _COLUMNS[:2])
    itself = np.flatnonzero(anchors == partners)
    if len(itself):
        raise InputError(f"{path}, row {itself[0] + 1}: {table['anchor'][itself[0]]} is paired with itself")
    similarity = _similarity(path, table)
    order = np.lexsort((np.arange(len(anchors)), -similarity, anchors))
    anchors, partners, similarity = anchors[order], partners[order], similarity[order]
    place = np.arange(len(anchors)) - np.searchsorted(anchors, anchors)
    width = int(place.max()) + 1
    if width * len(collection) > _MOST_PLACES:
        most = table["anchor"][int(order[place.argmax()])]
        raise InputError(
            f"{path}: {most} has {width:,} partners, too many for a table of {len(collection):,} images; "
            f"keep at most {_MOST_PLACES // len(collection):,} an image"
        )
    positions = np.full((len(collection), width), -1, np.int64)
    values = np.full(positions.shape, -np.inf, np.float32)
    positions[anchors, place], values[anchors, place] = partners, similarity
    return Candidates(positions, values)


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise InputError(f"there is no file of pairs at {path}")
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            text = pa_csv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS[:2], pa.string()))
            parse = pa_csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
            table = pa_csv.read_csv(path, parse_options=parse, convert_options=text)
    except pa.ArrowInvalid as fault:
        raise InputError(f"{path} cannot be read as a table of pairs: {fault}") from fault
    missing = [name for name in _COLUMNS[:2] if name not in table.column_names]
    if missing:
        there = ", ".join(table.column_names)
        raise InputError(f"{path} has no column {' and no column '.join(missing)}; its columns are: {there}")
    return table


def _positions(path: Path, table: pa.Table, name: str, collection: Collection) -> np.ndarray:
    known = {}
    for shard, start in enumerate(collection.starts[:-1]):
        ids = collection.columns(shard, ["id"])["id"]
        known.update(zip(ids, range(start, start + len(ids)), strict=True))
    found = np.array([known.get(str(each), -1) for each in table[name].to_pylist()], np.int64)
    unknown = np.flatnonzero(found < 0)
    if len(unknown):
        first = table[name][int(unknown[0])]
        raise InputError(
            f"{path}, row {unknown[0] + 1}: {name} {str(first)!r} is no image of {collection.path} "
            f"({len(unknown):,} such rows); ids are those of the collection"
        )
    return found


def _similarity(path: Path, table: pa.Table) -> np.ndarray:
    if "similarity" not in table.column_names:
        return np.ones(table.num_rows)
    column = table["similarity"].combine_chunks()
    if column.null_count:
        row = column.is_null().to_pylist().index(True) + 1
        raise InputError(f"{path}, row {row}: the similarity is no number")
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise InputError(f"{path}: the column similarity holds {column.type}, not numbers")
    values = column.to_numpy(zero_copy_only=False).astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise InputError(f"{path}, row {wrong[0] + 1}: the similarity is no number")
    return values
