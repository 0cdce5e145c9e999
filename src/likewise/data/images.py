"""Image bytes and pixels: where they lie, whether they are sound, and how they are decoded."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from likewise.data.dataset import ImageRef
from likewise.errors import InvalidInputError

MAX_PIXELS = 178_956_970  # Pillow's own bound against decompression bombs
MAX_ASPECT_RATIO = 20.0  # as in the LGSSL code
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
)
_JPEG_MAGIC = b"\xff\xd8\xff"


class UnreadableImageError(InvalidInputError):
    """An image that cannot be used; the message is a short reason by which skipped images are counted."""


def read_image_bytes(ref: ImageRef, root: Path) -> bytes:
    """Return an image's encoded bytes from its file, its place in an archive, or the record itself.

    Raises:
        BadImageError: where the file is missing, unreadable or shorter than the record says.
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
    """Decode an image to RGB: bytes -> (h, w, 3) uint8; transparency is laid on white.

    With `short_side`, JPEGs may be decoded at 1/2, 1/4 or 1/8 as long as the short side stays at least
    that long, which costs a fraction of the full decoding.

    Raises:
        BadImageError: where the bytes are no image, are damaged, or exceed the guards of this module.
    """
    if data[:3] == _JPEG_MAGIC:
        try:
            return _decode_jpeg(data, short_side)
        except ValueError:
            pass  # CMYK, arithmetic coding or damage: Pillow reads more kinds and tells damage apart
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
    """Return simplejpeg's bounds for the smallest reduced size whose short side is at least `min_side`."""
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
    except Exception as error:  # Pillow's decoders raise almost anything on damaged input
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
        # Pillow clips 16-bit grey to 255 on conversion; the upper byte keeps the picture.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def check_image_size(width: int, height: int) -> None:
    """Refuse images that would cost too much memory or are no pictures.

    Raises:
        BadImageError: for more than `MAX_PIXELS` pixels, or sides more than `MAX_ASPECT` apart.
    """
    if width < 1 or height < 1:
        raise UnreadableImageError("has no pixels")
    if width * height > MAX_PIXELS:
        raise UnreadableImageError("too many pixels")
    if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
        raise UnreadableImageError(f"sides differ more than {MAX_ASPECT_RATIO:g} to 1")
