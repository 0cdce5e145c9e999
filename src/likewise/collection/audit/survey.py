"""The first reading of all records: counts, and 64 bits of each text instead of the text itself."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from likewise.collection.audit.findings import Tally
from likewise.collection.audit.phrases import Frequent, openings_of
from likewise.collection.audit.settings import AuditSettings
from likewise.collection.audit.words import (
    emptiness_of,
    has_address,
    has_markup,
    hash_of,
    is_file_name,
    length_of,
    normalised,
    template_of,
)
from likewise.collection.records import Collection
from likewise.progress import Progress

LONG = 55  # words that fill the 77 tokens of CLIP's text encoder, at about 1.4 tokens a word
SHORT = 2
_COLUMNS = ["id", "captions", "group", "label", "width", "height"]
_LENGTHS = 1024  # longer captions are counted as so long


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What one reading of n records with r captions found.

    Attributes:
        texts: 64 bits of each caption, (r,) uint64; 0 for one without letters and digits.
        templates: The same with digits masked, (r,) uint64.
        owners: The position of the record of each caption, (r,) int64, ascending.
        told: 64 bits of all captions of a record, (n,) uint64: what copies of an image are compared by.
        groups: 64 bits of each record's group, (n,) uint64; 0 where it has none.
        labels: 64 bits of each record's label, (n,) uint64; 0 where it has none.
        lengths: How many captions have so many words, (1025,) int64.
        tally: Counts and examples of what a caption or record shows by itself.
        openings: The most frequent first and last words.
    """

    texts: np.ndarray
    templates: np.ndarray
    owners: np.ndarray
    told: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    tally: Tally
    openings: Frequent


@dataclass
class _Arrays:
    texts: list[int] = field(default_factory=list)
    templates: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def survey(collection: Collection, settings: AuditSettings, progress: Progress) -> Survey:
    """Read all records once; what is kept of a caption are 24 bytes."""
    tally, openings, lengths = Tally(), Frequent(), np.zeros(_LENGTHS + 1, np.int64)
    parts: list[dict[str, np.ndarray]] = []
    with progress.task("reading", len(collection), "images") as task:
        for shard in range(len(collection.shards)):
            arrays = _Arrays()
            for position, row in rows_of(collection, shard, _COLUMNS):
                _look_at_record(row, position, arrays, tally, settings)
                for caption in row["captions"]:
                    _look_at_caption(row["id"], position, caption, arrays, tally)
                    openings.add(openings_of(template_of(normalised(caption))))
                    lengths[min(length_of(caption), _LENGTHS)] += 1
            openings.prune()
            parts.append({name: _packed(name, values) for name, values in vars(arrays).items()})
            task.advance(len(arrays.told))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Survey(**joined, lengths=lengths, tally=tally, openings=openings)


def rows_of(collection: Collection, shard: int, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a shard, with their positions, as some columns tell of them."""
    columns = collection.columns(shard, names)
    for row, values in enumerate(zip(*(columns[name] for name in names), strict=True)):
        yield collection.starts[shard] + row, dict(zip(names, values, strict=True))


def _packed(name: str, values: list[int]) -> np.ndarray:
    return np.array(values, np.int64 if name == "owners" else np.uint64)


def _look_at_record(
    row: dict[str, Any], position: int, arrays: _Arrays, tally: Tally, settings: AuditSettings
) -> None:
    spelled = [normalised(caption) for caption in row["captions"]]
    arrays.told.append(hash_of("\n".join(sorted(spelled))))
    arrays.groups.append(0 if row["group"] is None else hash_of(row["group"]))
    arrays.labels.append(0 if row["label"] is None else hash_of(row["label"]))
    short, long = sorted((row["width"], row["height"]))
    found = {
        "without_caption": not spelled,
        "repeated_within": len(set(spelled)) < len(spelled),
        "tiny": short < settings.min_side,
        "stretched": long > settings.max_aspect * short,
    }
    caption = row["captions"][0] if row["captions"] else None
    for name, true in found.items():
        if true:
            tally.add(name, position, row["id"], caption)


def _look_at_caption(identifier: str, position: int, caption: str, arrays: _Arrays, tally: Tally) -> None:
    spelled = normalised(caption)
    arrays.texts.append(hash_of(spelled) if spelled else 0)
    arrays.templates.append(hash_of(template_of(spelled)) if spelled else 0)
    arrays.owners.append(position)
    empty, words = emptiness_of(caption), length_of(caption)
    found = {
        empty or "": empty is not None,
        "with_address": has_address(caption),
        "with_markup": has_markup(caption),
        "file_names": is_file_name(caption),
        "short": words <= SHORT,
        "long": words > LONG,
    }
    for name, true in found.items():
        if true:
            tally.add(name, position, identifier, caption)
