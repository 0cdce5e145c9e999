"""Images with captions, for image-text retrieval."""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from likewise.errors import InvalidInputError, did_you_mean
from likewise.evaluation.datasets.labeled import (
    ImageDataset,
    dataset_name,
    find_file_column,
    fingerprint,
    read_table,
)

_CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description")


@dataclass(frozen=True, kw_only=True)
class CaptionedDataset(ImageDataset):
    """Images with one or several captions each."""

    caption_column: str
    """Column of the captions in the table."""
    captions: tuple[tuple[str, ...], ...]
    """The captions of each image."""
    num_skipped: int
    """Number of excluded rows, without a file or a caption."""


def open_captioned(path: str | Path, *, caption_column: str | None = None) -> CaptionedDataset:
    """Open the test images of a table of captions.

    Args:
        path: A CSV or TSV file with columns of files and captions, one row per caption, or a folder with a
            `captions.csv`. If it has a column `split`, only rows of `test` are read.
        caption_column: Column of the captions; detected by its name if None.

    Raises:
        InvalidInputError: if there is no such table, or it has no captions.
    """
    path = Path(path)
    table = path / "captions.csv" if path.is_dir() else path
    if not table.is_file():
        raise InvalidInputError(
            f"{table} does not exist; image-text retrieval needs a table of files and captions", path=table
        )
    captions, column, num_skipped = read_table(table, partial(_read_captions, column=caption_column))
    if not captions:
        raise InvalidInputError(
            f"{table} has no caption of a test image in its column {column!r}", path=table
        )
    return CaptionedDataset(
        name=f"{dataset_name(table)}-captions",
        path=path,
        root=table.parent,
        files=tuple(captions),
        captions=tuple(map(tuple, captions.values())),
        caption_column=column,
        num_skipped=num_skipped,
        key=fingerprint(table.parent, list(captions.items()), list(captions)),
    )


def _read_captions(
    table: Path, reader: csv.DictReader, column: str | None
) -> tuple[dict[str, list[str]], str, int]:
    fieldnames = list(reader.fieldnames or [])
    file_col = find_file_column(table, fieldnames)
    caption_col = (
        column
        if column is not None
        else next((name for name in fieldnames if name.lower() in _CAPTION_COLUMNS), None)
    )
    if caption_col is None or caption_col not in fieldnames:
        missing, suggestion = "column of captions", ""
        if caption_col is not None:
            missing, suggestion = f"column {caption_col!r}", did_you_mean(caption_col, fieldnames)
        raise InvalidInputError(
            f"`caption_column`: {table} has no {missing}; it has {', '.join(fieldnames)}.{suggestion}",
            field="caption_column",
            path=table,
        )
    captions: dict[str, list[str]] = {}
    num_skipped = 0
    for row in reader:
        if row.get("split", "test").strip().lower() not in ("test", "testing", "eval"):
            continue
        if row[file_col] and row[caption_col]:
            captions.setdefault(row[file_col], []).append(row[caption_col])
        else:
            num_skipped += 1
    return captions, caption_col, num_skipped
