"""Images with boxes, read from the formats that detection sets come in."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import Image

from likewise.data.images import SUFFIXES
from likewise.errors import InputError
from likewise.evaluation.datasets.labeled import (
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


_SIDES = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True, kw_only=True)
class BoxedSet(ImageSet):
    """Images with boxes and a split each.

    Attributes:
        splits: (n,) of `train` and `test`.
        boxes: For each image (k, 4) float64, x0 y0 x1 y1 as shares of its sides, inside it.
        labels: For each image (k,) int64, the class of each box.
        crowds: For each image (k,) bool, which boxes stand for many things at once.
        classes: The classes' names, sorted.
        faults: What was cut, left out or is missing, by reason, with the first place it occurs.
    """

    splits: np.ndarray
    boxes: tuple[np.ndarray, ...]
    labels: tuple[np.ndarray, ...]
    crowds: tuple[np.ndarray, ...]
    classes: tuple[str, ...]
    faults: dict[str, int]


@dataclass
class _Shown:
    """An image as a file tells of it: boxes in pixels where it gives the size, else as shares."""

    file: str
    split: str
    size: tuple[float, float] = (1.0, 1.0)
    boxes: list[tuple[str, tuple[float, ...], bool, str]] = field(default_factory=list)

    def add(self, label: str, corners: Iterable[float], where: str, *, crowd: bool = False) -> None:
        """Note a box and where it stands."""
        self.boxes.append((label, tuple(corners), crowd, where))


def open_boxes(where: str | Path) -> BoxedSet:
    """Open a set of images with boxes.

    Args:
        where: A CSV file, or a folder with a `boxes.csv`, with columns of files, `split`, `label`, `x0`,
            `y0`, `x1`, `y1`, as shares of the image's sides or in pixels; or a folder as COCO (`annotations/
            instances_*.json`), Pascal VOC (`Annotations`, `ImageSets/Main`) or YOLO (a YAML file with
            `train`, `val` and `names`) have it. Where there is no `test`, `val` is tested on.

    Raises:
        InputError: where it is none of these, or train or test is empty.
    """
    path = Path(where)
    table = path / "boxes.csv" if path.is_dir() else path
    if table.is_file() and table.suffix in (".csv", ".tsv"):
        name = path.resolve().name if path.is_dir() else table_name(table)
        return _assemble(name, path, table.parent, read_table(table, _read_csv))
    if path.is_dir():
        for reader in (_read_coco, _read_voc, _read_yolo):
            found = list(reader(path))
            if found:
                return _assemble(path.resolve().name, path, path, found)
    raise InputError(
        f"{path} holds no boxes: give a boxes.csv, or a folder as COCO, Pascal VOC or YOLO lay it out"
    )


def _read_csv(table: Path, reader: csv.DictReader) -> list[_Shown]:
    present = list(reader.fieldnames or [])
    file = file_column(table, present)
    missing = [name for name in ("split", "label", *_SIDES) if name not in present]
    if missing:
        raise InputError(f"{table} has no column {missing[0]!r}; it has {', '.join(present)}")
    found: dict[str, _Shown] = {}
    largest = 0.0
    for number, row in enumerate(reader, start=2):
        place = f"{table.name}, row {number}"
        shown = found.setdefault(row[file], _Shown(row[file], split_named(row["split"] or "", place)))
        if not any(row[side] for side in _SIDES):
            continue  # an image without anything in it
        try:
            corners = tuple(float(row[side]) for side in _SIDES)
        except (TypeError, ValueError) as fault:
            raise InputError(f"{place}: {', '.join(_SIDES)} must be four numbers or all empty") from fault
        largest = max(largest, *corners)
        shown.add(row["label"], corners, place)
    if largest > 1.5:
        for shown in found.values():
            shown.size = _size(table.parent / shown.file)
    return list(found.values())


def _size(file: Path) -> tuple[float, float]:
    try:
        with Image.open(file) as image:
            return float(image.width), float(image.height)
    except OSError:
        return (1.0, 1.0)  # it is counted as missing or damaged when it is read


def _read_coco(path: Path) -> Iterator[_Shown]:
    for file in sorted((path / "annotations").glob("instances_*.json")):
        split = split_named(file.stem.removeprefix("instances_").rstrip("0123456789"), file.name)
        try:
            told: dict[str, Any] = json.loads(file.read_text())
            names = {each["id"]: each["name"] for each in told["categories"]}
            folder = _image_folder(path, file.stem.removeprefix("instances_"))
            images = {
                each["id"]: _Shown(
                    f"{folder}{each['file_name']}", split, (float(each["width"]), float(each["height"]))
                )
                for each in told["images"]
            }
            for each in told["annotations"]:
                x, y, width, height = map(float, each["bbox"])
                crowd = bool(each.get("iscrowd", 0))
                place = f"{file.name}, annotation {each['id']}"
                images[each["image_id"]].add(
                    names[each["category_id"]], (x, y, x + width, y + height), place, crowd=crowd
                )
        except (KeyError, TypeError, ValueError) as fault:
            raise InputError(
                f"{file} is no COCO file of instances: {type(fault).__name__} {fault}"
            ) from fault
        yield from images.values()


def _image_folder(path: Path, split: str) -> str:
    places = (split, f"images/{split}", "images", ".")
    return next((f"{place}/" for place in places if (path / place).is_dir() and place != "."), "")


def _read_voc(path: Path) -> Iterator[_Shown]:
    """Read Pascal VOC; its difficult objects count, as crowds do, neither way."""
    for name in ("train", "val", "test"):
        listed = path / "ImageSets/Main" / f"{name}.txt"
        lines = listed.read_text().splitlines() if listed.is_file() else []
        for stem in (line.split()[0] for line in lines if line.strip()):
            told = path / "Annotations" / f"{stem}.xml"
            try:
                yield _voc_image(told, name)
            except (OSError, ElementTree.ParseError, ValueError) as fault:
                raise InputError(f"{told}, named in {listed.name}, is no VOC annotation: {fault}") from fault


def _voc_image(told: Path, split: str) -> _Shown:
    tree = ElementTree.fromstring(told.read_bytes())  # noqa: S314  # expat resolves no outer entities
    width, height = (float(tree.findtext(f"size/{side}", "")) for side in ("width", "height"))
    shown = _Shown(f"JPEGImages/{tree.findtext('filename', f'{told.stem}.jpg')}", split, (width, height))
    for number, each in enumerate(tree.iter("object"), start=1):
        sides = (each.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax"))
        x0, y0, x1, y1 = map(float, sides)
        hard = each.findtext("difficult", "0").strip() == "1"
        # Its first pixel is 1, and its last one belongs to the box.
        corners = (x0 - 1, y0 - 1, x1, y1)
        shown.add(each.findtext("name", ""), corners, f"{told.name}, object {number}", crowd=hard)
    return shown


def _read_yolo(path: Path) -> Iterator[_Shown]:
    for config in (*sorted(path.glob("*.yaml")), *sorted(path.glob("*.yml"))):
        told = yaml.safe_load(config.read_text())
        if not isinstance(told, dict) or not {"train", "val", "names"} <= told.keys():
            continue
        for split in ("train", "val", "test"):
            if not told.get(split):
                continue
            folder = path / str(told.get("path") or ".") / str(told[split])
            if not folder.is_dir():
                raise InputError(f"{config} names {told[split]} for {split}, but {folder} does not exist")
            for file in sorted(each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES):
                yield _yolo_image(path, file, split, told["names"])


def _yolo_image(path: Path, file: Path, split: str, names: Any) -> _Shown:
    shown, text = _Shown(file.relative_to(path).as_posix(), split), _yolo_labels(file)
    lines = text.read_text().splitlines() if text.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            label, *numbers = line.split()[:5]
            x, y, width, height = map(float, numbers)
            name = str(names[int(label)])
        except (ValueError, KeyError, IndexError) as fault:
            raise InputError(f"{text}, line {number}: expected a class and x y width height") from fault
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        shown.add(name, corners, f"{text.name}, line {number}")
    return shown


def _yolo_labels(image: Path) -> Path:
    """Return where the boxes of an image stand: `labels` in place of `images` in its path, or beside it."""
    parts = list(image.parts)
    if "images" in parts:
        place = len(parts) - 1 - parts[::-1].index("images")
        parts[place] = "labels"
    return Path(*parts).with_suffix(".txt")


def _assemble(name: str, source: Path, root: Path, shown: list[_Shown]) -> BoxedSet:
    splits = np.array([each.split for each in shown])
    splits[splits == "val"] = "train" if "test" in splits else "test"
    faults: Counter[str] = Counter()
    kept = [[found for box in each.boxes if (found := _inside(each, faults, box))] for each in shown]
    for split in ("train", "test"):
        if split not in splits:
            raise InputError(f"{source} has no {split} images; found: {', '.join(sorted(set(splits)))}")
    classes = tuple(sorted({label for boxes in kept for label, _, _ in boxes}))
    if not classes:
        raise InputError(f"{source} has images but no boxes")
    number = {label: i for i, label in enumerate(classes)}
    files = [each.file for each in shown]
    return BoxedSet(
        name=name,
        source=source,
        root=root,
        files=tuple(files),
        key=fingerprint(
            root, [(split, boxes) for split, boxes in zip(splits.tolist(), kept, strict=True)], files
        ),
        splits=splits,
        boxes=tuple(np.array([box for _, box, _ in boxes], np.float64).reshape(-1, 4) for boxes in kept),
        labels=tuple(np.array([number[label] for label, _, _ in boxes], np.int64) for boxes in kept),
        crowds=tuple(np.array([crowd for _, _, crowd in boxes], bool) for boxes in kept),
        classes=classes,
        faults=dict(faults),
    )


def _inside(
    shown: _Shown, faults: Counter[str], box: tuple[str, tuple[float, ...], bool, str]
) -> tuple[str, tuple[float, ...], bool] | None:
    """Return a box as shares of the image and cut at its edge, or None where nothing is left of it."""
    label, corners, crowd, where = box
    shares = np.array(corners) / np.tile(shown.size, 2)
    cut = shares.clip(0, 1)
    if not (cut[:2] < cut[2:]).all():
        count_fault(faults, "boxes without area inside the image, left out", where)
        return None
    if np.abs(cut - shares).max() > 0.01:
        count_fault(faults, "boxes reaching over the edge, cut there", where)
    return label, tuple(cut.tolist()), crowd
