"""Images with boxes or masks, read from common formats of detection and segmentation."""

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

from likewise.data.images import IMAGE_SUFFIXES
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.labeled import (
    ImageDataset,
    count_skipped,
    dataset_name,
    find_file_column,
    fingerprint,
    parse_split,
    read_table,
)

DEFAULT_IGNORE_INDEX = 255


@dataclass(frozen=True, kw_only=True)
class SegmentationDataset(ImageDataset):
    """Images with a mask and a split each."""

    mask_files: tuple[str, ...]
    """n paths, relative to `root`."""
    splits: np.ndarray
    """(n,) of `train` and `test`."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of their values in masks."""
    ignore_index: tuple[int, ...]
    """Ignored values in masks."""
    skipped: dict[str, int]
    """Number of excluded images by reason, with the first file."""

    def load_mask(self, index: int) -> np.ndarray:
        """Return the mask of an image, (h, w) int64, -1 for ignored pixels."""
        with Image.open(self.root / self.mask_files[index]) as image:
            class_ids = np.asarray(image).astype(np.int64)
        return np.where(np.isin(class_ids, self.ignore_index), -1, class_ids)


def open_segmentation(
    path: str | Path, ignore_index: tuple[int, ...] = (DEFAULT_IGNORE_INDEX,)
) -> SegmentationDataset:
    """Open a dataset of images with masks: 8-bit gray or palette images of class numbers.

    Args:
        path: A CSV file, or a folder with an `index.csv`, with columns of files, `mask` and `split`; or a
            folder with the layout `train/images`, `train/masks`, `test/images` and so on, with equal names.
            An optional `classes.txt` beside it has the names of the classes, one per line. `val` is the test
            split if there is no `test`, else part of `train`.
        ignore_index: Ignored values in masks.

    Raises:
        InvalidInputError: if there is no such dataset, a mask is invalid, or train or test is empty.
    """
    path = Path(path)
    table = path / "index.csv" if path.is_dir() else path
    if table.is_file():
        root, rows, name = table.parent, read_table(table, _read_index), dataset_name(table)
    elif path.is_dir():
        root, rows, name = path, _read_mask_folders(path), path.resolve().name
    else:
        raise InvalidInputError(
            f"{path} does not exist; a folder with an index.csv or train/images and train/masks is needed",
            path=path,
        )
    skipped: Counter[str] = Counter()
    entries, max_class_id = [], 0
    for file, mask, split in rows:
        mask_max_id = _check_mask(root, file, mask, ignore_index, skipped)
        if mask_max_id is not None:
            entries.append((file, mask, split))
            max_class_id = max(max_class_id, mask_max_id)
    splits = np.array([split for _, _, split in entries], "<U5")
    splits[splits == "val"] = "train" if "test" in splits else "test"
    for split in ("train", "test"):
        if split not in splits:
            raise InvalidInputError(
                f"{path} has no {split} images with a mask; excluded: {dict(skipped) or 'none'}", path=path
            )
    files = tuple(file for file, _, _ in entries)
    return SegmentationDataset(
        name=name,
        path=path,
        root=root,
        files=files,
        key=fingerprint(root, [(*row, ignore_index) for row in entries], files),
        mask_files=tuple(mask for _, mask, _ in entries),
        splits=splits,
        classes=_read_class_names(root / "classes.txt", max_class_id, ignore_index),
        ignore_index=ignore_index,
        skipped=dict(skipped),
    )


def _read_index(table: Path, reader: csv.DictReader) -> list[tuple[str, str, str]]:
    fieldnames = list(reader.fieldnames or [])
    file_col = find_file_column(table, fieldnames)
    for name in ("mask", "split"):
        if name not in fieldnames:
            raise InvalidInputError(
                f"{table} has no column {name!r}; it has {', '.join(fieldnames)}", path=table
            )
    return [
        (row[file_col], row["mask"], parse_split(row["split"] or "", f"{table}, row {row_number}"))
        for row_number, row in enumerate(reader, start=2)
    ]


def _read_mask_folders(path: Path) -> list[tuple[str, str, str]]:
    entries = []
    for folder in sorted(entry for entry in path.iterdir() if (entry / "images").is_dir()):
        split = parse_split(folder.name, str(folder))
        for image_path in sorted((folder / "images").iterdir()):
            if image_path.suffix.lower() in IMAGE_SUFFIXES:
                mask_path = folder / "masks" / f"{image_path.stem}.png"
                entries.append(
                    (image_path.relative_to(path).as_posix(), mask_path.relative_to(path).as_posix(), split)
                )
    if not entries:
        raise InvalidInputError(
            f"{path} holds neither an index.csv nor train/images and train/masks", path=path
        )
    return entries


def _check_mask(
    root: Path, file: str, mask: str, ignore_index: tuple[int, ...], skipped: Counter[str]
) -> int | None:
    """Return the largest class in a mask, or None for an unusable mask, which is counted as skipped."""
    try:
        with Image.open(root / file) as image, Image.open(root / mask) as mask_image:
            if mask_image.mode not in ("L", "P"):
                raise InvalidInputError(
                    f"{root / mask} has mode {mask_image.mode}; masks must be 8-bit gray or palette images",
                    path=root / mask,
                )
            if image.size != mask_image.size:
                count_skipped(skipped, "masks whose size differs from their image", mask)
                return None
            class_ids = np.flatnonzero(np.bincount(np.asarray(mask_image).ravel()))
    except OSError:
        count_skipped(skipped, "missing or damaged images or masks", mask)
        return None
    return int(max((class_id for class_id in class_ids.tolist() if class_id not in ignore_index), default=0))


def _read_class_names(path: Path, max_class_id: int, ignore_index: tuple[int, ...]) -> tuple[str, ...]:
    lines = path.read_text().splitlines() if path.is_file() else []
    # Some files have the number before the name.
    class_names = [line.strip().removeprefix(f"{i} ") for i, line in enumerate(filter(str.strip, lines))]
    if class_names and max_class_id >= len(class_names):
        raise InvalidInputError(
            f"{path} names {len(class_names)} classes, but masks hold class {max_class_id}; "
            "name it, or add it to `ignore_index`",
            field="ignore_index",
            path=path,
        )
    while class_names and len(class_names) - 1 in ignore_index:
        class_names.pop()
    return tuple(class_names) or tuple(map(str, range(max_class_id + 1)))


_BOX_COLUMNS = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True, kw_only=True)
class DetectionDataset(ImageDataset):
    """Images with boxes and a split each."""

    splits: np.ndarray
    """(n,) of `train` and `test`."""
    boxes: tuple[np.ndarray, ...]
    """Per image (k, 4) float64, x0 y0 x1 y1 as fractions of width and height, in [0, 1]."""
    labels: tuple[np.ndarray, ...]
    """Per image (k,) int64, the class of each box."""
    is_crowd: tuple[np.ndarray, ...]
    """Per image (k,) bool, boxes of a crowd, which count neither as right nor as missed."""
    classes: tuple[str, ...]
    """Names of the classes, sorted."""
    skipped: dict[str, int]
    """Number of clipped or excluded boxes by reason, with the first location."""


@dataclass
class _AnnotatedImage:
    """The annotations of an image: boxes in pixels of `image_size`, or as fractions if that is (1, 1)."""

    file: str
    split: str
    image_size: tuple[float, float] = (1.0, 1.0)
    boxes: list[tuple[str, tuple[float, ...], bool, str]] = field(default_factory=list)

    def add_box(self, label: str, xyxy: Iterable[float], location: str, *, is_crowd: bool = False) -> None:
        """Add a box and its location in the annotation file."""
        self.boxes.append((label, tuple(xyxy), is_crowd, location))


def open_detection(path: str | Path) -> DetectionDataset:
    """Open a dataset of images with boxes.

    Args:
        path: A CSV file, or a folder with a `boxes.csv`, with columns of files, `split`, `label`, `x0`,
            `y0`, `x1`, `y1`, as fractions of width and height or in pixels; or a folder in the format of COCO
            (`annotations/instances_*.json`), Pascal VOC (`Annotations`, `ImageSets/Main`) or YOLO (a YAML
            file with `train`, `val` and `names`). `val` is the test split if there is no `test`, else part of
            `train`.

    Raises:
        InvalidInputError: if it is none of these, or train or test is empty.
    """
    path = Path(path)
    table = path / "boxes.csv" if path.is_dir() else path
    if table.is_file() and table.suffix in (".csv", ".tsv"):
        name = path.resolve().name if path.is_dir() else dataset_name(table)
        return _build_dataset(name, path, table.parent, read_table(table, _read_csv))
    if path.is_dir():
        for read_format in (_read_coco, _read_voc, _read_yolo):
            images = list(read_format(path))
            if images:
                return _build_dataset(path.resolve().name, path, path, images)
    raise InvalidInputError(
        f"{path} holds no boxes: neither a boxes.csv, nor a folder as in COCO, Pascal VOC or YOLO",
        path=path,
    )


def _read_csv(table: Path, reader: csv.DictReader) -> list[_AnnotatedImage]:
    fieldnames = list(reader.fieldnames or [])
    file_col = find_file_column(table, fieldnames)
    missing = [name for name in ("split", "label", *_BOX_COLUMNS) if name not in fieldnames]
    if missing:
        raise InvalidInputError(
            f"{table} has no column {missing[0]!r}; it has {', '.join(fieldnames)}", path=table
        )
    images: dict[str, _AnnotatedImage] = {}
    max_coordinate = 0.0
    for row_number, row in enumerate(reader, start=2):
        location = f"{table.name}, row {row_number}"
        image = images.setdefault(
            row[file_col], _AnnotatedImage(row[file_col], parse_split(row["split"] or "", location))
        )
        if not any(row[column] for column in _BOX_COLUMNS):
            continue  # an image without boxes
        try:
            xyxy = tuple(float(row[column]) for column in _BOX_COLUMNS)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"{location}: {', '.join(_BOX_COLUMNS)} must be four numbers or all empty"
            ) from error
        max_coordinate = max(max_coordinate, *xyxy)
        image.add_box(row["label"], xyxy, location)
    if max_coordinate > 1.5:
        for image in images.values():
            image.image_size = _image_size(table.parent / image.file)
    return list(images.values())


def _image_size(path: Path) -> tuple[float, float]:
    try:
        with Image.open(path) as image:
            return float(image.width), float(image.height)
    except OSError:
        return (1.0, 1.0)  # counted as missing or damaged when it is read


def _read_coco(path: Path) -> Iterator[_AnnotatedImage]:
    for annotation_file in sorted((path / "annotations").glob("instances_*.json")):
        split = parse_split(
            annotation_file.stem.removeprefix("instances_").rstrip("0123456789"), annotation_file.name
        )
        try:
            coco: dict[str, Any] = json.loads(annotation_file.read_text())
            class_names = {entry["id"]: entry["name"] for entry in coco["categories"]}
            image_folder = _image_folder(path, annotation_file.stem.removeprefix("instances_"))
            images = {
                entry["id"]: _AnnotatedImage(
                    f"{image_folder}{entry['file_name']}",
                    split,
                    (float(entry["width"]), float(entry["height"])),
                )
                for entry in coco["images"]
            }
            for entry in coco["annotations"]:
                x, y, width, height = map(float, entry["bbox"])
                is_crowd = bool(entry.get("iscrowd", 0))
                location = f"{annotation_file.name}, annotation {entry['id']}"
                images[entry["image_id"]].add_box(
                    class_names[entry["category_id"]],
                    (x, y, x + width, y + height),
                    location,
                    is_crowd=is_crowd,
                )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(
                f"{annotation_file} is not a COCO instances file: {type(error).__name__} {error}",
                path=annotation_file,
            ) from error
        yield from images.values()


def _image_folder(path: Path, split: str) -> str:
    candidates = (split, f"images/{split}", "images", ".")
    return next(
        (f"{candidate}/" for candidate in candidates if (path / candidate).is_dir() and candidate != "."), ""
    )


def _read_voc(path: Path) -> Iterator[_AnnotatedImage]:
    """Read Pascal VOC; its difficult objects are treated as crowds."""
    for split in ("train", "val", "test"):
        list_file = path / "ImageSets/Main" / f"{split}.txt"
        lines = list_file.read_text().splitlines() if list_file.is_file() else []
        for stem in (line.split()[0] for line in lines if line.strip()):
            xml_path = path / "Annotations" / f"{stem}.xml"
            try:
                yield _voc_image(xml_path, split)
            except (OSError, ElementTree.ParseError, ValueError) as error:
                raise InvalidInputError(
                    f"{xml_path}, named in {list_file.name}, is no VOC annotation: {error}"
                ) from error


def _voc_image(xml_path: Path, split: str) -> _AnnotatedImage:
    tree = ElementTree.fromstring(xml_path.read_bytes())  # noqa: S314  # expat resolves no external entities
    width, height = (float(tree.findtext(f"size/{key}", "")) for key in ("width", "height"))
    image = _AnnotatedImage(
        f"JPEGImages/{tree.findtext('filename', f'{xml_path.stem}.jpg')}", split, (width, height)
    )
    for object_number, node in enumerate(tree.iter("object"), start=1):
        bounds = (node.findtext(f"bndbox/{key}", "") for key in ("xmin", "ymin", "xmax", "ymax"))
        x0, y0, x1, y1 = map(float, bounds)
        is_difficult = node.findtext("difficult", "0").strip() == "1"
        # Pixels are numbered from 1, and the last one belongs to the box.
        xyxy = (x0 - 1, y0 - 1, x1, y1)
        image.add_box(
            node.findtext("name", ""), xyxy, f"{xml_path.name}, object {object_number}", is_crowd=is_difficult
        )
    return image


def _read_yolo(path: Path) -> Iterator[_AnnotatedImage]:
    for yaml_path in (*sorted(path.glob("*.yaml")), *sorted(path.glob("*.yml"))):
        yaml_config = yaml.safe_load(yaml_path.read_text())
        if not isinstance(yaml_config, dict) or not {"train", "val", "names"} <= yaml_config.keys():
            continue
        for split in ("train", "val", "test"):
            if not yaml_config.get(split):
                continue
            folder = path / str(yaml_config.get("path") or ".") / str(yaml_config[split])
            if not folder.is_dir():
                raise InvalidInputError(
                    f"{yaml_path} names {yaml_config[split]} for {split}, but {folder} does not exist"
                )
            for image_path in sorted(
                entry for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES
            ):
                yield _yolo_image(path, image_path, split, yaml_config["names"])


def _yolo_image(path: Path, image_path: Path, split: str, class_names: Any) -> _AnnotatedImage:
    image, label_path = (
        _AnnotatedImage(image_path.relative_to(path).as_posix(), split),
        _yolo_label_path(image_path),
    )
    lines = label_path.read_text().splitlines() if label_path.is_file() else []
    for line_number, line in enumerate(lines, start=1):
        try:
            label, *xywh = line.split()[:5]
            x, y, width, height = map(float, xywh)
            class_name = str(class_names[int(label)])
        except (ValueError, KeyError, IndexError) as error:
            raise InvalidInputError(
                f"{label_path}, line {line_number}: expected a class and x y width height"
            ) from error
        xyxy = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        image.add_box(class_name, xyxy, f"{label_path.name}, line {line_number}")
    return image


def _yolo_label_path(image_path: Path) -> Path:
    """Return the label file of an image: `labels` instead of `images` in its path, or beside the image."""
    parts = list(image_path.parts)
    if "images" in parts:
        index = len(parts) - 1 - parts[::-1].index("images")
        parts[index] = "labels"
    return Path(*parts).with_suffix(".txt")


def _build_dataset(name: str, path: Path, root: Path, images: list[_AnnotatedImage]) -> DetectionDataset:
    splits = np.array([image.split for image in images])
    splits[splits == "val"] = "train" if "test" in splits else "test"
    skipped: Counter[str] = Counter()
    boxes_by_image = [
        [clipped for box in image.boxes if (clipped := _clip_box(image, skipped, box))] for image in images
    ]
    for split in ("train", "test"):
        if split not in splits:
            raise InvalidInputError(
                f"{path} has no {split} images, only {', '.join(sorted(set(splits)))}", path=path
            )
    classes = tuple(sorted({label for boxes in boxes_by_image for label, _, _ in boxes}))
    if not classes:
        raise InvalidInputError(f"{path} has images but no boxes", path=path)
    class_index = {label: i for i, label in enumerate(classes)}
    files = [image.file for image in images]
    return DetectionDataset(
        name=name,
        path=path,
        root=root,
        files=tuple(files),
        key=fingerprint(
            root,
            [(split, boxes) for split, boxes in zip(splits.tolist(), boxes_by_image, strict=True)],
            files,
        ),
        splits=splits,
        boxes=tuple(
            np.array([box for _, box, _ in boxes], np.float64).reshape(-1, 4) for boxes in boxes_by_image
        ),
        labels=tuple(
            np.array([class_index[label] for label, _, _ in boxes], np.int64) for boxes in boxes_by_image
        ),
        is_crowd=tuple(np.array([is_crowd for _, _, is_crowd in boxes], bool) for boxes in boxes_by_image),
        classes=classes,
        skipped=dict(skipped),
    )


def _clip_box(
    image: _AnnotatedImage, skipped: Counter[str], box: tuple[str, tuple[float, ...], bool, str]
) -> tuple[str, tuple[float, ...], bool] | None:
    """Return a box as fractions, clipped to the image, or None, counted as skipped, if nothing remains."""
    label, xyxy, is_crowd, location = box
    normalized = np.array(xyxy) / np.tile(image.image_size, 2)
    clipped = normalized.clip(0, 1)
    if not (clipped[:2] < clipped[2:]).all():
        count_skipped(skipped, "boxes without area inside the image, excluded", location)
        return None
    if np.abs(clipped - normalized).max() > 0.01:
        count_skipped(skipped, "boxes beyond the edge of the image, clipped", location)
    return label, tuple(clipped.tolist()), is_crowd
