"""Tables in Parquet files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import pyarrow as pa
import pyarrow.parquet as pq

from likewise.data.readers.base import SkippedSample
from likewise.data.readers.tables import FileTable, TableRow, contains_bytes, holds_images, rows_of_batch
from likewise.errors import InvalidInputError

_BATCH_SIZE = 64  # small, because rows may contain images


@final
@dataclass(frozen=True, kw_only=True)
class ParquetTable(FileTable):
    """A Parquet file."""

    schema: pa.Schema

    def column_names(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.schema.names)

    def embedded_columns(self) -> frozenset[str]:
        """Return the columns of bytes (see `contains_bytes`) of which the first ones are images."""
        return self._embedded_columns

    @cached_property
    def _embedded_columns(self) -> frozenset[str]:
        return frozenset(
            field.name
            for field in self.schema
            if contains_bytes(field.type) and holds_images(self._iter_values(field.name))
        )

    def _iter_values(self, column: str) -> Iterator[Any]:
        for row in self.iter_rows([column]):
            if isinstance(row, TableRow):
                yield row.values[column]

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the rows with the requested columns, read in small batches.

        Raises:
            InvalidInputError: if the file is damaged.
        """
        index = 0
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(
                batch_size=_BATCH_SIZE, columns=list(columns)
            ):
                for values in rows_of_batch(batch):
                    location = f"{self.name} row {index}"
                    if values is None:
                        yield SkippedSample(
                            id=f"{index:08d}", location=location, reason="row has an invalid value"
                        )
                    else:
                        yield TableRow(index, location, values)
                    index += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(
                f"{self.path} is damaged after row {index}: {' '.join(str(error).split())}", path=self.path
            ) from error


def open_parquet_table(path: Path) -> ParquetTable:
    """Open a Parquet file.

    Raises:
        InvalidInputError: if it is not a Parquet file, or has duplicate columns.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"{path} is not a Parquet file: {' '.join(str(error).split())}", path=path
        ) from error
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise InvalidInputError(f"{path}: duplicate column {name!r}", path=path)
    return ParquetTable(path=path, name=path.name, root=path.parent, schema=schema)
