"""Options of an import; this module imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from likewise.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import.

    For folders and tar archives, columns are keys of the `.json` file of an image.
    """

    image_column: str | None = None
    """Column of image paths or images; inferred from common names by default."""
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
    limit: int | None = None
    """Maximum number of images, from the start of the source."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            InvalidInputError: if `limit` is below 1.
        """
        if self.limit is not None and self.limit < 1:
            raise InvalidInputError(f"`limit` must be at least 1, got {self.limit}", field="limit")
