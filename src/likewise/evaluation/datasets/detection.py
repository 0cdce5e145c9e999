"""Images with boxes, read from a table or a folder in the format of COCO, Pascal VOC or YOLO."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from likewise.data.readers.files import IgnoredFiles
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.annotations import (
    AnnotatedBox,
    AnnotatedImage,
    clean_label,
    infer_box_unit,
    pixels_to_fractions,
)
from likewise.evaluation.datasets.base import (
    ImageDataset,
    SkippedEntries,
    content_key,
    count_unused_images,
    dataset_name,
    find_table,
    missing_split,
    open_dataset_table,
    parse_split,
    same_file_id,
    unknown_split_reason,
)
from likewise.evaluation.datasets.coco import find_coco_files, read_coco
from likewise.evaluation.datasets.labeled import BOX_COLUMNS, clip_box, parse_box
from likewise.evaluation.datasets.voc import is_voc, read_voc
from likewise.evaluation.datasets.yolo import YoloConfig, find_yolo_config, is_yolo_file, read_yolo

logger = logging.getLogger(__name__)

_Opener = Callable[[SkippedEntries, IgnoredFiles], "list[AnnotatedImage]"]


@dataclass(frozen=True, kw_only=True)
class DetectionDataset(ImageDataset):
    """Images with boxes and a split each."""

    splits: np.ndarray
    """(n,) of `train` and `test`."""
    boxes: tuple[np.ndarray, ...]
    """Per image (k, 4) float64, x0 y0 x1 y1 as fractions of width and height as shown, in [0, 1]."""
    labels: tuple[np.ndarray, ...]
    """Per image (k,) int64, the class of each box."""
    is_crowd: tuple[np.ndarray, ...]
    """Per image (k,) bool, boxes of a crowd, which count neither as right nor as missed."""
    classes: tuple[str, ...]
    """Names of the classes, sorted."""


def open_detection(path: str | Path) -> DetectionDataset:
    """Open a dataset of images with boxes.

    Boxes in pixels are relative to the image as shown, or to the stored image if the annotation file declares
    its size (see `pixels_to_fractions`).

    Args:
        path: A table, or a folder with a `boxes.csv`, with columns of files, `split`, `label`, `x0`, `y0`,
            `x1`, `y1`, as fractions of width and height or in pixels; or a folder in the format of COCO
            (`annotations/instances_*.json`, or `_annotations.coco.json` in the folders of the splits), Pascal
            VOC (`Annotations`, `ImageSets/Main`) or YOLO (a YAML file with `train`, `val` and `names`, whose
            path may be given, too). `val` is the test split if there is no `test`, else part of `train`.

    Raises:
        InvalidInputError: if it is none of these or several, or train or test has no images or no boxes.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInputError(f"{path} does not exist", path=path)
    skipped, ignored = SkippedEntries(), IgnoredFiles()
    table = find_table(path, "boxes") if path.is_dir() else None if is_yolo_file(path) else path
    if table is not None:
        name = path.resolve().name if path.is_dir() else dataset_name(table)
        root, images = _read_table(table, skipped)
    else:
        root = path if path.is_dir() else path.parent
        name, images = root.resolve().name, _find_format(path, root, ignored)(skipped, ignored)
    count_unused_images(path, root, [image.file for image in images], ignored)
    return _build_dataset(name, path, root, _merge_images(root, images, skipped), (skipped, ignored))


def _find_format(path: Path, root: Path, ignored: IgnoredFiles) -> _Opener:
    """Return the reader of the only format that a folder holds."""
    config: YoloConfig | None = None
    if path.is_file() or not (find_coco_files(path) or is_voc(path)):
        config = find_yolo_config(path, ignored)
    else:
        try:
            config = find_yolo_config(path, IgnoredFiles())
        except InvalidInputError:
            config = None  # a damaged YAML file beside another format
    openers: dict[str, _Opener] = {}
    if path.is_dir() and find_coco_files(path):
        openers["COCO"] = lambda skipped, ignored: list(read_coco(path, skipped, ignored))
    if path.is_dir() and is_voc(path):
        openers["Pascal VOC"] = lambda skipped, ignored: list(read_voc(path, skipped, ignored))
    if config is not None:
        openers["YOLO"] = lambda skipped, ignored: list(read_yolo(root, config, skipped, ignored))
    if len(openers) > 1:
        raise InvalidInputError(
            f"{path} holds boxes in the formats {' and '.join(openers)}; give the path of YOLO's YAML file, "
            "or move the annotations of one format away",
            path=path,
        )
    if not openers:
        raise InvalidInputError(
            f"{path} holds no boxes: neither a boxes.csv, nor a folder as in COCO, Pascal VOC or YOLO",
            path=path,
        )
    return next(iter(openers.values()))


def _read_table(path: Path, skipped: SkippedEntries) -> tuple[Path, list[AnnotatedImage]]:
    """Return the folder of the images, and one image per row with a split, with its box if it has one."""
    table = open_dataset_table(path)
    fields = {name: table.require_column(name) for name in ("split", "label", *BOX_COLUMNS)}
    images, boxes = [], []
    for location, cells, _ in table.iter_rows(fields, skipped, missing_reason="rows without a file"):
        split = parse_split(cells["split"])
        if split is None:
            skipped.add(unknown_split_reason(cells["split"]), location)
            continue
        images.append(AnnotatedImage(file=cells["file"], split=split, unit="fractions"))
        xyxy = parse_box(cells, location, skipped)
        if xyxy is None:
            continue  # an image without boxes
        if not cells["label"]:
            skipped.add("boxes without a label", location)
            continue
        box = AnnotatedBox(label=clean_label(cells["label"]), xyxy=xyxy, location=location)
        images[-1].boxes.append(box)
        boxes.append(box)
    if boxes:
        xyxys, locations = np.array([box.xyxy for box in boxes]), [box.location for box in boxes]
        unit, is_in_unit = infer_box_unit(xyxys, locations, path)
        valid = dict(zip(locations, is_in_unit.tolist(), strict=True))
        for image in images:
            image.unit = unit
            for box in image.boxes:
                if not valid[box.location]:
                    skipped.add(f"boxes that are not in {unit}, excluded", box.location)
            image.boxes = [box for box in image.boxes if valid[box.location]]
    return table.root, images


def _merge_images(root: Path, images: list[AnnotatedImage], skipped: SkippedEntries) -> list[AnnotatedImage]:
    """Merge the entries of each image; boxes of an image in two splits, and repeated boxes, are counted."""
    merged: dict[str, AnnotatedImage] = {}
    for image in images:
        first = merged.setdefault(same_file_id(root, image.file), image)
        if first is image:
            continue
        if first.split == image.split:
            first.boxes += image.boxes
        else:
            skipped.add("entries of an image that is in another split already", image.file)
    for image in merged.values():
        unique = {(box.label, box.xyxy, box.is_crowd): box for box in reversed(image.boxes)}
        for box in image.boxes:
            if unique[box.label, box.xyxy, box.is_crowd] is not box:
                skipped.add("repeated boxes, excluded", box.location)
        image.boxes = list(reversed(unique.values()))
    return list(merged.values())


def _build_dataset(
    name: str,
    path: Path,
    root: Path,
    images: list[AnnotatedImage],
    counts: tuple[SkippedEntries, IgnoredFiles],
) -> DetectionDataset:
    skipped, ignored = counts
    normalized = [_normalize(image, root, skipped) for image in images]
    images = [image for image, boxes in zip(images, normalized, strict=True) if boxes is not None]
    boxes_by_image = [boxes for boxes in normalized if boxes is not None]
    splits = merge_val(path, [image.split for image in images], skipped)
    _check_boxes(path, splits, boxes_by_image, skipped)
    classes = tuple(sorted({label for boxes in boxes_by_image for label, _, _ in boxes}))
    class_index = {label: i for i, label in enumerate(classes)}
    return DetectionDataset(
        name=name,
        path=path,
        root=root,
        files=tuple(image.file for image in images),
        key=content_key(
            (root / image.file for image in images), zip(splits.tolist(), boxes_by_image, strict=True)
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
        skipped=skipped.to_dict(),
        ignored=dict(ignored.counts),
    )


def merge_val(path: Path, splits: list[str], skipped: SkippedEntries) -> np.ndarray:
    """Return the splits with `val` as test if there is no test, else as part of train.

    Raises:
        InvalidInputError: if train or test is empty.
    """
    merged = np.array(splits, "<U5")
    if "val" in merged and "test" not in merged:
        logger.info("%s has no test images: val is the test split", path)
    merged[merged == "val"] = "train" if "test" in merged else "test"
    for split in ("train", "test"):
        if split not in merged:
            raise missing_split(path, split, splits, skipped)
    return merged


_NormalizedBox = tuple[str, tuple[float, ...], bool]


def _normalize(image: AnnotatedImage, root: Path, skipped: SkippedEntries) -> list[_NormalizedBox] | None:
    """Return label, box as fractions and crowd flag of each box; None, counted, for an unusable image."""
    xyxy = np.array([box.xyxy for box in image.boxes], np.float64).reshape(-1, 4)
    if image.unit == "pixels" and len(xyxy):
        fractions = pixels_to_fractions(xyxy, root / image.file, image.declared_size, skipped)
        if fractions is None:
            return None
        xyxy = fractions
    clipped = [clip_box(box, entry.location, skipped) for box, entry in zip(xyxy, image.boxes, strict=True)]
    return [
        (entry.label, box, entry.is_crowd)
        for box, entry in zip(clipped, image.boxes, strict=True)
        if box is not None
    ]


def _check_boxes(
    path: Path, splits: np.ndarray, boxes_by_image: list[list[_NormalizedBox]], skipped: SkippedEntries
) -> None:
    """Raise InvalidInputError if there is nothing to learn or to measure in a split."""
    counts = Counter(
        split
        for split, boxes in zip(splits.tolist(), boxes_by_image, strict=True)
        for _, _, is_crowd in boxes
        if not is_crowd
    )
    if not counts:
        raise InvalidInputError(f"{path} has images but no boxes{skipped.summary()}", path=path)
    for split in ("train", "test"):
        if not counts[split]:
            raise InvalidInputError(
                f"no {split} image of {path} has a box, so that nothing can be "
                f"{'learned' if split == 'train' else 'measured'}{skipped.summary()}",
                path=path,
            )
