"""Formats of images: their file names, their first bytes, the limits on their size, and silent libraries.

Every format that Pillow decodes by itself is read, and HEIF, DICOM and other TIFF variants with the packages
of an extra. The format is known by content; file names only tell which files of a folder are candidates.
"""

import ctypes
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

import PIL
from PIL import Image

from likewise.errors import InvalidInputError

MAX_PIXELS = 178_956_970  # the default limit of Pillow against decompression bombs
MAX_ASPECT_RATIO = 20.0  # as in the code of LGSSL

# EPS runs Ghostscript; WMF and EMF are vector drawings; Pillow cannot decode MPEG, BUFR, GRIB and HDF5; it
# ignores the zero point of FITS; the signatures of IPTC, IMT, McIDAS and SPIDER fit many other files.
_EXCLUDED_FORMATS = frozenset(
    {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "FITS", "IPTC", "IMT", "MCIDAS", "SPIDER"}
)
_EXTRA_SUFFIXES = {
    "heif": frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"}),
    "dicom": frozenset({".dcm", ".dicom"}),
}
_HEIF_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
)
_SIGNED_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "QOI", "PSD")
SIGNATURE_BYTES = 132  # "DICM" is at byte 128
_PNG_HEADER_BYTES = 8
_PNG_METADATA = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
_QUIET_LOGGERS = ("PIL", "tifffile", "pydicom", "pillow_heif")
_QUIET_MODULES = r"(PIL|tifffile|pydicom|pillow_heif)(\.|$)"


class UnreadableImageError(InvalidInputError):
    """An image that cannot be read or decoded; skipped images are counted by the message."""


def pillow_formats() -> list[str]:
    """Return the names of the formats that Pillow may decode, most frequent first."""
    Image.init()
    return [name for name in Image.ID if name not in _EXCLUDED_FORMATS]


def _candidate_suffixes() -> frozenset[str]:
    formats = frozenset(pillow_formats())
    registered = {suffix for suffix, name in Image.registered_extensions().items() if name in formats}
    return frozenset(registered).union(*_EXTRA_SUFFIXES.values())


IMAGE_SUFFIXES: frozenset[str] = _candidate_suffixes()
"""Suffixes of files that are read as images, in lower case; the optional formats are always included."""


def is_image_name(name: str | Path) -> bool:
    """Return whether a file name has the suffix of an image format, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122  # called once per file


def has_image_signature(head: bytes) -> bool:
    """Return whether the first 132 bytes of a file are those of a common image format.

    Formats without an unmistakable signature, such as TGA, are recognized by their name only.
    """
    return (
        is_heif(head)
        or is_dicom(head)
        or any(name in Image.OPEN and _accepts(name, head[:16]) for name in _SIGNED_FORMATS)
    )


def _accepts(name: str, prefix: bytes) -> bool:
    accept = Image.OPEN[name][1]
    return accept is not None and len(prefix) == 16 and accept(prefix) is True


def is_image_file(path: Path) -> bool:
    """Return whether a file is an image by its name, or else by its first bytes."""
    if is_image_name(path.name):
        return True
    try:
        with path.open("rb") as stream:
            return has_image_signature(stream.read(SIGNATURE_BYTES))
    except OSError:
        return False


def is_heif(data: bytes) -> bool:
    """Return whether bytes are a HEIF file by their brand; `mif1` and `msf1` are shared with AVIF."""
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS


def is_dicom(data: bytes) -> bool:
    """Return whether bytes are a DICOM file by their preamble."""
    return data[128:132] == b"DICM"


def is_tiff(data: bytes) -> bool:
    """Return whether bytes are a TIFF or BigTIFF file by their first bytes."""
    return data[:4] in {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each chunk of a PNG file, and the start and stop of its content."""
    position = _PNG_HEADER_BYTES
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        start = position + 8
        yield data[position + 4 : start], start, start + length
        position = start + length + 4  # a checksum follows the content


def remove_png_metadata(data: bytes) -> bytes:
    """Return a PNG file without its texts and color profile."""
    chunks = (
        data[start - 8 : stop + 4] for kind, start, stop in png_chunks(data) if kind not in _PNG_METADATA
    )
    return data[:_PNG_HEADER_BYTES] + b"".join(chunks)


def has_package(name: str) -> bool:
    """Return whether an optional package is installed."""
    return find_spec(name) is not None


def missing_extra(kind: str, extra: str) -> UnreadableImageError:
    """Return the error for a format whose optional packages are not installed."""
    return UnreadableImageError(f"{kind} needs an optional package: pip install 'likewise[{extra}]'")


@cache
def register_heif() -> bool:
    """Let Pillow decode HEIF with pillow-heif; return whether the package is installed."""
    if not has_package("pillow_heif"):
        return False
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return True


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


class _QuietState:
    """Number of threads inside `quiet_libraries`, and what the last of them restores."""

    lock = Lock()
    num_active = 0
    filters = warnings.catch_warnings()
    levels: dict[str, int]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress warnings and log messages of image libraries: damage is reported as a reason instead.

    Threads may overlap: `warnings.catch_warnings` alone would restore the filters of another thread.
    """
    with _QuietState.lock:
        if _QuietState.num_active == 0:
            _start_quiet()
        _QuietState.num_active += 1
    try:
        yield
    finally:
        with _QuietState.lock:
            _QuietState.num_active -= 1
            if _QuietState.num_active == 0:
                _stop_quiet()


def _start_quiet() -> None:
    _silence_libtiff()
    _QuietState.filters = warnings.catch_warnings()
    _QuietState.filters.__enter__()
    warnings.filterwarnings("ignore", module=_QUIET_MODULES)
    loggers = {name: logging.getLogger(name) for name in _QUIET_LOGGERS}
    _QuietState.levels = {name: logger.level for name, logger in loggers.items()}
    for logger in loggers.values():
        logger.setLevel(logging.CRITICAL + 1)


def _stop_quiet() -> None:
    for name, level in _QuietState.levels.items():
        logging.getLogger(name).setLevel(level)
    _QuietState.filters.__exit__(None, None, None)


@cache
def _silence_libtiff() -> None:
    """Remove the handlers that write messages of the libtiff inside Pillow's wheel to stderr.

    Pillow raises an error for every failure itself. Pillow without bundled libraries is left as it is.
    """
    package = Path(PIL.__file__).parent
    folders = (package.parent / "pillow.libs", package / ".dylibs")
    for library in (path for folder in folders for path in sorted(folder.glob("libtiff*"))):
        try:
            libtiff = ctypes.CDLL(str(library))
            libtiff.TIFFSetErrorHandler(None)
            libtiff.TIFFSetWarningHandler(None)
        except (OSError, AttributeError):
            continue
