"""Pairs from a table of ids."""

import logging
import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from likewise.data.dataset import CaptionDataset
from likewise.data.readers import SkippedSample, open_table_file
from likewise.data.readers.tables import Table, TableRow
from likewise.errors import InvalidInputError
from likewise.pairs.candidates import Candidates

logger = logging.getLogger(__name__)

_MAX_TABLE_CELLS = 2**28  # 12 bytes each
_COLUMNS = ("anchor", "partner", "similarity")


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
