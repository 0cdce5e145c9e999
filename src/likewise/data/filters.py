"""Dataset filters: CSV files of the images and captions to exclude from pairs and training."""

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from likewise.artifacts import atomic_write
from likewise.data.dataset import CaptionDataset
from likewise.data.readers.base import SkippedSample
from likewise.data.readers.cells import cell_texts
from likewise.data.readers.formats import open_table_file
from likewise.errors import InvalidInputError

FILTER_COLUMNS = ("id", "caption", "reason")


@dataclass(frozen=True, kw_only=True)
class FilterRow:
    """One exclusion: a caption of an image or, if `caption` is empty, the whole image."""

    id: str
    caption: str
    reason: str


def write_filter(path: Path, rows: Iterable[FilterRow]) -> dict[str, int]:
    """Write a filter as CSV atomically and return the number of rows by reason."""
    reason_counts: Counter[str] = Counter()
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(FILTER_COLUMNS)
        for row in rows:
            writer.writerow([row.id, _collapse_whitespace(row.caption), row.reason])
            reason_counts[row.reason] += 1
    return dict(sorted(reason_counts.items()))


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetFilter:
    """Images and captions to exclude from pairs and training."""

    excluded_images: np.ndarray
    """Mask of the images that are excluded as a whole, (n,) bool."""
    excluded_captions: dict[int, frozenset[str]] = field(repr=False)
    """Excluded captions by image index, with collapsed whitespace."""
    reason_counts: dict[str, int]
    """Number of rows by reason."""
    key: str
    """Hash of the exclusions, 16 hexadecimal digits, independent of reasons and order."""

    def excludes_caption(self, index: int, caption: str) -> bool:
        """Return whether a caption of an image is excluded, by itself or with its image."""
        if self.excluded_images[index]:
            return True
        return _collapse_whitespace(caption) in self.excluded_captions.get(index, ())


@dataclass(frozen=True, eq=False)
class DatasetView:
    """A dataset and the part of it that takes part in pairs and training: opened once, then passed on.

    Attributes:
        dataset: The dataset.
        filter: What is excluded; None for nothing.
    """

    dataset: CaptionDataset
    filter: DatasetFilter | None = None

    @cached_property
    def image_mask(self) -> np.ndarray:
        """The images that take part, (n,) bool."""
        if self.filter is None:
            return np.ones(len(self.dataset), bool)
        return ~self.filter.excluded_images

    @cached_property
    def caption_mask(self) -> np.ndarray | None:
        """The captions that take part, (num_captions,) bool in the order of the embeddings; None for all."""
        if self.filter is None:
            return None
        return np.array(
            [
                not self.filter.excludes_caption(position, caption)
                for shard, offset in enumerate(self.dataset.shard_offsets[:-1])
                for position, captions in enumerate(
                    self.dataset.read_columns(shard, ["captions"])["captions"], offset
                )
                for caption in captions
            ],
            bool,
        )

    def excludes_caption(self, position: int, caption: str) -> bool:
        """Return whether a caption of the image at a position is excluded, by itself or with its image."""
        return self.filter is not None and self.filter.excludes_caption(position, caption)


def open_view(dataset: CaptionDataset, filter: Path | None = None) -> DatasetView:  # noqa: A002
    """Open the view of a dataset that a filter file leaves, or of the whole dataset.

    Raises:
        InvalidInputError: if the filter file does not fit the dataset (see `read_filter`).
    """
    return DatasetView(dataset, None if filter is None else read_filter(filter, dataset))


def read_filter(path: Path, dataset: CaptionDataset) -> DatasetFilter:
    """Read a filter: CSV with the columns `id`, `caption` and `reason`.

    An empty caption excludes the image, another one all equal captions of the image. An image without
    remaining captions is treated as an image without captions.

    Raises:
        InvalidInputError: if the file is missing or is not a filter, refers to images or captions that are
            not in the dataset, or excludes all images.
    """
    exclusions, reason_counts = _read_rows(path)
    key = _filter_key(exclusions)
    excluded_images = np.zeros(len(dataset), bool)
    excluded_captions: dict[int, frozenset[str]] = {}
    for shard, offset in enumerate(dataset.shard_offsets[:-1]):
        columns = dataset.read_columns(shard, ["id", "captions"])
        for row, sample_id in enumerate(columns["id"]):
            texts = exclusions.pop(sample_id, None)
            if texts is None:
                continue
            _check_captions(path, sample_id, texts, columns["captions"][row])
            excluded_images[offset + row] = "" in texts
            if excluded_texts := frozenset(texts) - {""}:
                excluded_captions[offset + row] = excluded_texts
    if exclusions:
        sample_id, texts = next(iter(exclusions.items()))
        raise InvalidInputError(
            f"{path}: {len(exclusions):,} ids are not in {dataset.path}, the first one is {sample_id!r} "
            f"({next(iter(texts.values()))}); is this the filter of another dataset?",
            path=path,
        )
    if excluded_images.all():
        raise InvalidInputError(f"{path} excludes all images of {dataset.path}", path=path)
    return DatasetFilter(
        excluded_images=excluded_images,
        excluded_captions=excluded_captions,
        reason_counts=reason_counts,
        key=key,
    )


def _read_rows(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    """Return the excluded captions by id with their locations in the file, and row counts by reason."""
    if not path.is_file():
        raise InvalidInputError(
            f"there is no filter at {path}; an audit of the dataset writes one", path=path
        )
    table = open_table_file(path)
    missing = [repr(column) for column in FILTER_COLUMNS if column not in table.all_column_names]
    if missing:
        raise InvalidInputError(
            f"{path} is not a filter: it has no column {', '.join(missing)}; a filter is a CSV file with the "
            f"columns {', '.join(FILTER_COLUMNS)}",
            path=path,
        )
    exclusions: dict[str, dict[str, str]] = {}
    reason_counts: Counter[str] = Counter()
    for row in table.iter_rows(FILTER_COLUMNS):
        if isinstance(row, SkippedSample):
            raise InvalidInputError(
                f"{path}: {row.location}: {row.reason}; correct or delete the row", path=path
            )
        try:
            sample_id, text, reason = (
                ", ".join(cell_texts(row.values.get(column))) for column in FILTER_COLUMNS
            )
        except ValueError as error:
            raise InvalidInputError(
                f"{path}: {row.location}: a cell is not text; correct or delete the row", path=path
            ) from error
        exclusions.setdefault(sample_id, {}).setdefault(_collapse_whitespace(text), row.location)
        reason_counts[reason] += 1
    return exclusions, dict(sorted(reason_counts.items()))


def _check_captions(path: Path, sample_id: str, texts: dict[str, str], captions: list[str]) -> None:
    valid_texts = {"", *map(_collapse_whitespace, captions)}
    for text, location in texts.items():
        if text not in valid_texts:
            raise InvalidInputError(
                f"{location}: image {sample_id!r} has no caption {text[:80]!r}; correct or delete the row",
                path=path,
            )


def _collapse_whitespace(text: str) -> str:
    """Normalize whitespace, which spreadsheet editors may change, and remove NUL characters."""
    return " ".join(text.replace("\0", "").split())


def _filter_key(exclusions: dict[str, dict[str, str]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for pair in sorted((sample_id, text) for sample_id, texts in exclusions.items() for text in texts):
        digest.update("\0".join([*pair, ""]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
