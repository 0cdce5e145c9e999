"""Tables in text files: CSV and other delimited files, JSON Lines, and Flickr8k/Flickr30k token files."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

from likewise.data.readers.base import SkippedSample
from likewise.data.readers.tables import FileTable, Table, TableRow
from likewise.errors import InvalidInputError

_HEAD_BYTES = 2**20
_DELIMITERS = (",", "\t", ";", "|")
_TOKEN_PATTERN = re.compile(r"([^\t]+)#\d+\t(.*)", re.DOTALL)
_NUM_PROBED_LINES = 100  # lines of JSON whose keys are the columns


@final
@dataclass(frozen=True, kw_only=True)
class DelimitedTable(FileTable):
    """A delimited text file whose first line is the header."""

    delimiter: str
    header: tuple[str, ...]

    def column_names(self) -> list[str]:
        """Return the cells of the header."""
        return list(self.header)

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the rows; rows that do not match the header are skipped samples."""
        with self.path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=self.delimiter, strict=True)
            for index, (line, cells) in enumerate(self._iter_cells(reader)):
                location = f"{self.name} line {line}"
                reason = cells if isinstance(cells, str) else self._row_error(cells)
                if reason is not None:
                    yield SkippedSample(id=f"{index - 1:08d}", location=location, reason=reason)
                elif index and cells:
                    yield TableRow(index - 1, location, dict(zip(self.header, cells, strict=False)))

    def _iter_cells(self, reader: Any) -> Iterator[tuple[int, list[str] | str]]:
        """Yield the first line number of each row, and its cells or an error message.

        Raises:
            InvalidInputError: if the file is not UTF-8, or a quote is never closed.
        """
        while True:
            line = reader.line_num + 1
            try:
                yield line, next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise InvalidInputError(_encoding_error(self.path), path=self.path) from error
            except csv.Error as error:
                if "expected after" not in str(error):
                    raise InvalidInputError(
                        f"{self.path}, line {line}: a quote is never closed, or a cell is longer than "
                        f"{csv.field_size_limit():,} characters ({error})",
                        path=self.path,
                    ) from error
                yield line, "row is not valid CSV"

    def _row_error(self, cells: list[str]) -> str | None:
        if not cells:
            return None
        if len(cells) < len(self.header):
            return "row has too few columns"
        if any(cells[len(self.header) :]):
            return "row has too many columns"
        return "row contains a NUL character" if any("\0" in cell for cell in cells) else None


@final
@dataclass(frozen=True, kw_only=True)
class JsonLinesTable(FileTable):
    """A file with one JSON object per line."""

    def column_names(self) -> list[str]:
        """Return the keys of the first objects, in order of appearance."""
        rows = (row for row in islice(self.iter_rows(()), _NUM_PROBED_LINES) if isinstance(row, TableRow))
        return list(dict.fromkeys(key for row in rows for key in row.values))

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the objects; other lines are skipped samples."""
        for index, line in _iter_lines(self.path):
            location = f"{self.name} line {index + 1}"
            try:
                values = json.loads(line)
            except UnicodeDecodeError:
                yield SkippedSample(id=f"{index:08d}", location=location, reason="line is not UTF-8")
            except (ValueError, RecursionError):
                yield SkippedSample(id=f"{index:08d}", location=location, reason="line is not valid JSON")
            else:
                if isinstance(values, dict):
                    yield TableRow(index, location, values)
                else:
                    yield SkippedSample(
                        id=f"{index:08d}", location=location, reason="line is not a JSON object"
                    )


@final
@dataclass(frozen=True, kw_only=True)
class FlickrTokenTable(FileTable):
    """A Flickr8k or Flickr30k token file, with lines `name.jpg#0<TAB>caption`."""

    def column_names(self) -> list[str]:
        """Return the columns `image` and `caption`."""
        return ["image", "caption"]

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield one row per caption."""
        for index, line in _iter_lines(self.path):
            location = f"{self.name} line {index + 1}"
            try:
                match = _TOKEN_PATTERN.fullmatch(line.decode())
            except UnicodeDecodeError:
                yield SkippedSample(id=f"{index:08d}", location=location, reason="line is not UTF-8")
                continue
            if match is None:
                yield SkippedSample(
                    id=f"{index:08d}", location=location, reason="line is not image#number<TAB>caption"
                )
            else:
                yield TableRow(index, location, {"image": match[1], "caption": match[2]})


def open_text_table(path: Path) -> Table:
    """Open a table in a text file; the format is detected from the name and the first line.

    Raises:
        InvalidInputError: if the file is empty, or its first line is not UTF-8 or has duplicate columns.
    """
    if path.suffix.lower() in {".jsonl", ".ndjson"}:
        return JsonLinesTable(path=path, name=path.name, root=path.parent)
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    try:
        first_line = (
            head.decode("utf-8-sig", "strict" if len(head) < _HEAD_BYTES else "ignore")
            .lstrip()
            .partition("\n")[0]
        )
    except UnicodeDecodeError as error:
        raise InvalidInputError(_encoding_error(path), path=path) from error
    if not first_line:
        raise InvalidInputError(f"{path} is empty", path=path)
    if _TOKEN_PATTERN.match(first_line):
        return FlickrTokenTable(path=path, name=path.name, root=path.parent)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=first_line.count)
    header = tuple(cell.strip() for cell in next(csv.reader([first_line.rstrip("\r")], delimiter=delimiter)))
    for cell in header:
        if cell and header.count(cell) > 1:
            raise InvalidInputError(f"{path}: duplicate column {cell!r} in the first line", path=path)
    return DelimitedTable(path=path, name=path.name, root=path.parent, delimiter=delimiter, header=header)


def _iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the index and content of each non-blank line, without a byte order mark."""
    with path.open("rb") as stream:
        for index, line in enumerate(stream):
            content = line.removeprefix(b"\xef\xbb\xbf") if not index else line
            if content.strip():
                yield index, content.rstrip(b"\r\n")


def _encoding_error(path: Path) -> str:
    """Return a message with the first line that is not UTF-8; the decoder reads blocks, not lines."""
    line_number = 1
    with path.open("rb") as stream:
        for line in stream:
            try:
                line.decode()
            except UnicodeDecodeError:
                break
            line_number += 1
    return (
        f"{path}, line {line_number}: not UTF-8; convert the file, for example with iconv -f latin1 -t utf-8"
    )
