"""Labelled sets of images to evaluate on, read from a folder or a table."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from likewise.collection.images import SUFFIXES
from likewise.errors import InputError, close_matches

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
_FILE = ("file", "image", "path", "filename", "file_name", "image_path")


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Images with a label and a split each.

    Attributes:
        name: What to call it in tables.
        source: The folder or table it was read from.
        label_column: Where its labels came from, in a table.
        split_column: Where its splits came from, in a table.
        root: The folder that files are relative to.
        files: n paths.
        splits: (n,) of `train`, `val`, `test`.
        labels: (n,) int64, the class of each image.
        classes: The classes' names, sorted.
        instances: (n,) what each image shows, for retrieval, or None.
        domains: (n,) where each image comes from, for retrieval, or None.
        key: A fingerprint of the table and of the files' names and sizes.
    """

    name: str
    source: Path
    label_column: str
    split_column: str
    root: Path
    files: tuple[str, ...]
    splits: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    instances: np.ndarray | None
    domains: np.ndarray | None
    key: str

    def __len__(self) -> int:
        return len(self.files)

    def counts(self) -> dict[str, int]:
        """Return how many images each split has."""
        return {split: int((self.splits == split).sum()) for split in SPLITS if (self.splits == split).any()}

    def unseen(self) -> list[str]:
        """Return the classes that occur in test but not in train or val: no classifier can name them."""
        seen = set(self.labels[self.splits != "test"].tolist())
        return [self.classes[i] for i in sorted(set(self.labels[self.splits == "test"].tolist()) - seen)]


@dataclass(frozen=True, kw_only=True)
class _Row:
    file: str
    split: str
    label: str
    instance: str | None = None
    domain: str | None = None


def open_set(where: str | Path, *, label_column: str = "label", split_column: str = "split") -> LabelledSet:
    """Open a labelled set.

    Args:
        where: A folder laid out as `split/class/image` or with a `labels.csv` inside, or a CSV or TSV file
            with a column of files, one of labels, and one of splits. Columns `instance` and `domain`, where
            a table has them, serve retrieval.
        label_column: The table's column of labels.
        split_column: The table's column of splits.

    Raises:
        InputError: where there is no such set, a column is missing, or train or test is empty.
    """
    path = Path(where)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder laid out as split/class/image, or a CSV file")
    table = path / "labels.csv" if path.is_dir() else path
    if table.is_file():
        rows = _read_table(table, label_column, split_column)
        root, name = table.parent, path.resolve().name if path.is_dir() else _table_name(table)
    else:
        rows = _read_folder(path)
        root, name = path, path.resolve().name
    if label_column != "label":
        name = f"{name}-{label_column}"
    return _assemble(name, path, (label_column, split_column), root, rows)


def _table_name(table: Path) -> str:
    return table.resolve().parent.name if table.stem in ("items", "labels", "index") else table.stem


def _read_folder(path: Path) -> list[_Row]:
    rows = []
    for split, names in SPLITS.items():
        for name in names:
            for file in sorted((path / name).glob("*/*")):
                if file.suffix.lower() in SUFFIXES:
                    place = file.relative_to(path).as_posix()
                    rows.append(_Row(file=place, split=split, label=file.parent.name))
    if not rows:
        raise InputError(
            f"{path} holds neither a labels.csv nor images laid out as train/CLASS/… and test/CLASS/…"
        )
    return rows


def _read_table(table: Path, label_column: str, split_column: str) -> list[_Row]:
    if table.suffix not in (".csv", ".tsv"):
        raise InputError(f"{table} is no labelled set: give a folder, or a .csv or .tsv file")
    try:
        return _read_rows(table, label_column, split_column)
    except (UnicodeDecodeError, csv.Error) as fault:
        raise InputError(f"{table} is no UTF-8 table with commas (tabs in .tsv): {fault}") from fault


def _read_rows(table: Path, label_column: str, split_column: str) -> list[_Row]:
    with table.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if table.suffix == ".tsv" else ",")
        columns = list(reader.fieldnames or [])
        file_column = next((c for c in columns if c.lower() in _FILE), None)
        if file_column is None:
            raise InputError(
                f"{table} has no column of image files ({', '.join(_FILE)}); it has {', '.join(columns)}"
            )
        for name, flag in ((label_column, "--label-column"), (split_column, "--split-column")):
            if name not in columns:
                near = close_matches(name, columns)
                raise InputError(
                    f"{table} has no column {name!r}; it has {', '.join(columns)}; use {flag}.{near}"
                )
        rows = []
        for number, row in enumerate(reader, start=2):
            if row[file_column] and row[label_column]:
                split = _split(row[split_column] or "", f"{table}, row {number}")
                rows.append(
                    _Row(
                        file=row[file_column],
                        split=split,
                        label=row[label_column],
                        instance=row.get("instance"),
                        domain=row.get("domain"),
                    )
                )
    return rows


def _split(name: str, where: str) -> str:
    for split, names in SPLITS.items():
        if name.strip().lower() in names:
            return split
    raise InputError(f"{where}: {name!r} is no split; use train, val or test")


def _assemble(
    name: str, source: Path, columns: tuple[str, str], root: Path, rows: Sequence[_Row]
) -> LabelledSet:
    splits = np.array([row.split for row in rows], "<U5")
    if "test" not in splits and "val" in splits:
        splits[splits == "val"] = "test"
    for needed in ("train", "test"):
        if needed not in splits:
            raise InputError(
                f"{source} has no {needed} images; found: {', '.join(sorted(set(splits))) or 'nothing'}"
            )
    classes = tuple(sorted({row.label for row in rows}))
    if len(classes) < 2:
        raise InputError(f"{source} has {len(classes)} class; at least 2 are needed to tell apart")
    number = {label: i for i, label in enumerate(classes)}
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        file = root / row.file
        size = file.stat().st_size if file.is_file() else -1
        digest.update(f"{row}\0{size}\n".encode())
    return LabelledSet(
        name=name,
        source=source,
        label_column=columns[0],
        split_column=columns[1],
        root=root,
        files=tuple(row.file for row in rows),
        splits=splits,
        labels=np.array([number[row.label] for row in rows], np.int64),
        classes=classes,
        instances=_column("instance", [row.instance for row in rows], splits, source),
        domains=_column("domain", [row.domain for row in rows], splits, source),
        key=digest.hexdigest(),
    )


def _column(name: str, values: list[str | None], splits: np.ndarray, source: Path) -> np.ndarray | None:
    """Return a column that serves retrieval, if there is one; it must be filled where it is looked at."""
    if not any(values):
        return None
    empty = sum(not value for value, split in zip(values, splits, strict=True) if split == "test")
    if empty:
        raise InputError(f"{source}: column {name!r} is empty for {empty} test images; fill it or drop it")
    return np.array([value or "" for value in values])
