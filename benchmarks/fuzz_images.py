"""Valid inputs of the readers under test, and the decoding of images."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.mutations import Files
from likewise.data.images import decode_image, read_image_size, read_orientation

_TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".caption", ".xml", ".yaml")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A valid input and how it is read."""

    files: Files
    mutable: tuple[str, ...]
    """Names of the files that are mutated."""
    check: Callable[[Path, Files], None]
    """Reads the files in a folder; raises AssertionError for wrong counts."""

    def is_text(self, name: str) -> bool:
        """Return whether a file is mutated as text."""
        return name.endswith(_TEXT_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class ReaderTest:
    """A reader under test."""

    name: str
    make_sources: Callable[[Path], list[Source]]
    """Makes the valid inputs; may write below the folder."""
    max_mib: int = 2048
    """Peak memory of the process, in MiB."""
    is_silent: bool = False
    """Whether nothing may be written to stderr, not even by libraries in C."""


def make_image(index: int, size: tuple[int, int] = (20, 14)) -> Image.Image:
    """Return an image of smooth colors and some noise."""
    rng = np.random.default_rng(index)
    ramp = np.linspace(0, 200, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    return Image.fromarray((ramp + rng.integers(0, 50, ramp.shape)).astype(np.uint8))


def encode_image(image: Image.Image, image_format: str, **options: object) -> bytes:
    """Return an image as a file in memory."""
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def _image_files() -> Files:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = make_image(0)
    gray, palette, alpha = image.convert("L"), image.convert("P"), image.convert("RGBA")
    deep = Image.fromarray(np.arange(280, dtype=np.uint16).reshape(14, 20) * 200)
    files = {
        "a.jpg": encode_image(image, "JPEG", exif=exif),
        "progressive.jpg": encode_image(image, "JPEG", progressive=True),
        "cmyk.jpg": encode_image(image.convert("CMYK"), "JPEG"),
        "a.png": encode_image(image, "PNG", exif=exif),
        "deep.png": encode_image(deep, "PNG"),
        "palette.png": encode_image(palette, "PNG", transparency=3),
        "gray.webp": encode_image(gray, "WEBP"),
        "lossless.webp": encode_image(alpha, "WEBP", lossless=True, exif=exif),
        "a.tif": encode_image(image, "TIFF", exif=exif),
        "deep.tif": encode_image(deep, "TIFF"),
        "a.gif": encode_image(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        "a.bmp": encode_image(image, "BMP"),
        "palette.bmp": encode_image(palette, "BMP"),
        "a.avif": encode_image(image, "AVIF", exif=exif),
        "a.jp2": encode_image(image, "JPEG2000"),
        "a.ppm": encode_image(image, "PPM"),
        "a.pgm": encode_image(deep, "PPM"),
        "a.ico": encode_image(alpha, "ICO"),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files[f"{compression}.tif"] = encode_image(image, "TIFF", compression=compression)
    files["group4.tif"] = encode_image(image.convert("1"), "TIFF", compression="group4")
    return files


def check_image(folder: Path, files: Files) -> None:
    """Decode an image; its pixels have the size of its header."""
    ((name, data),) = files.items()
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert read_image_size(folder / name) == pixels.shape[1::-1]
    assert read_image_size(data) == pixels.shape[1::-1]
    assert 1 <= read_orientation(data) <= 8
    half = decode_image(data, short_side=4)
    assert (half.shape[1] < half.shape[0]) == (pixels.shape[1] < pixels.shape[0])


def make_image_sources(folder: Path) -> list[Source]:
    """Return one image per format and variant."""
    return [
        Source(files={name: data}, mutable=(name,), check=check_image)
        for name, data in _image_files().items()
    ]
