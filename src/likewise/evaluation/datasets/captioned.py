"""Images with their captions, to find one by the other."""

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from likewise.errors import InputError, close_matches
from likewise.evaluation.datasets.labeled import ImageSet, file_column, fingerprint, read_table, table_name

_CAPTION = ("caption", "captions", "text", "title", "description")


@dataclass(frozen=True, kw_only=True)
class CaptionedSet(ImageSet):
    """Images with one or several captions each.

    Attributes:
        caption_column: Where the captions came from.
        captions: The captions of each image.
        without: Rows without a file or a caption, which are left out.
    """

    caption_column: str
    captions: tuple[tuple[str, ...], ...]
    without: int


def open_captioned(where: str | Path, *, caption_column: str | None = None) -> CaptionedSet:
    """Open the test images of a table of captions.

    Args:
        where: A CSV or TSV file with a column of files and one of captions, several rows for an image with
            several captions, or a folder with a `captions.csv`. Where it has a column `split`, only its rows
            of `test` count.
        caption_column: The column of captions; found by its usual names where not given.

    Raises:
        InputError: where there is no such table, or it has no captions.
    """
    path = Path(where)
    table = path / "captions.csv" if path.is_dir() else path
    if not table.is_file():
        raise InputError(f"{table} does not exist; captions are read from a table with a file and a caption")
    captions, column, without = read_table(table, partial(_read, column=caption_column))
    if not captions:
        raise InputError(f"{table} has no caption of a test image in its column {column!r}")
    return CaptionedSet(
        name=f"{table_name(table)}-captions",
        source=path,
        root=table.parent,
        files=tuple(captions),
        captions=tuple(map(tuple, captions.values())),
        caption_column=column,
        without=without,
        key=fingerprint(table.parent, list(captions.items()), list(captions)),
    )


def _read(table: Path, reader: csv.DictReader, column: str | None) -> tuple[dict[str, list[str]], str, int]:
    present = list(reader.fieldnames or [])
    file = file_column(table, present)
    found = column if column is not None else next((c for c in present if c.lower() in _CAPTION), None)
    if found is None or found not in present:
        near = "" if found is None else close_matches(found, present)
        raise InputError(
            f"{table} has no column of captions{'' if found is None else f' {found!r}'}; it has "
            f"{', '.join(present)}; use --caption-column.{near}"
        )
    captions: dict[str, list[str]] = {}
    without = 0
    for row in reader:
        if row.get("split", "test").strip().lower() not in ("test", "testing", "eval"):
            continue
        if row[file] and row[found]:
            captions.setdefault(row[file], []).append(row[found])
        else:
            without += 1
    return captions, found, without
