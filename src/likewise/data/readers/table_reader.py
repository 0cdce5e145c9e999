"""Readers of tables with one or several rows per image, and of several tables in subfolders."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final

from likewise.data.dataset import ImageRef
from likewise.data.readers.base import (
    ColumnMapping,
    Entry,
    ImportOptions,
    RawSample,
    Reader,
    SkippedSample,
    UInt64Set,
)
from likewise.data.readers.cells import MISSING_VALUE_WORDS, cell_texts
from likewise.data.readers.columns import find_root, infer_columns, row_matches
from likewise.data.readers.files import resolve_image_path
from likewise.data.readers.tables import Table, TableRow, cell_image
from likewise.errors import InvalidInputError
from likewise.hashing import hash_files, hash_strings

_MAX_LISTED_VALUES = 8
logger = logging.getLogger(__name__)


@dataclass
class _TableScan:
    """Counts of one pass over a table."""

    count: int = 0
    is_scattered: bool = False
    """Whether rows of a sample are separated by rows of others."""
    files_fingerprint: str = ""
    path_changes: Counter[str] = field(default_factory=Counter)
    """Number of image paths by how the path of the file differs from that of the table."""
    missing_words: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of cells by column and word that may stand for a missing value."""
    examples: dict[str, str] = field(default_factory=dict)

    def messages(self, name: str) -> list[str]:
        """Return messages on the counts that a user should know."""
        return [
            *(
                f"{name}: {count:,} image paths are written with {change}, such as {self.examples[change]}"
                for change, count in self.path_changes.items()
            ),
            *(
                f"{name}: {count:,} cells of column {column!r} are the text {word!r}; it is used as text, "
                "and only empty cells are missing values"
                for (column, word), count in self.missing_words.items()
            ),
        ]


@final
@dataclass(frozen=True, kw_only=True)
class TableReader(Reader):
    """Reader of the images of a table.

    Rows with the same image file and, if the user named an id column, the same id form one sample with the
    captions of all rows. Other ids of the same file are other samples. A row whose label or group differs
    from that of an earlier row of the sample is skipped.
    """

    table: Table
    columns: ColumnMapping
    merges_ids: bool = False
    """Whether rows of the same file are merged even if their ids differ; the first id is used."""
    notes: tuple[str, ...] = ()

    def inferred_settings(self) -> list[str]:
        """Return messages on the inferred columns, folders and formats."""
        return [*self.notes, *self._scan.messages(self.table.name)]

    def count(self) -> int:
        """Return the number of distinct samples in the rows that match the conditions."""
        return self._scan.count

    def fingerprint(self) -> str:
        """Hash the content of the table and of the image files."""
        return hash_strings([self.table.fingerprint(), self._scan.files_fingerprint])

    def iter_samples(self) -> Iterator[Entry]:
        """Yield the samples; the captions of rows that belong together are merged."""
        if self._is_embedded:
            return self._iter_entries()
        # Only tables with scattered rows are read into memory.
        return self._merge_scattered() if self._scan.is_scattered else self._merge_adjacent()

    def _iter_entries(self) -> Iterator[Entry]:
        self.counts.clear()
        for row in self.table.iter_rows(self.columns.required_columns()):
            self.counts["rows"] += 1
            if isinstance(row, SkippedSample):
                yield row
                continue
            try:
                if self.columns.matches(row.values):
                    yield self._make_entry(row)
                else:
                    self.counts["rows_excluded_by_where"] += 1
            except ValueError:
                yield SkippedSample(
                    id=f"{row.index:08d}",
                    location=row.location,
                    reason="value of a `where` column is not text",
                )

    def _make_entry(self, row: TableRow) -> Entry:
        cell = row.values.get(self.columns.image or "")
        image = cell_image(cell, is_embedded=self._is_embedded)
        # Embedded images often share a placeholder path; use the row index as the id.
        default_id = (
            f"{row.index:08d}" if image is None or self._is_embedded or image.path is None else image.path
        )
        if image is None:
            reason = "row has several images" if isinstance(cell, list) and cell else "row has no image"
            return SkippedSample(id=default_id, location=row.location, reason=reason)
        if image.path is not None:
            image = ImageRef(path=resolve_image_path(self.root, image.path)[0])
        return self.columns.build_sample(row.values, image, default_id, row.location)

    def _merge_key(self, path: str, sample_id: str | None) -> str:
        file = os.path.normpath(os.path.join(self.root, path))  # noqa: PTH118  # creating a Path per row is slow
        is_distinguished = self.columns.id is not None and not self.merges_ids
        return f"{file}\0{sample_id}" if is_distinguished else file

    def _merge_adjacent(self) -> Iterator[Entry]:
        """Merge adjacent rows of a sample, with one sample in memory at a time."""
        current: RawSample | None = None
        current_key = None
        for entry in self._iter_entries():
            if isinstance(entry, SkippedSample):
                yield entry
                continue
            key = None if entry.image.path is None else self._merge_key(entry.image.path, entry.id)
            if current is not None and key is not None and key == current_key:
                merged = _merge(current, entry)
                if isinstance(merged, SkippedSample):
                    yield merged
                else:
                    current = merged
                continue
            if current is not None:
                yield current
            current, current_key = entry, key
        if current is not None:
            yield current

    def _merge_scattered(self) -> Iterator[Entry]:
        """Merge all rows of a sample, with all samples in memory."""
        first_entries: dict[str, RawSample] = {}
        captions: dict[str, list[str]] = {}
        for entry in self._iter_entries():
            if isinstance(entry, SkippedSample) or entry.image.path is None:
                yield entry
                continue
            key = self._merge_key(entry.image.path, entry.id)
            # The captions are in lists of their own, because adding to tuples takes quadratic time.
            bare = replace(entry, captions=())
            merged = _merge(first_entries[key], bare) if key in first_entries else bare
            if isinstance(merged, SkippedSample):
                yield merged
            else:
                first_entries[key] = merged
                captions.setdefault(key, []).extend(entry.captions)
        for key, entry in first_entries.items():
            yield replace(entry, captions=tuple(captions.pop(key)))

    @property
    def _is_embedded(self) -> bool:
        return self.columns.image in self.table.embedded_columns()

    @cached_property
    def _scan(self) -> _TableScan:
        """Scan the table without image bytes: count samples, detect scattered rows, fingerprint files.

        Raises:
            InvalidInputError: if there are no rows, or none matches the conditions.
        """
        scan = _TableScan()
        scan.files_fingerprint = hash_files(self.root, self._scan_files(scan))
        return scan

    def _scan_files(self, scan: _TableScan) -> Iterator[str]:
        """Yield the path of each sample once, and fill in the counts."""
        seen_keys, last_key = UInt64Set(), None
        for row in self._iter_matching_rows():
            self._count_missing_words(row, scan)
            image = None if self._is_embedded else cell_image(row.values.get(self.columns.image or ""))
            if image is None or image.path is None:
                scan.count += 1
                continue
            path, _, change = resolve_image_path(self.root, image.path)
            if change is not None:
                scan.path_changes[change] += 1
                scan.examples.setdefault(change, image.path)
            key = self._merge_key(path, self._row_id(row) or image.path)
            if key == last_key:
                continue
            last_key = key
            if not seen_keys.add(hash(key) % 2**64):
                scan.is_scattered = True
                continue
            scan.count += 1
            yield path

    def _row_id(self, row: TableRow) -> str | None:
        try:
            return None if self.columns.id is None else row.text(self.columns.id)
        except ValueError:
            return None

    def _count_missing_words(self, row: TableRow, scan: _TableScan) -> None:
        for column in (*self.columns.captions, self.columns.label, self.columns.group, self.columns.id):
            value = None if column is None else row.values.get(column)
            if isinstance(value, str) and value.strip() in MISSING_VALUE_WORDS:
                scan.missing_words[str(column), value.strip()] += 1

    def _iter_matching_rows(self) -> Iterator[TableRow]:
        """Yield the rows that match the conditions, without embedded images.

        Raises:
            InvalidInputError: if there are no rows, or none matches.
        """
        num_rows = num_matching = 0
        other_values: Counter[str] = Counter()
        for row in self.table.iter_rows(
            [name for name in self.columns.required_columns() if name not in self.table.embedded_columns()]
        ):
            num_rows += 1
            if isinstance(row, TableRow) and row_matches(self.columns, row):
                num_matching += 1
                yield row
            elif isinstance(row, TableRow) and len(other_values) < _MAX_LISTED_VALUES:
                other_values.update(_condition_values(self.columns, row))
        if not num_rows:
            raise InvalidInputError(f"{self.table.name} has no rows", path=self.root)
        if not num_matching and other_values:
            conditions = " and ".join(f"{name}={value}" for name, value in self.columns.where)
            raise InvalidInputError(
                f"{self.table.name} has no row with {conditions}; it has {', '.join(other_values)}",
                field="where",
            )


def _merge(sample: RawSample, row: RawSample) -> RawSample | SkippedSample:
    """Add a row to the sample of its image; a skipped sample if its label or group is another one."""
    fields: dict[str, Any] = {}
    for name in ("label", "group"):
        first, second = getattr(sample, name), getattr(row, name)
        if first is not None and second is not None and first != second:
            reason = f"{name} differs from that of an earlier row of the image"
            return SkippedSample(id=row.id, location=row.location, reason=reason)
        fields[name] = second if first is None else first
    return replace(sample, captions=sample.captions + row.captions, **fields)


def _condition_values(columns: ColumnMapping, row: TableRow) -> list[str]:
    try:
        return [f"{name}={text}" for name, _ in columns.where for text in cell_texts(row.values.get(name))]
    except ValueError:
        return []


def open_table(table: Table, options: ImportOptions) -> TableReader:
    """Return the reader of a table, inferring its columns and its image folder.

    Raises:
        InvalidInputError: if a column or the folder `images` does not exist, or several columns or folders
            may be those of the images.
    """
    if options.images is not None and not options.images.is_dir():
        raise InvalidInputError(
            f"`images`: the folder {options.images} does not exist", field="images", path=options.images
        )
    columns, messages = infer_columns(table, options)
    if columns.image in table.embedded_columns():
        root = options.images if options.images is not None else table.root
    else:
        root, _ = find_root(table, columns, options.images)
        if options.images is None and root.resolve() != table.root.resolve():
            messages.append(f"{table.name}: image folder is {root}")
    return TableReader(
        table=table,
        columns=columns,
        merges_ids=options.id_column is None,
        root=root.resolve(),
        notes=(*messages, *table.messages()),
    )


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
        self.counts.clear()
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
            self.counts.update(reader.counts)

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
