"""Labelled sets of images to evaluate on, read from a folder or a table."""

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
    """Images to compute features of.

    Attributes:
        name: What to call it in tables.
        path: The folder or table it was read from.
        root: The folder that files are relative to.
        files: n paths.
        key: A fingerprint of the table and of the files' names and sizes.
    """

    name: str
    path: Path
    root: Path
    files: tuple[str, ...]
    key: str

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True, kw_only=True)
class LabeledDataset(ImageDataset):
    """Images with a label and a split each.

    Attributes:
        label_column: Where its labels came from, in a table.
        split_column: Where its splits came from, in a table.
        splits: (n,) of `train`, `val`, `test`.
        labels: (n,) int64, the class of each image.
        classes: The classes' names, sorted.
        instances: (n,) what each image shows, for retrieval, or None.
        domains: (n,) where each image comes from, for retrieval, or None.
        boxes: (n, 4) float64, where in the image its subject is: x0 y0 x1 y1 as the table has them, NaN
            where it does not say; or None.
        skipped: What of the table was left out, by reason.
    """

    label_column: str
    split_column: str
    splits: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    instances: np.ndarray | None
    domains: np.ndarray | None
    boxes: np.ndarray | None
    skipped: dict[str, int] = field(default_factory=dict)

    def split_counts(self) -> dict[str, int]:
        """Return how many images each split has."""
        return {
            split: int((self.splits == split).sum())
            for split in SPLIT_ALIASES
            if (self.splits == split).any()
        }

    def test_only_classes(self) -> list[str]:
        """Return the classes that occur in test but not in train or val: no classifier can name them."""
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
    """Open a labelled set.

    Args:
        path: A folder laid out as `split/class/image` or with a `labels.csv` inside, or a CSV or TSV file
            with a column of files, one of labels, and one of splits. Columns `instance` and `domain`, where
            a table has them, serve retrieval, `x0`, `y0`, `x1` and `y1` localisation.
        label_column: The table's column of labels.
        split_column: The table's column of splits.

    Raises:
        InputError: where there is no such set, a column is missing, or train or test is empty.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInputError(
            f"{path} does not exist; give a folder laid out as split/class/image, or a CSV file"
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
    """Return what to call a set by its table: the folder's name where the table's own says nothing."""
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
            f"{path} holds neither a labels.csv nor images laid out as train/CLASS/… and test/CLASS/…"
        )
    return rows


def read_table(table: Path, read_rows: Callable[[Path, csv.DictReader], T]) -> T:
    """Open a CSV or TSV file and read it, with one sentence for what is no such file.

    Raises:
        InputError: where it is no UTF-8 table.
    """
    if table.suffix not in (".csv", ".tsv"):
        raise InvalidInputError(f"{table} is no table: give a folder, or a .csv or .tsv file")
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            return read_rows(table, csv.DictReader(stream, delimiter="\t" if table.suffix == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"{table} is no UTF-8 table with commas (tabs in .tsv): {error}") from error


def find_file_column(table: Path, columns: Sequence[str]) -> str:
    """Return the column that names image files.

    Raises:
        InputError: where there is none.
    """
    column = next((name for name in columns if name.lower() in _FILE_COLUMNS), None)
    if column is None:
        raise InvalidInputError(
            f"{table} has no column of image files ({', '.join(_FILE_COLUMNS)}); it has {', '.join(columns)}"
        )
    return column


def _read_rows(
    table: Path, reader: csv.DictReader, columns: tuple[str, str]
) -> tuple[list[_LabeledImage], Counter[str]]:
    fieldnames = list(reader.fieldnames or [])
    file_col, (label_col, split_col) = find_file_column(table, fieldnames), columns
    for name, flag in ((label_col, "--label-column"), (split_col, "--split-column")):
        if name not in fieldnames:
            suggestion = did_you_mean(name, fieldnames)
            raise InvalidInputError(
                f"{table} has no column {name!r}; it has {', '.join(fieldnames)}; use {flag}.{suggestion}"
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
    """Return where the subject is; None where the row does not say, or, counted, its box has no area."""
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
    count_skipped(skipped, "boxes without area, left out", location)
    return None


def count_skipped(skipped: Counter[str], reason: str, location: str) -> None:
    """Count what is wrong in a set, under a name that tells where it occurred first."""
    skipped[next((key for key in skipped if key.startswith(reason)), f"{reason} (first: {location})")] += 1


def parse_split(name: str, location: str) -> str:
    """Return which split a name means; raises InputError where it means none."""
    for split, aliases in SPLIT_ALIASES.items():
        if name.strip().lower() in aliases:
            return split
    raise InvalidInputError(f"{location}: {name!r} is no split; use train, val or test")


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
                f"{path} has no {required_split} images; found: {', '.join(sorted(set(splits))) or 'nothing'}"
            )
    classes = tuple(sorted({row.label for row in rows}))
    if len(classes) < 2:
        raise InvalidInputError(f"{path} has {len(classes)} class; at least 2 are needed to tell apart")
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
    """Return a key of what a table says of files and of their sizes."""
    digest = hashlib.blake2b(digest_size=8)
    for row, file in zip(rows, files, strict=True):
        path = root / file
        size = path.stat().st_size if path.is_file() else -1
        digest.update(f"{row}\0{size}\n".encode())
    return digest.hexdigest()


def _retrieval_column(
    name: str, values: list[str | None], splits: np.ndarray, path: Path
) -> np.ndarray | None:
    """Return a column that serves retrieval, if there is one; it must be filled where it is looked at."""
    if not any(values):
        return None
    num_empty = sum(not value for value, split in zip(values, splits, strict=True) if split == "test")
    if num_empty:
        raise InvalidInputError(
            f"{path}: column {name!r} is empty for {num_empty} test images; fill it or drop it"
        )
    return np.array([value or "" for value in values])
