"""What all evaluation datasets share: splits, tables, counts of excluded entries, keys by content."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from likewise.data.config import ImportOptions
from likewise.data.dataset import ImageRef
from likewise.data.image_formats import is_image_name
from likewise.data.readers.base import SkippedSample
from likewise.data.readers.cells import cell_text
from likewise.data.readers.columns import find_path_column
from likewise.data.readers.encodings import decode_text
from likewise.data.readers.files import IgnoredFiles, find_image_root, resolve_image_path, walk_files
from likewise.data.readers.formats import TABLE_SUFFIXES, open_table_file
from likewise.data.readers.tables import Table
from likewise.errors import InvalidInputError, did_you_mean
from likewise.hashing import SAMPLED_BYTES, WHOLE_BYTES, content_fingerprint, hash_strings
from likewise.parallel import default_num_workers, prefetch_map

SPLIT_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
_SPLIT_OF_ALIAS = {alias: split for split, aliases in SPLIT_ALIASES.items() for alias in aliases}
_NUM_PROBED_FILES = 40
# A change of pixels may leave the head and the tail of these formats as they are: hashed as a whole.
_UNCOMPRESSED_SUFFIXES = frozenset({".bmp", ".pgm", ".ppm", ".pnm", ".tif", ".tiff"})


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """Images of an evaluation dataset."""

    name: str
    """Name in tables."""
    path: Path
    """The folder or table that it was read from."""
    root: Path
    """Folder that `files` are relative to."""
    files: tuple[str, ...]
    """n paths, relative to `root` or absolute."""
    key: str
    """Fingerprint of the annotations and of the content of the files; a copied dataset has the same."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of excluded or corrected rows, images and annotations by reason, with the first location."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Number of files that are no candidates by reason, such as hidden files."""

    def __len__(self) -> int:
        return len(self.files)

    def image_refs(self, start: int, stop: int) -> list[ImageRef]:
        """Return the locations of the images from `start` to `stop`."""
        return [ImageRef(path=file) for file in self.files[start:stop]]


class SkippedEntries:
    """Counts of excluded or corrected entries by reason, with the first location of each reason."""

    def __init__(self) -> None:
        """Start with no entries."""
        self._counts = Counter[str]()
        self._first_locations: dict[str, str] = {}

    def add(self, reason: str, location: str = "") -> None:
        """Count an entry by its reason."""
        self._counts[reason] += 1
        self._first_locations.setdefault(reason, location)

    def to_dict(self) -> dict[str, int]:
        """Return the counts; each reason is followed by its first location."""
        return {
            f"{reason} (first: {self._first_locations[reason]})"
            if self._first_locations[reason]
            else reason: n
            for reason, n in self._counts.items()
        }

    def summary(self) -> str:
        """Return the counts in one line for the end of an error message; empty without entries."""
        return "".join(f"; {count:,} skipped: {reason}" for reason, count in self.to_dict().items())


def parse_split(name: str) -> str | None:
    """Return `train`, `val` or `test` for a name such as `Validation`, or None for another name."""
    return _SPLIT_OF_ALIAS.get(name.strip().lower())


def unknown_split_reason(name: str) -> str:
    """Return why a row with this name of a split is skipped."""
    return f"split {name!r} is not train, val or test" if name else "without a split"


def find_split(name: str) -> str | None:
    """Return the only split that a file name such as `train2017_v1` contains as a word, or None."""
    splits = {parse_split(word) for word in re.split(r"[^a-z]+", name.lower())} - {None}
    return splits.pop() if len(splits) == 1 else None


def dataset_name(table: Path) -> str:
    """Return the name of a dataset from its table: the folder's name if that of the table is generic."""
    is_generic = table.stem.lower() in ("items", "labels", "captions", "index")
    return table.resolve().parent.name if is_generic else table.stem


def find_table(folder: Path, stem: str) -> Path | None:
    """Return the table `STEM.csv` (or another table suffix, in any case) of a folder, or None.

    Raises:
        InvalidInputError: if there are several.
    """
    tables = sorted(
        path for path in folder.iterdir() if path.stem.lower() == stem and _is_dataset_table(path)
    )
    if len(tables) > 1:
        names = " and ".join(path.name for path in tables)
        raise InvalidInputError(f"{folder} holds {names}; give the path of one of them", path=folder)
    return tables[0] if tables else None


def _is_dataset_table(path: Path) -> bool:
    """Return whether a file of a folder is a table by its suffix, and, for `.json`, by its columns."""
    suffix = path.suffix.lower()
    # `labels.txt` is usually a list of class names, and `labels.json` may be one.
    if suffix == ".txt" or suffix not in TABLE_SUFFIXES or not path.is_file():
        return False
    if suffix != ".json":
        return True
    try:
        return find_path_column(open_table_file(path), ImportOptions()) is not None
    except InvalidInputError:
        return False


class CellRow(NamedTuple):
    """One row of a table as text."""

    location: str
    """File and line, for messages."""
    cells: dict[str, str]
    """Stripped text by field; empty if the cell or the column is absent."""
    values: Mapping[str, Any]
    """Values by column, as they are in the table."""


@dataclass(frozen=True, kw_only=True)
class DatasetTable:
    """A table with a column of image files, read as `import` reads it."""

    path: Path
    table: Table
    column_names: list[str]
    file_column: str
    root: Path
    """Folder that the image files are relative to."""

    def find_column(self, name: str) -> str | None:
        """Return the column of this name, or else the only one that differs from it in case, or None."""
        if name in self.column_names:
            return name
        matches = [column for column in self.column_names if column.strip().lower() == name.lower()]
        return matches[0] if len(matches) == 1 else None

    def require_column(self, name: str, field_name: str | None = None) -> str:
        """Return the column of a name.

        Raises:
            InvalidInputError: if there is none; it names the config field, if one is responsible.
        """
        column = self.find_column(name)
        if column is None:
            prefix = f"`{field_name}`: " if field_name else ""
            raise InvalidInputError(
                f"{prefix}{self.path} has no column {name!r}; it has {', '.join(self.column_names)}."
                f"{did_you_mean(name, self.column_names)}",
                field=field_name,
                path=self.path,
            )
        return column

    def find_root(self, column: str) -> Path:
        """Return the folder that the files of a column are relative to."""
        return _find_column_root(self.path, self.table, column)

    def iter_rows(
        self, columns: Mapping[str, str | None], skipped: SkippedEntries, *, missing_reason: str
    ) -> Iterator[CellRow]:
        """Yield the rows that name an image file, with its path as `import` resolves it.

        The other rows are counted as skipped.

        Args:
            columns: The column of each field; None for an absent column.
            skipped: Receives the counts.
            missing_reason: Reason of rows without a file.
        """
        names = [self.file_column, *(name for name in columns.values() if name is not None)]
        for row in self.table.iter_rows(list(dict.fromkeys(names))):
            if isinstance(row, SkippedSample):
                skipped.add(row.reason, row.location)
                continue
            try:
                cells = {
                    key: "" if name is None else cell_text(row.values.get(name)) or ""
                    for key, name in (("file", self.file_column), *columns.items())
                }
            except ValueError:
                skipped.add("a cell is not text", row.location)
                continue
            if not cells["file"]:
                skipped.add(missing_reason)
            elif "\0" in cells["file"]:
                skipped.add("file name contains a NUL character", row.location)
            else:
                cells["file"], is_found, _ = resolve_image_path(self.root, cells["file"])
                if is_found or "://" not in cells["file"]:
                    yield CellRow(row.location, cells, row.values)
                else:
                    skipped.add("file is a web address", row.location)


def open_dataset_table(path: Path) -> DatasetTable:
    """Open a table of image files in any format that `import` reads.

    Raises:
        InvalidInputError: if it is no table, or has no column of image files.
    """
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise InvalidInputError(
            f"{path} is neither a folder nor a table ({', '.join(sorted(TABLE_SUFFIXES))})", path=path
        )
    table = open_table_file(path)
    names, embedded = list(table.all_column_names), table.embedded_columns()
    path_columns = [name for name in names if name not in embedded]
    file_column = find_path_column(table, ImportOptions())
    if file_column is None:
        raise InvalidInputError(
            f"{path} has no column of image files (file, image, path, filename, ...); it has "
            f"{', '.join(path_columns)}"
            + (
                f"; images inside a table ({', '.join(sorted(embedded))}) are not supported"
                if embedded
                else ""
            ),
            path=path,
        )
    return DatasetTable(
        path=path,
        table=table,
        column_names=path_columns,
        file_column=file_column,
        root=_find_column_root(path, table, file_column),
    )


def _find_column_root(path: Path, table: Table, column: str) -> Path:
    """Return the folder near a table that the files of a column are relative to, as `import` finds it."""
    files: dict[str, None] = {}
    for row in table.iter_rows([column]):
        try:
            file = None if isinstance(row, SkippedSample) else row.text(column)
        except ValueError:
            continue  # counted when the rows are read
        if file:
            files[file] = None
    step = max(1, len(files) // _NUM_PROBED_FILES)
    return find_image_root(list(files)[::step][:_NUM_PROBED_FILES], path.parent)[0]


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, UTF-16 or UTF-32.

    Raises:
        InvalidInputError: if the file cannot be read or decoded.
    """
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{path} is not text in UTF-8, UTF-16 or UTF-32: {error.reason} at byte {error.start:,}; "
            "convert it to UTF-8",
            path=path,
        ) from error


def count_unused_images(path: Path, root: Path, files: Iterable[str], ignored: IgnoredFiles) -> None:
    """Count the images in the folder of a dataset that no usable annotation names.

    Args:
        path: The dataset; nothing is counted if it is a file.
        root: Folder that `files` are relative to.
        files: Images with an annotation, and masks.
        ignored: Receives the counts.
    """
    if not path.is_dir():
        return
    used = {os.path.realpath(os.path.join(root, file)) for file in files}  # noqa: PTH118
    for name in walk_files(path, IgnoredFiles()):
        if is_image_name(name) and os.path.realpath(os.path.join(path, name)) not in used:  # noqa: PTH118
            ignored.add("image that no usable annotation names", name)


def same_file_id(root: Path, file: str) -> str:
    """Return an identifier that is equal for two spellings of one path, such as `a.jpg` and `./a.jpg`."""
    return os.path.normpath(os.path.join(root, file))  # noqa: PTH118  # called once per row


def missing_split(
    path: Path, split: str, splits: Iterable[str], skipped: SkippedEntries
) -> InvalidInputError:
    """Return the error for a dataset without images of a split."""
    found = ", ".join(sorted(set(splits))) or "none"
    return InvalidInputError(f"{path} has no {split} images, only {found}{skipped.summary()}", path=path)


def content_key(paths: Iterable[Path], annotations: Iterable[object], *, whole: bool = False) -> str:
    """Return a hash of the content of files and of the annotation of each, independent of their names."""

    def fingerprint(path: Path) -> str:
        is_whole = whole or path.suffix.lower() in _UNCOMPRESSED_SUFFIXES
        return content_fingerprint(path, WHOLE_BYTES if is_whole else SAMPLED_BYTES)

    fingerprints = prefetch_map(fingerprint, paths, 4 * default_num_workers())
    return hash_strings(
        part
        for file_hash, annotation in zip(fingerprints, annotations, strict=True)
        for part in (repr(annotation), file_hash)
    )
