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

from likewise.data.images import SUFFIXES
from likewise.errors import InputError, close_matches

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
_BOX = ("x0", "y0", "x1", "y1")
_FILE = ("file", "image", "path", "filename", "file_name", "image_path")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images to compute features of.

    Attributes:
        name: What to call it in tables.
        source: The folder or table it was read from.
        root: The folder that files are relative to.
        files: n paths.
        key: A fingerprint of the table and of the files' names and sizes.
    """

    name: str
    source: Path
    root: Path
    files: tuple[str, ...]
    key: str

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True, kw_only=True)
class LabelledSet(ImageSet):
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
        faults: What of the table was left out, by reason.
    """

    label_column: str
    split_column: str
    splits: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    instances: np.ndarray | None
    domains: np.ndarray | None
    boxes: np.ndarray | None
    faults: dict[str, int] = field(default_factory=dict)

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
    box: tuple[float, ...] | None = None


def open_set(where: str | Path, *, label_column: str = "label", split_column: str = "split") -> LabelledSet:
    """Open a labelled set.

    Args:
        where: A folder laid out as `split/class/image` or with a `labels.csv` inside, or a CSV or TSV file
            with a column of files, one of labels, and one of splits. Columns `instance` and `domain`, where
            a table has them, serve retrieval, `x0`, `y0`, `x1` and `y1` localisation.
        label_column: The table's column of labels.
        split_column: The table's column of splits.

    Raises:
        InputError: where there is no such set, a column is missing, or train or test is empty.
    """
    path = Path(where)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder laid out as split/class/image, or a CSV file")
    table = path / "labels.csv" if path.is_dir() else path
    faults: Counter[str] = Counter()
    if table.is_file():
        rows, faults = read_table(table, partial(_read_rows, columns=(label_column, split_column)))
        root, name = table.parent, path.resolve().name if path.is_dir() else table_name(table)
    else:
        rows = _read_folder(path)
        root, name = path, path.resolve().name
    if label_column != "label":
        name = f"{name}-{label_column}"
    return _assemble(name, path, (label_column, split_column), root, rows, dict(faults))


def table_name(table: Path) -> str:
    """Return what to call a set by its table: the folder's name where the table's own says nothing."""
    plain = table.stem in ("items", "labels", "captions", "index")
    return table.resolve().parent.name if plain else table.stem


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


def read_table(table: Path, read: Callable[[Path, csv.DictReader], T]) -> T:
    """Open a CSV or TSV file and read it, with one sentence for what is no such file.

    Raises:
        InputError: where it is no UTF-8 table.
    """
    if table.suffix not in (".csv", ".tsv"):
        raise InputError(f"{table} is no table: give a folder, or a .csv or .tsv file")
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            return read(table, csv.DictReader(stream, delimiter="\t" if table.suffix == ".tsv" else ","))
    except (UnicodeDecodeError, csv.Error) as fault:
        raise InputError(f"{table} is no UTF-8 table with commas (tabs in .tsv): {fault}") from fault


def file_column(table: Path, columns: Sequence[str]) -> str:
    """Return the column that names image files.

    Raises:
        InputError: where there is none.
    """
    found = next((c for c in columns if c.lower() in _FILE), None)
    if found is None:
        raise InputError(
            f"{table} has no column of image files ({', '.join(_FILE)}); it has {', '.join(columns)}"
        )
    return found


def _read_rows(
    table: Path, reader: csv.DictReader, columns: tuple[str, str]
) -> tuple[list[_Row], Counter[str]]:
    present = list(reader.fieldnames or [])
    file, (label, split) = file_column(table, present), columns
    for name, flag in ((label, "--label-column"), (split, "--split-column")):
        if name not in present:
            near = close_matches(name, present)
            raise InputError(
                f"{table} has no column {name!r}; it has {', '.join(present)}; use {flag}.{near}"
            )
    rows, faults = [], Counter[str]()
    for number, row in enumerate(reader, start=2):
        if not row[file] or not row[label]:
            faults["without a file or a label"] += 1
            continue
        where = f"{table}, row {number}"
        rows.append(
            _Row(
                file=row[file],
                split=split_named(row[split] or "", where),
                label=row[label],
                instance=row.get("instance"),
                domain=row.get("domain"),
                box=_box(row, where, faults) if set(_BOX) <= set(present) else None,
            )
        )
    return rows, faults


def _box(row: dict[str, str], where: str, faults: Counter[str]) -> tuple[float, ...] | None:
    """Return where the subject is; None where the row does not say, or, counted, its box has no area."""
    if not any(row[side] for side in _BOX):
        return None
    try:
        x0, y0, x1, y1 = (float(row[side]) for side in _BOX)
    except (TypeError, ValueError) as fault:
        raise InputError(f"{where}: {', '.join(_BOX)} must be four numbers or all empty") from fault
    if x0 < x1 and y0 < y1:
        return x0, y0, x1, y1
    count_fault(faults, "boxes without area, left out", where)
    return None


def count_fault(faults: Counter[str], reason: str, where: str) -> None:
    """Count what is wrong in a set, under a name that tells where it occurred first."""
    faults[next((each for each in faults if each.startswith(reason)), f"{reason} (first: {where})")] += 1


def split_named(name: str, where: str) -> str:
    """Return which split a name means; raises InputError where it means none."""
    for split, names in SPLITS.items():
        if name.strip().lower() in names:
            return split
    raise InputError(f"{where}: {name!r} is no split; use train, val or test")


def _assemble(
    name: str,
    source: Path,
    columns: tuple[str, str],
    root: Path,
    rows: Sequence[_Row],
    faults: dict[str, int],
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
    boxes = np.array([row.box or (np.nan,) * 4 for row in rows])
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
        boxes=boxes if np.isfinite(boxes).any() else None,
        faults=faults,
        key=fingerprint(root, rows, [row.file for row in rows]),
    )


def fingerprint(root: Path, rows: Sequence[object], files: Sequence[str]) -> str:
    """Return a key of what a table says of files and of their sizes."""
    digest = hashlib.blake2b(digest_size=8)
    for row, name in zip(rows, files, strict=True):
        file = root / name
        size = file.stat().st_size if file.is_file() else -1
        digest.update(f"{row}\0{size}\n".encode())
    return digest.hexdigest()


def _column(name: str, values: list[str | None], splits: np.ndarray, source: Path) -> np.ndarray | None:
    """Return a column that serves retrieval, if there is one; it must be filled where it is looked at."""
    if not any(values):
        return None
    empty = sum(not value for value, split in zip(values, splits, strict=True) if split == "test")
    if empty:
        raise InputError(f"{source}: column {name!r} is empty for {empty} test images; fill it or drop it")
    return np.array([value or "" for value in values])
