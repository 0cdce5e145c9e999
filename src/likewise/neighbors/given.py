"""Pairs that the user brings: a table of anchor, partner and, if wanted, similarity."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from likewise.collection.records import Collection
from likewise.errors import InputError
from likewise.neighbors.candidates import Candidates

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
