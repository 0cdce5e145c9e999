"""Reader interface and column mapping."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from likewise.data.config import ImportOptions
from likewise.data.dataset import ImageRef
from likewise.data.readers.cells import cell_text, cell_texts, equals_text
from likewise.data.readers.files import IgnoredFiles
from likewise.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """A sample of the source before validation."""

    id: str
    image: ImageRef
    captions: tuple[str, ...]
    group: str | None
    label: str | None
    location: str
    """File and row, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedSample:
    """An entry of the source that is not imported."""

    id: str
    location: str
    """File and row, for messages."""
    reason: str
    """Short phrase; skipped entries are counted by it."""
    num_captions: int = 0
    """Captions that are skipped with the entry, as far as they were read."""


Entry = RawSample | SkippedSample


@dataclass(frozen=True, kw_only=True)
class Reader(ABC):
    """Reader of captioned images in one format."""

    root: Path
    """Absolute folder that image paths are relative to."""
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles, compare=False, kw_only=True)
    """Files that are no candidates for samples; complete after `iter_samples`."""
    counts: Counter[str] = field(default_factory=Counter, compare=False, kw_only=True)
    """Counts for the manifest besides those of samples; complete after `iter_samples`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change if anything in the source changes.

        They depend on names and content only: a copied or touched source keeps them.
        """

    @abstractmethod
    def count(self) -> int:
        """Return the approximate number of samples, from metadata alone."""

    @abstractmethod
    def iter_samples(self) -> Iterator[Entry]:
        """Yield the samples and the skipped entries of the source in a deterministic order."""

    @abstractmethod
    def inferred_settings(self) -> list[str]:
        """Return messages on the columns and folders that were inferred."""


@dataclass(frozen=True, kw_only=True)
class ColumnMapping:
    """Mapping of the fields of a sample to columns of a table or keys of a sidecar file."""

    image: str | None = None
    """Column of images; None if images are found without a table."""
    captions: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    id: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    """Conditions as pairs of column and value."""

    def required_columns(self) -> list[str]:
        """Return the distinct columns that are read, in a fixed order."""
        names = [
            self.image,
            *self.captions,
            self.label,
            self.group,
            self.id,
            *(name for name, _ in self.where),
        ]
        return list(dict.fromkeys(name for name in names if name is not None))

    def matches(self, values: Mapping[str, Any]) -> bool:
        """Return whether a row matches all conditions (see `equals_text`).

        Raises:
            ValueError: if the value of a condition is not text.
        """
        return all(equals_text(values.get(name), expected) for name, expected in self.where)

    def build_sample(
        self,
        values: Mapping[str, Any],
        image: ImageRef,
        default_id: str,
        location: str,
        default_group: str | None = None,
    ) -> Entry:
        """Build the sample of a row.

        Args:
            values: Values of the row by column.
            image: Location of the image.
            default_id: Id if there is no id column or its value is empty.
            location: File and row, for messages.
            default_group: Group if there is no group column.

        Returns:
            The sample, or a skipped sample if a value is not text.
        """
        fields = {}
        for field_name in ("label", "group", "id"):
            column = getattr(self, field_name)
            try:
                fields[field_name] = None if column is None else cell_text(values.get(column))
            except ValueError:
                return SkippedSample(id=default_id, location=location, reason=f"column {column} is not text")
        try:
            captions = tuple(text for column in self.captions for text in cell_texts(values.get(column)))
        except ValueError:
            return SkippedSample(id=default_id, location=location, reason="caption is not text")
        return RawSample(
            id=fields["id"] if fields["id"] is not None else default_id,
            image=image,
            captions=captions,
            group=fields["group"] if self.group is not None else default_group,
            label=fields["label"],
            location=location,
        )


def parse_where(options: ImportOptions) -> tuple[tuple[str, str], ...]:
    """Parse the conditions `COLUMN=VALUE` into pairs.

    Raises:
        InvalidInputError: if a condition lacks a column or an equals sign.
    """
    conditions = []
    for condition in options.where:
        name, separator, value = condition.partition("=")
        if not (name and separator):
            raise InvalidInputError(
                f"`where` must have the form COLUMN=VALUE, such as split=train, got {condition}",
                field="where",
            )
        conditions.append((name, value))
    return tuple(conditions)


def reject_table_options(
    options: ImportOptions, reason: str, fields: Sequence[str] = ("image_column", "images")
) -> None:
    """Check that no option is set that applies to tables only.

    Raises:
        InvalidInputError: if one of `fields` is set.
    """
    for name in fields:
        if getattr(options, name) is not None:
            raise InvalidInputError(f"`{name}` does not apply: {reason}", field=name)


_MIN_MERGE_SIZE = 2**15
# At most 1/64 of the values are in the Python set: additions take amortized constant time, and the set stays
# small in memory.
_MERGE_DIVISOR = 64


class UInt64Set:
    """A set of unsigned 64-bit integers that takes about 8 bytes per value; `set[int]` takes about 90."""

    def __init__(self) -> None:
        """Create an empty set."""
        self._sorted = np.empty(0, np.uint64)  # ascending
        self._recent: set[int] = set()

    def add(self, value: int) -> bool:
        """Add a value and return whether it is new."""
        if value in self._recent or self._in_sorted(value):
            return False
        self._recent.add(value)
        if len(self._recent) >= max(_MIN_MERGE_SIZE, len(self._sorted) // _MERGE_DIVISOR):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._recent.clear()
            # A stable sort merges two ascending runs in one pass.
            recent.sort()
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort(kind="stable")
        return True

    def _in_sorted(self, value: int) -> bool:
        index = int(self._sorted.searchsorted(np.uint64(value)))
        return index < len(self._sorted) and int(self._sorted[index]) == value
