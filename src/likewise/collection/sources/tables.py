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

from likewise.collection.records import ImageRef
from likewise.collection.sources.candidates import (
    Candidate,
    Entry,
    Fault,
    ImportOptions,
    Source,
    digest_of,
    state_of,
)
from likewise.collection.sources.columns import Columns, resolve, texts
from likewise.collection.sources.marks import Marks
from likewise.collection.sources.nearby import folder_of
from likewise.errors import InputError

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
