"""Reader of several tables in subfolders, such as `train/metadata.jsonl` and `test/metadata.jsonl`."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

from likewise.data.readers.base import Entry, Reader, SkippedSample
from likewise.data.readers.table_reader import TableReader
from likewise.errors import InvalidInputError
from likewise.hashing import hash_strings

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, kw_only=True)
class ChainedReader(Reader):
    """Reader of tables one after the other; image paths and ids start with the folder of the table."""

    readers: tuple[TableReader, ...]
    names: tuple[str, ...]
    """Paths of the tables relative to the root."""

    def inferred_settings(self) -> list[str]:
        """Return the messages of all tables with matching rows, each once."""
        messages = [message for _, reader in self._matching for message in reader.inferred_settings()]
        return [f"{self.root.name}: reading table {', '.join(self.names)}", *dict.fromkeys(messages)]

    def count(self) -> int:
        """Return the number of images of all tables."""
        return sum(reader.count() for _, reader in self._matching)

    def fingerprint(self) -> str:
        """Hash the names and fingerprints of the tables."""
        return hash_strings(part for name, reader in self._matching for part in (name, reader.fingerprint()))

    def iter_samples(self) -> Iterator[Entry]:
        """Yield the samples of all tables."""
        for name, error in self._errors.items():
            if error.field != "where":
                yield SkippedSample(id=name, location=name, reason="table cannot be read")
        for name, reader in self._matching:
            prefix = os.path.relpath(reader.root, self.root)
            table_stem = os.path.splitext(name)[0]  # noqa: PTH122
            for entry in reader.iter_samples():
                location = entry.location.replace(reader.table.name, name, 1)
                if isinstance(entry, SkippedSample):
                    yield replace(entry, id=f"{table_stem}/{entry.id}", location=location)
                    continue
                path = entry.image.path
                image = entry.image
                if path is not None and image.bytes is None:
                    image = replace(image, path=os.path.normpath(os.path.join(prefix, path)))  # noqa: PTH118
                # Ids of a table are its own image paths or row numbers, unless a column has them.
                default_id = image.path if path == entry.id and image.path else f"{table_stem}/{entry.id}"
                sample_id = entry.id if reader.columns.id is not None else default_id
                yield replace(entry, id=sample_id, image=image, location=location)

    @cached_property
    def _matching(self) -> list[tuple[str, TableReader]]:
        """The tables with rows that match `where`.

        Raises:
            InvalidInputError: if no table has such a row.
        """
        matching = [
            (name, reader)
            for name, reader in zip(self.names, self.readers, strict=True)
            if name not in self._errors
        ]
        if not matching:
            first, *_ = self._errors.values()
            messages = dict.fromkeys(map(str, self._errors.values()))
            raise InvalidInputError("; ".join(messages), field=first.field, path=first.path)
        return matching

    @cached_property
    def _errors(self) -> dict[str, InvalidInputError]:
        """The errors of tables without a row that matches `where`, and of tables that cannot be read."""
        errors = {}
        for name, reader in zip(self.names, self.readers, strict=True):
            try:
                reader.count()
            except InvalidInputError as error:
                errors[name] = error
                if error.field != "where":
                    logger.warning("skipped a table: %s", error)
        return errors
