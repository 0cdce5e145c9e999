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
from likewise.errors import InputError, close_matches

_SMALL = 64 * 2**20  # files up to this size are fingerprinted by content


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
class Candidate:
    """An image as the source tells of it, not yet looked at; `where` is its file and row, for messages."""

    id: str
    image: ImageRef
    captions: tuple[str, ...]
    group: str | None
    label: str | None
    where: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """An entry of the source that cannot become a candidate; `reason` is a short phrase to count by."""

    id: str
    where: str
    reason: str


Entry = Candidate | Fault


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """A set of captioned images somewhere on disk, in one of the formats that people use."""

    root: Path  # the absolute folder that image paths are relative to

    @abstractmethod
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change when anything in the source changes."""

    @abstractmethod
    def count(self) -> int:
        """Return about how many candidates there are, from metadata alone."""

    @abstractmethod
    def candidates(self) -> Iterator[Entry]:
        """Yield the images and the faults of the source, in the same order every time."""

    @abstractmethod
    def guesses(self) -> list[str]:
        """Return sentences on what was taken to be what."""


def digest_of(parts: Iterable[str]) -> str:
    """Return 16 hexadecimal digits of BLAKE2b over strings."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def state_of(path: Path | str) -> str:
    """Return a file's size and time of change, or `missing`."""
    try:
        told = os.stat(path)  # noqa: PTH116  # called once an image; Path.stat costs twice as much
    except (OSError, ValueError):
        return "missing"
    return f"{told.st_size}:{told.st_mtime_ns}"


def file_digest(path: Path) -> str:
    """Return a file's fingerprint: by content where it is small, else by name, size and time of change."""
    if path.stat().st_size > _SMALL:
        return digest_of([path.name, state_of(path)])
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


# Usual names, likeliest first, in lower case.
_IMAGE = (
    *("file", "image", "path", "filename", "file_name", "image_path", "filepath", "img"),
    *("image_name", "image_file", "file_path", "img_path"),
)
_CAPTION = ("caption", "captions", "title", "text", "description", "comment", "name")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The parts that columns play; `image` is None where images are found without a table."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    id: str | None = None
    where: tuple[tuple[str, str], ...] = ()

    def used(self) -> list[str]:
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

    def keep(self, values: Mapping[str, Any]) -> bool:
        """Whether all conditions hold; an absent value equals the empty one."""
        return all(wanted in (texts(values.get(name)) or ("",)) for name, wanted in self.where)

    def candidate(
        self, values: Mapping[str, Any], image: ImageRef, name: str, where: str, group: str | None = None
    ) -> Entry:
        """Return the candidate that a row describes; `name` and `group` stand in for absent columns."""
        told = {}
        for part in ("label", "group", "id"):
            column = getattr(self, part)
            try:
                told[part] = (
                    None if column is None else (", ".join(texts(values.get(column))).strip() or None)
                )
            except ValueError:
                return Fault(id=name, where=where, reason=f"column {column} holds no text")
        try:
            captions = tuple(text for column in self.captions for text in texts(values.get(column)))
        except ValueError:
            return Fault(id=name, where=where, reason="caption is no text")
        return Candidate(
            id=told["id"] if told["id"] is not None else name,
            image=image,
            captions=captions,
            group=told["group"] if self.group is not None else group,
            label=told["label"],
            where=where,
        )


def texts(value: Any) -> tuple[str, ...]:
    """Return the texts in a cell: none for an absent value, several for a list.

    Raises:
        ValueError: for what cannot be told as text, such as a mapping.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in texts(item))
    if isinstance(value, dict | bytes):
        raise ValueError("no text")
    return (str(value),)


def conditions(options: ImportOptions) -> tuple[tuple[str, str], ...]:
    """Return the conditions COLUMN=VALUE as pairs.

    Raises:
        InputError: for a condition without a column or an equals sign.
    """
    pairs = []
    for told in options.where:
        name, sign, value = told.partition("=")
        if not (name and sign):
            raise InputError(f"a condition has the form COLUMN=VALUE, such as split=train; got {told}")
        pairs.append((name, value))
    return tuple(pairs)


def sidecar_columns(options: ImportOptions) -> Columns:
    """Return the keys to read from a JSON file beside each image."""
    return Columns(
        captions=options.caption_column or ("caption", "captions"),
        label=options.label_column,
        group=options.group_column,
        id=options.id_column,
        where=conditions(options),
    )


def fitness(columns: Sequence[str], embedded: frozenset[str], options: ImportOptions) -> int:
    """Return 0 for a table without an image column, 1 with one, 2 with images and captions."""
    asked = options.image_column
    if asked not in columns if asked is not None else not _image_columns(columns, embedded):
        return 0
    captioned = (
        set(options.caption_column) <= set(columns) if options.caption_column else _usual(columns, _CAPTION)
    )
    return 2 if captioned else 1


def resolve(
    columns: Sequence[str], embedded: frozenset[str], options: ImportOptions, name: str
) -> tuple[Columns, list[str]]:
    """Return the parts that a table's columns play, and sentences on those that were guessed.

    `embedded` names the columns that hold images themselves rather than paths.

    Raises:
        InputError: for a column that is asked for and not there, or no image column at all.
    """
    where = conditions(options)
    single = [options.image_column, options.label_column, options.group_column, options.id_column]
    for column in [*single, *options.caption_column, *(column for column, _ in where)]:
        if column is not None and column not in columns:
            near = close_matches(column, list(columns))
            raise InputError(f"{name} has no column `{column}`; its columns are {', '.join(columns)}.{near}")
    told = []
    image, captions = options.image_column, options.caption_column
    if image is None:
        image, *_ = _image_columns(columns, embedded) or [None]
        if image is None:
            raise InputError(
                f"{name} has no column that looks like images; its columns are {', '.join(columns)}. "
                "Name the one that holds image paths with --image-column"
            )
        told.append(f"{name}: images are taken from column `{image}`.")
    if not captions:
        usual = [column for column in _usual(columns, _CAPTION) if column != image]
        captions = tuple(usual[:1])
        told.append(_say_captions(name, usual, columns))
    parts = Columns(
        image=image,
        captions=captions,
        label=options.label_column,
        group=options.group_column,
        id=options.id_column,
        where=where,
    )
    return parts, told


def _say_captions(name: str, usual: list[str], columns: Sequence[str]) -> str:
    if not usual:
        return (
            f"{name}: no column looks like captions ({', '.join(columns)}); "
            "name one with --caption-column if there is one."
        )
    others = f" (or is it {', '.join(usual[1:])}? then say --caption-column)" if usual[1:] else ""
    return f"{name}: captions are taken from column `{usual[0]}`{others}."


def _image_columns(columns: Sequence[str], embedded: frozenset[str]) -> list[str]:
    """Return likely image columns; those that hold images themselves come before those that name files."""
    holding = [column for column in columns if column in embedded]
    return _usual(holding, _IMAGE) or holding or _usual(columns, _IMAGE)


def _usual(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    folded = {column.strip().casefold(): column for column in reversed(columns)}
    return [folded[name] for name in names if name in folded]


MAX_SIZE = 16 * 2**20  # a longer caption file is a mistake, and would fill the memory
KINDS = frozenset({".json", ".txt"})


class SidecarError(ValueError):
    """A caption file that cannot be used; the message is a short reason to count skipped images by."""


def told_beside(mapping: bytes | None, text: bytes | None) -> dict[str, Any]:
    """Return the keys of a JSON file; a text file is the caption where those have none.

    Raises:
        SidecarError: where a file is damaged or no text.
    """
    values: Any = {}
    if mapping is not None:
        try:
            values = json.loads(mapping)
        except (ValueError, RecursionError) as fault:
            raise SidecarError("caption file is not valid JSON") from fault
        if not isinstance(values, dict):
            raise SidecarError("caption file holds no JSON object")
    if text is not None and values.get("caption") is None:
        try:
            values["caption"] = text.decode("utf-8-sig")
        except UnicodeDecodeError as fault:
            raise SidecarError("caption file is not UTF-8") from fault
    return values


_FRESH = 2**15
_SHARE = 64  # one of so many marks may be fresh: merging then takes linear time, and fresh ones little memory


class Marks:
    """A set of 64-bit numbers that only grows."""

    def __init__(self) -> None:
        """Begin with none."""
        self._settled = np.empty(0, np.uint64)  # ascending
        self._fresh: set[int] = set()

    def add(self, mark: int) -> bool:
        """Add a number of 64 bits, without sign, and tell whether it is new."""
        if mark in self._fresh or self._has_settled(mark):
            return False
        self._fresh.add(mark)
        if len(self._fresh) >= max(_FRESH, len(self._settled) // _SHARE):
            fresh = np.fromiter(self._fresh, np.uint64, len(self._fresh))
            self._fresh.clear()
            # Two ascending runs are merged in one pass by a stable sort.
            fresh.sort()
            self._settled = np.concatenate([self._settled, fresh])
            self._settled.sort(kind="stable")
        return True

    def _has_settled(self, mark: int) -> bool:
        place = int(self._settled.searchsorted(np.uint64(mark)))
        return place < len(self._settled) and int(self._settled[place]) == mark
