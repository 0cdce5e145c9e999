"""Read and decode images: bytes from files, archives or rows, to RGB arrays."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from likewise.data.config import BandSelection
from likewise.data.dataset import ImageRef
from likewise.data.dicom import decode_dicom, read_dicom_size
from likewise.data.image_formats import (
    IMAGE_SUFFIXES,
    SIGNATURE_BYTES,
    UnreadableImageError,
    check_image_size,
    is_dicom,
    is_heif,
    is_image_file,
    is_image_name,
    is_tiff,
    missing_extra,
    pillow_formats,
    png_chunks,
    quiet_libraries,
    register_heif,
    remove_png_metadata,
)
from likewise.data.pixels import (
    UPRIGHT,
    exif_orientation,
    gray_to_uint8,
    has_lost_bits,
    is_deep_color,
    is_deep_gray,
    orient_pixels,
    orient_size,
    scale_to_uint8,
)
from likewise.data.tiff_bands import decode_bands, decode_tiff, has_tiff_header, read_tiff_header

__all__ = [
    "IMAGE_SUFFIXES",
    "UnreadableImageError",
    "check_image_size",
    "convert_image",
    "decode_image",
    "is_image_file",
    "is_image_name",
    "orient_pixels",
    "orient_size",
    "read_image",
    "read_image_bytes",
    "read_image_size",
    "read_orientation",
]

_JPEG_MAGIC = b"\xff\xd8\xff"
_JPEG_APP1, _JPEG_START_OF_SCAN = 0xE1, 0xDA
_T = TypeVar("_T")


def read_image_bytes(ref: ImageRef, root: Path) -> bytes:
    """Return the encoded bytes of an image from a file, a byte range of an archive, or the reference itself.

    Raises:
        UnreadableImageError: if the file is missing, empty, unreadable or shorter than the byte range.
    """
    if ref.bytes is not None:
        return ref.bytes
    path = root / (ref.path or "")
    with _file_errors_as_reasons():
        is_whole_file = ref.offset is None
        data = path.read_bytes() if is_whole_file else _read_range(path, ref.offset or 0, ref.size or 0)
    if not data:
        raise UnreadableImageError("file is empty")
    return data


@contextmanager
def _file_errors_as_reasons() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UnreadableImageError("file is missing") from error
    except (OSError, ValueError) as error:  # a name with a NUL character is a ValueError
        raise UnreadableImageError("file cannot be read") from error


def _read_range(path: Path, offset: int, size: int) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(fd, size, offset)
    finally:
        os.close(fd)
    if len(data) < size:
        raise UnreadableImageError("archive is shorter than recorded")
    return data


def read_image(ref: ImageRef, root: Path, short_side: int | None = None) -> np.ndarray:
    """Read and decode the image of a reference; see `read_image_bytes` and `decode_image`."""
    return decode_image(read_image_bytes(ref, root), short_side, ref.bands)


def decode_image(
    data: bytes, short_side: int | None = None, bands: BandSelection | None = None
) -> np.ndarray:
    """Decode an image to RGB as it is shown: with its EXIF orientation, and transparency composited on white.

    Values of more than 8 bits are scaled by the rule of `likewise.data.pixels`.

    Args:
        data: Encoded image.
        short_side: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size, as long as the short side keeps at
            least this many pixels; defaults to full size.
        bands: Choice of the bands of TIFF images of several bands; other images are not affected.

    Returns:
        Pixels, (h, w, 3) uint8.

    Raises:
        UnreadableImageError: if the bytes are not an image, are damaged, need a package that is not
            installed, or exceed the limits of `check_image_size`.
    """
    if data[:3] == _JPEG_MAGIC:
        try:
            pixels = _decode_jpeg(data, short_side)
        except ValueError:
            pass  # CMYK, arithmetic coding or damage: Pillow supports more variants and detects damage
        else:
            return orient_pixels(pixels, _jpeg_orientation(data))
    if is_dicom(data):
        return decode_dicom(data)
    if is_tiff(data):
        return _decode_tiff(data, bands)
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


def _jpeg_orientation(data: bytes) -> int:
    """Return the orientation of a JPEG; it is opened with Pillow, which is slow, only if it has metadata."""
    if not _has_app1(data):
        return UPRIGHT
    try:
        return _open_image(data, exif_orientation)
    except UnreadableImageError:
        return UPRIGHT  # simplejpeg decodes it, and Pillow does not


def _has_app1(data: bytes) -> bool:
    """Return whether a JPEG may have EXIF or XMP data."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _JPEG_START_OF_SCAN:
            return False
        if marker == _JPEG_APP1:
            break
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return True  # also for padding between segments and for damage, which Pillow handles


def _decode_tiff(data: bytes, bands: BandSelection | None) -> np.ndarray:
    """Decode a TIFF image with the chosen bands, with Pillow, or else with tifffile."""
    pixels = None if bands is None else decode_bands(data, bands)
    if pixels is not None:
        return pixels
    try:
        return _decode_with_pillow(data)
    except UnreadableImageError as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):
            raise
    if not has_tiff_header(data):
        raise UnreadableImageError("damaged")
    return decode_tiff(data)


def _decode_with_pillow(data: bytes) -> np.ndarray:
    return _open_image(data, lambda image: _decode_opened(image, data))


def _decode_opened(image: Image.Image, data: bytes) -> np.ndarray:
    """Decode an opened file; Pillow keeps 8 bits of 16 bits per color channel, which may not be enough."""
    is_deep = is_deep_color(image)
    pixels = convert_image(image)
    if not (is_deep and has_lost_bits(image)):
        return pixels
    if image.format == "TIFF":
        return decode_tiff(data)
    return orient_pixels(_decode_deep_png(data), exif_orientation(image)) if image.format == "PNG" else pixels


def _decode_deep_png(data: bytes) -> np.ndarray:
    """Decode a PNG image of 16 bits per channel to RGB, (h, w, 3) uint8, in its stored orientation."""
    import torch
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_image as decode_to_tensor

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    channels = decode_to_tensor(encoded, mode=ImageReadMode.UNCHANGED).numpy()
    num_colors = len(channels) - 1 + len(channels) % 2  # 2 and 4 channels end with transparency
    colors = scale_to_uint8(channels[:num_colors]).transpose(1, 2, 0)
    if num_colors == len(channels):
        return np.ascontiguousarray(colors)
    alpha = scale_to_uint8(channels[-1])[:, :, None]
    rgba = np.concatenate([np.broadcast_to(colors, (*alpha.shape[:2], 3)), alpha], axis=2)
    return _to_rgb(Image.fromarray(rgba))


def _open_image(source: bytes | Path, function: Callable[[Image.Image], _T]) -> _T:
    """Apply a function to an image opened by Pillow.

    Raises:
        UnreadableImageError: with a reason for every error of Pillow.
    """
    head = _read_head(source)
    can_read_heif = is_heif(head) and register_heif()
    try:
        with (
            _pillow_errors_as_reasons(),
            Image.open(
                io.BytesIO(source) if isinstance(source, bytes) else source, formats=pillow_formats()
            ) as image,
        ):
            return function(image)
    except UnreadableImageError as error:
        if isinstance(error.__cause__, UnidentifiedImageError) and is_heif(head) and not can_read_heif:
            raise missing_extra("HEIF", "heif") from error
        if "MAX_TEXT" not in str(error.__cause__):
            raise
    # Pillow refuses long texts in PNG files, which have no effect on the pixels.
    data = source if isinstance(source, bytes) else source.read_bytes()
    return _open_image(remove_png_metadata(data), function)


def _read_head(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source[:SIGNATURE_BYTES]
    with _file_errors_as_reasons(), source.open("rb") as stream:
        return stream.read(SIGNATURE_BYTES)


@contextmanager
def _pillow_errors_as_reasons() -> Iterator[None]:
    try:
        with quiet_libraries():
            yield
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError("not an image") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError("too many pixels") from error
    except Exception as error:  # decoders of Pillow raise many types of errors on damaged input
        raise UnreadableImageError("truncated" if "truncated" in str(error).lower() else "damaged") from error


def convert_image(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to RGB as `decode_image` does: (h, w, 3) uint8.

    Raises:
        UnreadableImageError: if the image is damaged, or `check_image_size` refuses it.
    """
    if image.format == "TIFF" and getattr(image, "tile", ()) and getattr(image, "filename", ""):
        # Pillow maps the pixels of TIFF files opened by path with the width after the rotation.
        image = Image.open(io.BytesIO(Path(str(getattr(image, "filename", ""))).read_bytes()))
    check_image_size(*image.size)
    with _pillow_errors_as_reasons():
        pixels = _to_rgb(image)
        # Pillow turns TIFF images itself when they are loaded, and then removes the tag.
        return orient_pixels(pixels, exif_orientation(image))


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels of a Pillow image, (h, w, 3) uint8, in their stored orientation."""
    if is_deep_gray(image):
        return np.repeat(gray_to_uint8(image)[:, :, None], 3, axis=2)
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(background, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def read_image_size(source: bytes | str | Path) -> tuple[int, int]:
    """Return the (width, height) of an image as it is shown, from its header.

    Args:
        source: Encoded image, or the path of a file.

    Raises:
        UnreadableImageError: as `decode_image`, and for a file that is missing or cannot be read.
    """
    return _read_header(source)[0]


def read_orientation(source: bytes | str | Path) -> int:
    """Return the EXIF orientation of an image, 1 to 8, from its header.

    With `orient_pixels` and `orient_size` it turns what was made on the stored pixels. HEIF and DICOM images
    have no orientation besides that of their pixels.

    Args:
        source: Encoded image, or the path of a file.

    Raises:
        UnreadableImageError: as `read_image_size`.
    """
    return _read_header(source)[1]


def _read_header(source: bytes | str | Path) -> tuple[tuple[int, int], int]:
    """Return the (width, height) as shown and the orientation."""
    source = Path(source) if isinstance(source, str) else source
    head = _read_head(source)
    if is_dicom(head):
        return read_dicom_size(_read_all(source)), UPRIGHT
    try:
        return _open_image(source, lambda image: _pillow_header(image, source))
    except UnreadableImageError as error:
        if not (is_tiff(head) and isinstance(error.__cause__, UnidentifiedImageError)):
            raise
    size, orientation = read_tiff_header(_read_all(source))
    return orient_size(size, orientation), orientation


def _read_all(source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source
    with _file_errors_as_reasons():
        return source.read_bytes()


def _pillow_header(image: Image.Image, source: bytes | Path) -> tuple[tuple[int, int], int]:
    if image.format == "PNG" and "exif" not in image.info and not _png_has_orientation(_read_all(source)):
        return image.size, UPRIGHT  # Pillow would decode the pixels to find EXIF data behind them
    size, orientation = image.size, exif_orientation(image)
    # The size of a TIFF image in Pillow is already that as shown.
    return (size if image.format == "TIFF" else orient_size(size, orientation)), orientation


def _png_has_orientation(data: bytes) -> bool:
    return any(
        kind == b"eXIf" or data[start : start + 17].startswith((b"XML:com.adobe.xmp", b"Raw profile type"))
        for kind, start, _ in png_chunks(data)
    )
