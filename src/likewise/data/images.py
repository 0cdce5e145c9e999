"""Read and decode images: bytes from files, archives or rows, to RGB arrays."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from likewise.data.dataset import ImageRef
from likewise.errors import InvalidInputError

MAX_PIXELS = 178_956_970  # the default limit of Pillow against decompression bombs
MAX_ASPECT_RATIO = 20.0  # as in the code of LGSSL
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_JPEG_MAGIC = b"\xff\xd8\xff"


class UnreadableImageError(InvalidInputError):
    """An image that cannot be read or decoded; skipped images are counted by the message."""


def read_image_bytes(ref: ImageRef, root: Path) -> bytes:
    """Return the encoded bytes of an image from a file, a byte range of an archive, or the reference itself.

    Raises:
        UnreadableImageError: if the file is missing, empty, unreadable or shorter than the byte range.
    """
    if ref.bytes is not None:
        return ref.bytes
    path = root / (ref.path or "")
    try:
        is_whole_file = ref.offset is None
        data = path.read_bytes() if is_whole_file else _read_range(path, ref.offset or 0, ref.size or 0)
    except FileNotFoundError as error:
        raise UnreadableImageError("file is missing") from error
    except OSError as error:
        raise UnreadableImageError("file cannot be read") from error
    if not data:
        raise UnreadableImageError("file is empty")
    return data


def _read_range(path: Path, offset: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(fd, size, offset)
    finally:
        os.close(fd)
    if len(data) < size:
        raise UnreadableImageError("archive is shorter than recorded")
    return data


def decode_image(data: bytes, short_side: int | None = None) -> np.ndarray:
    """Decode an image to RGB, compositing transparency on white.

    Args:
        data: Encoded image.
        short_side: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size, as long as the short side keeps at
            least this many pixels; defaults to full size.

    Returns:
        Pixels, (h, w, 3) uint8.

    Raises:
        UnreadableImageError: if the bytes are not an image, are damaged, or exceed the limits of this module.
    """
    if data[:3] == _JPEG_MAGIC:
        try:
            return _decode_jpeg(data, short_side)
        except ValueError:
            pass  # CMYK, arithmetic coding or damage: Pillow supports more variants and detects damage
    return _decode_with_pillow(data)


def _decode_jpeg(data: bytes, short_side: int | None) -> np.ndarray:
    height, width = (int(side) for side in simplejpeg.decode_jpeg_header(data, strict=True)[:2])
    check_image_size(width, height)
    min_side = 0 if short_side is None else min(short_side, height, width)
    decode_size = {} if short_side is None else _min_decode_size(height, width, min_side)
    return simplejpeg.decode_jpeg(
        data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True, **decode_size
    )


def _min_decode_size(height: int, width: int, min_side: int) -> dict[str, int]:
    """Return the arguments of simplejpeg for the smallest size whose short side is at least `min_side`."""
    if height <= width:
        return {"min_height": min_side, "min_width": 0}
    return {"min_height": 0, "min_width": min_side}


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                return convert_image(image)
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not an image") from error
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError("too many pixels") from error
    except Exception as error:  # decoders of Pillow raise many types of errors on damaged input
        raise UnreadableImageError("damaged") from error


def convert_image(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to RGB: (h, w, 3) uint8, with transparency composited on white.

    Raises:
        UnreadableImageError: for an image that `check_image_size` refuses.
    """
    check_image_size(*image.size)
    return np.asarray(_to_rgb(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit gray values to 255 on conversion; use the high byte instead.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def read_image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image as shown, with its EXIF orientation applied, from its header.

    Raises:
        UnreadableImageError: if the file is missing or no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                # Pillow applies the orientation of TIFF files by itself.
                is_rotated = image.format != "TIFF" and image.getexif().get(0x0112) in {5, 6, 7, 8}
                width, height = image.size
    except FileNotFoundError as error:
        raise UnreadableImageError("file is missing") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not an image") from error
    except Exception as error:  # decoders of Pillow raise many types of errors on damaged input
        raise UnreadableImageError("file cannot be read") from error
    return (height, width) if is_rotated else (width, height)


def check_image_size(width: int, height: int) -> None:
    """Check the limits on the number of pixels and the aspect ratio.

    Raises:
        UnreadableImageError: if the image has no pixels, more than `MAX_PIXELS`, or an aspect ratio above
            `MAX_ASPECT_RATIO`.
    """
    if width < 1 or height < 1:
        raise UnreadableImageError("has no pixels")
    if width * height > MAX_PIXELS:
        raise UnreadableImageError("too many pixels")
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise UnreadableImageError(f"aspect ratio above {MAX_ASPECT_RATIO:g}")
