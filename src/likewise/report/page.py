"""Rendering of report pages: the jinja environment, thumbnails, and the format of numbers."""

import base64
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from likewise.artifacts import write_text
from likewise.data.dataset import CaptionDataset, Sample
from likewise.data.images import UnreadableImageError, read_image
from likewise.strings import count_noun

THUMBNAIL_SIZE = 128  # twice the size on the page, for high-density screens
_JPEG_QUALITY = 88
_TEMPLATE_DIR = Path(__file__).parent / "templates"

MINUS = "−"
ABSENT = "–"


def render(template: str, **context: Any) -> str:
    """Render a template of `templates/` as a self-contained HTML page; all text is escaped."""
    return _environment().get_template(template).render(context)


def write_page(path: Path, html: str) -> None:
    """Write a page atomically; code points that are not valid text are replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names and captions may contain lone surrogates.
    write_text(path, html.encode("utf-8", "replace").decode("utf-8"))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Return the environment of all pages. Captions are untrusted text, therefore autoescape is on."""
    env = Environment(
        loader=FileSystemLoader(_TEMPLATE_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "count_noun": count_noun,
        "fraction": format_fraction,
        "thousands": "{:,}".format,
    }
    return env


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """A small image of a page.

    Attributes:
        alt: Alternative text.
        data_uri: The image as a data URI; empty if it is unreadable.
        reason: Reason why the image is unreadable.
    """

    alt: str
    data_uri: str = ""
    reason: str = ""


def sample_thumbnail(dataset: CaptionDataset, sample: Sample, size: int = THUMBNAIL_SIZE) -> Thumbnail:
    """Return the thumbnail of a sample's image, or the reason why the image is unreadable."""
    alt = format_captions(sample) or "image without a caption"
    try:
        return make_thumbnail(read_image(sample.image, dataset.root, size), alt, size)
    except UnreadableImageError as error:
        return Thumbnail(alt=alt, reason=str(error))


class ThumbnailCache:
    """Thumbnails of a dataset's images by position, each computed once."""

    def __init__(self, dataset: CaptionDataset, size: int = THUMBNAIL_SIZE) -> None:
        self._dataset, self._size = dataset, size
        self._thumbnails: dict[int, Thumbnail] = {}

    def __call__(self, position: int) -> Thumbnail:
        """Return the thumbnail of the image at a position of the dataset."""
        if position not in self._thumbnails:
            sample = self._dataset[position]
            self._thumbnails[position] = sample_thumbnail(self._dataset, sample, self._size)
        return self._thumbnails[position]


def make_thumbnail(pixels: np.ndarray, alt: str, size: int = THUMBNAIL_SIZE) -> Thumbnail:
    """Return pixels (h, w, 3) uint8 as a thumbnail: PNG or JPEG, whichever is smaller."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    encoded = {"png": _encode_image(image, "PNG", optimize=True)}
    encoded["jpeg"] = _encode_image(image, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    image_format = min(encoded, key=lambda name: len(encoded[name]))
    return Thumbnail(
        alt=alt,
        data_uri=f"data:image/{image_format};base64,{base64.b64encode(encoded[image_format]).decode()}",
    )


def _encode_image(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def format_captions(sample: Sample, max_length: int = 160) -> str:
    """Return the captions of a sample in one line, truncated to `max_length` characters."""
    text = " · ".join(" ".join(caption.split()) for caption in sample.captions)
    return text if len(text) <= max_length else text[: max_length - 1].rstrip() + "…"


def format_percent(fraction: float, decimals: int = 1) -> str:
    """Return a fraction in percent without the percent sign, such as `36.6`."""
    return f"{100 * fraction:.{decimals}f}"


def format_fraction(count: int, total: int) -> str:
    """Return a fraction in percent, such as `6.7 %`; `< 0.1 %` if it rounds to zero."""
    if not count or not total:
        return ABSENT
    return f"{100 * count / total:.1f} %" if count >= 0.0005 * total else "< 0.1 %"


def format_percentage_points(fraction: float) -> str:
    """Return a difference of fractions in signed percentage points, such as `+3.2` or `−0.4`."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def format_p_value(p_value: float) -> str:
    """Return a p-value with its symbol, such as `p = 0.034`."""
    if p_value < 0.001:
        return "p\u00a0<\u00a00.001"
    return f"p\u00a0=\u00a0{p_value:.3f}" if p_value < 0.1 else f"p\u00a0=\u00a0{p_value:.2f}"


def format_value(value: object) -> str:
    """Return the value of a setting as short text; None as a dash."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def join_words(parts: list[str]) -> str:
    """Join with commas and a final `and`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
