"""DICOM images as 8-bit pixels, with pydicom (the extra `dicom`)."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from likewise.data.image_formats import (
    UnreadableImageError,
    check_image_size,
    has_package,
    missing_extra,
    quiet_libraries,
)
from likewise.data.pixels import scale_to_uint8, stretch

if TYPE_CHECKING:
    from pydicom import Dataset

_UNBOUNDED = np.array([-1e15, 1e15])  # mapped to the two ends of the output range of a window


def decode_dicom(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a DICOM image of a single frame to RGB.

    Gray values pass the modality transformation (rescale slope and intercept, or a table) and the first
    window (or table) of values of interest, and MONOCHROME1 is inverted. Images without a window are scaled
    from their minimum to their maximum.

    Raises:
        UnreadableImageError: if pydicom is not installed, there is no single frame, or the data are damaged.
    """
    with _errors_as_reasons():
        dataset = _read(data)
        check_image_size(*_size(dataset))
        try:
            pixels = _to_uint8(dataset)
        except (NotImplementedError, RuntimeError) as error:
            syntax = dataset.file_meta.TransferSyntaxUID.name
            raise UnreadableImageError(f"DICOM pixels cannot be decompressed: {syntax}") from error
    return np.repeat(pixels[:, :, None], 3, axis=2) if pixels.ndim == 2 else pixels


def read_dicom_size(data: bytes) -> tuple[int, int]:
    """Return the (width, height) of a DICOM image from its header.

    Raises:
        UnreadableImageError: as `decode_dicom`.
    """
    with _errors_as_reasons():
        return _size(_read(data, stop_before_pixels=True))


@contextmanager
def _errors_as_reasons() -> Iterator[None]:
    try:
        with quiet_libraries():
            yield
    except UnreadableImageError:
        raise
    except Exception as error:  # pydicom raises many types of errors on damaged input
        raise UnreadableImageError("damaged") from error


def _read(data: bytes, *, stop_before_pixels: bool = False) -> "Dataset":
    if not has_package("pydicom"):
        raise missing_extra("DICOM", "dicom")
    import pydicom

    return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=stop_before_pixels)


def _size(dataset: "Dataset") -> tuple[int, int]:
    if "Rows" not in dataset or "Columns" not in dataset:
        raise UnreadableImageError("DICOM file without an image")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise UnreadableImageError("DICOM file with several frames; export one image per frame")
    return int(dataset.Columns), int(dataset.Rows)


def _to_uint8(dataset: "Dataset") -> np.ndarray:
    """Return gray (h, w) or RGB (h, w, 3) pixels as uint8."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    photometric = str(dataset.PhotometricInterpretation)
    values = pixel_array(dataset)
    if photometric == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
        return scale_to_uint8(values, 8 * values.dtype.itemsize)
    if values.ndim == 3:
        return scale_to_uint8(values, int(dataset.BitsStored))
    gray = _apply_window(apply_modality_lut(values, dataset), dataset)
    return 255 - gray if photometric == "MONOCHROME1" else gray


def _apply_window(values: np.ndarray, dataset: "Dataset") -> UInt8[np.ndarray, "h w"]:
    """Apply the first table or window of values of interest and scale its output range to 8 bits."""
    from pydicom.pixels import apply_voi, apply_windowing

    if dataset.get("VOILUTSequence"):
        num_bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return stretch(apply_voi(values, dataset), 0, 2**num_bits - 1)
    if dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        low, high = apply_windowing(_UNBOUNDED, dataset)
        return stretch(apply_windowing(values, dataset), float(low), float(high))
    return stretch(values, float(values.min()), float(values.max()))
