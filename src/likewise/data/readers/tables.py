"""Tables that name images and captions, one row or several rows an image."""

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
    Candidate,
    Columns,
    Entry,
    Fault,
    ImportOptions,
    Marks,
    Source,
    digest_of,
    file_digest,
    resolve,
    state_of,
    texts,
)
from likewise.errors import InputError

# Where Flickr8k, Flickr30k and COCO keep images beside the folder of their annotations, in lower case.
_IMAGE_FOLDERS = frozenset(
    {"images", "flicker8k_dataset", "flickr8k_dataset", "flickr30k_images", "flickr30k-images", "flickr30k"}
    | {f"{split}{year}" for split in ("train", "val", "test") for year in (2014, 2015, 2017)}
)


def folder_of(paths: list[str], folder: Path) -> Path:
    """Return the folder, at or near a table's own, in which most of some images are found."""
    best, most = folder, 0
    for near in _near(folder) if paths else ():
        hits = sum(state_of(near / path) != "missing" for path in paths)
        if hits > most:
            best, most = near, hits
        if most == len(paths):
            break
    return best


def _near(folder: Path) -> Iterator[Path]:
    """Yield the folder, the folders in it, the one above, and those beside it that are usually of images."""
    folder = folder.resolve()
    yield folder
    yield from _below(folder)
    yield folder.parent
    for sibling in _below(folder.parent):
        if sibling.name.casefold() in _IMAGE_FOLDERS:
            yield sibling
            yield from _below(sibling)


def _below(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


_PROBED = 20  # rows whose images are looked for, to find the folder of images
_TOLD_VALUES = 8


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its number from 0, its place for messages, and its values by column."""

    number: int
    where: str
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table(ABC):
    """Something with columns and rows."""

    name: str  # for messages
    folder: Path  # where image paths start, unless told otherwise

    @abstractmethod
    def columns(self) -> list[str]:
        """Return the names of the columns."""

    @abstractmethod
    def embedded(self) -> frozenset[str]:
        """Return the columns that hold images themselves rather than paths."""

    @abstractmethod
    def rows(self, wanted: Sequence[str]) -> Iterator[Row | Fault]:
        """Yield all rows, of which only the columns in `wanted` need values."""

    @abstractmethod
    def digest(self) -> str:
        """Return a fingerprint of the table itself."""


@dataclass(frozen=True)
class _Survey:
    count: int
    scattered: bool  # whether other images stand between two rows of one
    digest: str


@final
@dataclass(frozen=True, kw_only=True)
class TableSource(Source):
    """The images that a table names."""

    table: Table
    parts: Columns
    told: tuple[str, ...] = ()

    def guesses(self) -> list[str]:
        """Return what was guessed about columns and folders."""
        return list(self.told)

    def count(self) -> int:
        """Return the number of different images in the rows that fulfil the conditions."""
        return self._survey.count

    def fingerprint(self) -> str:
        """Return a digest of the table and of the size and time of every image file."""
        return digest_of([self.table.digest(), self._survey.digest])

    def candidates(self) -> Iterator[Entry]:
        """Yield an image a row, or an image with all its captions where rows name the same one."""
        if self._embedded:
            return self._entries()
        # Only tables that scatter the rows of an image are held in memory, and of them only what is kept.
        return self._gathered() if self._survey.scattered else self._adjoined()

    def _entries(self) -> Iterator[Entry]:
        for row in self.table.rows(self.parts.used()):
            if isinstance(row, Fault):
                yield row
            elif _keeps(self.parts, row):
                yield self._entry(row)

    def _entry(self, row: Row) -> Entry:
        image = _reference(row.values.get(self.parts.image or ""))
        # Embedded images often share one made-up path, so the row is their name.
        name = f"{row.number:08d}" if image is None or self._embedded or image.path is None else image.path
        if image is None:
            return Fault(id=name, where=row.where, reason="row names no image")
        return self.parts.candidate(row.values, image, name, row.where)

    def _adjoined(self) -> Iterator[Entry]:
        """Yield images whose rows follow each other, one of them held at a time."""
        held: Candidate | None = None
        for entry in self._entries():
            if isinstance(entry, Fault):
                yield entry
            elif held is not None and held.image.path is not None and held.image.path == entry.image.path:
                held = replace(held, captions=held.captions + entry.captions)
            else:
                if held is not None:
                    yield held
                held = entry
        if held is not None:
            yield held

    def _gathered(self) -> Iterator[Entry]:
        first: dict[str, Candidate] = {}
        captions: dict[str, list[str]] = {}
        for entry in self._entries():
            if isinstance(entry, Fault) or entry.image.path is None:
                yield entry
            else:
                first.setdefault(entry.image.path, entry)
                captions.setdefault(entry.image.path, []).extend(entry.captions)
        for path, entry in first.items():
            yield replace(entry, captions=tuple(captions.pop(path)))

    @property
    def _embedded(self) -> bool:
        return self.parts.image in self.table.embedded()

    @cached_property
    def _survey(self) -> _Survey:
        """Read the table once, without image bytes: count images, see how rows lie, fingerprint files.

        Raises:
            InputError: where there are no rows, or none fulfils the conditions.
        """
        seen, last, scattered = Marks(), None, False
        digest = hashlib.blake2b(digest_size=8)
        count = 0
        for row in self._chosen():
            path = None if self._embedded else _named(row.values.get(self.parts.image or ""))
            if path is None:
                count += 1
                continue
            if path == last:
                continue
            last = path
            if not seen.add(hash(path) % 2**64):
                scattered = True
                continue
            count += 1
            digest.update(f"{path}\0{state_of(os.path.join(self.root, path))}\0".encode("utf-8", "replace"))  # noqa: PTH118
        return _Survey(count, scattered, digest.hexdigest())

    def _chosen(self) -> Iterator[Row]:
        """Yield the rows that fulfil the conditions, without embedded images; raises where there are none."""
        rows = kept = 0
        others: Counter[str] = Counter()
        for row in self.table.rows([name for name in self.parts.used() if name not in self.table.embedded()]):
            rows += 1
            if isinstance(row, Row) and _keeps(self.parts, row):
                kept += 1
                yield row
            elif isinstance(row, Row) and len(others) < _TOLD_VALUES:
                others.update(_unwanted(self.parts, row))
        if not rows:
            raise InputError(f"{self.table.name} holds no rows")
        if not kept and others:
            wanted = " and ".join(f"{name}={value}" for name, value in self.parts.where)
            raise InputError(f"{self.table.name} has no row where {wanted}; found {', '.join(others)}")


def _keeps(parts: Columns, row: Row) -> bool:
    try:
        return parts.keep(row.values)
    except ValueError:
        return False


def _unwanted(parts: Columns, row: Row) -> list[str]:
    try:
        return [f"{name}={text}" for name, _ in parts.where for text in texts(row.values.get(name))]
    except ValueError:
        return []


def _path(cell: Any) -> str | None:
    return (cell.strip() or None) if isinstance(cell, str) else None


def _reference(cell: Any) -> ImageRef | None:
    """Return where an image lies: a cell may be a path, bytes, or `datasets`' mapping of both."""
    if isinstance(cell, dict):
        if cell.get("bytes") is not None:
            return ImageRef(bytes=cell["bytes"])
        return _reference(cell.get("path"))
    if isinstance(cell, bytes):
        return ImageRef(bytes=cell)
    path = _path(cell)
    return None if path is None else ImageRef(path=path)


def _named(cell: Any) -> str | None:
    """Return the path in a cell, if it names a file."""
    image = _reference(cell)
    return None if image is None else image.path


def open_table(table: Table, options: ImportOptions) -> TableSource:
    """Return the images of a table, with its columns and the folder of its images found out.

    Raises:
        InputError: for columns that are not there, or a folder of images that is none.
    """
    parts, told = resolve(table.columns(), table.embedded(), options, table.name)
    if options.images is not None:
        if not options.images.is_dir():
            raise InputError(f"the folder of images {options.images} does not exist")
        root = options.images
    elif parts.image in table.embedded():
        root = table.folder
    else:
        root = _find_images(table, parts)
        if root != table.folder:
            told.append(f"{table.name}: images are taken from the folder {root}.")
    return TableSource(table=table, parts=parts, root=root.resolve(), told=tuple(told))


def _find_images(table: Table, parts: Columns) -> Path:
    rows = (row for row in table.rows(parts.used()) if isinstance(row, Row) and _keeps(parts, row))
    paths = [_named(row.values.get(parts.image or "")) for row in islice(rows, _PROBED)]
    return folder_of([path for path in paths if path is not None], table.folder)


_BATCH = 64  # rows held at a time: images may lie in them


@final
@dataclass(frozen=True, kw_only=True)
class ParquetTable(Table):
    """A Parquet file."""

    path: Path
    schema: pa.Schema

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.schema.names)

    def embedded(self) -> frozenset[str]:
        """Return the columns of bytes, or of mappings with `bytes` in them as `datasets` writes them."""
        return frozenset(field.name for field in self.schema if _holds_bytes(field.type))

    def digest(self) -> str:
        """Return the file's fingerprint."""
        return file_digest(self.path)

    def rows(self, wanted: Sequence[str]) -> Iterator[Row]:
        """Yield the rows with the wanted columns, few at a time.

        Raises:
            InputError: where the file is damaged.
        """
        number = 0
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(batch_size=_BATCH, columns=list(wanted)):
                for values in batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows:
                    yield Row(number, f"{self.name} row {number}", values)
                    number += 1
        except (pa.ArrowException, OSError) as fault:
            raise InputError(
                f"{self.path} is damaged after row {number}: {' '.join(str(fault).split())}"
            ) from fault


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def open_parquet(path: Path) -> ParquetTable:
    """Return the table in a Parquet file.

    Raises:
        InputError: where the file is no Parquet.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as fault:
        raise InputError(f"{path} is no Parquet file: {' '.join(str(fault).split())}") from fault
    return ParquetTable(path=path, name=path.name, folder=path.parent, schema=schema)


@final
@dataclass(frozen=True, kw_only=True)
class CocoTable(Table):
    """A row an image, with all its captions; the file is held in memory, as its two lists must be joined."""

    path: Path

    def columns(self) -> list[str]:
        """Return the keys of the images, and `caption`."""
        first = next((image for image in self._told["images"] if isinstance(image, dict)), {})
        return list(dict.fromkeys([*first, "caption"]))

    def embedded(self) -> frozenset[str]:
        """Return nothing: JSON holds no images."""
        return frozenset()

    def digest(self) -> str:
        """Return the file's fingerprint."""
        return file_digest(self.path)

    def rows(self, wanted: Sequence[str]) -> Iterator[Row | Fault]:
        """Yield the images in the order of the file, then the captions that belong to none."""
        captions: dict[Any, list[Any]] = {}
        for number, told in enumerate(self._told["annotations"]):
            where = f"{self.name} annotation {number}"
            if isinstance(told, dict) and isinstance(told.get("image_id"), int | str):
                captions.setdefault(told["image_id"], []).append(told.get("caption"))
            else:
                yield Fault(id=f"annotation {number}", where=where, reason="annotation names no image")
        for number, image in enumerate(self._told["images"]):
            where = f"{self.name} image {number}"
            if isinstance(image, dict) and isinstance(image.get("id"), int | str):
                yield Row(number, where, image | {"caption": captions.pop(image["id"], [])})
            else:
                yield Fault(id=f"image {number}", where=where, reason="image has no id")
        for name in captions:
            yield Fault(id=str(name), where=self.name, reason="caption of an image that is not listed")

    @cached_property
    def _told(self) -> dict[str, Any]:
        return _read(self.path)


def _read(path: Path) -> dict[str, Any]:
    told = read_json(path)
    lists = isinstance(told, dict) and all(
        isinstance(told.get(key), list) for key in ("images", "annotations")
    )
    if not lists:
        raise InputError(
            f"{path} holds no captions in COCO's format: a mapping with the lists `images` and `annotations` "
            "is needed (a plain list of rows is read from a .jsonl file, one row a line)"
        )
    if not any(isinstance(item, dict) and "caption" in item for item in told["annotations"]):
        raise InputError(
            f"{path}: none of its annotations has a `caption`; take the file of captions, not of boxes"
        )
    return told


def open_coco(path: Path) -> CocoTable:
    """Return the table of captioned images in a JSON file.

    Raises:
        InputError: where the file is no JSON or not of this format.
    """
    table = CocoTable(path=path, name=path.name, folder=path.parent)
    table.columns()
    return table
