"""Tables in JSON files: one object per line, objects over several lines, lists, and COCO captions."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, final

from likewise.data.readers.base import SkippedSample
from likewise.data.readers.cells import JSON_DECODER, DuplicateKeyError
from likewise.data.readers.encodings import MAX_LINE_CHARS, decode_text, iter_lines
from likewise.data.readers.tables import FileTable, Table, TableRow
from likewise.errors import InvalidInputError

LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_NUM_PROBED_ROWS = 100  # rows whose keys are used to infer columns
_CHUNK_CHARS = 2**16
_PLAIN_DECODER = json.JSONDecoder(parse_int=str)


def read_json_document(path: Path) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        InvalidInputError: if the file cannot be read or is not valid JSON.
    """
    try:
        return JSON_DECODER.decode(decode_text(path.read_bytes()))
    except DuplicateKeyError as error:
        raise InvalidInputError(f"{path}: {error} in an object", path=path) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not valid JSON: {error}", path=path) from error
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}", path=path) from error


def is_coco(value: Any) -> bool:
    """Return whether a JSON value has the lists of a COCO file."""
    return isinstance(value, dict) and all(
        isinstance(value.get(key), list) for key in ("images", "annotations")
    )


def _join_key(image_id: Any) -> str | None:
    """Return an id as text, the same for `1`, `1.0` and `"1"`; None if it is no id."""
    if isinstance(image_id, bool) or not isinstance(image_id, int | float | str):
        return None
    if isinstance(image_id, float) and float(image_id).is_integer():
        return str(int(image_id))
    return str(image_id).strip() or None


@final
@dataclass(frozen=True, kw_only=True)
class CocoTable(FileTable):
    """COCO captions: one row per image with all its captions.

    The file is in memory, because its lists of images and annotations must be joined.
    """

    document: Any = field(repr=False, compare=False)
    """Content of the file."""

    def __post_init__(self) -> None:
        """Check the format.

        Raises:
            InvalidInputError: if the lists of COCO or the captions are missing.
        """
        if not is_coco(self.document):
            raise InvalidInputError(
                f"{self.path} is not in a format for captions: expected a list of objects, one object per "
                "line, or COCO captions (an object with the lists 'images' and 'annotations')",
                path=self.path,
            )
        if not any(isinstance(item, dict) and "caption" in item for item in self.document["annotations"]):
            raise InvalidInputError(
                f"{self.path}: no annotation has a 'caption'; use the captions file, not the file of boxes",
                path=self.path,
            )

    @property
    def default_id_column(self) -> str | None:
        """The ids of COCO."""
        return "id"

    def column_names(self) -> list[str]:
        """Return the keys of the images, and `caption`."""
        images = (image for image in self.document["images"] if isinstance(image, dict))
        return list(dict.fromkeys([*(key for image in images for key in image), "caption"]))

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the images in the order of the file, then the captions that belong to no image."""
        captions: dict[str, list[tuple[int, Any]]] = {}
        for index, annotation in enumerate(self.document["annotations"]):
            reason = _annotation_error(annotation)
            if reason is None:
                captions.setdefault(str(_join_key(annotation["image_id"])), []).append(
                    (index, annotation["caption"])
                )
            else:
                yield self._skip("annotation", index, reason)
        seen_ids: set[str] = set()
        for index, image in enumerate(self.document["images"]):
            image_id = _join_key(image.get("id")) if isinstance(image, dict) else None
            if image_id is None:
                yield self._skip("image", index, "image has no id")
            elif image_id in seen_ids:
                yield self._skip("image", index, "image id is listed twice")
            else:
                seen_ids.add(image_id)
                texts = [caption for _, caption in captions.pop(image_id, [])]
                yield TableRow(
                    index, f"{self.name} image {index}", image | {"id": image_id, "caption": texts}
                )
        for orphans in captions.values():
            for index, _ in orphans:
                yield self._skip("annotation", index, "caption of an unknown image")

    def _skip(self, kind: str, index: int, reason: str) -> SkippedSample:
        return SkippedSample(id=f"{kind} {index}", location=f"{self.name} {kind} {index}", reason=reason)


def _annotation_error(annotation: Any) -> str | None:
    if not isinstance(annotation, dict) or _join_key(annotation.get("image_id")) is None:
        return "annotation has no image id"
    return "annotation has no caption" if annotation.get("caption") is None else None


@dataclass(frozen=True, kw_only=True)
class JsonTable(FileTable):
    """A table of JSON objects, whose keys may differ from row to row."""

    def column_names(self) -> list[str]:
        """Return the keys of the first objects, in order of appearance."""
        return _list_keys(islice(self.iter_rows(()), _NUM_PROBED_ROWS))

    @cached_property
    def all_column_names(self) -> list[str]:
        """The keys of all objects, in order of appearance."""
        return _list_keys(self.iter_rows(()))

    def _make_row(self, index: int, where: str, value: Any) -> TableRow | SkippedSample:
        """Return the row of a value at a line or item, such as `line 3`."""
        location = f"{self.name} {where}"
        if isinstance(value, dict):
            return TableRow(index, location, value)
        error = value if isinstance(value, _InvalidJson) else "is not a JSON object"
        reason = f"{where.partition(' ')[0]} {error}"
        return SkippedSample(id=f"{index:08d}", location=location, reason=reason)


class _InvalidJson(str):
    """The reason why a text is not a value."""

    __slots__ = ()


def _list_keys(rows: Iterable[TableRow | SkippedSample]) -> list[str]:
    return list(dict.fromkeys(key for row in rows if isinstance(row, TableRow) for key in row.values))


def _parse_values(text: str) -> list[Any]:
    """Return the values in a text, usually one; a list with one invalid value if they are not valid JSON."""
    values: list[Any] = []
    position = 0
    text = text.strip()
    if _has_invalid_bytes(text):
        return [_InvalidJson("is not UTF-8")]
    try:
        while position < len(text):
            value, position = JSON_DECODER.raw_decode(text, position)
            values.append(value)
            while text[position : position + 1].isspace():
                position += 1
    except DuplicateKeyError:
        return [_InvalidJson("has a key twice")]
    except (ValueError, RecursionError):
        return [_InvalidJson("is not valid JSON")]
    return values


def _has_invalid_bytes(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= char <= "\udcff" for char in text)


@final
@dataclass(frozen=True, kw_only=True)
class JsonLinesTable(JsonTable):
    """A file with one JSON object per line."""

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the objects; other lines are skipped samples."""
        index = 0
        for line in iter_lines(self.path):
            if not line.text.strip():
                continue
            for value in (
                _parse_values(line.text) if line.error is None else [_InvalidJson(f"is {line.error}")]
            ):
                yield self._make_row(index, f"line {line.number}", value)
                index += 1


@final
@dataclass(frozen=True, kw_only=True)
class JsonObjectsTable(JsonTable):
    """A file of JSON objects over several lines each; they begin and end with a brace at the line start."""

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the objects; other texts are skipped samples."""
        index = 0
        for number, text in self._iter_texts():
            for value in _parse_values(text):
                yield self._make_row(index, f"line {number}", value)
                index += 1

    def _iter_texts(self) -> Iterator[tuple[int, str]]:
        """Yield the text of each object with the number of its first line."""
        first_line, parts, num_chars = 1, [], 0
        for line in iter_lines(self.path):
            if (line.text.startswith("{") and parts) or num_chars > MAX_LINE_CHARS:
                yield first_line, "\n".join(parts)
                parts, num_chars = [], 0
            if line.text.strip():
                first_line = first_line if parts else line.number
                parts.append(line.text)
                num_chars += len(line.text)
            if line.text.startswith("}"):
                yield first_line, "\n".join(parts)
                parts, num_chars = [], 0
        if parts:
            yield first_line, "\n".join(parts)


@final
@dataclass(frozen=True, kw_only=True)
class JsonArrayTable(JsonTable):
    """A file with one JSON list of objects, read in constant memory."""

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the objects; other items are skipped samples.

        Raises:
            InvalidInputError: if the list is damaged.
        """
        for index, value in enumerate(self._iter_items()):
            yield self._make_row(index, f"item {index}", value)

    def _iter_items(self) -> Iterator[Any]:
        buffer = _TextBuffer(self.path)
        buffer.skip("[")
        index = 0
        while buffer.peek() != "]":
            yield self._next_item(buffer, index)
            index += 1
            if buffer.peek() != "]" and not buffer.skip(","):
                raise self._error(index)
        buffer.skip("]")
        if buffer.peek():
            raise self._error(index)

    def _next_item(self, buffer: "_TextBuffer", index: int) -> Any:
        buffer.peek()
        while True:
            try:
                value, end = JSON_DECODER.raw_decode(buffer.text, buffer.position)
            except DuplicateKeyError:
                value = _InvalidJson("has a key twice")
                end = _PLAIN_DECODER.raw_decode(buffer.text, buffer.position)[1]
            except (ValueError, RecursionError) as error:
                if len(buffer.text) - buffer.position > MAX_LINE_CHARS or not buffer.extend():
                    raise self._error(index) from error
                continue
            if end == len(buffer.text) and buffer.extend():
                continue  # a number may go on
            if _has_invalid_bytes(buffer.text[buffer.position : end]):
                value = _InvalidJson("is not UTF-8")
            buffer.position = end
            return value

    def _error(self, index: int) -> InvalidInputError:
        return InvalidInputError(f"{self.path} is not valid JSON after item {index}", path=self.path)


class _TextBuffer:
    """The text of a file from a position, of which a beginning is in memory."""

    def __init__(self, path: Path) -> None:
        self._lines = iter_lines(path)
        self.text = ""
        self.position = 0

    def extend(self) -> bool:
        """Read at least as many characters as are in memory; return False at the end of the file."""
        parts = [self.text[self.position :]]
        size, goal = 0, max(_CHUNK_CHARS, len(parts[0]))
        for line in self._lines:
            parts.append(line.text + "\n")
            size += len(parts[-1])
            if size >= goal:
                break
        if size:
            self.text, self.position = "".join(parts), 0
        return size > 0

    def peek(self) -> str:
        """Return the next character that is not whitespace, or an empty text at the end of the file."""
        while True:
            while self.text[self.position : self.position + 1].isspace():
                self.position += 1
            if self.position < len(self.text) or not self.extend():
                return self.text[self.position : self.position + 1]

    def skip(self, char: str) -> bool:
        """Skip a character; return False if it is not the next one."""
        is_next = self.peek() == char
        self.position += is_next
        return is_next


def open_json_table(path: Path) -> Table:
    """Open a table of JSON objects or a file of COCO captions; the format is detected from the content.

    Raises:
        InvalidInputError: if the file cannot be read or is empty, or a `.json` file is in no such format.
    """
    options = {"path": path, "name": path.name, "root": path.parent}
    lines = (line.text.strip() for line in iter_lines(path))
    first_lines = list(islice((line for line in lines if line), 2))
    if not first_lines:
        raise InvalidInputError(f"{path} is empty", path=path)
    if "".join("".join(line[:2] for line in first_lines).split())[:2] in {"[{", "[]"}:
        return JsonArrayTable(**options)
    is_lines_file = path.suffix.lower() in LINES_SUFFIXES
    values = _parse_values(first_lines[0])
    starts_with_objects = all(isinstance(value, dict) for value in values)
    if starts_with_objects and not is_coco(values[0]) and (is_lines_file or len(first_lines) > 1):
        return JsonLinesTable(**options)
    if is_lines_file and not starts_with_objects and first_lines[0] != "{":
        return JsonLinesTable(**options)  # its first line is damaged
    try:
        document = read_json_document(path)
    except InvalidInputError:
        if first_lines[0] == "{" and _count_objects(path) > 1:
            return JsonObjectsTable(**options)
        raise
    if is_lines_file and not is_coco(document):
        return JsonObjectsTable(**options)
    return CocoTable(**options, document=document)


def _count_objects(path: Path) -> int:
    """Return the number of lines that begin with a brace, up to 2."""
    return sum(1 for _ in islice((line for line in iter_lines(path) if line.text.startswith("{")), 2))
