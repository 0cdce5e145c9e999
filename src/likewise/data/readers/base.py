"""What a source of captioned images yields, and what may be asked of it."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from likewise.data.dataset import ImageRef
from likewise.errors import InvalidInputError, did_you_mean

_MAX_HASHED_BYTES = 64 * 2**20  # files up to this size are fingerprinted by content


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How to read a source; `None` and `()` mean: guess, and say what was guessed.

    `where` holds `COLUMN=VALUE` conditions, all of which must hold; `images` is the folder that image
    paths are relative to; `limit` takes the first images only. For images with a `.json` beside them the
    columns are keys of that file.
    """

    image_column: str | None = None
    caption_column: tuple[str, ...] = ()
    label_column: str | None = None
    group_column: str | None = None
    id_column: str | None = None
    where: tuple[str, ...] = ()
    images: Path | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """An image as the source tells of it, not yet looked at; `location` is its file and row, for messages."""

    id: str
    image: ImageRef
    captions: tuple[str, ...]
    group: str | None
    label: str | None
    location: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSample:
    """An entry of the source that cannot become a candidate; `reason` is a short phrase to count by."""

    id: str
    location: str
    reason: str


Entry = RawSample | SkippedSample


@dataclass(frozen=True, kw_only=True)
class Reader(ABC):
    """A set of captioned images somewhere on disk, in one of the formats that people use."""

    root: Path  # the absolute folder that image paths are relative to

    @abstractmethod
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change when anything in the source changes."""

    @abstractmethod
    def count(self) -> int:
        """Return about how many candidates there are, from metadata alone."""

    @abstractmethod
    def iter_samples(self) -> Iterator[Entry]:
        """Yield the images and the faults of the source, in the same order every time."""

    @abstractmethod
    def inferred_settings(self) -> list[str]:
        """Return sentences on what was taken to be what."""


def hash_strings(strings: Iterable[str]) -> str:
    """Return 16 hexadecimal digits of BLAKE2b over strings."""
    digest = hashlib.blake2b(digest_size=8)
    for string in strings:
        digest.update(string.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def stat_fingerprint(path: Path | str) -> str:
    """Return a file's size and time of change, or `missing`."""
    try:
        stat = os.stat(path)  # noqa: PTH116  # called once an image; Path.stat costs twice as much
    except (OSError, ValueError):
        return "missing"
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def file_fingerprint(path: Path) -> str:
    """Return a file's fingerprint: by content where it is small, else by name, size and time of change."""
    if path.stat().st_size > _MAX_HASHED_BYTES:
        return hash_strings([path.name, stat_fingerprint(path)])
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


# Usual names, likeliest first, in lower case.
_IMAGE_COLUMN_NAMES = (
    *("file", "image", "path", "filename", "file_name", "image_path", "filepath", "img"),
    *("image_name", "image_file", "file_path", "img_path"),
)
_CAPTION_COLUMN_NAMES = ("caption", "captions", "title", "text", "description", "comment", "name")


@dataclass(frozen=True, kw_only=True)
class ColumnMapping:
    """The parts that columns play; `image` is None where images are found without a table."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    id: str | None = None
    where: tuple[tuple[str, str], ...] = ()

    def required_columns(self) -> list[str]:
        """Return every column that is read, once, in a fixed order."""
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
        """Whether all conditions hold; an absent value equals the empty one."""
        return all(expected in (cell_texts(values.get(name)) or ("",)) for name, expected in self.where)

    def build_sample(
        self,
        values: Mapping[str, Any],
        image: ImageRef,
        default_id: str,
        location: str,
        default_group: str | None = None,
    ) -> Entry:
        """Return the sample of a row; `default_id` and `default_group` replace absent columns."""
        fields = {}
        for field_name in ("label", "group", "id"):
            column = getattr(self, field_name)
            try:
                fields[field_name] = (
                    None if column is None else (", ".join(cell_texts(values.get(column))).strip() or None)
                )
            except ValueError:
                return SkippedSample(
                    id=default_id, location=location, reason=f"column {column} holds no text"
                )
        try:
            captions = tuple(text for column in self.captions for text in cell_texts(values.get(column)))
        except ValueError:
            return SkippedSample(id=default_id, location=location, reason="caption is no text")
        return RawSample(
            id=fields["id"] if fields["id"] is not None else default_id,
            image=image,
            captions=captions,
            group=fields["group"] if self.group is not None else default_group,
            label=fields["label"],
            location=location,
        )


def cell_texts(value: Any) -> tuple[str, ...]:
    """Return the texts in a cell: none for an absent value, several for a list.

    Raises:
        ValueError: for what cannot be told as text, such as a mapping.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in cell_texts(item))
    if isinstance(value, dict | bytes):
        raise ValueError("no text")
    return (str(value),)


def parse_where(options: ImportOptions) -> tuple[tuple[str, str], ...]:
    """Return the conditions COLUMN=VALUE as pairs.

    Raises:
        InputError: for a condition without a column or an equals sign.
    """
    conditions = []
    for condition in options.where:
        name, separator, value = condition.partition("=")
        if not (name and separator):
            raise InvalidInputError(
                f"a condition has the form COLUMN=VALUE, such as split=train; got {condition}"
            )
        conditions.append((name, value))
    return tuple(conditions)


def sidecar_columns(options: ImportOptions) -> ColumnMapping:
    """Return the keys to read from a JSON file beside each image."""
    return ColumnMapping(
        captions=options.caption_column or ("caption", "captions"),
        label=options.label_column,
        group=options.group_column,
        id=options.id_column,
        where=parse_where(options),
    )


def match_score(column_names: Sequence[str], embedded_columns: frozenset[str], options: ImportOptions) -> int:
    """Return 0 for a table without an image column, 1 with one, 2 with images and captions."""
    image_column = options.image_column
    if (
        image_column not in column_names
        if image_column is not None
        else not _match_image_columns(column_names, embedded_columns)
    ):
        return 0
    has_captions = (
        set(options.caption_column) <= set(column_names)
        if options.caption_column
        else _match_names(column_names, _CAPTION_COLUMN_NAMES)
    )
    return 2 if has_captions else 1


def infer_columns(
    column_names: Sequence[str], embedded_columns: frozenset[str], options: ImportOptions, name: str
) -> tuple[ColumnMapping, list[str]]:
    """Return the parts that a table's columns play, and sentences on those that were guessed.

    `embedded_columns` names the columns that hold images themselves rather than paths.

    Raises:
        InputError: for a column that is asked for and not there, or no image column at all.
    """
    where = parse_where(options)
    single_columns = [options.image_column, options.label_column, options.group_column, options.id_column]
    for column in [*single_columns, *options.caption_column, *(column for column, _ in where)]:
        if column is not None and column not in column_names:
            suggestion = did_you_mean(column, list(column_names))
            raise InvalidInputError(
                f"{name} has no column `{column}`; its columns are {', '.join(column_names)}.{suggestion}"
            )
    messages = []
    image_column, caption_columns = options.image_column, options.caption_column
    if image_column is None:
        image_column, *_ = _match_image_columns(column_names, embedded_columns) or [None]
        if image_column is None:
            raise InvalidInputError(
                f"{name} has no column that looks like images; its columns are {', '.join(column_names)}. "
                "Name the one that holds image paths with --image-column"
            )
        messages.append(f"{name}: images are taken from column `{image_column}`.")
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
        return (
            f"{name}: no column looks like captions ({', '.join(column_names)}); "
            "name one with --caption-column if there is one."
        )
    alternatives = f" (or is it {', '.join(matches[1:])}? then say --caption-column)" if matches[1:] else ""
    return f"{name}: captions are taken from column `{matches[0]}`{alternatives}."


def _match_image_columns(column_names: Sequence[str], embedded_columns: frozenset[str]) -> list[str]:
    """Return likely image columns; those that hold images themselves come before those that name files."""
    with_images = [column for column in column_names if column in embedded_columns]
    return (
        _match_names(with_images, _IMAGE_COLUMN_NAMES)
        or with_images
        or _match_names(column_names, _IMAGE_COLUMN_NAMES)
    )


def _match_names(column_names: Sequence[str], names: Sequence[str]) -> list[str]:
    by_casefold = {column.strip().casefold(): column for column in reversed(column_names)}
    return [by_casefold[name] for name in names if name in by_casefold]


MAX_SIDECAR_BYTES = 16 * 2**20  # a longer caption file is a mistake, and would fill the memory
SIDECAR_SUFFIXES = frozenset({".json", ".txt"})


class SidecarError(ValueError):
    """A caption file that cannot be used; the message is a short reason to count skipped images by."""


def read_sidecar(json_bytes: bytes | None, text_bytes: bytes | None) -> dict[str, Any]:
    """Return the keys of a JSON file; a text file is the caption where those have none.

    Raises:
        SidecarError: where a file is damaged or no text.
    """
    values: Any = {}
    if json_bytes is not None:
        try:
            values = json.loads(json_bytes)
        except (ValueError, RecursionError) as error:
            raise SidecarError("caption file is not valid JSON") from error
        if not isinstance(values, dict):
            raise SidecarError("caption file holds no JSON object")
    if text_bytes is not None and values.get("caption") is None:
        try:
            values["caption"] = text_bytes.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SidecarError("caption file is not UTF-8") from error
    return values


_MIN_MERGE_SIZE = 2**15
_MERGE_DIVISOR = (
    64  # one of so many marks may be fresh: merging then takes linear time, and fresh ones little memory
)


class UInt64Set:
    """A set of 64-bit numbers that only grows."""

    def __init__(self) -> None:
        """Begin with none."""
        self._sorted = np.empty(0, np.uint64)  # ascending
        self._recent: set[int] = set()

    def add(self, value: int) -> bool:
        """Add a number of 64 bits, without sign, and tell whether it is new."""
        if value in self._recent or self._in_sorted(value):
            return False
        self._recent.add(value)
        if len(self._recent) >= max(_MIN_MERGE_SIZE, len(self._sorted) // _MERGE_DIVISOR):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._recent.clear()
            # Two ascending runs are merged in one pass by a stable sort.
            recent.sort()
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort(kind="stable")
        return True

    def _in_sorted(self, value: int) -> bool:
        index = int(self._sorted.searchsorted(np.uint64(value)))
        return index < len(self._sorted) and int(self._sorted[index]) == value
