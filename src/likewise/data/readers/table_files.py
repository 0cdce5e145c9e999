"""Open the table in a file of any supported format."""

from pathlib import Path

from likewise.data.readers.encodings import decode_text, read_head
from likewise.data.readers.json_tables import LINES_SUFFIXES, open_json_table
from likewise.data.readers.parquet import open_parquet_table
from likewise.data.readers.tables import Table
from likewise.data.readers.text import open_text_table

TEXT_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".token", ".tab"})
JSON_SUFFIXES = LINES_SUFFIXES | {".json"}
PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
TABLE_SUFFIXES = TEXT_SUFFIXES | JSON_SUFFIXES | PARQUET_SUFFIXES
_PARQUET_MAGIC = b"PAR1"


def open_table_file(path: Path) -> Table:
    """Open a table: CSV and other delimited text, JSON, COCO captions, a Flickr token file, or Parquet.

    The format is that of the suffix; files with another suffix are opened by their content.

    Raises:
        InvalidInputError: if the file cannot be read or is not a table.
    """
    suffix = path.suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        return open_parquet_table(path)
    if suffix in JSON_SUFFIXES:
        return open_json_table(path)
    if suffix in TEXT_SUFFIXES:
        return open_text_table(path)
    head = read_head(path, 64)
    if head.startswith(_PARQUET_MAGIC):
        return open_parquet_table(path)
    return open_json_table(path) if _starts_as_json(head) else open_text_table(path)


def _starts_as_json(head: bytes) -> bool:
    try:
        return decode_text(head).lstrip().startswith(("{", "["))
    except UnicodeDecodeError:
        return head.lstrip().startswith((b"{", b"["))
