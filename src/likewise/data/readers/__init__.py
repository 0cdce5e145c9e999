"""Readers of captioned images, one per format, and the detection of the format."""

import glob
from dataclasses import replace
from pathlib import Path

from likewise.artifacts import MANIFEST
from likewise.data.config import ImportOptions
from likewise.data.images import IMAGE_SUFFIXES
from likewise.data.readers.base import RawSample, Reader, SkippedSample
from likewise.data.readers.formats import (
    COMPRESSED_SUFFIXES,
    SUPPORTED_FORMATS,
    TABLE_SUFFIXES,
    open_folder,
    open_table_file,
    open_table_reader,
)
from likewise.data.readers.huggingface import (
    HUB_PREFIX,
    is_saved_dataset,
    open_hub_dataset,
    open_saved_dataset,
)
from likewise.data.readers.table_reader import TableReader, open_table
from likewise.data.readers.tables import Table
from likewise.data.readers.webdataset import open_tar_archives
from likewise.errors import InvalidInputError, did_you_mean

__all__ = ["ImportOptions", "RawSample", "Reader", "SkippedSample", "open_reader", "open_table_file"]


def open_reader(source: str, options: ImportOptions) -> Reader:
    """Detect the format of a source and return its reader.

    Args:
        source: A path, a glob pattern of tar archives, or `hf:NAME`.
        options: How to read it.

    Raises:
        InvalidInputError: if the source does not exist, its format is unknown, or an option does not apply.
        DependencyError: if `datasets` is needed and not installed.
    """
    if source.startswith(HUB_PREFIX):
        return _with_messages(*open_hub_dataset(source), options)
    path = Path(source).expanduser()
    if path.is_dir() and is_saved_dataset(path) and not (path / MANIFEST).is_file():
        return _with_messages(*open_saved_dataset(path), options)
    if path.is_dir():
        return open_folder(path, options)
    if path.exists():
        return _open_file(path, options)
    if glob.has_magic(source):
        return _open_pattern(path, options)
    siblings = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    raise InvalidInputError(f"{path} does not exist.{did_you_mean(path.name, siblings)}", path=path)


def _open_pattern(pattern: Path, options: ImportOptions) -> Reader:
    paths = [Path(name) for name in sorted(glob.glob(str(pattern)))]  # noqa: PTH207  # the pattern may be absolute
    if not paths:
        raise InvalidInputError(f"no file matches {pattern}", path=pattern)
    others = [path.name for path in paths if path.suffix.lower() != ".tar"]
    if others:
        raise InvalidInputError(
            f"a glob pattern may match .tar archives only; {pattern} also matches {others[0]}", path=pattern
        )
    _check_format(pattern, "tar", options)
    return open_tar_archives(paths, options)


def _check_format(source: str | Path, source_format: str, options: ImportOptions) -> None:
    if options.source_format not in ("auto", source_format):
        raise InvalidInputError(
            f"`source_format` is {options.source_format}, but {source} is a {source_format}",
            field="source_format",
        )


def _open_file(path: Path, options: ImportOptions) -> Reader:
    suffix = path.suffix.lower()
    if suffix == ".tar" or suffix in TABLE_SUFFIXES:
        _check_format(path, "tar" if suffix == ".tar" else "table", options)
    if suffix == ".tar":
        return open_tar_archives([path], options)
    if suffix in COMPRESSED_SUFFIXES:
        raise InvalidInputError(
            f"{path} is compressed; unpack it first (plain .tar archives are read in place)", path=path
        )
    if suffix in IMAGE_SUFFIXES:
        raise InvalidInputError(f"{path} is a single image; import its folder or table", path=path)
    if suffix not in TABLE_SUFFIXES:
        raise InvalidInputError(f"{path} has an unknown format; expected {SUPPORTED_FORMATS}", path=path)
    return open_table_reader(path, options)


def _with_messages(table: Table, messages: list[str], options: ImportOptions) -> TableReader:
    _check_format(table.name, "table", options)
    reader = open_table(table, options)
    return replace(reader, notes=(*messages, *reader.notes))
