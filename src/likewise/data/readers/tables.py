"""Interface of tables: rows of values by column, in any format."""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from likewise.data.dataset import ImageRef
from likewise.data.image_formats import SIGNATURE_BYTES, has_image_signature, pillow_formats, quiet_libraries
from likewise.data.readers.base import SkippedSample
from likewise.data.readers.cells import cell_text
from likewise.hashing import content_fingerprint

_WHOLE_TABLE_BYTES = 2**30  # up to which a table is hashed completely: a word may change in its middle
_NUM_PROBED_IMAGES = 5  # values that decide whether a column of bytes holds images


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table."""

    index: int
    location: str
    """File and line, for messages."""
    values: dict[str, Any]
    """Values by column; those of text files keep surrounding whitespace."""

    def text(self, column: str) -> str | None:
        """Return the text of a cell without surrounding whitespace, or None if it is absent or blank.

        Raises:
            ValueError: if the cell is not text (see `cell_texts`).
        """
        return cell_text(self.values.get(column))


@dataclass(frozen=True, kw_only=True)
class Table(ABC):
    """A table in one format."""

    name: str
    """Name for messages."""
    root: Path
    """Folder that image paths are relative to by default."""

    @abstractmethod
    def column_names(self) -> list[str]:
        """Return the names of the columns; of the first rows only, where rows may differ."""

    @property
    def all_column_names(self) -> list[str]:
        """Names of the columns of all rows."""
        return self.column_names()

    @property
    def default_id_column(self) -> str | None:
        """Column of ids that the format defines, if it does."""
        return None

    def embedded_columns(self) -> frozenset[str]:
        """Return the columns of images instead of paths; none by default."""
        return frozenset()

    def messages(self) -> list[str]:
        """Return messages on the format that was inferred from the content; none by default."""
        return []

    @abstractmethod
    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield all rows; they contain at least the requested columns that they have a value of."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return the fingerprint of the table."""


@dataclass(frozen=True, kw_only=True)
class FileTable(Table):
    """A table in one file."""

    path: Path

    def fingerprint(self) -> str:
        """Return the fingerprint of the content of the file."""
        return content_fingerprint(self.path, _WHOLE_TABLE_BYTES)


def cell_image(cell: Any, *, is_embedded: bool = False) -> ImageRef | None:
    """Return the image in a cell: a path, bytes, a mapping of both as in Hugging Face datasets, or None.

    Args:
        cell: The value; a list must have one item.
        is_embedded: Whether the column holds images. In other columns, bytes in UTF-8 are paths.
    """
    while isinstance(cell, list | tuple | dict):  # without recursion: JSON may be nested deeply
        if isinstance(cell, list | tuple):
            cell = cell[0] if len(cell) == 1 else None
        elif isinstance(cell.get("bytes"), bytes):
            return ImageRef(bytes=cell["bytes"])
        else:
            cell, is_embedded = cell.get("path"), False
    if isinstance(cell, bytes):
        path = None if is_embedded else _decode_path(cell)
        return ImageRef(bytes=cell) if path is None else cell_image(path)
    path = cell.strip() if isinstance(cell, str) else ""
    return ImageRef(path=path) if path else None


def _decode_path(cell: bytes) -> str | None:
    try:
        path = cell.decode()
    except UnicodeDecodeError:
        return None
    return path if path.isprintable() else None


def contains_bytes(data_type: pa.DataType) -> bool:
    """Return whether cells are bytes, have a field `bytes`, or are lists or dictionary entries of these."""
    if pa.types.is_dictionary(data_type):
        return contains_bytes(data_type.value_type)
    if pa.types.is_list(data_type) or pa.types.is_large_list(data_type):
        return contains_bytes(data_type.value_type)
    if pa.types.is_struct(data_type):
        index = data_type.get_field_index("bytes")
        return index >= 0 and contains_bytes(data_type.field(index).type)
    return (
        pa.types.is_binary(data_type)
        or pa.types.is_large_binary(data_type)
        or pa.types.is_fixed_size_binary(data_type)
    )


def holds_images(cells: Iterable[Any]) -> bool:
    """Return whether any of the first bytes in the cells of a column are an image in a known format."""
    images = (cell_image(cell, is_embedded=True) for cell in cells)
    values = (image.bytes for image in images if image is not None and image.bytes is not None)
    return any(_is_image(value) for value in islice(values, _NUM_PROBED_IMAGES))


def _is_image(data: bytes) -> bool:
    if has_image_signature(data[:SIGNATURE_BYTES]):  # also of formats that an extra decodes
        return True
    try:
        with quiet_libraries():
            Image.open(io.BytesIO(data), formats=pillow_formats()).close()
    except UnidentifiedImageError:
        return False
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True  # the format is known, but the image is damaged or too large
    return True


def rows_of_batch(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any] | None]:
    """Return the rows of an Arrow batch as Python values; None for a row that cannot be converted."""
    if not batch.num_columns:
        return [{}] * batch.num_rows
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        if batch.num_rows == 1:
            return [None]
        return [row for i in range(batch.num_rows) for row in rows_of_batch(batch.slice(i, 1))]
