"""Filters: which images and captions of a collection take no part. A table that people read and edit."""

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from likewise.artifacts import atomic
from likewise.data.dataset import Collection
from likewise.data.readers.base import Fault
from likewise.data.readers.text import open_text
from likewise.errors import InputError

COLUMNS = ("id", "caption", "reason")


@dataclass(frozen=True, kw_only=True)
class FilterRow:
    """One thing to leave out: a caption of an image by its text or, with an empty one, the whole image."""

    id: str
    caption: str
    reason: str


def write_filter(path: Path, rows: Iterable[FilterRow]) -> dict[str, int]:
    """Write a filter as CSV, whole or not at all, and return the number of rows by reason."""
    counts: Counter[str] = Counter()
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([row.id, _even(row.caption), row.reason])
            counts[row.reason] += 1
    return dict(sorted(counts.items()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Filter:
    """What takes no part in pairs and training; nothing is deleted.

    Attributes:
        images: The images that are left out as a whole, (n,) bool.
        captions: By position of an image, the texts that are left out, white space evened.
        reasons: Number of rows by reason.
        key: 16 hexadecimal digits that change with what is left out, but not with reasons or order.
    """

    images: np.ndarray
    captions: dict[int, frozenset[str]] = field(repr=False)
    reasons: dict[str, int]
    key: str

    def drops_caption(self, position: int, caption: str) -> bool:
        """Whether a caption of the image at a position is left out, by itself or with its image."""
        return bool(self.images[position]) or _even(caption) in self.captions.get(position, ())

    def caption_rows(self, collection: Collection, shard: int) -> np.ndarray:
        """Return which captions of a shard stay, (rows,) bool, in the order of records and their captions.

        That is the order of the rows of the embeddings of the same shard.
        """
        first = collection.starts[shard]
        return np.array(
            [
                not self.drops_caption(first + row, caption)
                for row, captions in enumerate(collection.columns(shard, ["captions"])["captions"])
                for caption in captions
            ],
            bool,
        )


def read_filter(path: Path, collection: Collection) -> Filter:
    """Read the filter of a collection: CSV with the columns `id`, `caption` and `reason`.

    An empty caption leaves out the whole image, a text all captions of that image that read so. An image
    without captions left still takes part as one without a caption.

    Raises:
        InputError: where there is no such file, it is empty or no such table, tells of images or captions
            that the collection does not have, or leaves no image.
    """
    wanted, reasons = _read_rows(path)
    key = _key(wanted)
    images = np.zeros(len(collection), bool)
    captions: dict[int, frozenset[str]] = {}
    for shard, first in enumerate(collection.starts[:-1]):
        columns = collection.columns(shard, ["id", "captions"])
        for row, identifier in enumerate(columns["id"]):
            told = wanted.pop(identifier, None)
            if told is None:
                continue
            _check_texts(identifier, told, columns["captions"][row])
            images[first + row] = "" in told
            if texts := frozenset(told) - {""}:
                captions[first + row] = texts
    if wanted:
        identifier, told = next(iter(wanted.items()))
        raise InputError(
            f"{path}: {len(wanted):,} of its ids are not in {collection.path}, the first is `{identifier}` "
            f"({next(iter(told.values()))}); is it the filter of another collection?"
        )
    if images.all():
        raise InputError(f"{path} leaves out every image of {collection.path}; delete some of its rows")
    return Filter(images=images, captions=captions, reasons=reasons, key=key)


def _read_rows(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, int]]:
    """Return by id the texts to leave out, each with the place where it stands, and the rows by reason."""
    if not path.is_file():
        raise InputError(f"there is no filter at {path}; `likewise audit COLLECTION` writes one")
    table = open_text(path)
    missing = [f"`{column}`" for column in COLUMNS if column not in table.columns()]
    if missing:
        raise InputError(
            f"{path} is no filter: it has no column {', '.join(missing)}; a filter is CSV with the columns "
            f"{', '.join(COLUMNS)}, as `likewise audit` writes it"
        )
    wanted: dict[str, dict[str, str]] = {}
    reasons: Counter[str] = Counter()
    for row in table.rows(COLUMNS):
        if isinstance(row, Fault):
            raise InputError(f"{path}: {row.where}: {row.reason}; mend or delete the row")
        identifier, text, reason = (str(row.values[column]) for column in COLUMNS)
        wanted.setdefault(identifier, {}).setdefault(_even(text), row.where)
        reasons[reason] += 1
    return wanted, dict(sorted(reasons.items()))


def _check_texts(identifier: str, told: dict[str, str], captions: list[str]) -> None:
    known = {"", *map(_even, captions)}
    for text, where in told.items():
        if text not in known:
            raise InputError(
                f"{where}: image `{identifier}` has no caption `{text[:80]}`; "
                "write the text as it stands in the collection, or delete the row"
            )


def _even(text: str) -> str:
    """Return a text as a table holds it: single spaces, which editors of tables may change, and no NUL."""
    return " ".join(text.replace("\0", "").split())


def _key(wanted: dict[str, dict[str, str]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for pair in sorted((identifier, text) for identifier, texts in wanted.items() for text in texts):
        digest.update("\0".join([*pair, ""]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
