"""Folders of images with a `.json` or `.txt` of the same name beside each, as img2dataset leaves them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

from likewise.data.dataset import ImageRef
from likewise.data.images import SUFFIXES
from likewise.data.readers.base import (
    KINDS,
    MAX_SIZE,
    Columns,
    Entry,
    Fault,
    ImportOptions,
    SidecarError,
    Source,
    digest_of,
    sidecar_columns,
    state_of,
    told_beside,
)
from likewise.errors import InputError


@dataclass(frozen=True, slots=True)
class _Found:
    """An image: its path without suffix, relative to the root, and the suffixes of it and its companions."""

    stem: str
    suffix: str
    beside: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class FolderSource(Source):
    """The images below a folder; the first folder below it is their group."""

    parts: Columns

    def guesses(self) -> list[str]:
        """Return where captions are looked for."""
        keys = " or ".join(f"`{key}`" for key in self.parts.captions)
        return [f"{self.root.name}: captions are taken from {keys} in an image's .json, or from its .txt."]

    def count(self) -> int:
        """Return the number of images."""
        return self._survey[0]

    def fingerprint(self) -> str:
        """Return a digest of the name, size and time of every image and of the files beside it."""
        return self._survey[1]

    def candidates(self) -> Iterator[Entry]:
        """Yield the images, folder by folder in the order of names."""
        for found in images_below(self.root):
            entry = self._entry(found)
            if entry is not None:
                yield entry

    def _entry(self, found: _Found) -> Entry | None:
        where = found.stem + found.suffix
        try:
            values = told_beside(*(self._read(found, kind) for kind in (".json", ".txt")))
            if not self.parts.keep(values):
                return None
        except SidecarError as fault:
            return Fault(id=found.stem, where=where, reason=str(fault))
        except ValueError:
            return Fault(id=found.stem, where=where, reason="a condition's key holds no text")
        first, *deeper = found.stem.split("/")
        group = first if deeper else None
        return self.parts.candidate(values, ImageRef(path=where), found.stem, where, group)

    def _read(self, found: _Found, kind: str) -> bytes | None:
        suffix = next((suffix for suffix in found.beside if suffix.lower() == kind), None)
        if suffix is None:
            return None
        path = self.root / (found.stem + suffix)
        try:
            if path.stat().st_size > MAX_SIZE:
                raise SidecarError("caption file is too large")
            return path.read_bytes()
        except OSError as fault:
            raise SidecarError("caption file cannot be read") from fault

    @cached_property
    def _survey(self) -> tuple[int, str]:
        count = 0

        def states() -> Iterator[str]:
            nonlocal count
            for found in images_below(self.root):
                count += 1
                for suffix in (found.suffix, *found.beside):
                    yield found.stem + suffix
                    yield state_of(f"{self.root}/{found.stem}{suffix}")

        digest = digest_of(states())
        return count, digest


def images_below(root: Path, within: str = "", above: tuple[str, ...] = ()) -> Iterator[_Found]:
    """Yield the images below a folder in the order of names; hidden files are left out.

    Links to folders are followed, except back to a folder (`above`) that is being walked.

    Raises:
        InputError: where a folder cannot be read.
    """
    here = os.path.realpath(root / within)
    if here in above:
        return
    try:
        with os.scandir(here) as entries:
            listing = sorted(
                (e.name, e.is_dir()) for e in entries if not e.name.startswith((".", "__MACOSX"))
            )
    except OSError as fault:
        raise InputError(f"the folder {root / within} cannot be read: {fault.strerror}") from fault
    companions: dict[str, list[str]] = {}
    for name, is_folder in listing:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if not is_folder and suffix.lower() in KINDS:
            companions.setdefault(stem, []).append(suffix)
    for name, is_folder in listing:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if is_folder:
            yield from images_below(root, f"{within}{name}/", (*above, here))
        elif suffix.lower() in SUFFIXES:
            yield _Found(within + stem, suffix, tuple(companions.get(stem, ())))


def has_images(path: Path) -> bool:
    """Whether there is an image anywhere below a folder."""
    return next(images_below(path), None) is not None


def open_images(path: Path, options: ImportOptions) -> FolderSource:
    """Return the images below a folder.

    Raises:
        InputError: for options that have no meaning for images without a table.
    """
    if options.image_column is not None or options.images is not None:
        raise InputError(
            f"{path} is read as a folder of images, without a table: leave out --image-column and --images"
        )
    return FolderSource(root=path.resolve(), parts=sidecar_columns(options))
