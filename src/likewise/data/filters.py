"""Filters: which images and captions of a collection take no part. A table that people read and edit."""

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from likewise.artifacts import atomic_write
from likewise.data.dataset import CaptionDataset
from likewise.data.readers.base import SkippedSample
from likewise.data.readers.text import open_text_table
from likewise.errors import InvalidInputError

FILTER_COLUMNS = ("id", "caption", "reason")


@dataclass(frozen=True, kw_only=True)
class FilterRow:
    """One thing to leave out: a caption of an image by its text or, with an empty one, the whole image."""

    id: str
    caption: str
    reason: str


def write_filter(path: Path, rows: Iterable[FilterRow]) -> dict[str, int]:
    """Write a filter as CSV, whole or not at all, and return the number of rows by reason."""
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
    """What takes no part in pairs and training; nothing is deleted.

    Attributes:
        excluded_images: The images that are left out as a whole, (n,) bool.
        excluded_captions: By position of an image, the texts that are left out, white space evened.
        reason_counts: Number of rows by reason.
        key: 16 hexadecimal digits that change with what is left out, but not with reasons or order.
    """

    excluded_images: np.ndarray
    excluded_captions: dict[int, frozenset[str]] = field(repr=False)
    reason_counts: dict[str, int]
    key: str

    def excludes_caption(self, position: int, caption: str) -> bool:
        """Whether a caption of the image at a position is left out, by itself or with its image."""
        return bool(self.excluded_images[position]) or _collapse_whitespace(
            caption
        ) in self.excluded_captions.get(position, ())

    def caption_mask(self, dataset: CaptionDataset, shard: int) -> np.ndarray:
        """Return which captions of a shard stay, (rows,) bool, in the order of records and their captions.

        That is the order of the rows of the embeddings of the same shard.
        """
        offset = dataset.shard_offsets[shard]
        return np.array(
            [
                not self.excludes_caption(offset + row, caption)
                for row, captions in enumerate(dataset.read_columns(shard, ["captions"])["captions"])
                for caption in captions
            ],
            bool,
        )


def read_filter(path: Path, dataset: CaptionDataset) -> DatasetFilter:
    """Read the filter of a collection: CSV with the columns `id`, `caption` and `reason`.

    An empty caption leaves out the whole image, a text all captions of that image that read so. An image
    without captions left still takes part as one without a caption.

    Raises:
        InputError: where there is no such file, it is empty or no such table, tells of images or captions
            that the collection does not have, or leaves no image.
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
            _check_captions(sample_id, texts, columns["captions"][row])
            excluded_images[offset + row] = "" in texts
            if excluded_texts := frozenset(texts) - {""}:
                excluded_captions[offset + row] = excluded_texts
    if exclusions:
        sample_id, texts = next(iter(exclusions.items()))
        raise InvalidInputError(
            f"{path}: {len(exclusions):,} of its ids are not in {dataset.path}, the first is `{sample_id}` "
            f"({next(iter(texts.values()))}); is it the filter of another collection?"
        )
    if excluded_images.all():
        raise InvalidInputError(f"{path} leaves out every image of {dataset.path}; delete some of its rows")
    return DatasetFilter(
        excluded_images=excluded_images,
        excluded_captions=excluded_captions,
        reason_counts=reason_counts,
        key=key,
    )


def _read_rows(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    """Return by id the texts to leave out, each with the place where it stands, and the rows by reason."""
    if not path.is_file():
        raise InvalidInputError(f"there is no filter at {path}; `likewise audit COLLECTION` writes one")
    table = open_text_table(path)
    missing = [f"`{column}`" for column in FILTER_COLUMNS if column not in table.column_names()]
    if missing:
        raise InvalidInputError(
            f"{path} is no filter: it has no column {', '.join(missing)}; a filter is CSV with the columns "
            f"{', '.join(FILTER_COLUMNS)}, as `likewise audit` writes it"
        )
    exclusions: dict[str, dict[str, str]] = {}
    reason_counts: Counter[str] = Counter()
    for row in table.iter_rows(FILTER_COLUMNS):
        if isinstance(row, SkippedSample):
            raise InvalidInputError(f"{path}: {row.location}: {row.reason}; mend or delete the row")
        sample_id, text, reason = (str(row.values[column]) for column in FILTER_COLUMNS)
        exclusions.setdefault(sample_id, {}).setdefault(_collapse_whitespace(text), row.location)
        reason_counts[reason] += 1
    return exclusions, dict(sorted(reason_counts.items()))


def _check_captions(sample_id: str, texts: dict[str, str], captions: list[str]) -> None:
    valid_texts = {"", *map(_collapse_whitespace, captions)}
    for text, location in texts.items():
        if text not in valid_texts:
            raise InvalidInputError(
                f"{location}: image `{sample_id}` has no caption `{text[:80]}`; "
                "write the text as it stands in the collection, or delete the row"
            )


def _collapse_whitespace(text: str) -> str:
    """Return a text as a table holds it: single spaces, which editors of tables may change, and no NUL."""
    return " ".join(text.replace("\0", "").split())


def _filter_key(exclusions: dict[str, dict[str, str]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for pair in sorted((sample_id, text) for sample_id, texts in exclusions.items() for text in texts):
        digest.update("\0".join([*pair, ""]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
