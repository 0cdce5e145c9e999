"""Labeled images, read from a folder or a table."""

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from likewise.data.images import IMAGE_SUFFIXES
from likewise.errors import InvalidInputError, did_you_mean

SPLIT_ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
_BOX_COLUMNS = ("x0", "y0", "x1", "y1")
_FILE_COLUMNS = ("file", "image", "path", "filename", "file_name", "image_path")
T = TypeVar("T")


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
    """n paths."""
    key: str
    """Fingerprint of the table and of the names and sizes of the files."""

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True, kw_only=True)
class LabeledDataset(ImageDataset):
    """Images with a label and a split each."""

    label_column: str
    """Column of the labels in the table."""
    split_column: str
    """Column of the splits in the table."""
    splits: np.ndarray
    """(n,) of `train`, `val` and `test`."""
    labels: np.ndarray
    """(n,) int64, the class of each image."""
    classes: tuple[str, ...]
    """Names of the classes, sorted."""
    instances: np.ndarray | None
    """(n,) object instance of each image, for retrieval, or None."""
    domains: np.ndarray | None
    """(n,) domain of each image, for cross-domain retrieval, or None."""
    boxes: np.ndarray | None
    """(n, 4) float64, box of each subject as x0 y0 x1 y1 in the units of the table or NaN; or None."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of excluded rows and boxes by reason."""

    def split_counts(self) -> dict[str, int]:
        """Return the number of images per split."""
        return {
            split: int((self.splits == split).sum())
            for split in SPLIT_ALIASES
            if (self.splits == split).any()
        }

    def test_only_classes(self) -> list[str]:
        """Return the classes that occur in test but not in train or val, which no classifier can predict."""
        train_labels = set(self.labels[self.splits != "test"].tolist())
        return [
            self.classes[i] for i in sorted(set(self.labels[self.splits == "test"].tolist()) - train_labels)
        ]


@dataclass(frozen=True, kw_only=True)
class _LabeledImage:
    file: str
    split: str
    label: str
    instance: str | None = None
    domain: str | None = None
    box: tuple[float, ...] | None = None


def open_labeled(
    path: str | Path, *, label_column: str = "label", split_column: str = "split"
) -> LabeledDataset:
    """Open a labeled dataset.

    Args:
        path: A folder with the layout `split/class/image` or with a `labels.csv`, or a CSV or TSV file with
            columns of files, labels and splits. The optional columns `instance` and `domain` are for
            retrieval, `x0`, `y0`, `x1` and `y1` for localization. Without `test` images, `val` is the test
            split.
        label_column: Column of the labels.
        split_column: Column of the splits.

    Raises:
        InvalidInputError: if there is no such dataset, a column is missing, or train or test is empty.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInputError(
            f"{path} does not exist; a folder with the layout split/class/image or a CSV file is needed",
            path=path,
        )
    table = path / "labels.csv" if path.is_dir() else path
    skipped: Counter[str] = Counter()
    if table.is_file():
        rows, skipped = read_table(table, partial(_read_rows, columns=(label_column, split_column)))
        root, name = table.parent, path.resolve().name if path.is_dir() else dataset_name(table)
    else:
        rows = _read_folder(path)
        root, name = path, path.resolve().name
    if label_column != "label":
        name = f"{name}-{label_column}"
    return _build_dataset(name, path, (label_column, split_column), root, rows, dict(skipped))


def dataset_name(table: Path) -> str:
    """Return the name of a dataset from its table: the folder's name if that of the table is generic."""
    is_generic = table.stem in ("items", "labels", "captions", "index")
    return table.resolve().parent.name if is_generic else table.stem


def _read_folder(path: Path) -> list[_LabeledImage]:
    rows = []
    for split, aliases in SPLIT_ALIASES.items():
        for alias in aliases:
            for file in sorted((path / alias).glob("*/*")):
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    relative_path = file.relative_to(path).as_posix()
                    rows.append(_LabeledImage(file=relative_path, split=split, label=file.parent.name))
    if not rows:
        raise InvalidInputError(
            f"{path} holds neither a labels.csv nor images with the layout train/CLASS/… and test/CLASS/…",
            path=path,
        )
    return rows


def read_table(table: Path, read_rows: Callable[[Path, csv.DictReader], T]) -> T:
    """Open a CSV or TSV file and apply `read_rows` to it.

    Raises:
        InvalidInputError: if it is not a UTF-8 table.
    """
    if table.suffix not in (".csv", ".tsv"):
        raise InvalidInputError(f"{table} is not a folder, nor a .csv or .tsv file", path=table)
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            return read_rows(table, csv.DictReader(stream, delimiter="\t" if table.suffix == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(
            f"{table} is not a UTF-8 table with commas (tabs in .tsv): {error}", path=table
        ) from error


def find_file_column(table: Path, columns: Sequence[str]) -> str:
    """Return the column of image files.

    Raises:
        InvalidInputError: if there is none.
    """
    column = next((name for name in columns if name.lower() in _FILE_COLUMNS), None)
    if column is None:
        raise InvalidInputError(
            f"{table} has no column of image files ({', '.join(_FILE_COLUMNS)}); it has {', '.join(columns)}",
            path=table,
        )
    return column


def _read_rows(
    table: Path, reader: csv.DictReader, columns: tuple[str, str]
) -> tuple[list[_LabeledImage], Counter[str]]:
    fieldnames = list(reader.fieldnames or [])
    file_col, (label_col, split_col) = find_file_column(table, fieldnames), columns
    for name, field_name in ((label_col, "label_column"), (split_col, "split_column")):
        if name not in fieldnames:
            raise InvalidInputError(
                f"`{field_name}`: {table} has no column {name!r}; it has {', '.join(fieldnames)}."
                f"{did_you_mean(name, fieldnames)}",
                field=field_name,
                path=table,
            )
    rows, skipped = [], Counter[str]()
    for row_number, row in enumerate(reader, start=2):
        if not row[file_col] or not row[label_col]:
            skipped["without a file or a label"] += 1
            continue
        location = f"{table}, row {row_number}"
        rows.append(
            _LabeledImage(
                file=row[file_col],
                split=parse_split(row[split_col] or "", location),
                label=row[label_col],
                instance=row.get("instance"),
                domain=row.get("domain"),
                box=_parse_box(row, location, skipped) if set(_BOX_COLUMNS) <= set(fieldnames) else None,
            )
        )
    return rows, skipped


def _parse_box(row: dict[str, str], location: str, skipped: Counter[str]) -> tuple[float, ...] | None:
    """Return the box of the subject; None if the row has none, or, counted as skipped, one without area."""
    if not any(row[column] for column in _BOX_COLUMNS):
        return None
    try:
        x0, y0, x1, y1 = (float(row[column]) for column in _BOX_COLUMNS)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{location}: {', '.join(_BOX_COLUMNS)} must be four numbers or all empty"
        ) from error
    if x0 < x1 and y0 < y1:
        return x0, y0, x1, y1
    count_skipped(skipped, "boxes without area, excluded", location)
    return None


def count_skipped(skipped: Counter[str], reason: str, location: str) -> None:
    """Count a problem of a dataset by its reason and first location."""
    skipped[next((key for key in skipped if key.startswith(reason)), f"{reason} (first: {location})")] += 1


def parse_split(name: str, location: str) -> str:
    """Return the split of a name such as `validation`; raises InvalidInputError for an unknown name."""
    for split, aliases in SPLIT_ALIASES.items():
        if name.strip().lower() in aliases:
            return split
    raise InvalidInputError(f"{location}: {name!r} is not a split; use train, val or test")


def _build_dataset(
    name: str,
    path: Path,
    columns: tuple[str, str],
    root: Path,
    rows: Sequence[_LabeledImage],
    skipped: dict[str, int],
) -> LabeledDataset:
    splits = np.array([row.split for row in rows], "<U5")
    if "test" not in splits and "val" in splits:
        splits[splits == "val"] = "test"
    for required_split in ("train", "test"):
        if required_split not in splits:
            raise InvalidInputError(
                f"{path} has no {required_split} images, only {', '.join(sorted(set(splits))) or 'none'}",
                path=path,
            )
    classes = tuple(sorted({row.label for row in rows}))
    if len(classes) < 2:
        raise InvalidInputError(f"{path} has {len(classes)} class; at least 2 are needed", path=path)
    class_index = {label: i for i, label in enumerate(classes)}
    boxes = np.array([row.box or (np.nan,) * 4 for row in rows])
    return LabeledDataset(
        name=name,
        path=path,
        label_column=columns[0],
        split_column=columns[1],
        root=root,
        files=tuple(row.file for row in rows),
        splits=splits,
        labels=np.array([class_index[row.label] for row in rows], np.int64),
        classes=classes,
        instances=_retrieval_column("instance", [row.instance for row in rows], splits, path),
        domains=_retrieval_column("domain", [row.domain for row in rows], splits, path),
        boxes=boxes if np.isfinite(boxes).any() else None,
        skipped=skipped,
        key=fingerprint(root, rows, [row.file for row in rows]),
    )


def fingerprint(root: Path, rows: Sequence[object], files: Sequence[str]) -> str:
    """Return a hash of the rows of a table and of the sizes of their files."""
    digest = hashlib.blake2b(digest_size=8)
    for row, file in zip(rows, files, strict=True):
        path = root / file
        size = path.stat().st_size if path.is_file() else -1
        digest.update(f"{row}\0{size}\n".encode())
    return digest.hexdigest()


def _retrieval_column(
    name: str, values: list[str | None], splits: np.ndarray, path: Path
) -> np.ndarray | None:
    """Return a column for retrieval, if there is one; raises InvalidInputError if test images lack it."""
    if not any(values):
        return None
    num_empty = sum(not value for value, split in zip(values, splits, strict=True) if split == "test")
    if num_empty:
        raise InvalidInputError(
            f"{path}: column {name!r} is empty for {num_empty} test images; fill it or remove it", path=path
        )
    return np.array([value or "" for value in values])
