"""Text files in UTF-8, UTF-16 and UTF-32: detection of the encoding, and lines in constant memory."""

import codecs
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from likewise.errors import InvalidInputError

# The mark of UTF-32-LE begins with that of UTF-16-LE.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HEAD_BYTES = 2**16
MAX_LINE_CHARS = 2**26
"""Longer lines are cut, so that a file without line ends cannot exhaust the memory."""


def detect_encoding(head: bytes) -> tuple[str, int]:
    """Return the encoding of a text by its first bytes, and the number of bytes of its byte order mark.

    Without a mark, UTF-16 is detected by zeros in every other byte; all other texts should be UTF-8.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    num_even, num_odd, num_chars = head[::2].count(0), head[1::2].count(0), len(head) // 2
    if num_chars and num_odd > 0.3 * num_chars and num_even < 0.05 * num_chars:
        return "utf-16-le", 0
    if num_chars and num_even > 0.3 * num_chars and num_odd < 0.05 * num_chars:
        return "utf-16-be", 0
    return "utf-8", 0


def decode_text(data: bytes) -> str:
    """Decode a text in UTF-8, UTF-16 or UTF-32, without its byte order mark.

    Raises:
        UnicodeDecodeError: if the bytes are invalid in the encoding that `detect_encoding` returns.
    """
    encoding, mark_size = detect_encoding(data[:_HEAD_BYTES])
    return data[mark_size:].decode(encoding)


def read_head(path: Path, num_bytes: int = _HEAD_BYTES) -> bytes:
    """Return the first bytes of a file.

    Raises:
        InvalidInputError: if the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return stream.read(num_bytes)
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}", path=path) from error


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a text file."""

    number: int
    """Number of the line in the file, from 1."""
    text: str
    """Content without the line end; invalid bytes are replaced."""
    error: str | None = None
    """What is wrong with the line, if anything, such as `not UTF-8`."""


def iter_lines(path: Path) -> Iterator[Line]:
    r"""Yield the lines of a text file, which may end with any mix of `\n`, `\r\n` and `\r`.

    Raises:
        InvalidInputError: if the file cannot be read.
    """
    encoding, mark_size = detect_encoding(read_head(path))
    try:
        with path.open("rb") as raw:
            raw.seek(mark_size)
            errors = "surrogateescape" if encoding == "utf-8" else "replace"
            with io.TextIOWrapper(raw, encoding, errors, newline=None) as stream:
                yield from _split_lines(stream, encoding)
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}", path=path) from error


def _split_lines(stream: io.TextIOWrapper, encoding: str) -> Iterator[Line]:
    number = 0
    while text := stream.readline(MAX_LINE_CHARS):
        number += 1
        error = None
        if not text.endswith("\n") and len(text) >= MAX_LINE_CHARS:
            error = f"longer than {MAX_LINE_CHARS:,} characters"
            while (rest := stream.readline(MAX_LINE_CHARS)) and not rest.endswith("\n"):
                pass
        elif not text.isascii() and _has_invalid_bytes(text, encoding):
            error = f"not {encoding[:6].upper().rstrip('-')}"
        yield Line(number, text.removesuffix("\n"), error)


def _has_invalid_bytes(text: str, encoding: str) -> bool:
    if encoding != "utf-8":
        return "\ufffd" in text
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def check_encoding(path: Path, max_bytes: int) -> None:
    """Check that the first bytes of a file are not in a single-byte or another unsupported encoding.

    A few invalid lines are no error here, if there are more valid lines with other characters than ASCII.

    Raises:
        InvalidInputError: with the first invalid line and the probable encoding.
    """
    num_valid = num_chars = 0
    invalid: list[Line] = []
    for line in iter_lines(path):
        if line.error is not None and line.error.startswith("not"):
            invalid.append(line)
        elif not line.text.isascii():
            num_valid += 1
        num_chars += len(line.text)
        if num_chars > max_bytes or len(invalid) > 100 + num_valid:
            break
    if len(invalid) > num_valid:
        encoding = "UTF-8" if "UTF-8" in str(invalid[0].error) else "valid text"
        raise InvalidInputError(
            f"{path}, line {invalid[0].number}: not {encoding}; {_conversion_advice(invalid[0].text)}",
            path=path,
        )


def _conversion_advice(text: str) -> str:
    """Return how to convert a file to UTF-8, given a line of it with escaped bytes."""
    data = text.encode("utf-8", "surrogateescape")
    high = [byte >= 0x80 for byte in data]
    num_adjacent = sum(first and second for first, second in itertools.pairwise(high))
    if any(byte < 0x20 and byte not in b"\t\r\n\f" for byte in data):
        return "it may be no text file at all"
    if num_adjacent * 2 < sum(high):  # accented letters stand alone, those of other scripts side by side
        return (
            "the encoding is probably Windows-1252, as Excel writes it; convert the file to UTF-8, for "
            "example with iconv -f WINDOWS-1252 -t UTF-8"
        )
    return (
        "the encoding is probably one of another script, such as GB18030, Shift JIS or Windows-1251; save "
        "the file as UTF-8 in the program that wrote it"
    )
