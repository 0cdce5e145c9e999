"""Numbers as people read them."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from likewise.data.dataset import Collection, Record
from likewise.data.images import BadImageError, decode, read_bytes

SIDE = 128  # twice what is shown on a usual screen, for finer ones
_JPEG_QUALITY = 88


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the page: its data URI, or the reason why there is none, and what it shows in words."""

    alt: str
    source: str = ""
    reason: str = ""


def picture_of(collection: Collection, record: Record, side: int = SIDE) -> Picture:
    """Return an image of a collection, made small."""
    alt = caption_of(record) or "an image without a caption"
    try:
        return picture(decode(read_bytes(record.image, collection.root), side), alt, side)
    except BadImageError as fault:
        return Picture(alt=alt, reason=str(fault))


def picture(pixels: np.ndarray, alt: str, side: int = SIDE) -> Picture:
    """Return pixels (h, w, 3) uint8 as a small picture, PNG or JPEG by which is shorter."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = {"png": _encoded(image, "PNG", optimize=True)}
    encoded["jpeg"] = _encoded(image, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    kind = min(encoded, key=lambda name: len(encoded[name]))
    return Picture(alt=alt, source=f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}")


def _encoded(image: Image.Image, kind: str, **how: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def caption_of(record: Record, length: int = 160) -> str:
    """Return the captions of a record in one line, cut where they run on."""
    text = " · ".join(" ".join(caption.split()) for caption in record.captions)
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


MINUS = "−"
ABSENT = "–"


def percent(share: float, places: int = 1) -> str:
    """Return a share of one as a percentage without its sign, such as `36.6`."""
    return f"{100 * share:.{places}f}"


def points(share: float) -> str:
    """Return a difference of shares as signed percentage points, such as `+3.2` or `−0.4`."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def chance(p_value: float) -> str:
    """Return a p-value with what it is, such as `p = 0.034`."""
    if p_value < 0.001:
        return "p\u00a0<\u00a00.001"
    return f"p\u00a0=\u00a0{p_value:.3f}" if p_value < 0.1 else f"p\u00a0=\u00a0{p_value:.2f}"


def plain(value: object) -> str:
    """Return a setting as text: numbers short, nothing as a dash."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def listed(parts: list[str]) -> str:
    """Join with commas and a last `and`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, such as `1 image` or `1,045 images`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
