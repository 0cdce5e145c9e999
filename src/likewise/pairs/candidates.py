"""Candidates for partners: from a search or a table of ids, filtered and re-ranked.

Candidates are arrays with one row per image (or caption), nearest first, padded with -1.
"""

import logging
import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.special import log_ndtr

from likewise.data.dataset import CaptionDataset
from likewise.data.readers import SkippedSample, open_table_file
from likewise.data.readers.tables import Table, TableRow
from likewise.errors import InvalidInputError

FLOAT32_TOLERANCE = 1e-6  # error of the cosine similarity of equal unit vectors in float32
_CSLS_K = 10
_MERGE_CHUNK_ROWS = 16_384
logger = logging.getLogger(__name__)
_MAX_TABLE_CELLS = 2**28  # 12 bytes each
_COLUMNS = ("anchor", "partner", "similarity")


@dataclass(frozen=True)
class Candidates:
    """Candidates for the partner of each image.

    Attributes:
        positions: (n, k) int64, best first, padded with -1.
        similarity: (n, k) float32 cosine similarity, padded with -inf.
    """

    positions: np.ndarray
    similarity: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Mask of the entries that are not padding, (n, k) bool."""
        return self.positions >= 0

    def topk(self, k: int) -> "Candidates":
        """Return the first k candidates of each row."""
        return Candidates(self.positions[:, :k], self.similarity[:, :k])

    def filter(self, mask: np.ndarray) -> "Candidates":
        """Return the candidates where `mask` (n, k) bool is true, in the same order, padded at the end."""
        mask = mask & self.mask
        order = np.argsort(~mask, axis=1, kind="stable")
        positions = np.where(mask, self.positions, -1)
        similarity = np.where(mask, self.similarity, -np.inf).astype(np.float32)
        return Candidates(
            np.take_along_axis(positions, order, axis=1), np.take_along_axis(similarity, order, axis=1)
        )

    def rerank(self, scores: np.ndarray) -> "Candidates":
        """Return the candidates sorted by scores (n, k), descending; the sort is stable."""
        order = np.argsort(-np.where(self.mask, scores, -np.inf), axis=1, kind="stable")
        return Candidates(
            np.take_along_axis(self.positions, order, axis=1),
            np.take_along_axis(self.similarity, order, axis=1),
        )


def restrict_to(candidates: Candidates, allowed: np.ndarray) -> Candidates:
    """Keep allowed candidates: `allowed` is (num_images,) bool."""
    allowed = np.append(allowed, False)  # the last entry is for -1
    return candidates.filter(allowed[candidates.positions])


def filter_min_similarity(candidates: Candidates, min_similarity: float) -> Candidates:
    """Keep candidates with at least this cosine similarity, up to float32 rounding."""
    return candidates.filter(candidates.similarity >= min_similarity - FLOAT32_TOLERANCE)


def ratio_test(candidates: Candidates, ratio_threshold: float) -> Candidates:
    """Keep rows whose second candidate is farther than the first by a factor (Lowe 2004, section 7.1).

    The distance is 1 - cosine similarity. A row with one candidate passes. The LGSSL code reads such a ratio
    from its pairs and drops those below a threshold; the code that writes it was not published.
    """
    if candidates.positions.shape[1] < 2:
        return candidates
    distance = np.maximum(1 - candidates.similarity[:, :2].astype(np.float64), 0)
    is_distinct = distance[:, 1] >= ratio_threshold * distance[:, 0]
    is_single = candidates.positions[:, 1] < 0
    return candidates.filter(np.broadcast_to((is_distinct | is_single)[:, None], candidates.positions.shape))


def filter_mutual(candidates: Candidates, mutual_k: int) -> Candidates:
    """Keep pairs that are in each other's first `mutual_k`; rows must be images in order of position.

    The result is symmetric: if j is in row i, i is in row j.
    """
    topk = candidates.topk(mutual_k)
    n = len(topk.positions)
    rows, columns = np.nonzero(topk.mask)
    neighbors = topk.positions[rows, columns]
    is_mutual = np.zeros(candidates.positions.shape, bool)
    is_mutual[rows, columns] = np.isin(neighbors * n + rows, rows * n + neighbors)
    return candidates.filter(is_mutual)


def csls_scores(candidates: Candidates, base: Candidates) -> np.ndarray:
    """Score candidates by cross-domain similarity local scaling (Conneau et al. 2018, eq. 2).

    CSLS(x, y) = 2 cos(x, y) - r(x) - r(y), with r the mean similarity to the ten nearest in `base`, whose
    rows are images; r(x) does not change the order within a row and is omitted.

    Returns:
        Scores (n, k) float64.
    """
    nearest = base.topk(_CSLS_K)
    counts = nearest.mask.sum(axis=1)
    sums = np.where(nearest.mask, nearest.similarity, 0).sum(axis=1, dtype=np.float64)
    mean_similarity = np.append(sums / np.maximum(counts, 1), 0)
    return 2 * candidates.similarity.astype(np.float64) - mean_similarity[candidates.positions]


def mutual_proximity_scores(candidates: Candidates, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Score candidates by the logarithm of Gaussian mutual proximity (Schnitzer et al. 2012, eq. 3).

    MP(x, y) = P(S_x < s) P(S_y < s), where S_x is the similarity of x to any other image, assumed normal with
    `mean` and `std` (n,) and independent of S_y. The logarithm separates values that would round to 1.

    Returns:
        Scores (n, k) float64.
    """
    mean, std = np.append(mean, 0), np.append(np.maximum(std, 1e-12), 1)
    similarity = candidates.similarity.astype(np.float64)
    anchor_z = (similarity - mean[:-1, None]) / std[:-1, None]
    candidate_z = (similarity - mean[candidates.positions]) / std[candidates.positions]
    return log_ndtr(anchor_z) + log_ndtr(candidate_z)


def reciprocal_rank_fusion(
    caption_candidates: Candidates, image_candidates: Candidates, image_weight: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fuse candidates by reciprocal rank (Cormack et al. 2009): sum of weight / (60 + rank), ranks from 1.

    Args:
        caption_candidates: Candidates by caption embeddings.
        image_candidates: Candidates by image embeddings.
        image_weight: Weight of the image candidates per row, (n, 1), from 0 to 1.
        k: Number of candidates to return.

    Returns:
        The top k of both, (n, k) int64 padded with -1, and their scores (n, k) float64.
    """
    scores = []
    for candidates, weight in ((caption_candidates, 1 - image_weight), (image_candidates, image_weight)):
        ranks = np.arange(1, candidates.positions.shape[1] + 1, dtype=np.float64)
        scores.append(np.where(candidates.mask, weight / (60 + ranks), 0))
    return merge_scores(caption_candidates.positions, image_candidates.positions, scores[0], scores[1], k)


def union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the union of the candidates per row: (n, a), (n, b) -> (n, a + b) int64, padded with -1."""
    k = a.shape[1] + b.shape[1]
    return merge_scores(a, b, np.zeros(a.shape), np.zeros(b.shape), k)[0]


def merge_scores(
    a: np.ndarray, b: np.ndarray, a_scores: np.ndarray, b_scores: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add the scores of two sets of candidates per candidate, and return the top k of each row.

    Candidates (n, a) and (n, b) int64 with scores of the same shapes; ties go to the lower position.
    """
    k = min(k, a.shape[1] + b.shape[1])
    best, scores = np.empty((len(a), k), np.int64), np.empty((len(a), k))
    for start in range(0, len(a), _MERGE_CHUNK_ROWS):
        chunk = slice(start, start + _MERGE_CHUNK_ROWS)
        best[chunk], scores[chunk] = _merge_rows(
            np.concatenate([a[chunk], b[chunk]], axis=1),
            np.concatenate([a_scores[chunk], b_scores[chunk]], axis=1),
            k,
        )
    return best, scores


def _merge_rows(positions: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(positions, axis=1, kind="stable")
    positions, scores = (np.take_along_axis(array, order, axis=1) for array in (positions, scores))
    is_duplicate = np.zeros(positions.shape, bool)
    is_duplicate[:, 1:] = positions[:, 1:] == positions[:, :-1]
    # A candidate occurs at most once in each set, so that there are at most two copies.
    scores[:, :-1] += np.where(is_duplicate[:, 1:], scores[:, 1:], 0)
    is_removed = is_duplicate | (positions < 0)
    positions, scores = np.where(is_removed, -1, positions), np.where(is_removed, -np.inf, scores)
    top = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(positions, top, axis=1), np.take_along_axis(scores, top, axis=1)


@dataclass
class _SkippedRows:
    """Rows that are not used by reason, with the first one of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, example)

    def summary(self) -> str:
        return "; ".join(
            f"{reason} ({count:,}, such as {self.examples[reason]})"
            for reason, count in self.counts.most_common()
        )


def read_pairs_file(path: Path, dataset: CaptionDataset) -> Candidates:
    """Read the pairs of a dataset from a table: CSV, TSV, JSON or Parquet.

    Columns `anchor` and `partner` contain ids of the dataset. Partners are sorted by the optional column
    `similarity`, otherwise they keep the order of the file. An image may have any number of partners. Rows
    with an unknown id, one image twice, or a similarity that is not a finite number are skipped with a
    warning.

    Returns:
        One row per image of the dataset; the similarity defaults to 1.

    Raises:
        InvalidInputError: if the file or a column is missing, no row can be used, or an image has too many
            partners.
    """
    skipped = _SkippedRows()
    anchor_values, partner_values, similarity_values = array("q"), array("q"), array("d")
    for anchor, partner, value in _iter_pairs(_open_table(path), dataset, skipped):
        anchor_values.append(anchor)
        partner_values.append(partner)
        similarity_values.append(value)
    if not anchor_values:
        reasons = f": {skipped.summary()}" if skipped.counts else ""
        raise InvalidInputError(
            f"{path} contains no pairs of {dataset.path}{reasons}", field="pairs_file", path=path
        )
    if skipped.counts:
        logger.warning(f"{path}: skipped {skipped.counts.total():,} rows: {skipped.summary()}")
    anchors, partners = np.array(anchor_values, np.int64), np.array(partner_values, np.int64)
    similarity = np.array(similarity_values)
    order = np.lexsort((np.arange(len(anchors)), -similarity, anchors))
    anchors, partners, similarity = anchors[order], partners[order], similarity[order]
    rank = np.arange(len(anchors)) - np.searchsorted(anchors, anchors)
    max_partners = int(rank.max()) + 1
    if max_partners * len(dataset) > _MAX_TABLE_CELLS:
        raise InvalidInputError(
            f"{path}: {dataset[int(anchors[rank.argmax()])].id} has {max_partners:,} partners; the maximum "
            f"for {len(dataset):,} images is {_MAX_TABLE_CELLS // len(dataset):,} per image",
            field="pairs_file",
            path=path,
        )
    positions = np.full((len(dataset), max_partners), -1, np.int64)
    similarity_table = np.full(positions.shape, -np.inf, np.float32)
    positions[anchors, rank], similarity_table[anchors, rank] = partners, similarity
    return Candidates(positions, similarity_table)


def _open_table(path: Path) -> Table:
    if not path.is_file():
        raise InvalidInputError(f"pairs file {path} does not exist", field="pairs_file", path=path)
    try:
        table = open_table_file(path)
    except InvalidInputError as error:
        raise InvalidInputError(
            f"cannot read the pairs file: {error}", field="pairs_file", path=path
        ) from error
    column_names = table.all_column_names
    missing = [name for name in _COLUMNS[:2] if name not in column_names]
    if missing:
        raise InvalidInputError(
            f"{path} has no column {' and no column '.join(missing)}; "
            f"its columns are: {', '.join(column_names)}",
            field="pairs_file",
            path=path,
        )
    return table


def _iter_pairs(
    table: Table, dataset: CaptionDataset, skipped: _SkippedRows
) -> Iterator[tuple[int, int, float]]:
    """Yield the positions of anchor and partner and the similarity of each row that can be used."""
    has_similarity = _COLUMNS[2] in table.all_column_names
    position_of: dict[str, int] = {}
    for shard, start in enumerate(dataset.shard_offsets[:-1]):
        ids = dataset.read_columns(shard, ["id"])["id"]
        position_of.update(zip(map(str.strip, ids), range(start, start + len(ids)), strict=True))
    for row in table.iter_rows(_COLUMNS if has_similarity else _COLUMNS[:2]):
        if isinstance(row, SkippedSample):
            skipped.add(row.reason, row.location)
            continue
        ids = [_cell_text(row, column) for column in _COLUMNS[:2]]
        anchor, partner = (-1 if name is None else position_of.get(name, -1) for name in ids)
        similarity = _parse_similarity(row) if has_similarity else 1.0
        if min(anchor, partner) < 0:
            side = 0 if anchor < 0 else 1
            skipped.add(f"{_COLUMNS[side]} is not an id of the dataset", f"{row.location}: {ids[side]!r}")
        elif anchor == partner:
            skipped.add("an image is paired with itself", row.location)
        elif similarity is None:
            skipped.add("the similarity is not a finite number", row.location)
        else:
            yield anchor, partner, similarity


def _cell_text(row: TableRow, column: str) -> str | None:
    try:
        return row.text(column)
    except ValueError:
        return None


def _parse_similarity(row: TableRow) -> float | None:
    try:
        similarity = float(_cell_text(row, _COLUMNS[2]) or "nan")
    except ValueError:
        return None
    return similarity if math.isfinite(similarity) else None
