"""TIFF images that Pillow does not decode, and chosen bands, with tifffile (the extra `tiff`)."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from likewise.data.config import MAX_BANDS, BandSelection
from likewise.data.image_formats import (
    MAX_PIXELS,
    UnreadableImageError,
    check_image_size,
    has_package,
    missing_extra,
    quiet_libraries,
)
from likewise.data.pixels import UPRIGHT, check_orientation, orient_pixels, scale_to_uint8, stretch

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage, TiffPageSeries

_IMAGE_WIDTH, _ORIENTATION = 256, 274  # tags
_PLANE = {"Y", "X"}
_MAX_BYTES = 4 * MAX_PIXELS  # those of the largest RGBA image


def decode_tiff(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode the first page of a gray or RGB TIFF image of any type of numbers to RGB, as it is shown.

    Values are scaled by the rule of `likewise.data.pixels`.

    Raises:
        UnreadableImageError: if tifffile is not installed, the image has other bands, exceeds the limits, or
            is damaged.
    """
    with _open_tiff(data, "this kind of TIFF") as tiff:
        page = tiff.pages[0].aspage()
        check_image_size(page.imagewidth, page.imagelength)
        return orient_pixels(_decode_page(page), _orientation(page))


def decode_bands(data: bytes, selection: BandSelection) -> UInt8[np.ndarray, "h w 3"] | None:
    """Decode chosen bands of a TIFF image to RGB, as it is shown.

    Bands are the samples per pixel of a page, or else the pages of a stack. Each chosen band is scaled from
    its own lower to its own upper percentile.

    Args:
        data: Encoded image.
        selection: Choice of bands.

    Returns:
        Pixels, (h, w, 3) uint8; None for an image with a single band.

    Raises:
        UnreadableImageError: if tifffile is not installed, a band is missing, the image exceeds the limits,
            or is damaged.
    """
    with _open_tiff(data, "a choice of TIFF bands") as tiff:
        page, series = tiff.pages[0].aspage(), tiff.series[0]
        check_image_size(page.imagewidth, page.imagelength)
        axes, shape = series.get_axes(), series.get_shape()
        band_axes = [i for i, name in enumerate(axes) if name not in _PLANE and shape[i] > 1]
        if not band_axes:
            return None
        if len(band_axes) > 1:
            raise UnreadableImageError(f"TIFF with the axes {axes}; only one axis of bands is supported")
        num_bands = shape[band_axes[0]]
        if max(selection.bands) > num_bands:
            raise UnreadableImageError(f"has bands 1 to {num_bands}; `bands` asks for {max(selection.bands)}")
        _check_num_bytes(series)
        values = np.moveaxis(series.asarray(), band_axes[0], 0)
        values = values.reshape(num_bands, page.imagelength, page.imagewidth)
        bands = [_stretch_band(values[band - 1], selection.percentiles) for band in selection.bands]
        pixels = np.stack(bands if len(bands) == MAX_BANDS else bands * MAX_BANDS, axis=2)
        return orient_pixels(pixels, _orientation(page))


def read_tiff_header(data: bytes) -> tuple[tuple[int, int], int]:
    """Return the stored (width, height) and the orientation of the first page of a TIFF image.

    Raises:
        UnreadableImageError: if tifffile is not installed, or the data are damaged.
    """
    with _open_tiff(data, "this kind of TIFF") as tiff:
        page = tiff.pages[0].aspage()
        return (int(page.imagewidth), int(page.imagelength)), _orientation(page)


def has_tiff_header(data: bytes) -> bool:
    """Return whether the first directory of a TIFF image is sound, by Pillow."""
    try:
        is_big = data[2:4] in {b"+\0", b"\0+"}
        directory = ImageFileDirectory_v2(data[: 16 if is_big else 8])
        stream = io.BytesIO(data)
        stream.seek(directory.next)
        with quiet_libraries():
            directory.load(stream)
    except Exception:  # Pillow raises many types of errors on damaged input  # noqa: BLE001
        return False
    return _IMAGE_WIDTH in directory


@contextmanager
def _open_tiff(data: bytes, purpose: str) -> Iterator["TiffFile"]:
    """Open a TIFF image with tifffile; its errors, also those in the block, become reasons."""
    if not has_package("tifffile"):
        raise missing_extra(purpose, "tiff")
    from tifffile import TiffFile

    try:
        with quiet_libraries(), TiffFile(io.BytesIO(data)) as tiff:
            yield tiff
    except UnreadableImageError:
        raise
    except Exception as error:  # tifffile and its codecs raise many types of errors on damaged input
        raise UnreadableImageError("damaged") from error


def _orientation(page: "TiffPage") -> int:
    tag = page.tags.get(_ORIENTATION)
    return UPRIGHT if tag is None else check_orientation(tag.value)


def _stretch_band(values: np.ndarray, percentiles: tuple[float, float]) -> UInt8[np.ndarray, "h w"]:
    if values.dtype.kind not in "buif" or not np.isfinite(values).all():
        raise UnreadableImageError("has NaN or infinite pixels")
    low, high = np.percentile(values, percentiles)
    return stretch(values, float(low), float(high))


def _decode_page(page: "TiffPage") -> np.ndarray:
    """Return the gray or RGB pixels of a page; a page with other bands needs a choice."""
    num_bands = page.samplesperpixel
    photometric = str(getattr(page.photometric, "name", page.photometric))
    is_rgb = photometric == "RGB" and num_bands >= MAX_BANDS
    if not is_rgb and num_bands > 1:
        raise UnreadableImageError(f"has bands 1 to {num_bands}; choose one or three of them by `bands`")
    if not is_rgb and photometric not in {"MINISBLACK", "MINISWHITE"}:
        raise UnreadableImageError(f"TIFF with the color space {photometric}")
    _check_num_bytes(page)
    values = page.asarray()
    if is_rgb:
        rgb = np.moveaxis(values, page.axes.index("S"), -1)[..., :MAX_BANDS]
        return scale_to_uint8(np.ascontiguousarray(rgb))
    gray = scale_to_uint8(values)
    return np.repeat((255 - gray if photometric == "MINISWHITE" else gray)[:, :, None], MAX_BANDS, axis=2)


def _check_num_bytes(pages: "TiffPage | TiffPageSeries") -> None:
    if pages.nbytes > _MAX_BYTES:
        raise UnreadableImageError("too many pixels")
