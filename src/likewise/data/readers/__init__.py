"""Readers of captioned images, one per format, and the detection of the format."""

import glob
from dataclasses import replace
from pathlib import Path

from likewise.artifacts import MANIFEST
from likewise.data.config import ImportOptions
from likewise.data.images import IMAGE_SUFFIXES
from likewise.data.readers.base import RawSample, Reader, SkippedSample
from likewise.data.readers.columns import match_score
from likewise.data.readers.folder import has_images, open_image_folder
from likewise.data.readers.huggingface import (
    HUB_PREFIX,
    is_saved_dataset,
    open_hub_dataset,
    open_saved_dataset,
)
from likewise.data.readers.table_files import PARQUET_SUFFIXES, TABLE_SUFFIXES, open_table_file
from likewise.data.readers.table_reader import TableReader, open_table
from likewise.data.readers.tables import Table
from likewise.data.readers.webdataset import open_tar_archives
from likewise.errors import InvalidInputError, did_you_mean

__all__ = ["ImportOptions", "RawSample", "Reader", "SkippedSample", "open_reader", "open_table_file"]

_COMPRESSED_SUFFIXES = frozenset(
    {".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar"}
)
_SUPPORTED_FORMATS = (
    "a folder of images, a table (.csv, .tsv, .jsonl, .json, .parquet), COCO captions (.json), "
    "a Flickr token file, .tar archives, or a Hugging Face dataset (a saved folder, or hf:NAME)"
)


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
    if path.is_dir():
        return _open_folder(path, options)
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
    return open_tar_archives(paths, options)


def _open_file(path: Path, options: ImportOptions) -> Reader:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return open_tar_archives([path], options)
    if suffix in _COMPRESSED_SUFFIXES:
        raise InvalidInputError(
            f"{path} is compressed; unpack it first (plain .tar archives are read in place)", path=path
        )
    if suffix in IMAGE_SUFFIXES:
        raise InvalidInputError(f"{path} is a single image; import its folder or table", path=path)
    if suffix not in TABLE_SUFFIXES:
        raise InvalidInputError(f"{path} has an unknown format; expected {_SUPPORTED_FORMATS}", path=path)
    return open_table(open_table_file(path), options)


def _with_messages(table: Table, messages: list[str], options: ImportOptions) -> TableReader:
    reader = open_table(table, options)
    return replace(reader, notes=(*messages, *reader.notes))


def _open_folder(path: Path, options: ImportOptions) -> Reader:
    """Detect the content of a folder: a saved dataset, a table with its images, images, or tar archives."""
    if (path / MANIFEST).is_file():
        raise InvalidInputError(f"{path} was written by likewise; import its source instead", path=path)
    if is_saved_dataset(path):
        return _with_messages(*open_saved_dataset(path), options)
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    table_file = _find_table_file(path, files, options)
    if table_file is not None:
        reader = open_table(open_table_file(table_file), options)
        return replace(reader, notes=(f"{path.name}: reading table {table_file.name}", *reader.notes))
    if has_images(path):
        return open_image_folder(path, options)
    tars = [p for p in files if p.suffix.lower() == ".tar"]
    if tars:
        return open_tar_archives(tars, options)
    compressed = [p.name for p in files if p.suffix.lower() in _COMPRESSED_SUFFIXES]
    if compressed:
        raise InvalidInputError(
            f"{path} contains only compressed files such as {compressed[0]}; unpack them first", path=path
        )
    for file in _table_files(files):
        return open_table(open_table_file(file), options)  # raises the error of the table
    raise InvalidInputError(
        f"no images, tables or tar archives in {path}; expected {_SUPPORTED_FORMATS}", path=path
    )


def _find_table_file(path: Path, files: list[Path], options: ImportOptions) -> Path | None:
    """Return the table with an image column, preferring tables with captions; None if there is no table.

    Raises:
        InvalidInputError: if several tables match equally well.
    """
    scores = {file: _score_table(file, options) for file in _table_files(files)}
    best_score = max(scores.values(), default=0)
    best_files = [file for file, score in scores.items() if score == best_score > 0]
    if len(best_files) > 1:
        names = ", ".join(file.name for file in best_files)
        all_parquet = {file.suffix.lower() for file in best_files} <= PARQUET_SUFFIXES
        hint = f", or all of them as {HUB_PREFIX}{path}" if all_parquet else ""
        raise InvalidInputError(
            f"{path} contains several tables of images ({names}); import one of them{hint}", path=path
        )
    return best_files[0] if best_files else None


def _table_files(files: list[Path]) -> list[Path]:
    """Return the files that may be tables by their names, without the caption files of single images."""
    image_stems = {file.stem for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
    caption_files = [
        file for file in files if "caption" in file.name.casefold() or ".token" in file.name.casefold()
    ]
    caption_tables = [
        file
        for file in caption_files
        if file.suffix.lower() in {".json", ".txt"} and file.stem not in image_stems
    ]
    return [
        file
        for file in files
        if file.suffix.lower() in TABLE_SUFFIXES - {".json", ".txt"} or file in caption_tables
    ]


def _score_table(file: Path, options: ImportOptions) -> int:
    try:
        return match_score(open_table_file(file), options)
    except InvalidInputError:
        return 0
