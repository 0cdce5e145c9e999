"""Annotated images as the readers of COCO, Pascal VOC, YOLO and tables return them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from likewise.evaluation.datasets.base import SkippedEntries
from likewise.evaluation.datasets.frames import BoxUnit


@dataclass(frozen=True, kw_only=True)
class AnnotatedBox:
    """A box of an annotation file."""

    label: str
    xyxy: tuple[float, float, float, float]
    location: str
    """File and position, for messages."""
    is_crowd: bool = False


@dataclass(kw_only=True)
class AnnotatedImage:
    """An image of an annotation file with its boxes."""

    file: str
    """Path relative to the folder of the dataset, or absolute."""
    split: str
    """`train`, `val` or `test`."""
    unit: BoxUnit
    declared_size: tuple[float, float] | None = None
    """Width and height in the annotation file, if it has them."""
    boxes: list[AnnotatedBox] = field(default_factory=list)


def parse_numbers(values: object, count: int) -> tuple[float, ...] | None:
    """Return finite numbers from a sequence of numbers or texts, or None if it is anything else."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        return None
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):  # an integer of JSON may exceed all floats
        return None
    return numbers if np.isfinite(numbers).all() else None


def parse_size(width: object, height: object) -> tuple[float, float] | None:
    """Return a declared width and height, or None if they are absent, zero or no numbers."""
    numbers = parse_numbers((width, height), 2)
    return None if numbers is None or min(numbers) <= 0 else (numbers[0], numbers[1])


def parse_class_number(text: str) -> int | None:
    """Return a class number of at most nine digits, or None for any other text."""
    return int(text) if re.fullmatch(r"\s*[0-9]{1,9}\s*", text) else None


def is_true(value: object) -> bool:
    """Return whether a flag such as `1`, `"1"` or `true` is set."""
    return isinstance(value, str | int | float) and str(value).strip().lower() in {"1", "1.0", "true", "yes"}


def clean_label(value: object) -> str:
    """Return the name of a class in one line; empty if it is absent, a list or a mapping."""
    return "" if value is None or isinstance(value, dict | list) else re.sub(r"\s+", " ", str(value)).strip()


def add_box(image: AnnotatedImage, box: AnnotatedBox, skipped: SkippedEntries) -> None:
    """Add a box to its image; a box without a label is counted."""
    if box.label:
        image.boxes.append(box)
    else:
        skipped.add("boxes without a label", box.location)
