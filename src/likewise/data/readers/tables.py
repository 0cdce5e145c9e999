"""Reader of tables with one or several rows per image, and the formats Parquet and COCO captions."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq

from likewise.artifacts import read_json
from likewise.data.dataset import ImageRef
from likewise.data.readers.base import (
    ColumnMapping,
    Entry,
    ImportOptions,
    RawSample,
    Reader,
    SkippedSample,
    UInt64Set,
    cell_texts,
    file_fingerprint,
    hash_strings,
    infer_columns,
    stat_fingerprint,
)
from likewise.errors import InvalidInputError

# Image folders of Flickr8k, Flickr30k and COCO, next to the folder of the annotations, in lower case.
_IMAGE_FOLDER_NAMES = frozenset(
    {"images", "flicker8k_dataset", "flickr8k_dataset", "flickr30k_images", "flickr30k-images", "flickr30k"}
    | {f"{split}{year}" for split in ("train", "val", "test") for year in (2014, 2015, 2017)}
)


def find_image_root(paths: list[str], table_dir: Path) -> Path:
    """Return the folder near a table that contains most of the image paths.

    The folder of the table itself is preferred if no other folder contains more of them.

    Raises:
        InvalidInputError: if another folder contains at least half as many.
    """
    hits: dict[Path, int] = {}
    for candidate_dir in _candidate_dirs(table_dir) if paths else ():
        num_hits = sum(stat_fingerprint(candidate_dir / path) != "missing" for path in paths)
        hits[candidate_dir.resolve()] = num_hits
        if num_hits == len(paths) and len(hits) == 1:
            break
    best, *others = sorted(hits, key=lambda candidate_dir: -hits[candidate_dir]) or [table_dir]
    if not hits.get(best):
        return table_dir
    if best != table_dir.resolve() and others and 2 * hits[others[0]] >= hits[best]:
        raise InvalidInputError(
            f"the images of the table are in {best} and in {others[0]}: {paths[0]} and others have the same "
            "names in both; set `images` to one of the folders",
            field="images",
            path=table_dir,
        )
    return best


def _candidate_dirs(table_dir: Path) -> Iterator[Path]:
    """Yield the folder of the table, its subfolders, its parent, and siblings with common names."""
    table_dir = table_dir.resolve()
    yield table_dir
    yield from _subdirs(table_dir)
    yield table_dir.parent
    for sibling in _subdirs(table_dir.parent):
        if sibling.name.casefold() in _IMAGE_FOLDER_NAMES:
            yield sibling
            yield from _subdirs(sibling)


def _subdirs(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []


_NUM_PROBED_ROWS = 20  # rows that are used to find the image folder
_MAX_LISTED_VALUES = 8


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table."""

    index: int
    location: str
    """File and line, for messages."""
    values: dict[str, Any]
    """Values by column."""


@dataclass(frozen=True, kw_only=True)
class Table(ABC):
    """A table in one format."""

    name: str
    """Name for messages."""
    root: Path
    """Folder that image paths are relative to by default."""

    @abstractmethod
    def column_names(self) -> list[str]:
        """Return the names of the columns."""

    def embedded_columns(self) -> frozenset[str]:
        """Return the columns of images instead of paths; none by default."""
        return frozenset()

    @abstractmethod
    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield all rows; they contain at least the requested columns."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return the fingerprint of the table."""


@dataclass(frozen=True, kw_only=True)
class FileTable(Table):
    """A table in one file."""

    path: Path

    def fingerprint(self) -> str:
        """Return the fingerprint of the file."""
        return file_fingerprint(self.path)


@dataclass(frozen=True)
class _TableScan:
    count: int
    is_scattered: bool
    """Whether rows of an image are separated by rows of other images."""
    files_fingerprint: str


@final
@dataclass(frozen=True, kw_only=True)
class TableReader(Reader):
    """Reader of the images of a table."""

    table: Table
    columns: ColumnMapping
    messages: tuple[str, ...] = ()

    def inferred_settings(self) -> list[str]:
        """Return messages on the inferred columns and folders."""
        return list(self.messages)

    def count(self) -> int:
        """Return the number of distinct images in the rows that match the conditions."""
        return self._scan.count

    def fingerprint(self) -> str:
        """Hash the table, and the sizes and modification times of the image files."""
        return hash_strings([self.table.fingerprint(), self._scan.files_fingerprint])

    def iter_samples(self) -> Iterator[Entry]:
        """Yield one sample per image; the captions of rows with the same image path are merged."""
        if self._is_embedded:
            return self._iter_entries()
        # Only tables with scattered rows are read into memory.
        return self._merge_scattered() if self._scan.is_scattered else self._merge_adjacent()

    def _iter_entries(self) -> Iterator[Entry]:
        for row in self.table.iter_rows(self.columns.required_columns()):
            if isinstance(row, SkippedSample):
                yield row
            elif _matches(self.columns, row):
                yield self._make_entry(row)

    def _make_entry(self, row: TableRow) -> Entry:
        image = _image_ref(row.values.get(self.columns.image or ""))
        # Embedded images often share a placeholder path; use the row index as the id.
        default_id = (
            f"{row.index:08d}" if image is None or self._is_embedded or image.path is None else image.path
        )
        if image is None:
            return SkippedSample(id=default_id, location=row.location, reason="row has no image")
        return self.columns.build_sample(row.values, image, default_id, row.location)

    def _merge_adjacent(self) -> Iterator[Entry]:
        """Merge adjacent rows of an image, with one image in memory at a time."""
        current: RawSample | None = None
        for entry in self._iter_entries():
            if isinstance(entry, SkippedSample):
                yield entry
            elif (
                current is not None
                and current.image.path is not None
                and current.image.path == entry.image.path
            ):
                current = replace(current, captions=current.captions + entry.captions)
            else:
                if current is not None:
                    yield current
                current = entry
        if current is not None:
            yield current

    def _merge_scattered(self) -> Iterator[Entry]:
        """Merge all rows of an image, with all samples in memory."""
        first_entries: dict[str, RawSample] = {}
        captions: dict[str, list[str]] = {}
        for entry in self._iter_entries():
            if isinstance(entry, SkippedSample) or entry.image.path is None:
                yield entry
            else:
                first_entries.setdefault(entry.image.path, entry)
                captions.setdefault(entry.image.path, []).extend(entry.captions)
        for path, entry in first_entries.items():
            yield replace(entry, captions=tuple(captions.pop(path)))

    @property
    def _is_embedded(self) -> bool:
        return self.columns.image in self.table.embedded_columns()

    @cached_property
    def _scan(self) -> _TableScan:
        """Scan the table without image bytes: count images, detect scattered rows, fingerprint files.

        Raises:
            InvalidInputError: if there are no rows, or none matches the conditions.
        """
        seen_paths, last_path, is_scattered = UInt64Set(), None, False
        digest = hashlib.blake2b(digest_size=8)
        count = 0
        for row in self._iter_matching_rows():
            path = None if self._is_embedded else _image_path(row.values.get(self.columns.image or ""))
            if path is None:
                count += 1
                continue
            if path == last_path:
                continue
            last_path = path
            if not seen_paths.add(hash(path) % 2**64):
                is_scattered = True
                continue
            count += 1
            digest.update(
                f"{path}\0{stat_fingerprint(os.path.join(self.root, path))}\0".encode("utf-8", "replace")  # noqa: PTH118  # creating a Path per row is slow
            )
        return _TableScan(count, is_scattered, digest.hexdigest())

    def _iter_matching_rows(self) -> Iterator[TableRow]:
        """Yield the rows that match the conditions, without embedded images.

        Raises:
            InvalidInputError: if there are no rows, or none matches.
        """
        num_rows = num_matching = 0
        other_values: Counter[str] = Counter()
        for row in self.table.iter_rows(
            [name for name in self.columns.required_columns() if name not in self.table.embedded_columns()]
        ):
            num_rows += 1
            if isinstance(row, TableRow) and _matches(self.columns, row):
                num_matching += 1
                yield row
            elif isinstance(row, TableRow) and len(other_values) < _MAX_LISTED_VALUES:
                other_values.update(_condition_values(self.columns, row))
        if not num_rows:
            raise InvalidInputError(f"{self.table.name} has no rows")
        if not num_matching and other_values:
            conditions = " and ".join(f"{name}={value}" for name, value in self.columns.where)
            raise InvalidInputError(
                f"{self.table.name} has no row with {conditions}; it has {', '.join(other_values)}",
                field="where",
            )


def _matches(columns: ColumnMapping, row: TableRow) -> bool:
    try:
        return columns.matches(row.values)
    except ValueError:
        return False


def _condition_values(columns: ColumnMapping, row: TableRow) -> list[str]:
    try:
        return [f"{name}={text}" for name, _ in columns.where for text in cell_texts(row.values.get(name))]
    except ValueError:
        return []


def _cell_path(cell: Any) -> str | None:
    return (cell.strip() or None) if isinstance(cell, str) else None


def _image_ref(cell: Any) -> ImageRef | None:
    """Return the image in a cell: a path, bytes, or a mapping of both as in Hugging Face datasets."""
    if isinstance(cell, dict):
        if cell.get("bytes") is not None:
            return ImageRef(bytes=cell["bytes"])
        return _image_ref(cell.get("path"))
    if isinstance(cell, bytes):
        return ImageRef(bytes=cell)
    path = _cell_path(cell)
    return None if path is None else ImageRef(path=path)


def _image_path(cell: Any) -> str | None:
    """Return the image path in a cell, or None."""
    image = _image_ref(cell)
    return None if image is None else image.path


def open_table(table: Table, options: ImportOptions) -> TableReader:
    """Return the reader of a table, inferring its columns and its image folder.

    Raises:
        InvalidInputError: if a column or the folder `images` does not exist.
    """
    columns, messages = infer_columns(table.column_names(), table.embedded_columns(), options, table.name)
    if options.images is not None:
        if not options.images.is_dir():
            raise InvalidInputError(
                f"`images`: the folder {options.images} does not exist", field="images", path=options.images
            )
        root = options.images
    elif columns.image in table.embedded_columns():
        root = table.root
    else:
        root = _find_root(table, columns)
        if root != table.root:
            messages.append(f"{table.name}: image folder is {root}")
    return TableReader(table=table, columns=columns, root=root.resolve(), messages=tuple(messages))


def _find_root(table: Table, columns: ColumnMapping) -> Path:
    rows = (
        row
        for row in table.iter_rows(columns.required_columns())
        if isinstance(row, TableRow) and _matches(columns, row)
    )
    paths = [_image_path(row.values.get(columns.image or "")) for row in islice(rows, _NUM_PROBED_ROWS)]
    return find_image_root([path for path in paths if path is not None], table.root)


_BATCH_SIZE = 64  # small, because rows may contain images


@final
@dataclass(frozen=True, kw_only=True)
class ParquetTable(FileTable):
    """A Parquet file."""

    schema: pa.Schema

    def column_names(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.schema.names)

    def embedded_columns(self) -> frozenset[str]:
        """Return the columns of bytes, or of structs with a field `bytes` as in Hugging Face datasets."""
        return frozenset(field.name for field in self.schema if _contains_bytes(field.type))

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow]:
        """Yield the rows with the requested columns, read in small batches.

        Raises:
            InvalidInputError: if the file is damaged.
        """
        index = 0
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(
                batch_size=_BATCH_SIZE, columns=list(columns)
            ):
                for values in batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows:
                    yield TableRow(index, f"{self.name} row {index}", values)
                    index += 1
        except (pa.ArrowException, OSError) as error:
            raise InvalidInputError(
                f"{self.path} is damaged after row {index}: {' '.join(str(error).split())}", path=self.path
            ) from error


def _contains_bytes(data_type: pa.DataType) -> bool:
    if pa.types.is_struct(data_type):
        return any(data_type.field(i).name == "bytes" for i in range(data_type.num_fields))
    return pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type)


def open_parquet_table(path: Path) -> ParquetTable:
    """Open a Parquet file.

    Raises:
        InvalidInputError: if it is not a Parquet file.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise InvalidInputError(
            f"{path} is not a Parquet file: {' '.join(str(error).split())}", path=path
        ) from error
    return ParquetTable(path=path, name=path.name, root=path.parent, schema=schema)


@final
@dataclass(frozen=True, kw_only=True)
class CocoTable(FileTable):
    """COCO captions: one row per image with all its captions.

    The file is read into memory, because its lists of images and annotations must be joined.
    """

    def column_names(self) -> list[str]:
        """Return the keys of the images, and `caption`."""
        first_image = next((image for image in self._data["images"] if isinstance(image, dict)), {})
        return list(dict.fromkeys([*first_image, "caption"]))

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the images in the order of the file, then the captions without an image."""
        captions: dict[Any, list[Any]] = {}
        for index, annotation in enumerate(self._data["annotations"]):
            location = f"{self.name} annotation {index}"
            if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
                captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
            else:
                yield SkippedSample(
                    id=f"annotation {index}", location=location, reason="annotation has no image id"
                )
        for index, image in enumerate(self._data["images"]):
            location = f"{self.name} image {index}"
            if isinstance(image, dict) and isinstance(image.get("id"), int | str):
                yield TableRow(index, location, image | {"caption": captions.pop(image["id"], [])})
            else:
                yield SkippedSample(id=f"image {index}", location=location, reason="image has no id")
        for image_id in captions:
            yield SkippedSample(id=str(image_id), location=self.name, reason="caption of an unknown image")

    @cached_property
    def _data(self) -> dict[str, Any]:
        return _read_coco(self.path)


def _read_coco(path: Path) -> dict[str, Any]:
    data = read_json(path)
    has_lists = isinstance(data, dict) and all(
        isinstance(data.get(key), list) for key in ("images", "annotations")
    )
    if not has_lists:
        raise InvalidInputError(
            f"{path} is not in COCO format: expected a mapping with the lists 'images' and 'annotations' "
            "(for a list of rows use .jsonl, one row per line)",
            path=path,
        )
    if not any(isinstance(item, dict) and "caption" in item for item in data["annotations"]):
        raise InvalidInputError(
            f"{path}: no annotation has a 'caption'; use the captions file, not the file of boxes", path=path
        )
    return data


def open_coco_table(path: Path) -> CocoTable:
    """Open a file of COCO captions.

    Raises:
        InvalidInputError: if the file is not JSON or not in COCO format.
    """
    table = CocoTable(path=path, name=path.name, root=path.parent)
    table.column_names()
    return table
