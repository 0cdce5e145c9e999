"""Images with captions, for image-text retrieval."""

import logging
from dataclasses import dataclass
from pathlib import Path

from likewise.data.readers.cells import cell_texts
from likewise.data.readers.columns import find_caption_column, match_caption_columns
from likewise.data.readers.files import IgnoredFiles
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.base import (
    DatasetTable,
    ImageDataset,
    SkippedEntries,
    content_key,
    count_unused_images,
    dataset_name,
    find_table,
    open_dataset_table,
    parse_split,
    same_file_id,
    unknown_split_reason,
)

logger = logging.getLogger(__name__)

_NO_FILE_OR_CAPTION = "without a file or a caption"


@dataclass(frozen=True, kw_only=True)
class CaptionedDataset(ImageDataset):
    """Images with one or several captions each."""

    caption_column: str
    """Column of the captions in the table."""
    captions: tuple[tuple[str, ...], ...]
    """The captions of each image."""


def open_captioned(path: str | Path, *, caption_column: str | None = None) -> CaptionedDataset:
    """Open the test images of a table of captions.

    Args:
        path: A table with columns of files and captions, in any format of tables that `import` reads, with
            one or several captions per row, or a folder with a `captions.csv`. If it has a column `split`,
            only rows of `test` are read, or those of `val` if there are none.
        caption_column: Column of the captions; detected by its name if None.

    Raises:
        InvalidInputError: if there is no such table, or it has no captions.
    """
    path = Path(path)
    table_path = find_table(path, "captions") or path / "captions.csv" if path.is_dir() else path
    if not table_path.is_file():
        raise InvalidInputError(
            f"{table_path} does not exist; image-text retrieval needs a table of files and captions",
            path=table_path,
        )
    table, skipped = open_dataset_table(table_path), SkippedEntries()
    column = _find_caption_column(table, caption_column)
    captions_by_split = _read_captions(table, column, skipped)
    captions = captions_by_split["test"]
    if not captions and captions_by_split["val"]:
        logger.info("%s has no test images: val is the test split", table_path)
        captions = captions_by_split["val"]
    if not captions:
        raise InvalidInputError(
            f"{table_path} has no caption of a test image in its column {column!r}{skipped.summary()}",
            path=table_path,
        )
    files, root, ignored = tuple(captions), table.root, IgnoredFiles()
    count_unused_images(path, root, [file for split in captions_by_split.values() for file in split], ignored)
    return CaptionedDataset(
        name=f"{dataset_name(table_path)}-captions",
        path=path,
        root=root,
        files=files,
        captions=tuple(map(tuple, captions.values())),
        caption_column=column,
        skipped=skipped.to_dict(),
        ignored=dict(ignored.counts),
        key=content_key((root / file for file in files), captions.values()),
    )


def _find_caption_column(table: DatasetTable, column: str | None) -> str:
    if column is not None:
        return table.require_column(column, "caption_column")
    caption_column = find_caption_column(table.table)
    if caption_column is None:  # columns that only later rows have
        first_columns = table.table.column_names()
        later_columns = [name for name in table.column_names if name not in first_columns]
        caption_column = next(iter(match_caption_columns(later_columns)), None)
    if caption_column is None or caption_column == table.file_column:
        raise InvalidInputError(
            f"`caption_column`: {table.path} has no column of captions; it has "
            f"{', '.join(table.column_names)}",
            field="caption_column",
            path=table.path,
        )
    return caption_column


def _read_captions(
    table: DatasetTable, column: str, skipped: SkippedEntries
) -> dict[str, dict[str, list[str]]]:
    """Return the captions of each image by split; all rows are of `test` without a column of splits."""
    captions: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
    first_spellings: dict[str, str] = {}
    split_column = table.find_column("split")
    fields = {"split": split_column, "caption": column}
    for location, cells, values in table.iter_rows(fields, skipped, missing_reason=_NO_FILE_OR_CAPTION):
        split = "test" if split_column is None else parse_split(cells["split"])
        texts = [text.strip() for text in cell_texts(values.get(column)) if text.strip()]
        if not cells["caption"] or not texts:
            skipped.add(_NO_FILE_OR_CAPTION)
        elif split is None:
            skipped.add(unknown_split_reason(cells["split"]), location)
        else:
            file_id = same_file_id(table.root, cells["file"])
            file = first_spellings.setdefault(file_id, cells["file"])
            captions[split].setdefault(file, []).extend(texts)
    return captions
