"""Tables in text files: CSV and other delimited files, and Flickr8k and Flickr30k token files."""

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import dropwhile, islice
from pathlib import Path
from typing import final

from likewise.data.readers.base import SkippedSample
from likewise.data.readers.encodings import Line, check_encoding, detect_encoding, iter_lines, read_head
from likewise.data.readers.json_tables import LINES_SUFFIXES, open_json_table
from likewise.data.readers.tables import FileTable, Table, TableRow
from likewise.errors import InvalidInputError

_DELIMITERS = (",", "\t", ";", "|")
_DELIMITER_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
_TOKEN_PATTERN = re.compile(r"([^\t]+)#\d+\t(.*)", re.DOTALL)
_NUM_PROBED_LINES = 200  # lines that decide on the delimiter
_MAX_PROBED_BYTES = 64 * 2**20  # text that decides on the encoding and the quoting
_MAX_RECORD_LINES = 10_000  # a quote that is open for longer is a stray one
_DELIMITER_NAMES = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a vertical bar"}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How the rows of a delimited file are split into cells."""

    delimiter: str
    quoted: bool = True
    """Whether cells may be quoted, and then contain delimiters and line ends; else each line is a row."""
    skip_spaces: bool = False
    """Whether a quote may follow spaces after a delimiter."""


@dataclass(frozen=True, slots=True)
class _Record:
    line: Line
    cells: list[str]
    error: str | None
    num_lines: int = 1
    num_suspicious_lines: int = 0
    """Number of lines of a record of several lines that would all be whole rows without quotes."""
    last_line: int = 0
    """Number of the last line of the record."""


class _LineSource:
    """Lines of a file, of which those after the first of an invalid record can be read again."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._lines = iter(lines)
        self._pending: deque[Line] = deque()
        self.record: list[Line] = []

    def __iter__(self) -> "_LineSource":
        return self

    def __next__(self) -> str:
        if len(self.record) == _MAX_RECORD_LINES:
            raise StopIteration
        self.record.append(self._pending.popleft() if self._pending else next(self._lines))
        return self.record[-1].text + "\n"

    def read_again(self, start: int) -> None:
        """Return the lines of the record from a position to the source."""
        self._pending.extendleft(reversed(self.record[start:]))
        del self.record[start:]


def iter_records(lines: Iterable[Line], dialect: Dialect, width: int) -> Iterator[_Record]:
    """Yield the rows of a delimited file, without blank lines.

    Args:
        lines: Lines of the file.
        dialect: How to split them.
        width: Number of columns. Rows with fewer cells, or with more that are not empty, are invalid. If a
            record of several lines is invalid, and its quotes are, or it contains whole rows, its first quote
            is a stray one: only its first line is an invalid row, and its other lines are read again.
    """
    # The limit is a setting of the process; the limits of this module keep the memory bounded.
    csv.field_size_limit(max(csv.field_size_limit(), 2**30))
    source = _LineSource(lines)
    delimiter = dialect.delimiter

    def is_row(line: Line) -> bool:
        return len(_parse_quoted(iter([line.text]), dialect) or ()) == width

    while True:
        source.record = []
        try:
            text = next(source)
        except StopIteration:
            return
        line = source.record[0]
        if not text.strip(" \r\n\f"):
            continue
        if '"' not in text or not dialect.quoted:
            cells: list[str] | None = line.text.split(delimiter)
        else:
            source.read_again(0)
            cells = _parse_quoted(source, dialect)
        errors = [part.error for part in source.record if part.error is not None]
        error = f"row is {errors[0]}" if errors else _width_error(cells, width)
        rest = source.record[1:]
        if rest and (cells is None or (error is not None and any(map(is_row, rest)))):
            source.read_again(1)
            rest = []
            error = "row is not valid CSV"
        suspicious = bool(rest) and all(part.text.count(delimiter) + 1 == width for part in source.record)
        num_lines = len(rest) + 1
        yield _Record(
            line, cells or [], error, num_lines, num_lines if suspicious else 0, source.record[-1].number
        )


def _parse_quoted(lines: Iterator[str], dialect: Dialect) -> list[str] | None:
    """Return the cells of the first record of some lines, or None if its quotes are invalid."""
    reader = csv.reader(lines, delimiter=dialect.delimiter, skipinitialspace=dialect.skip_spaces, strict=True)
    try:
        return next(reader)
    except csv.Error:
        return None


def _width_error(cells: list[str] | None, width: int) -> str | None:
    if cells is None:
        return "row is not valid CSV"
    if len(cells) < width:
        return "row has too few columns"
    if any(cell.strip() for cell in cells[width:]):
        return "row has too many columns"
    return "row contains a NUL character" if any("\0" in cell for cell in cells) else None


@final
@dataclass(frozen=True, kw_only=True)
class DelimitedTable(FileTable):
    """A delimited text file whose first row is the header."""

    delimiter: str
    header: tuple[str, ...]
    first_line: int
    """Number of the first line after the header."""

    def column_names(self) -> list[str]:
        """Return the cells of the header, without surrounding whitespace."""
        return list(self.header)

    def messages(self) -> list[str]:
        """Return messages on the encoding, the delimiter and the quoting, where they are uncommon."""
        encoding, mark_size = detect_encoding(read_head(self.path))
        messages = []
        if encoding != "utf-8":
            mark = "" if mark_size else ", without a byte order mark"
            messages.append(f"{self.name}: the encoding is {encoding.upper()}{mark}")
        if self.delimiter != _default_delimiter(self.path):
            name = _DELIMITER_NAMES.get(self.delimiter, repr(self.delimiter))
            messages.append(f"{self.name}: the delimiter is {name}")
        if self._layout[1] is not None:
            messages.append(f"{self.name}: {self._layout[1]}")
        return messages

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the rows; rows that do not match the header are skipped samples.

        Raises:
            InvalidInputError: if the file is in an unsupported encoding.
        """
        dialect, _ = self._layout
        for index, record in enumerate(self._iter_records(dialect)):
            location = f"{self.name} line {record.line.number}"
            if record.error is not None:
                yield SkippedSample(id=f"{index:08d}", location=location, reason=record.error)
            else:
                yield TableRow(index, location, dict(zip(self.header, record.cells, strict=False)))

    def _iter_records(self, dialect: Dialect, max_bytes: int | None = None) -> Iterator[_Record]:
        """Yield the rows after the header, up to a number of characters."""
        lines = (line for line in iter_lines(self.path) if line.number >= self.first_line)
        return iter_records(_limit(lines, max_bytes), dialect, len(self.header))

    @cached_property
    def _layout(self) -> tuple[Dialect, str | None]:
        """The dialect under which the fewest lines are invalid, and a message if another one is possible.

        Raises:
            InvalidInputError: if the file is in an unsupported encoding.
        """
        check_encoding(self.path, _MAX_PROBED_BYTES)
        quoted = Dialect(self.delimiter)
        starts = re.compile(rf'(?:^|{re.escape(self.delimiter)})( *)"')
        spaces = {
            match[1] != ""
            for line in _limit(iter_lines(self.path), _MAX_PROBED_BYTES)
            if line.number >= self.first_line and '"' in line.text
            for match in starts.finditer(line.text)
        }
        if not spaces:
            return quoted, None
        dialects = [replace(quoted, skip_spaces=True)] if True in spaces else []
        dialects += [quoted, Dialect(self.delimiter, quoted=False)]
        scores = [self._count_invalid_lines(dialect) for dialect in dialects]
        best = scores.index(min(scores))
        dialect = dialects[best]
        if not dialect.quoted:
            return dialect, (
                "quotes are part of the text; as CSV quotes they would damage or join "
                f"{min(scores[:-1]):,} lines"
            )
        if scores[-1] == scores[best] and (dialect.skip_spaces or False in spaces):
            return dialect, "quotes around a cell are not part of its text"
        return dialect, None

    def _count_invalid_lines(self, dialect: Dialect) -> int:
        return sum(
            record.num_lines if record.error is not None else record.num_suspicious_lines
            for record in self._iter_records(dialect, _MAX_PROBED_BYTES)
        )


def _limit(lines: Iterable[Line], max_bytes: int | None) -> Iterator[Line]:
    num_chars = 0
    for line in lines:
        yield line
        num_chars += len(line.text) + 1
        if max_bytes is not None and num_chars > max_bytes:
            return


@final
@dataclass(frozen=True, kw_only=True)
class FlickrTokenTable(FileTable):
    """A Flickr8k or Flickr30k token file, with lines `name.jpg#0<TAB>caption`."""

    def column_names(self) -> list[str]:
        """Return the columns `image` and `caption`."""
        return ["image", "caption"]

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield one row per caption."""
        lines = (line for line in iter_lines(self.path) if line.text.strip())
        for index, line in enumerate(lines):
            location = f"{self.name} line {line.number}"
            match = _TOKEN_PATTERN.fullmatch(line.text)
            if line.error is not None or match is None:
                reason = f"line is {line.error or 'not image#number<TAB>caption'}"
                yield SkippedSample(id=f"{index:08d}", location=location, reason=reason)
            else:
                yield TableRow(index, location, {"image": match[1], "caption": match[2]})


def open_text_table(path: Path) -> Table:
    """Open a table in a text file; the format is detected from the name and the first lines.

    Raises:
        InvalidInputError: if the file cannot be read or is empty, or its header is invalid, is not in UTF-8,
            UTF-16 or UTF-32, or has duplicate columns.
    """
    if path.suffix.lower() in LINES_SUFFIXES:
        return open_json_table(path)
    nonblank = dropwhile(lambda line: not line.text.strip(), iter_lines(path))
    lines = list(islice(nonblank, _NUM_PROBED_LINES))
    if not lines:
        raise InvalidInputError(f"{path} is empty", path=path)
    if lines[0].error is not None:
        check_encoding(path, 0)
        raise InvalidInputError(f"{path}, line {lines[0].number} is {lines[0].error}", path=path)
    if _TOKEN_PATTERN.match(lines[0].text):
        return FlickrTokenTable(path=path, name=path.name, root=path.parent)
    if match := _DELIMITER_LINE.fullmatch(lines[0].text.strip(" ")):
        delimiter = match[1]
        lines = list(dropwhile(lambda line: not line.text.strip(), lines[1:]))
        if not lines:
            raise InvalidInputError(f"{path} has no header", path=path)
    else:
        delimiter = _find_delimiter(path, lines)
    header, last_line = _parse_header(lines, delimiter)
    for cell in header:
        if cell and header.count(cell) > 1:
            raise InvalidInputError(f"{path}: duplicate column {cell!r} in the header", path=path)
    return DelimitedTable(
        path=path,
        name=path.name,
        root=path.parent,
        delimiter=delimiter,
        header=tuple(header),
        first_line=last_line + 1,
    )


def _default_delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _find_delimiter(path: Path, lines: list[Line]) -> str:
    """Return the delimiter of the header under which the fewest of the first lines are invalid."""
    default = _default_delimiter(path)
    candidates = [delimiter for delimiter in (default, *_DELIMITERS) if delimiter in lines[0].text]
    best, best_score = default, (len(lines) + 1, 0)
    for delimiter in dict.fromkeys(candidates):
        width = len(_parse_header(lines, delimiter)[0])
        if width > 1:
            num_invalid = min(
                sum(
                    record.num_lines
                    for record in iter_records(lines, Dialect(delimiter, quoted=quoted), width)
                    if record.error is not None
                )
                for quoted in (True, False)
            )
            if (num_invalid, -width) < best_score:
                best, best_score = delimiter, (num_invalid, -width)
    return best


def _parse_header(lines: list[Line], delimiter: str) -> tuple[list[str], int]:
    """Return the cells of the header, which may span lines within quotes, and the number of its last line."""
    # The width is not known yet, so that records have no other errors than those of quotes and characters.
    record = next(iter_records(lines, Dialect(delimiter, skip_spaces=True), 0))
    cells, last_line = record.cells, record.last_line
    if record.error == "row is not valid CSV":
        cells, last_line = lines[0].text.split(delimiter), lines[0].number
    return [" ".join(cell.split()) for cell in cells], last_line
