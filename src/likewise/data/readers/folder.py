"""Reader of image folders with a `.json` or `.txt` file per image, as written by img2dataset."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

from likewise.data.dataset import ImageRef
from likewise.data.images import IMAGE_SUFFIXES
from likewise.data.readers.base import (
    MAX_SIDECAR_BYTES,
    SIDECAR_SUFFIXES,
    ColumnMapping,
    Entry,
    ImportOptions,
    Reader,
    SidecarError,
    SkippedSample,
    read_sidecar,
    reject_table_options,
    sidecar_columns,
)
from likewise.errors import InvalidInputError
from likewise.hashing import hash_files


@dataclass(frozen=True, slots=True)
class _ImageFile:
    stem: str
    """Path relative to the root, without suffix."""
    suffix: str
    sidecar_suffixes: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class FolderReader(Reader):
    """Reader of the images below a folder; the top-level subfolder is the group."""

    columns: ColumnMapping

    def inferred_settings(self) -> list[str]:
        """Return a message on the source of the captions."""
        keys = " or ".join(map(repr, self.columns.captions))
        return [f"{self.root.name}: captions are {keys} of the .json file of an image, or its .txt file"]

    def count(self) -> int:
        """Return the number of images."""
        return self._scan[0]

    def fingerprint(self) -> str:
        """Hash the names and the content of all images and caption files."""
        return self._scan[1]

    def iter_samples(self) -> Iterator[Entry]:
        """Yield the images, folder by folder, sorted by name."""
        for image_file in iter_images(self.root):
            entry = self._make_entry(image_file)
            if entry is not None:
                yield entry

    def _make_entry(self, image_file: _ImageFile) -> Entry | None:
        location = image_file.stem + image_file.suffix
        try:
            values = read_sidecar(
                *(self._read_sidecar_bytes(image_file, suffix) for suffix in (".json", ".txt"))
            )
            if not self.columns.matches(values):
                return None
        except SidecarError as error:
            return SkippedSample(id=image_file.stem, location=location, reason=str(error))
        except ValueError:
            return SkippedSample(
                id=image_file.stem, location=location, reason="value of a `where` column is not text"
            )
        top_folder, *subfolders = image_file.stem.split("/")
        group = top_folder if subfolders else None
        return self.columns.build_sample(values, ImageRef(path=location), image_file.stem, location, group)

    def _read_sidecar_bytes(self, image_file: _ImageFile, target_suffix: str) -> bytes | None:
        suffix = next(
            (suffix for suffix in image_file.sidecar_suffixes if suffix.lower() == target_suffix), None
        )
        if suffix is None:
            return None
        path = self.root / (image_file.stem + suffix)
        try:
            if path.stat().st_size > MAX_SIDECAR_BYTES:
                raise SidecarError("caption file is too large")
            return path.read_bytes()
        except OSError as error:
            raise SidecarError("caption file cannot be read") from error

    @cached_property
    def _scan(self) -> tuple[int, str]:
        count = 0

        def iter_names() -> Iterator[str]:
            nonlocal count
            for image_file in iter_images(self.root):
                count += 1
                for suffix in (image_file.suffix, *image_file.sidecar_suffixes):
                    yield image_file.stem + suffix

        fingerprint = hash_files(self.root, iter_names())
        return count, fingerprint


def iter_images(root: Path, subfolder: str = "", ancestors: tuple[str, ...] = ()) -> Iterator[_ImageFile]:
    """Yield the images below a folder, sorted by name; hidden files are skipped.

    Symbolic links to folders are followed, unless they lead back to one of `ancestors`.

    Raises:
        InvalidInputError: if a folder cannot be read.
    """
    real_path = os.path.realpath(root / subfolder)
    if real_path in ancestors:
        return
    try:
        with os.scandir(real_path) as entries:
            children = sorted(
                (entry.name, entry.is_dir())
                for entry in entries
                if not entry.name.startswith((".", "__MACOSX"))
            )
    except OSError as error:
        raise InvalidInputError(
            f"cannot read the folder {root / subfolder}: {error.strerror}", path=root / subfolder
        ) from error
    sidecar_suffixes: dict[str, list[str]] = {}
    for name, is_folder in children:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if not is_folder and suffix.lower() in SIDECAR_SUFFIXES:
            sidecar_suffixes.setdefault(stem, []).append(suffix)
    for name, is_folder in children:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if is_folder:
            yield from iter_images(root, f"{subfolder}{name}/", (*ancestors, real_path))
        elif suffix.lower() in IMAGE_SUFFIXES:
            yield _ImageFile(subfolder + stem, suffix, tuple(sidecar_suffixes.get(stem, ())))


def has_images(path: Path) -> bool:
    """Return whether there is an image below a folder."""
    return next(iter_images(path), None) is not None


def open_image_folder(path: Path, options: ImportOptions) -> FolderReader:
    """Return the reader of an image folder.

    Raises:
        InvalidInputError: if an option requires a table.
    """
    reject_table_options(options, f"{path} is an image folder without a table")
    return FolderReader(root=path.resolve(), columns=sidecar_columns(options))
