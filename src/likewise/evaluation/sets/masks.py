"""Images with a mask that gives each pixel a class."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from likewise.collection.images import SUFFIXES
from likewise.errors import InputError
from likewise.evaluation.sets.suite import (
    ImageSet,
    count_fault,
    file_column,
    fingerprint,
    read_table,
    split_named,
    table_name,
)

UNLABELLED = 255


@dataclass(frozen=True, kw_only=True)
class MaskedSet(ImageSet):
    """Images with a mask and a split each.

    Attributes:
        masks: n paths, relative to the same folder as the images.
        splits: (n,) of `train` and `test`.
        classes: The classes' names, by the number that stands for them in masks.
        ignored: Numbers in masks that count neither way.
        faults: What was left out, by reason, with the first file it occurs in.
    """

    masks: tuple[str, ...]
    splits: np.ndarray
    classes: tuple[str, ...]
    ignored: tuple[int, ...]
    faults: dict[str, int]

    def mask(self, row: int) -> np.ndarray:
        """Return the mask of an image, (h, w) int64, -1 where it counts neither way."""
        with Image.open(self.root / self.masks[row]) as image:
            found = np.asarray(image).astype(np.int64)
        return np.where(np.isin(found, self.ignored), -1, found)


def open_masks(where: str | Path, ignored: tuple[int, ...] = (UNLABELLED,)) -> MaskedSet:
    """Open a set of images with masks: 8-bit grey or palette images that hold class numbers.

    Args:
        where: A CSV file, or a folder with an `index.csv`, with columns of files, `mask` and `split`; or a
            folder laid out as `train/images`, `train/masks`, `test/images` and so on, with equal names.
            Names of classes stand in a `classes.txt` beside it, one a line, where there is one. Where there
            is no `test`, `val` is tested on; else it is learned from.
        ignored: Numbers that count neither way.

    Raises:
        InputError: where there is no such set, a mask is none, or train or test is empty.
    """
    path = Path(where)
    table = path / "index.csv" if path.is_dir() else path
    if table.is_file():
        root, rows, name = table.parent, read_table(table, _read_index), table_name(table)
    elif path.is_dir():
        root, rows, name = path, _read_folders(path), path.resolve().name
    else:
        raise InputError(
            f"{path} does not exist; give a folder with an index.csv or train/images, train/masks"
        )
    faults: Counter[str] = Counter()
    kept, highest = [], 0
    for file, mask, split in rows:
        top = _check(root, file, mask, ignored, faults)
        if top is not None:
            kept.append((file, mask, split))
            highest = max(highest, top)
    splits = np.array([split for _, _, split in kept], "<U5")
    splits[splits == "val"] = "train" if "test" in splits else "test"
    for split in ("train", "test"):
        if split not in splits:
            raise InputError(f"{path} has no {split} images with a mask; left out: {dict(faults) or 'none'}")
    files = tuple(file for file, _, _ in kept)
    return MaskedSet(
        name=name,
        source=path,
        root=root,
        files=files,
        key=fingerprint(root, [(*row, ignored) for row in kept], files),
        masks=tuple(mask for _, mask, _ in kept),
        splits=splits,
        classes=_names(root / "classes.txt", highest, ignored),
        ignored=ignored,
        faults=dict(faults),
    )


def _read_index(table: Path, reader: csv.DictReader) -> list[tuple[str, str, str]]:
    present = list(reader.fieldnames or [])
    file = file_column(table, present)
    for name in ("mask", "split"):
        if name not in present:
            raise InputError(f"{table} has no column {name!r}; it has {', '.join(present)}")
    return [
        (row[file], row["mask"], split_named(row["split"] or "", f"{table}, row {number}"))
        for number, row in enumerate(reader, start=2)
    ]


def _read_folders(path: Path) -> list[tuple[str, str, str]]:
    rows = []
    for folder in sorted(each for each in path.iterdir() if (each / "images").is_dir()):
        split = split_named(folder.name, str(folder))
        for image in sorted((folder / "images").iterdir()):
            if image.suffix.lower() in SUFFIXES:
                mask = folder / "masks" / f"{image.stem}.png"
                rows.append((image.relative_to(path).as_posix(), mask.relative_to(path).as_posix(), split))
    if not rows:
        raise InputError(f"{path} holds neither an index.csv nor train/images and train/masks")
    return rows


def _check(root: Path, file: str, mask: str, ignored: tuple[int, ...], faults: Counter[str]) -> int | None:
    """Return the highest class of a mask, or None and count why it cannot be used."""
    try:
        with Image.open(root / file) as image, Image.open(root / mask) as told:
            if told.mode not in ("L", "P"):
                needed = "8-bit grey or palette images with class numbers are needed"
                raise InputError(f"{root / mask} is a mask in {told.mode}: {needed}")
            if image.size != told.size:
                count_fault(faults, "masks of another size than their image", mask)
                return None
            values = np.flatnonzero(np.bincount(np.asarray(told).ravel()))
    except OSError:
        count_fault(faults, "images or masks missing or damaged", mask)
        return None
    return int(max((value for value in values.tolist() if value not in ignored), default=0))


def _names(file: Path, highest: int, ignored: tuple[int, ...]) -> tuple[str, ...]:
    lines = file.read_text().splitlines() if file.is_file() else []
    # Some write the number before the name.
    named = [line.strip().removeprefix(f"{i} ") for i, line in enumerate(filter(str.strip, lines))]
    if named and highest >= len(named):
        told = f"{len(named)} classes, but masks hold {highest}"
        raise InputError(f"{file} names {told}; name it too, or use --ignore {highest}")
    while named and len(named) - 1 in ignored:
        named.pop()
    return tuple(named) or tuple(map(str, range(highest + 1)))
