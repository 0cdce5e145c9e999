"""Annotated images, and their coordinates: from the frame of an annotation to the image as shown.

Images are decoded as shown, with their EXIF orientation applied, and so are boxes and masks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from likewise.data.images import UnreadableImageError, orient_size, read_image_size, read_orientation
from likewise.data.pixels import UPRIGHT
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.base import SkippedEntries

BoxUnit = Literal["fractions", "pixels"]
# A box of fractions may reach beyond the image by at most its size.
_MIN_FRACTION, _MAX_FRACTION = -1.0, 2.0
# Rows in the other unit are mistakes if they are at most this part of a table.
_MAX_MISTAKES = 0.2


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


@dataclass(frozen=True)
class ImageFrame:
    """Sizes of an image in pixels."""

    size: tuple[int, int]
    """Width and height as shown."""
    stored_size: tuple[int, int]
    """Width and height of the stored pixels, before the EXIF orientation is applied."""
    orientation: int
    """EXIF orientation, 1 to 8, that leads from the stored to the shown image."""


def read_frame(path: Path) -> ImageFrame:
    """Read the sizes of an image from its header.

    Raises:
        UnreadableImageError: if it is missing or no image.
    """
    size, orientation = read_image_size(path), read_orientation(path)
    return ImageFrame(size, orient_size(size, orientation), orientation)


def rotate_boxes(
    boxes: Float[np.ndarray, "k 4"], stored_size: tuple[int, int], orientation: int
) -> Float[np.ndarray, "k 4"]:
    """Return boxes x0 y0 x1 y1 of the stored image in the frame of the image as shown.

    Args:
        boxes: (k, 4) in pixels of the stored image.
        stored_size: Width and height of the stored image.
        orientation: EXIF orientation from 5 to 8.
    """
    width, height = stored_size
    x0, y0, x1, y1 = boxes.T
    columns = {
        5: (y0, x0, y1, x1),
        6: (height - y1, x0, height - y0, x1),
        7: (height - y1, width - x1, height - y0, width - x0),
        8: (y0, width - x1, y1, width - x0),
    }[orientation]
    return np.stack(columns, axis=1)


def pixels_to_fractions(
    boxes: Float[np.ndarray, "k 4"],
    path: Path,
    declared_size: tuple[float, float] | None,
    skipped: SkippedEntries,
) -> Float[np.ndarray, "k 4"] | None:
    """Return boxes in pixels as fractions of the image as shown; None, counted, if that is undecidable.

    A declared size equal to that of the image as shown, or none, means pixels of the image as shown; one
    equal to the stored size means pixels of the stored image, whose boxes are rotated. If width and height
    are merely exchanged, the size of the image is used and counted. Any other declared size excludes the
    image, because its boxes could be in either of two frames. If no size tells the frames apart, an image
    with an EXIF orientation is counted, and its boxes are read as displayed.

    Args:
        boxes: (k, 4) x0 y0 x1 y1.
        path: The image.
        declared_size: Width and height in the annotation file, if it has them.
        skipped: Receives the counts.
    """
    try:
        frame = read_frame(path)
    except UnreadableImageError as error:
        skipped.add(f"images with boxes in pixels whose size cannot be read ({error})", str(path))
        return None
    if declared_size is not None and declared_size not in (frame.size, frame.stored_size):
        if declared_size != frame.size[::-1]:
            skipped.add("images whose size differs from the declared width and height", str(path))
            return None
        skipped.add("declared width and height exchanged, size of the image used", str(path))
    elif declared_size is not None and declared_size != frame.size:
        boxes = rotate_boxes(boxes, frame.stored_size, frame.orientation)
    elif frame.orientation != UPRIGHT and (declared_size is None or frame.size == frame.stored_size):
        skipped.add(f"EXIF orientation {frame.orientation}, annotation read as displayed", str(path))
    return boxes / np.tile(np.array(frame.size, np.float64), 2)


def infer_box_unit(
    boxes: Float[np.ndarray, "n 4"], locations: list[str], path: Path
) -> tuple[BoxUnit, Bool[np.ndarray, " n"]]:
    """Decide whether the boxes of a table are fractions or pixels.

    A box is a fraction if all its coordinates are within [-1, 2]; a box of zeros and ones may be either. The
    unit is that of at least 80 % of the other boxes.

    Args:
        boxes: (n, 4) finite x0 y0 x1 y1.
        locations: File and line of each, for messages.
        path: The table, for messages.

    Returns:
        The unit, and which boxes are in it.

    Raises:
        InvalidInputError: if both units are frequent.
    """
    is_neutral = np.isin(boxes, (0, 1)).all(axis=1)
    is_fraction = np.all((boxes >= _MIN_FRACTION) & (boxes <= _MAX_FRACTION), axis=1)
    num_fractions, num_pixels = int((is_fraction & ~is_neutral).sum()), int((~is_fraction).sum())
    if num_pixels <= _MAX_MISTAKES * (num_fractions + num_pixels):
        return "fractions", is_fraction
    if num_fractions <= _MAX_MISTAKES * (num_fractions + num_pixels):
        # Small whole numbers, such as 0 0 2 2, are pixels.
        return "pixels", ~is_fraction | (boxes == boxes.round()).all(axis=1)
    first_fraction, first_pixel = (
        int(np.flatnonzero(mask)[0]) for mask in (is_fraction & ~is_neutral, ~is_fraction)
    )
    raise InvalidInputError(
        f"{path}: {num_fractions:,} boxes can be fractions of width and height (first: "
        f"{locations[first_fraction]}) and {num_pixels:,} only pixels (first: {locations[first_pixel]}); "
        "write all boxes of a table in one unit",
        path=path,
    )
