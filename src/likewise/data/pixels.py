"""Pixels as a viewer shows them: the EXIF orientation, and gray values of any depth as 8 bits.

Gray values are never clipped: the range [low, high] is mapped linearly to [0, 255] and rounded. The range is
1. [0, 2^b - 1] for unsigned integers of up to 16 bits: b is the depth that the file declares if that is not
   8 or 16, and otherwise the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value, because most
   files of 10 to 14 bits are stored in 16 bits without a mark;
2. [0, 1] for floats within it;
3. the minimum and the maximum of the image for all others: signed and 32-bit integers, and other floats.

Color images of 16 bits per channel follow the first rule; if they use more than 14 bits, Pillow reduces them
to their high byte, which differs by at most 1.

NaN and infinite values have no place in a range, and such an image is unreadable.
"""

from typing import Any, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from likewise.data.image_formats import UnreadableImageError

UPRIGHT = 1
_ORIENTATIONS = range(1, 9)
_FIRST_TRANSPOSED = 5  # orientations from 5 on exchange width and height
_FLIPPED_ROWS, _FLIPPED_COLUMNS = {3, 4, 7, 8}, {2, 3, 6, 7}
_Pixels = TypeVar("_Pixels", bound=np.ndarray)
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339
_SIGNED = 2  # value of SampleFormat
_WHITE_IS_ZERO = 0  # value of PhotometricInterpretation
_MIN_HIGH_BYTE = 2 ** (14 - 8)  # of an image that uses more than 14 of 16 bits
_BLOCK_SIZE = 2**20  # values in double precision at a time


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


def scale_to_uint8(values: np.ndarray, num_bits: int | None = None) -> UInt8[np.ndarray, "..."]:
    """Scale values of one image to 8 bits by the rule of this module.

    Args:
        values: Values of any shape, of an integer, floating-point or boolean type.
        num_bits: Declared depth of unsigned integers.

    Raises:
        UnreadableImageError: if a value is NaN or infinite, or the values are not real numbers.
    """
    if values.dtype.kind not in "buif":
        raise UnreadableImageError(f"has pixels of type {values.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UnreadableImageError("has NaN or infinite pixels")
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "b":
        low, high = 0.0, 1.0
    elif values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        low, high = 0.0, 2.0 ** (num_bits or _used_bits(int(high))) - 1
    elif values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    return stretch(values, low, high)


def stretch(values: np.ndarray, low: float, high: float) -> UInt8[np.ndarray, "..."]:
    """Map [low, high] linearly to [0, 255]; values outside are set to the nearest end."""
    scaled = np.zeros(values.shape, np.uint8)
    if high <= low:
        return scaled
    flat, flat_scaled = values.reshape(-1), scaled.reshape(-1)
    for start in range(0, len(flat), _BLOCK_SIZE):
        block = flat[start : start + _BLOCK_SIZE].astype(np.float64)
        block = (block - low) * (255 / (high - low))
        flat_scaled[start : start + _BLOCK_SIZE] = np.rint(block.clip(0, 255))
    return scaled
    flat, flat_scaled = values.reshape(-1), scaled.reshape(-1)
    for start in range(0, len(flat), _BLOCK_SIZE):
        block = flat[start : start + _BLOCK_SIZE].astype(np.float64)
        flat_scaled[start : start + _BLOCK_SIZE] = np.rint(
            ((block - low) * (255 / (high - low))).clip(0, 255)
        )
    return scaled


def _used_bits(max_value: int) -> int:
    """Return the smallest even depth from 8 bits on that holds a value."""
    return max(8, max_value.bit_length() + max_value.bit_length() % 2)


def is_deep_gray(image: Image.Image) -> bool:
    """Return whether a Pillow image has values that 8 bits do not hold as they are."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16") or _is_signed_tiff(image)


def is_deep_color(image: Image.Image) -> bool:
    """Return whether an opened file, whose pixels are not loaded yet, has 16 bits per color channel."""
    tiles: list[Any] = getattr(image, "tile", [])
    raw_mode = str(tiles[0][3]) if tiles else ""
    return image.mode in {"RGB", "RGBA"} and ";16" in raw_mode


def has_lost_bits(image: Image.Image) -> bool:
    """Return whether the high bytes of a deep color image leave out values of less than 16 bits."""
    return int(np.asarray(image)[..., :3].max()) < _MIN_HIGH_BYTE


def _is_signed_tiff(image: Image.Image) -> bool:
    return image.mode == "L" and _SIGNED in _tag(image, _TIFF_SAMPLE_FORMAT)


def _tag(image: Image.Image, tag: int) -> tuple[int, ...]:
    """Return the values of a TIFF tag of an opened file; empty for other images."""
    value = getattr(image, "tag_v2", {}).get(tag, ())
    return value if isinstance(value, tuple) else (value,)


def gray_to_uint8(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """Scale a Pillow image of mode I, I;16, F, or L with signed values to 8 bits by the rule of this module.

    Raises:
        UnreadableImageError: if a value is NaN or infinite.
    """
    num_bits = _declared_bits(image)  # before the pixels are loaded
    values = np.asarray(image)
    if image.mode == "L":
        values = values.view(np.int8)
    elif image.mode == "I" and image.format == "PPM":
        values = values.astype(np.uint16)
    elif image.mode == "I" and image.format == "TIFF" and _SIGNED not in _tag(image, _TIFF_SAMPLE_FORMAT):
        values = values.view(np.uint32)
    gray = scale_to_uint8(values, num_bits)
    is_inverted = image.mode != "L" and _tag(image, _TIFF_PHOTOMETRIC) == (_WHITE_IS_ZERO,)
    return 255 - gray if is_inverted else gray


def _declared_bits(image: Image.Image) -> int | None:
    """Return the depth that a file declares, or None if it is that of the container."""
    if image.format == "PPM" and image.mode == "I":
        # Pillow scales values of all other maxima to 16 bits while it decodes them.
        tiles: list[Any] = getattr(image, "tile", [])
        has_full_range = bool(tiles) and tiles[0][0] == "raw"
        return None if has_full_range else 16
    bits = _tag(image, _TIFF_BITS_PER_SAMPLE)[:1]
    return bits[0] if bits and bits[0] not in {8, 16, 32} else None
