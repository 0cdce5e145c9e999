"""Labeled images, read from a folder or a table."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from likewise.data.images import is_image_name
from likewise.data.readers.files import IgnoredFiles, file_type_reason, walk_files
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.annotations import infer_box_unit, pixels_to_fractions
from likewise.evaluation.datasets.base import (
    SPLIT_ALIASES,
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

logger = logging.getLogger(__name__)

BOX_COLUMNS = ("x0", "y0", "x1", "y1")
Box = tuple[float, float, float, float]
_NO_FILE_OR_LABEL = "without a file or a label"


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
    is_registered: bool = False
    """Whether it is a dataset of the registry, which defines its metric."""
    boxes: np.ndarray | None
    """(n, 4) float64, box of each subject as x0 y0 x1 y1 in fractions of the image, in [0, 1], or NaN; or
    None."""

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


@dataclass(kw_only=True)
class _LabeledImage:
    file: str
    split: str
    label: str
    instance: str = ""
    domain: str = ""
    box: Box | None = None
    box_location: str = ""

    def annotation(self, split: str) -> tuple[object, ...]:
        """Return what the scores depend on, except the file."""
        return split, self.label, self.instance, self.domain, self.box


def open_labeled(
    path: str | Path, *, label_column: str = "label", split_column: str = "split"
) -> LabeledDataset:
    """Open a labeled dataset.

    Args:
        path: A folder with the layout `split/class/image` or with a `labels.csv`, or a table with columns of
            files, labels and splits, in any format of tables that `import` reads. The optional columns
            `instance` and `domain` are for retrieval, `x0`, `y0`, `x1` and `y1` for localization, as
            fractions or in pixels of the image as shown. The class of an image in a deeper folder is the
            folder directly below the split. Without `test` images, `val` is the test split.
        label_column: Column of the labels.
        split_column: Column of the splits.

    Raises:
        InvalidInputError: if there is no such dataset, a column is missing, or train or test is empty.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInputError(
            f"{path} does not exist; a folder with the layout split/class/image or a table is needed",
            path=path,
        )
    skipped, ignored = SkippedEntries(), IgnoredFiles()
    table = find_table(path, "labels") if path.is_dir() else path
    if table is not None:
        root, images = _read_table(table, (label_column, split_column), skipped)
        name = path.resolve().name if path.is_dir() else dataset_name(table)
        count_unused_images(path, root, [image.file for image in images], ignored)
    else:
        root, images = path, _read_folder(path, skipped, ignored)
        name = path.resolve().name
    if label_column != "label":
        name = f"{name}-{label_column}"
    images = _merge_rows(root, images, skipped)
    splits = _assign_splits(path, images, skipped)
    _normalize_boxes(table, root, images, skipped)
    return LabeledDataset(
        name=name,
        path=path,
        label_column=label_column,
        split_column=split_column,
        root=root,
        skipped=skipped.to_dict(),
        ignored=dict(ignored.counts),
        **_to_arrays(path, images, splits, skipped),
        key=content_key(
            (root / image.file for image in images),
            [image.annotation(split) for image, split in zip(images, splits.tolist(), strict=True)],
        ),
    )


def _read_folder(path: Path, skipped: SkippedEntries, ignored: IgnoredFiles) -> list[_LabeledImage]:
    """Read the layout split/class/image; the class of a deeper image is the folder below its split."""
    images, num_deep = [], 0
    for file in walk_files(path, ignored):
        folder, *parts = file.split("/")
        split = parse_split(folder) if parts else None
        if not is_image_name(file):
            ignored.add(file_type_reason(file), file)
        elif split is None:
            skipped.add("images outside of the folders train, val and test", file)
        elif len(parts) < 2:
            skipped.add("images without a class folder", file)
        else:
            images.append(_LabeledImage(file=file, split=split, label=parts[0]))
            num_deep += len(parts) > 2
    if not images:
        raise InvalidInputError(
            f"{path} holds neither a labels.csv nor images with the layout train/CLASS/… and test/CLASS/…"
            f"{skipped.summary()}",
            path=path,
        )
    if num_deep:
        logger.info(
            "%s: the class of %d images in deeper folders is the folder below the split", path, num_deep
        )
    return images


def _read_table(
    path: Path, columns: tuple[str, str], skipped: SkippedEntries
) -> tuple[Path, list[_LabeledImage]]:
    """Return the folder of the images, and an image per row with a file, a label and a split."""
    table = open_dataset_table(path)
    label_column, split_column = columns
    fields: dict[str, str | None] = {
        "label": table.require_column(label_column, "label_column"),
        "split": table.require_column(split_column, "split_column"),
        "instance": table.find_column("instance"),
        "domain": table.find_column("domain"),
    }
    box_columns = {name: table.find_column(name) for name in BOX_COLUMNS}
    has_boxes = all(box_columns.values())
    images = []
    for location, cells, _ in table.iter_rows(
        fields | (box_columns if has_boxes else {}), skipped, missing_reason=_NO_FILE_OR_LABEL
    ):
        split = parse_split(cells["split"])
        if not cells["label"]:
            skipped.add(_NO_FILE_OR_LABEL)
        elif split is None:
            skipped.add(unknown_split_reason(cells["split"]), location)
        else:
            images.append(
                _LabeledImage(
                    file=cells["file"],
                    split=split,
                    label=cells["label"],
                    instance=cells["instance"],
                    domain=cells["domain"],
                    box=parse_box(cells, location, skipped) if has_boxes else None,
                    box_location=location,
                )
            )
    return table.root, images


def parse_box(cells: dict[str, str], location: str, skipped: SkippedEntries) -> Box | None:
    """Return x0 y0 x1 y1; None if all are empty, or, counted, if they are not four finite numbers."""
    if not any(cells[column] for column in BOX_COLUMNS):
        return None
    try:
        x0, y0, x1, y1 = (float(cells[column]) for column in BOX_COLUMNS)
    except ValueError:
        x0, y0, x1, y1 = (np.nan,) * 4
    if not np.isfinite((x0, y0, x1, y1)).all():
        skipped.add("boxes that are not four numbers, excluded", location)
        return None
    return x0, y0, x1, y1


def _merge_rows(root: Path, images: list[_LabeledImage], skipped: SkippedEntries) -> list[_LabeledImage]:
    """Keep the first row of each image; later rows are counted."""
    first_rows: dict[str, _LabeledImage] = {}
    for image in images:
        first = first_rows.setdefault(same_file_id(root, image.file), image)
        if first is image:
            continue
        if first.split != image.split:
            skipped.add("rows of an image that is in another split already", image.file)
        elif first.label != image.label:
            skipped.add("rows of an image that has another label already", image.file)
        else:
            skipped.add("repeated rows of an image", image.file)
    return list(first_rows.values())


def _assign_splits(path: Path, images: list[_LabeledImage], skipped: SkippedEntries) -> np.ndarray:
    """Return the split of each image; `val` is the test split if there is no `test`."""
    splits = np.array([image.split for image in images], "<U5")
    if "test" not in splits and "val" in splits:
        logger.info("%s has no test images: val is the test split", path)
        splits[splits == "val"] = "test"
    for split in ("train", "test"):
        if split not in splits:
            raise missing_split(path, split, splits.tolist(), skipped)
    return splits


def _normalize_boxes(
    table: Path | None, root: Path, images: list[_LabeledImage], skipped: SkippedEntries
) -> None:
    """Convert the boxes to fractions of their images, clipped; boxes without area are counted and removed."""
    boxed_images = [image for image in images if image.box is not None]
    if not boxed_images or table is None:
        return
    boxes = np.array([image.box for image in boxed_images], np.float64)
    unit, is_in_unit = infer_box_unit(boxes, [image.box_location for image in boxed_images], table)
    for image, box, is_valid in zip(boxed_images, boxes, is_in_unit.tolist(), strict=True):
        image.box = None
        if not is_valid:
            skipped.add(f"boxes that are not in {unit}, excluded", image.box_location)
            continue
        normalized = (
            box[None]
            if unit == "fractions"
            else pixels_to_fractions(box[None], root / image.file, None, skipped)
        )
        clipped = None if normalized is None else clip_box(normalized[0], image.box_location, skipped)
        image.box = clipped


def clip_box(box: np.ndarray, location: str, skipped: SkippedEntries) -> Box | None:
    """Return a box (4,) of fractions clipped to the image, or None, counted, if nothing remains."""
    clipped = box.clip(0, 1)
    if not (clipped[:2] < clipped[2:]).all():
        skipped.add("boxes without area inside the image, excluded", location)
        return None
    if np.abs(clipped - box).max() > 0.01:
        skipped.add("boxes beyond the edge of the image, clipped", location)
    x0, y0, x1, y1 = clipped.tolist()
    return x0, y0, x1, y1


def _to_arrays(
    path: Path, images: list[_LabeledImage], splits: np.ndarray, skipped: SkippedEntries
) -> dict[str, Any]:
    """Return the fields of the dataset with one value per image, and the classes."""
    classes = tuple(sorted({image.label for image in images}))
    if len(classes) < 2:
        raise InvalidInputError(
            f"{path} has {len(classes)} class; at least 2 are needed{skipped.summary()}", path=path
        )
    class_index = {label: i for i, label in enumerate(classes)}
    boxes = np.array([image.box or (np.nan,) * 4 for image in images])
    return {
        "files": tuple(image.file for image in images),
        "splits": splits,
        "labels": np.array([class_index[image.label] for image in images], np.int64),
        "classes": classes,
        "instances": _retrieval_column("instance", [image.instance for image in images], splits, path),
        "domains": _retrieval_column("domain", [image.domain for image in images], splits, path),
        "boxes": boxes if np.isfinite(boxes).any() else None,
    }


def _retrieval_column(name: str, values: Sequence[str], splits: np.ndarray, path: Path) -> np.ndarray | None:
    """Return a column for retrieval, if there is one; raises InvalidInputError if test images lack it."""
    if not any(values):
        return None
    num_empty = sum(not value for value, split in zip(values, splits, strict=True) if split == "test")
    if num_empty:
        raise InvalidInputError(
            f"{path}: column {name!r} is empty for {num_empty} test images; fill it or remove it", path=path
        )
    return np.array(values)
