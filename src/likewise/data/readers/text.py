"""Tables in text files: CSV and its kin, JSON Lines, and the token files of Flickr8k and Flickr30k."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

from likewise.data.readers.base import Fault, file_digest
from likewise.data.readers.tables import Row, Table
from likewise.errors import InputError

_HEAD = 2**20
_DELIMITERS = (",", "\t", ";", "|")
_TOKEN = re.compile(r"([^\t]+)#\d+\t(.*)", re.DOTALL)
_PROBED = 100  # lines of JSON whose keys count as columns


@final
@dataclass(frozen=True, kw_only=True)
class Delimited(Table):
    """A table whose first line names the columns, with cells set apart by one character."""

    path: Path
    delimiter: str
    header: tuple[str, ...]

    def columns(self) -> list[str]:
        """Return the names in the first line."""
        return list(self.header)

    def embedded(self) -> frozenset[str]:
        """Return nothing: text holds no images."""
        return frozenset()

    def digest(self) -> str:
        """Return the file's fingerprint."""
        return file_digest(self.path)

    def rows(self, wanted: Sequence[str]) -> Iterator[Row | Fault]:
        """Yield the rows; those that do not fit the header are faults."""
        with self.path.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=self.delimiter, strict=True)
            for number, (line, cells) in enumerate(self._lines(reader)):
                where = f"{self.name} line {line}"
                fault = cells if isinstance(cells, str) else self._misfit(cells)
                if fault is not None:
                    yield Fault(id=f"{number - 1:08d}", where=where, reason=fault)
                elif number and cells:
                    yield Row(number - 1, where, dict(zip(self.header, cells, strict=False)))

    def _lines(self, reader: Any) -> Iterator[tuple[int, list[str] | str]]:
        """Yield the first line number and the cells of every row, or what is wrong with it.

        Raises:
            InputError: where the file is not UTF-8, or a quotation mark is never closed.
        """
        while True:
            line = reader.line_num + 1
            try:
                yield line, next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as fault:
                raise InputError(_encoding_fault(self.path)) from fault
            except csv.Error as fault:
                if "expected after" not in str(fault):
                    raise InputError(
                        f"{self.path}, line {line}: a quotation mark is never closed, or a cell is over "
                        f"{csv.field_size_limit():,} characters ({fault})"
                    ) from fault
                yield line, "row is not valid CSV"

    def _misfit(self, cells: list[str]) -> str | None:
        if not cells:
            return None
        if len(cells) < len(self.header):
            return "row has too few columns"
        if any(cells[len(self.header) :]):
            return "row has too many columns"
        return "row holds a NUL character" if any("\0" in cell for cell in cells) else None


@final
@dataclass(frozen=True, kw_only=True)
class JsonLines(Table):
    """A file with a JSON object a line."""

    path: Path

    def columns(self) -> list[str]:
        """Return the keys of the first objects, in order of appearance."""
        rows = (row for row in islice(self.rows(()), _PROBED) if isinstance(row, Row))
        return list(dict.fromkeys(key for row in rows for key in row.values))

    def embedded(self) -> frozenset[str]:
        """Return nothing: text holds no images."""
        return frozenset()

    def digest(self) -> str:
        """Return the file's fingerprint."""
        return file_digest(self.path)

    def rows(self, wanted: Sequence[str]) -> Iterator[Row | Fault]:
        """Yield the objects; lines that hold none are faults."""
        for number, line in _lines(self.path):
            where = f"{self.name} line {number + 1}"
            try:
                values = json.loads(line)
            except UnicodeDecodeError:
                yield Fault(id=f"{number:08d}", where=where, reason="line is not UTF-8")
            except (ValueError, RecursionError):
                yield Fault(id=f"{number:08d}", where=where, reason="line is not valid JSON")
            else:
                if isinstance(values, dict):
                    yield Row(number, where, values)
                else:
                    yield Fault(id=f"{number:08d}", where=where, reason="line holds no JSON object")


@final
@dataclass(frozen=True, kw_only=True)
class Tokens(Table):
    """Lines of `name.jpg#0<TAB>caption`, as Flickr8k and Flickr30k are told."""

    path: Path

    def columns(self) -> list[str]:
        """Return the two things that a line tells."""
        return ["image", "caption"]

    def embedded(self) -> frozenset[str]:
        """Return nothing: text holds no images."""
        return frozenset()

    def digest(self) -> str:
        """Return the file's fingerprint."""
        return file_digest(self.path)

    def rows(self, wanted: Sequence[str]) -> Iterator[Row | Fault]:
        """Yield an image's name and one caption of it a line."""
        for number, line in _lines(self.path):
            where = f"{self.name} line {number + 1}"
            try:
                match = _TOKEN.fullmatch(line.decode())
            except UnicodeDecodeError:
                yield Fault(id=f"{number:08d}", where=where, reason="line is not UTF-8")
                continue
            if match is None:
                yield Fault(id=f"{number:08d}", where=where, reason="line is not image#number<TAB>caption")
            else:
                yield Row(number, where, {"image": match[1], "caption": match[2]})


def open_text(path: Path) -> Table:
    """Return the table in a text file, its kind told by its name and first line.

    Raises:
        InputError: where the file is empty, or its first line is not UTF-8 or names a column twice.
    """
    if path.suffix.lower() in {".jsonl", ".ndjson"}:
        return JsonLines(path=path, name=path.name, folder=path.parent)
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    try:
        first = (
            head.decode("utf-8-sig", "strict" if len(head) < _HEAD else "ignore").lstrip().partition("\n")[0]
        )
    except UnicodeDecodeError as fault:
        raise InputError(_encoding_fault(path)) from fault
    if not first:
        raise InputError(f"{path} is empty")
    if _TOKEN.match(first):
        return Tokens(path=path, name=path.name, folder=path.parent)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=first.count)
    header = tuple(cell.strip() for cell in next(csv.reader([first.rstrip("\r")], delimiter=delimiter)))
    for cell in header:
        if cell and header.count(cell) > 1:
            raise InputError(f"{path}: the first line names column `{cell}` more than once")
    return Delimited(path=path, name=path.name, folder=path.parent, delimiter=delimiter, header=header)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers from 0, without a byte order mark."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream):
            bare = line.removeprefix(b"\xef\xbb\xbf") if not number else line
            if bare.strip():
                yield number, bare.rstrip(b"\r\n")


def _encoding_fault(path: Path) -> str:
    """Say which line of a file is not UTF-8; read again because decoding works on blocks, not lines."""
    line = 1
    with path.open("rb") as stream:
        for raw in stream:
            try:
                raw.decode()
            except UnicodeDecodeError:
                break
            line += 1
    return f"{path}, line {line}: not UTF-8; convert the file, such as with iconv -f latin1 -t utf-8"
