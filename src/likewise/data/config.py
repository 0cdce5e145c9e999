"""Options of imports and audits; this module imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from likewise.errors import InvalidInputError, did_you_mean

CaptionLines = Literal["auto", "separate", "join"]
SourceFormat = Literal["auto", "folder", "table", "tar"]

MAX_BANDS = 3
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BAND_PERCENTILES = (2.0, 98.0)


@dataclass(frozen=True, kw_only=True)
class BandSelection:
    """Choice of the bands of multi-band TIFF images that are shown as red, green and blue, or as gray."""

    bands: tuple[int, ...]
    """Numbers of one or three bands, from 1."""
    percentiles: tuple[float, float]
    """Percentiles of each band that become 0 and 255; values outside are set to these ends."""


def select_bands(bands: tuple[int, ...], percentiles: tuple[float, ...]) -> BandSelection | None:
    """Return the choice of bands, or None without bands.

    Raises:
        InvalidInputError: unless there are no, one or three bands from 1 on, and two ascending percentiles.
    """
    if len(bands) not in {0, 1, MAX_BANDS} or any(band < 1 for band in bands):
        raise InvalidInputError(
            f"`bands` must be one or three band numbers, the first band being 1, got {list(bands)}",
            field="bands",
        )
    if len(percentiles) != 2 or not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise InvalidInputError(
            f"`band_percentiles` must be two ascending numbers from 0 to 100, got {list(percentiles)}",
            field="band_percentiles",
        )
    if not bands:
        return None
    return BandSelection(bands=bands, percentiles=(float(percentiles[0]), float(percentiles[1])))


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import.

    For folders and tar archives, columns are keys of the `.json` file of an image.
    """

    image_column: str | None = None
    """Column of image paths or images; inferred from common names by default. For tar archives, the part of a
    member name between the first dot and the file type, such as `left` for `0.left.jpg`."""
    caption_column: tuple[str, ...] = ()
    """Columns of captions, repeatable or comma-separated (a column that exists is not split); inferred from
    common names by default."""
    label_column: str | None = None
    """Column of class labels, used for evaluation only, unless pairs are sampled by label."""
    group_column: str | None = None
    """Column of groups, such as a subreddit or a year; they can constrain pairs."""
    id_column: str | None = None
    """Column of unique ids; defaults to the image path."""
    where: tuple[str, ...] = ()
    """Conditions `COLUMN=VALUE`; only rows that match all of them are imported."""
    images: Path | None = None
    """Folder that image paths are relative to; detected near the table by default."""
    bands: tuple[int, ...] = ()
    """Numbers, from 1, of the bands of multi-band TIFF images that are red, green and blue, or gray."""
    band_percentiles: tuple[float, ...] = BAND_PERCENTILES
    """Percentiles of each of the `bands` that become black and full brightness."""
    source_format: SourceFormat = "auto"
    """What to read in a folder: images with caption files (`folder`), a `table`, or `tar` archives."""
    caption_lines: CaptionLines = "auto"
    """Lines of a `.txt` file: `separate` captions, or one caption (`join`); inferred by default."""
    limit: int | None = None
    """Maximum number of images, from the start of the source."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            InvalidInputError: if `limit` is below 1, a choice is unknown, the bands are invalid, or there are
                percentiles without bands.
        """
        _ = self.band_selection
        if not self.bands and self.band_percentiles != BAND_PERCENTILES:
            raise InvalidInputError(
                "`band_percentiles` has no effect without `bands`", field="band_percentiles"
            )
        if self.limit is not None and self.limit < 1:
            raise InvalidInputError(f"`limit` must be at least 1, got {self.limit}", field="limit")
        for name, choices in (("source_format", SourceFormat), ("caption_lines", CaptionLines)):
            value, known = getattr(self, name), get_args(choices)
            if value not in known:
                suggestion = did_you_mean(value, list(known))
                raise InvalidInputError(
                    f"unknown `{name}` {value!r}; known: {', '.join(known)}.{suggestion}", field=name
                )

    @property
    def band_selection(self) -> BandSelection | None:
        """Choice of bands, or None without `bands`."""
        return select_bands(self.bands, self.band_percentiles)


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Thresholds of an audit."""

    min_side: int = 64
    """Images with a shorter side, in pixels, are reported as tiny."""
    max_aspect: float = 4.0
    """Images with a larger aspect ratio are reported as stretched."""
    max_hamming: int = 3
    """Maximum Hamming distance between the 64-bit hashes of near-duplicate images."""

    def validate(self) -> None:
        """Validate the fields.

        Raises:
            InvalidInputError: if a threshold is out of range.
        """
        if self.min_side < 0:
            raise InvalidInputError(f"`min_side` must be at least 0, got {self.min_side}", field="min_side")
        if not self.max_aspect >= 1:
            raise InvalidInputError(
                f"`max_aspect` must be at least 1, got {self.max_aspect}", field="max_aspect"
            )
