"""Parquet tables, with paths of images or the images themselves inside."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import pyarrow as pa
import pyarrow.parquet as pq

from likewise.collection.sources.candidates import file_digest
from likewise.collection.sources.tables import Row, Table
from likewise.errors import InputError

_BATCH = 64  # rows held at a time: images may lie in them


@final
@dataclass(frozen=True, kw_only=True)
class ParquetTable(Table):
    """A Parquet file."""

    path: Path
    schema: pa.Schema

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.schema.names)

    def embedded(self) -> frozenset[str]:
        """Return the columns of bytes, or of mappings with `bytes` in them as `datasets` writes them."""
        return frozenset(field.name for field in self.schema if _holds_bytes(field.type))

    def digest(self) -> str:
        """Return the file's fingerprint."""
        return file_digest(self.path)

    def rows(self, wanted: Sequence[str]) -> Iterator[Row]:
        """Yield the rows with the wanted columns, few at a time.

        Raises:
            InputError: where the file is damaged.
        """
        number = 0
        try:
            for batch in pq.ParquetFile(self.path).iter_batches(batch_size=_BATCH, columns=list(wanted)):
                for values in batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows:
                    yield Row(number, f"{self.name} row {number}", values)
                    number += 1
        except (pa.ArrowException, OSError) as fault:
            raise InputError(
                f"{self.path} is damaged after row {number}: {' '.join(str(fault).split())}"
            ) from fault


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def open_parquet(path: Path) -> ParquetTable:
    """Return the table in a Parquet file.

    Raises:
        InputError: where the file is no Parquet.
    """
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as fault:
        raise InputError(f"{path} is no Parquet file: {' '.join(str(fault).split())}") from fault
    return ParquetTable(path=path, name=path.name, folder=path.parent, schema=schema)
