"""Reader interface, column mapping, caption sidecar files and fingerprints."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from likewise.data.config import ImportOptions
from likewise.data.dataset import ImageRef
from likewise.data.readers.files import IgnoredFiles
from likewise.errors import InvalidInputError, did_you_mean
from likewise.names import split_unknown_names

_MAX_HASHED_BYTES = 64 * 2**20  # files up to this size are fingerprinted by content


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """A sample of the source before validation."""

    id: str
    image: ImageRef
    captions: tuple[str, ...]
    group: str | None
    label: str | None
    location: str
    """File and row, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSample:
    """An entry of the source that is not imported."""

    id: str
    location: str
    """File and row, for messages."""
    reason: str
    """Short phrase; skipped entries are counted by it."""


Entry = RawSample | SkippedSample


@dataclass(frozen=True, kw_only=True)
class Reader(ABC):
    """Reader of captioned images in one format."""

    root: Path
    """Absolute folder that image paths are relative to."""
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles, compare=False, kw_only=True)
    """Files that are no candidates for samples; complete after `iter_samples`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change if anything in the source changes."""

    @abstractmethod
    def count(self) -> int:
        """Return the approximate number of samples, from metadata alone."""

    @abstractmethod
    def iter_samples(self) -> Iterator[Entry]:
        """Yield the samples and the skipped entries of the source in a deterministic order."""

    @abstractmethod
    def inferred_settings(self) -> list[str]:
        """Return messages on the columns and folders that were inferred."""


def hash_strings(strings: Iterable[str]) -> str:
    """Hash strings: 16 hexadecimal digits of BLAKE2b."""
    digest = hashlib.blake2b(digest_size=8)
    for string in strings:
        digest.update(string.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def stat_fingerprint(path: Path | str) -> str:
    """Return the size and modification time of a file, or `missing`."""
    try:
        stat = os.stat(path)  # noqa: PTH116  # called once per image; Path.stat takes twice as long
    except (OSError, ValueError):
        return "missing"
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def file_fingerprint(path: Path) -> str:
    """Fingerprint a small file by its content, and a large one by name, size and modification time."""
    if path.stat().st_size > _MAX_HASHED_BYTES:
        return hash_strings([path.name, stat_fingerprint(path)])
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


# Common column names in lower case, in order of preference.
_IMAGE_COLUMN_NAMES = (
    *("file", "image", "path", "filename", "file_name", "image_path", "filepath", "img"),
    *("image_name", "image_file", "file_path", "img_path"),
)
_CAPTION_COLUMN_NAMES = ("caption", "captions", "title", "text", "description", "comment", "name")


@dataclass(frozen=True, kw_only=True)
class ColumnMapping:
    """Mapping of the fields of a sample to columns of a table or keys of a sidecar file."""

    image: str | None = None
    """Column of images; None if images are found without a table."""
    captions: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    id: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    """Conditions as pairs of column and value."""
    is_sidecar: bool = False
    """Whether columns are keys of sidecar files, where only each file tells which names with commas exist."""

    def required_columns(self) -> list[str]:
        """Return the distinct columns that are read, in a fixed order."""
        names = [
            self.image,
            *self.captions,
            self.label,
            self.group,
            self.id,
            *(name for name, _ in self.where),
        ]
        return list(dict.fromkeys(name for name in names if name is not None))

    def matches(self, values: Mapping[str, Any]) -> bool:
        """Return whether a row matches all conditions; a missing value equals the empty string."""
        return all(expected in (cell_texts(values.get(name)) or ("",)) for name, expected in self.where)

    def build_sample(
        self,
        values: Mapping[str, Any],
        image: ImageRef,
        default_id: str,
        location: str,
        default_group: str | None = None,
    ) -> Entry:
        """Build the sample of a row.

        Args:
            values: Values of the row by column.
            image: Location of the image.
            default_id: Id if there is no id column or its value is empty.
            location: File and row, for messages.
            default_group: Group if there is no group column.

        Returns:
            The sample, or a skipped sample if a value is not text.
        """
        fields = {}
        for field_name in ("label", "group", "id"):
            column = getattr(self, field_name)
            try:
                fields[field_name] = (
                    None if column is None else (", ".join(cell_texts(values.get(column))).strip() or None)
                )
            except ValueError:
                return SkippedSample(id=default_id, location=location, reason=f"column {column} is not text")
        try:
            columns = self.captions
            if self.is_sidecar:
                columns = split_unknown_names(columns, values.__contains__)
            captions = tuple(text for column in columns for text in cell_texts(values.get(column)))
        except ValueError:
            return SkippedSample(id=default_id, location=location, reason="caption is not text")
        return RawSample(
            id=fields["id"] if fields["id"] is not None else default_id,
            image=image,
            captions=captions,
            group=fields["group"] if self.group is not None else default_group,
            label=fields["label"],
            location=location,
        )


def cell_texts(value: Any) -> tuple[str, ...]:
    """Return the texts in a cell: none for a missing value, several for a list.

    Raises:
        ValueError: if a value is a mapping or bytes.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in cell_texts(item))
    if isinstance(value, dict | bytes):
        raise ValueError("not text")
    return (str(value),)


def parse_where(options: ImportOptions) -> tuple[tuple[str, str], ...]:
    """Parse the conditions `COLUMN=VALUE` into pairs.

    Raises:
        InvalidInputError: if a condition lacks a column or an equals sign.
    """
    conditions = []
    for condition in options.where:
        name, separator, value = condition.partition("=")
        if not (name and separator):
            raise InvalidInputError(
                f"`where` must have the form COLUMN=VALUE, such as split=train, got {condition}",
                field="where",
            )
        conditions.append((name, value))
    return tuple(conditions)


def sidecar_columns(options: ImportOptions) -> ColumnMapping:
    """Return the keys to read from the JSON sidecar file of an image."""
    return ColumnMapping(
        captions=options.caption_column or ("caption", "captions"),
        label=options.label_column,
        group=options.group_column,
        id=options.id_column,
        where=parse_where(options),
        is_sidecar=True,
    )


def reject_table_options(options: ImportOptions, reason: str) -> None:
    """Check that no option is set that applies to tables only.

    Raises:
        InvalidInputError: if `image_column` or `images` is set.
    """
    for field in ("image_column", "images"):
        if getattr(options, field) is not None:
            raise InvalidInputError(f"`{field}` does not apply: {reason}", field=field)


def match_score(column_names: Sequence[str], embedded_columns: frozenset[str], options: ImportOptions) -> int:
    """Return 0 for a table without an image column, 1 with an image column, 2 with images and captions."""
    image_column = options.image_column
    if (
        image_column not in column_names
        if image_column is not None
        else not _match_image_columns(column_names, embedded_columns)
    ):
        return 0
    has_captions = (
        set(split_unknown_names(options.caption_column, column_names.__contains__)) <= set(column_names)
        if options.caption_column
        else _match_names(column_names, _CAPTION_COLUMN_NAMES)
    )
    return 2 if has_captions else 1


def infer_columns(
    column_names: Sequence[str], embedded_columns: frozenset[str], options: ImportOptions, name: str
) -> tuple[ColumnMapping, list[str]]:
    """Infer the columns of a table that the options leave open.

    Args:
        column_names: All columns of the table.
        embedded_columns: Columns of images instead of paths.
        options: The import options.
        name: Name of the table, for messages.

    Returns:
        The mapping, and messages on the inferred columns.

    Raises:
        InvalidInputError: if a requested column is missing, or there is no image column.
    """
    where = parse_where(options)
    caption_columns = split_unknown_names(options.caption_column, column_names.__contains__)
    requested = [
        ("image_column", options.image_column),
        ("label_column", options.label_column),
        ("group_column", options.group_column),
        ("id_column", options.id_column),
        *(("caption_column", column) for column in caption_columns),
        *(("where", column) for column, _ in where),
    ]
    for field, column in requested:
        if column is not None and column not in column_names:
            suggestion = did_you_mean(column, list(column_names))
            raise InvalidInputError(
                f"{name} has no column {column!r}; its columns are {', '.join(column_names)}.{suggestion}",
                field=field,
            )
    messages = []
    image_column = options.image_column
    if image_column is None:
        image_column, *_ = _match_image_columns(column_names, embedded_columns) or [None]
        if image_column is None:
            raise InvalidInputError(
                f"cannot infer the image column of {name}; its columns are {', '.join(column_names)}. "
                "Set `image_column`",
                field="image_column",
            )
        messages.append(f"{name}: image column is {image_column!r}")
    if not caption_columns:
        matches = [
            column for column in _match_names(column_names, _CAPTION_COLUMN_NAMES) if column != image_column
        ]
        caption_columns = tuple(matches[:1])
        messages.append(_caption_message(name, matches, column_names))
    columns = ColumnMapping(
        image=image_column,
        captions=caption_columns,
        label=options.label_column,
        group=options.group_column,
        id=options.id_column,
        where=where,
    )
    return columns, messages


def _caption_message(name: str, matches: list[str], column_names: Sequence[str]) -> str:
    if not matches:
        return f"{name}: no caption column in {', '.join(column_names)}; set `caption_column`"
    alternatives = f"; set `caption_column` to use {', '.join(matches[1:])}" if matches[1:] else ""
    return f"{name}: caption column is {matches[0]!r}{alternatives}"


def _match_image_columns(column_names: Sequence[str], embedded_columns: frozenset[str]) -> list[str]:
    """Return likely image columns, preferring columns of images over columns of paths."""
    with_images = [column for column in column_names if column in embedded_columns]
    return (
        _match_names(with_images, _IMAGE_COLUMN_NAMES)
        or with_images
        or _match_names(column_names, _IMAGE_COLUMN_NAMES)
    )


def _match_names(column_names: Sequence[str], names: Sequence[str]) -> list[str]:
    by_casefold = {column.strip().casefold(): column for column in reversed(column_names)}
    return [by_casefold[name] for name in names if name in by_casefold]


MAX_SIDECAR_BYTES = 16 * 2**20  # larger caption files are errors, and would exhaust the memory
SIDECAR_SUFFIXES = frozenset({".json", ".txt"})


class SidecarError(ValueError):
    """An invalid caption file; skipped images are counted by the message."""


def read_sidecar(json_bytes: bytes | None, text_bytes: bytes | None) -> dict[str, Any]:
    """Return the values of the caption files of an image; the text file is used if the JSON has no `caption`.

    Raises:
        SidecarError: if a file is not valid JSON, not a JSON object, or not UTF-8.
    """
    values: Any = {}
    if json_bytes is not None:
        try:
            values = json.loads(json_bytes)
        except (ValueError, RecursionError) as error:
            raise SidecarError("caption file is not valid JSON") from error
        if not isinstance(values, dict):
            raise SidecarError("caption file is not a JSON object")
    if text_bytes is not None and values.get("caption") is None:
        try:
            values["caption"] = text_bytes.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SidecarError("caption file is not UTF-8") from error
    return values


_MIN_MERGE_SIZE = 2**15
# At most 1/64 of the values are in the Python set: additions take amortized constant time, and the set stays
# small in memory.
_MERGE_DIVISOR = 64


class UInt64Set:
    """A set of unsigned 64-bit integers that takes about 8 bytes per value; `set[int]` takes about 90."""

    def __init__(self) -> None:
        """Create an empty set."""
        self._sorted = np.empty(0, np.uint64)  # ascending
        self._recent: set[int] = set()

    def add(self, value: int) -> bool:
        """Add a value and return whether it is new."""
        if value in self._recent or self._in_sorted(value):
            return False
        self._recent.add(value)
        if len(self._recent) >= max(_MIN_MERGE_SIZE, len(self._sorted) // _MERGE_DIVISOR):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._recent.clear()
            # A stable sort merges two ascending runs in one pass.
            recent.sort()
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort(kind="stable")
        return True

    def _in_sorted(self, value: int) -> bool:
        index = int(self._sorted.searchsorted(np.uint64(value)))
        return index < len(self._sorted) and int(self._sorted[index]) == value
