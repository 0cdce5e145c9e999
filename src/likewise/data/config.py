"""Options of an import; this module imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from likewise.errors import InvalidInputError, did_you_mean

CaptionLines = Literal["auto", "separate", "join"]
SourceFormat = Literal["auto", "folder", "table", "tar"]


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import.

    For folders and tar archives, columns are keys of the `.json` file of an image.
    """

    image_column: str | None = None
    """Column of image paths or images; inferred from common names by default. For tar archives, the part of a
    member name between the first dot and the file type, such as `left` for `0.left.jpg`."""
    caption_column: tuple[str, ...] = ()
    """Columns of captions; inferred from common names by default."""
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
    source_format: SourceFormat = "auto"
    """What to read in a folder: images with caption files (`folder`), a `table`, or `tar` archives."""
    caption_lines: CaptionLines = "auto"
    """Lines of a `.txt` file: `separate` captions, or one caption (`join`); inferred by default."""
    limit: int | None = None
    """Maximum number of images, from the start of the source."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            InvalidInputError: if `limit` is below 1, or a choice is unknown.
        """
        if self.limit is not None and self.limit < 1:
            raise InvalidInputError(f"`limit` must be at least 1, got {self.limit}", field="limit")
        for name, choices in (("source_format", SourceFormat), ("caption_lines", CaptionLines)):
            value, known = getattr(self, name), get_args(choices)
            if value not in known:
                suggestion = did_you_mean(value, list(known))
                raise InvalidInputError(
                    f"unknown `{name}` {value!r}; known: {', '.join(known)}.{suggestion}", field=name
                )
