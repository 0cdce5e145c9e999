"""Images as small data URIs, so that a page is one file; what cannot be shown says why."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from likewise.collection.images import BadImageError, decode, read_bytes
from likewise.collection.records import Collection, Record

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
