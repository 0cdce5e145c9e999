"""Columns of tables: which hold images, captions and the other fields of a sample."""

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from likewise.data.config import ImportOptions
from likewise.data.readers.base import ColumnMapping, parse_where
from likewise.data.readers.cells import MAX_DEPTH
from likewise.data.readers.files import find_image_root, resolve_image_path
from likewise.data.readers.tables import Table, TableRow, cell_image
from likewise.errors import InvalidInputError, did_you_mean
from likewise.strings import split_unknown_names

# Common column names in lower case, in order of preference.
_IMAGE_COLUMN_NAMES = (
    *("file", "image", "path", "filename", "file_name", "image_path", "filepath", "img"),
    *("image_name", "image_file", "file_path", "img_path", "image_filename", "image_filepath"),
)
_CAPTION_COLUMN_NAMES = ("caption", "captions", "title", "text", "description", "comment", "name")
_NUM_PROBED_ROWS = 20  # rows that are used to find the image column and the image folder
_NUM_PROBED_CAPTIONS = 100


def match_score(table: Table, options: ImportOptions) -> int:
    """Return 0 for a table without an image column, 1 with an image column, 2 with images and captions."""
    column_names = table.column_names()
    if options.image_column is not None:
        has_images = options.image_column in column_names
    else:
        has_images = any(_match_image_columns(table, column_names))
    if not has_images:
        return 0
    has_captions = (
        set(split_unknown_names(options.caption_column, column_names.__contains__)) <= set(column_names)
        if options.caption_column
        else _match_names(column_names, _CAPTION_COLUMN_NAMES)
    )
    return 2 if has_captions else 1


def infer_columns(table: Table, options: ImportOptions) -> tuple[ColumnMapping, list[str]]:
    """Infer the columns of a table that the options leave open.

    Args:
        table: The table.
        options: The import options.

    Returns:
        The mapping, and messages on the inferred columns.

    Raises:
        InvalidInputError: if a requested column is missing, there is no image column, or there are several
            equally good ones.
    """
    column_names = _list_columns(table, options)
    messages = []
    image_column = options.image_column
    caption_columns = split_unknown_names(options.caption_column, column_names.__contains__)
    if image_column is None:
        image_column = _infer_image_column(table, column_names, options)
        messages.append(f"{table.name}: image column is {image_column!r}")
    if not caption_columns:
        matches = [
            column
            for column in _match_names(column_names, _CAPTION_COLUMN_NAMES)
            if column != image_column and _contains_text(table, column)
        ]
        caption_columns = tuple(matches[:1])
        messages.append(_caption_message(table.name, matches, column_names))
    columns = ColumnMapping(
        image=image_column,
        captions=caption_columns,
        label=options.label_column,
        group=options.group_column,
        id=options.id_column if options.id_column is not None else table.default_id_column,
        where=parse_where(options),
    )
    return columns, messages


def _list_columns(table: Table, options: ImportOptions) -> list[str]:
    """Return the columns of a table: of its first rows, or of all rows if those lack any that is needed.

    Raises:
        InvalidInputError: if no row has a requested column.
    """
    column_names = table.column_names()
    requested = _requested_columns(options, column_names)
    is_complete = all(column is None or column in column_names for _, column in requested)
    if not is_complete or match_score(table, options) < 2:
        column_names = table.all_column_names
    for field, column in _requested_columns(options, column_names):
        if column is not None and column not in column_names:
            suggestion = did_you_mean(column, list(column_names))
            raise InvalidInputError(
                f"{table.name} has no column {column!r}; its columns are {_join(column_names)}.{suggestion}",
                field=field,
            )
    return column_names


def _requested_columns(options: ImportOptions, column_names: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return the columns that options name, with the name of the option."""
    caption_columns = split_unknown_names(options.caption_column, column_names.__contains__)
    return [
        ("image_column", options.image_column),
        ("label_column", options.label_column),
        ("group_column", options.group_column),
        ("id_column", options.id_column),
        *(("caption_column", column) for column in caption_columns),
        *(("where", column) for column, _ in parse_where(options)),
    ]


def _infer_image_column(table: Table, column_names: Sequence[str], options: ImportOptions) -> str:
    with_images, with_paths = _match_image_columns(table, column_names)
    if with_paths and not _match_names(with_images, _IMAGE_COLUMN_NAMES):
        # A common name says more than images in another column, if its files exist.
        with_paths, num_files = _select_existing(table, with_paths, options)
        candidates = with_paths if num_files or not with_images else with_images
    else:
        candidates = with_images
    if not candidates:
        raise InvalidInputError(
            f"cannot infer the image column of {table.name}; its columns are {_join(column_names)}. "
            "Set `image_column`",
            field="image_column",
        )
    if len(candidates) > 1:
        names = " and ".join(map(repr, candidates))
        raise InvalidInputError(
            f"{table.name} has several image columns: {names}; set `image_column` to one of them",
            field="image_column",
        )
    return candidates[0]


def find_path_column(table: Table, options: ImportOptions) -> str | None:
    """Return the column of image paths with a common name whose files exist; None if there is none.

    Raises:
        InvalidInputError: if there are several, of different files.
    """
    _, candidates = _match_image_columns(table, table.all_column_names)
    if len(candidates) > 1:
        candidates, _ = _select_existing(table, candidates, options)
    if len(candidates) > 1:
        names = " and ".join(map(repr, candidates))
        raise InvalidInputError(
            f"{table.name} has several image columns of different files: {names}; rename all but one",
            field="image_column",
        )
    return next(iter(candidates), None)


def find_caption_column(table: Table) -> str | None:
    """Return the column of texts with the most common name for captions, or None."""
    matches = _match_names(table.column_names(), _CAPTION_COLUMN_NAMES)
    return next((column for column in matches if _contains_text(table, column)), None)


def _select_existing(table: Table, candidates: list[str], options: ImportOptions) -> tuple[list[str], int]:
    """Return the columns whose files exist for most of the first rows, and the number of these files.

    Of columns with the same files, the first one is returned; without any file, all columns are.
    """
    where = parse_where(options)
    columns_of: dict[tuple[str, ...], str] = {}
    for column in candidates:
        root, paths = find_root(table, ColumnMapping(image=column, where=where), options.images)
        resolved = [resolve_image_path(root, path) for path in paths]
        files = tuple(os.path.realpath(root / path) for path, is_found, _ in resolved if is_found)
        columns_of.setdefault(files, column)
    most = max(map(len, columns_of))
    best = [column for files, column in columns_of.items() if len(files) == most] if most else candidates
    return best, most


def row_matches(columns: ColumnMapping, row: TableRow) -> bool:
    """Return whether a row matches the conditions; False if a cell of a condition is not text."""
    try:
        return columns.matches(row.values)
    except ValueError:
        return False


def find_root(table: Table, columns: ColumnMapping, images: Path | None) -> tuple[Path, list[str]]:
    """Return the folder that the image paths of a table are relative to, and the paths of the first rows."""
    rows = (
        row
        for row in table.iter_rows(columns.required_columns())
        if isinstance(row, TableRow) and row_matches(columns, row)
    )
    cells = [row.values.get(columns.image or "") for row in islice(rows, _NUM_PROBED_ROWS)]
    paths = [image.path for image in map(cell_image, cells) if image is not None and image.path is not None]
    return (find_image_root(paths, table.root)[0] if images is None else images), paths


def _contains_text(table: Table, column: str) -> bool:
    """Return whether the first values of a column are text; a column without values counts as text."""
    if column in table.embedded_columns():
        return False
    rows = (row for row in table.iter_rows([column]) if isinstance(row, TableRow))
    values = [row.values.get(column) for row in islice(rows, _NUM_PROBED_CAPTIONS)]
    values = [value for value in values if value not in (None, "", [])]
    return not values or any(_is_textual(value) for value in values)


def _is_textual(value: object, depth: int = 0) -> bool:
    if isinstance(value, list | tuple):
        return depth < MAX_DEPTH and any(_is_textual(item, depth + 1) for item in value)
    return isinstance(value, str | bytes | dict)


def _caption_message(name: str, matches: list[str], column_names: Sequence[str]) -> str:
    if not matches:
        return f"{name}: no caption column in {_join(column_names)}; set `caption_column`"
    alternatives = f"; set `caption_column` to use {', '.join(matches[1:])}" if matches[1:] else ""
    return f"{name}: caption column is {matches[0]!r}{alternatives}"


def _join(column_names: Sequence[str]) -> str:
    return ", ".join(filter(None, column_names))


def _match_image_columns(table: Table, column_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the best columns of images, those with a common name or else all, and those of paths."""
    with_images = [column for column in column_names if column in table.embedded_columns()]
    with_paths = [column for column in column_names if column not in table.embedded_columns()]
    return (
        _match_names(with_images, _IMAGE_COLUMN_NAMES) or with_images,
        _match_names(with_paths, _IMAGE_COLUMN_NAMES),
    )


def match_caption_columns(names: Sequence[str]) -> list[str]:
    """Return the names that are common for captions, in order of preference."""
    return _match_names(names, _CAPTION_COLUMN_NAMES)


def _match_names(column_names: Sequence[str], names: Sequence[str]) -> list[str]:
    by_casefold = {column.strip().casefold(): column for column in reversed(column_names)}
    # `Caption (English)` is a caption where no column has the name alone.
    without_note = {
        re.split(r"[(\[]", name, maxsplit=1)[0].rstrip() if name.endswith((")", "]")) else name: column
        for name, column in by_casefold.items()
    }
    by_casefold = without_note | by_casefold
    return [by_casefold[name] for name in names if name in by_casefold]
