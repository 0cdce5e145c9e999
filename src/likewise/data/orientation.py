"""The EXIF orientation of images: how stored pixels are turned to be shown."""

from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image

UPRIGHT = 1
_ORIENTATIONS = range(1, 9)
_FIRST_TRANSPOSED = 5  # orientations from 5 on exchange width and height
_FLIPPED_ROWS, _FLIPPED_COLUMNS = {3, 4, 7, 8}, {2, 3, 6, 7}
_Pixels = TypeVar("_Pixels", bound=np.ndarray)


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a Pillow image, 1 to 8; 1 if there is none, or EXIF data are damaged."""
    try:
        return check_orientation(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF data raise many types of errors; the pixels may be sound  # noqa: BLE001
        return UPRIGHT


def check_orientation(value: Any) -> int:
    """Return an orientation from 1 to 8 as it is, and 1 for any other value."""
    return value if isinstance(value, int) and value in _ORIENTATIONS else UPRIGHT


def orient_pixels(pixels: _Pixels, orientation: int) -> _Pixels:
    """Turn stored pixels or a stored mask as shown: (h, w, ...) -> (h, w, ...) or (w, h, ...), contiguous.

    Args:
        pixels: Stored values.
        orientation: EXIF orientation, 1 to 8.
    """
    if orientation == UPRIGHT:
        return pixels
    oriented = pixels.swapaxes(0, 1) if orientation >= _FIRST_TRANSPOSED else pixels
    oriented = oriented[::-1] if orientation in _FLIPPED_ROWS else oriented
    oriented = oriented[:, ::-1] if orientation in _FLIPPED_COLUMNS else oriented
    return np.ascontiguousarray(oriented)  # pyrefly: ignore[bad-return]


def orient_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the shown (width, height) of a stored size, or the reverse."""
    width, height = size
    return (height, width) if orientation >= _FIRST_TRANSPOSED else (width, height)
