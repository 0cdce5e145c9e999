"""What a source of captioned images yields, and what may be asked of it."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from likewise.collection.records import ImageRef

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
