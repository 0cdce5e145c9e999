"""Numbers as people read them."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from likewise.data.dataset import CaptionDataset, Sample
from likewise.data.images import UnreadableImageError, read_image

THUMBNAIL_SIZE = 128  # twice what is shown on a usual screen, for finer ones
_JPEG_QUALITY = 88


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """An image of the page: its data URI, or the reason why there is none, and what it shows in words."""

    alt: str
    data_uri: str = ""
    reason: str = ""


def sample_thumbnail(dataset: CaptionDataset, sample: Sample, size: int = THUMBNAIL_SIZE) -> Thumbnail:
    """Return an image of a collection, made small."""
    alt = format_captions(sample) or "an image without a caption"
    try:
        return make_thumbnail(read_image(sample.image, dataset.root, size), alt, size)
    except UnreadableImageError as error:
        return Thumbnail(alt=alt, reason=str(error))


def make_thumbnail(pixels: np.ndarray, alt: str, size: int = THUMBNAIL_SIZE) -> Thumbnail:
    """Return pixels (h, w, 3) uint8 as a small picture, PNG or JPEG by which is shorter."""
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
    """Return the captions of a record in one line, cut where they run on."""
    text = " · ".join(" ".join(caption.split()) for caption in sample.captions)
    return text if len(text) <= max_length else text[: max_length - 1].rstrip() + "…"


MINUS = "−"
ABSENT = "–"


def format_percent(fraction: float, decimals: int = 1) -> str:
    """Return a share of one as a percentage without its sign, such as `36.6`."""
    return f"{100 * fraction:.{decimals}f}"


def format_percentage_points(fraction: float) -> str:
    """Return a difference of shares as signed percentage points, such as `+3.2` or `−0.4`."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def format_p_value(p_value: float) -> str:
    """Return a p-value with what it is, such as `p = 0.034`."""
    if p_value < 0.001:
        return "p\u00a0<\u00a00.001"
    return f"p\u00a0=\u00a0{p_value:.3f}" if p_value < 0.1 else f"p\u00a0=\u00a0{p_value:.2f}"


def format_value(value: object) -> str:
    """Return a setting as text: numbers short, nothing as a dash."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def join_words(parts: list[str]) -> str:
    """Join with commas and a last `and`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def count_noun(count: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as `1 image` or `1,045 images`."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"
