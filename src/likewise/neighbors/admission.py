"""Codes that tell who may be found by whom: equal codes stand for the same group, caption or picture."""

import hashlib
import re

import numpy as np

from likewise.collection.duplicates import image_hashes, near_duplicate_clusters
from likewise.collection.filters import Filter
from likewise.collection.records import Collection
from likewise.errors import InputError
from likewise.neighbors.rules import SearchRule
from likewise.progress import SILENT, Progress

_NOISE = re.compile(r"[\W_]+")


def caption_codes(collection: Collection, left_out: Filter | None = None, *, each: bool) -> np.ndarray:
    """Return what captions say, but for case, spaces and punctuation, as codes of 63 bits.

    With `each`, one a caption, (captions,) int64; else one an image for all its captions together,
    (n,) int64, -1 for images without any. Those that `left_out` drops do not count for an image.
    """
    codes: list[int] = []
    for shard, start in enumerate(collection.starts[:-1]):
        for position, captions in enumerate(collection.columns(shard, ["captions"])["captions"], start):
            if each:
                codes += [_code(plain(caption)) for caption in captions]
                continue
            counted = [c for c in captions if left_out is None or not left_out.drops_caption(position, c)]
            codes.append(_code("\n".join(sorted(map(plain, counted)))) if counted else -1)
    return np.array(codes, np.int64)


def plain(caption: str) -> str:
    """Return a caption in lower case with words and single spaces alone."""
    return _NOISE.sub(" ", caption.casefold()).strip()


def _code(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def column_codes(collection: Collection, column: str) -> np.ndarray:
    """Return the values of `group` or `label` as codes: (n,) int64, -1 where an image has none."""
    known: dict[str, int] = {}
    codes = [
        -1 if value is None else known.setdefault(value, len(known))
        for shard in range(len(collection.shards))
        for value in collection.columns(shard, [column])[column]
    ]
    return np.array(codes, np.int64)


def image_codes(
    collection: Collection, rule: SearchRule, progress: Progress = SILENT
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return what a search rule forbids and demands of images.

    Returns:
        Codes of which none may be equal, (n, m) int64 or None; and a code that must be equal, (n,) int64 or
        None. -1 in the first is never equal; -1 in the second finds nobody.

    Raises:
        InputError: where groups are asked for and there are none.
    """
    differ, same = [], None
    if rule.distinct_images:
        hashes = image_hashes(collection, progress=progress)
        differ.append(near_duplicate_clusters(hashes))
    if rule.scope != "any":
        group = column_codes(collection, "group")
        if (group < 0).all():
            raise InputError(
                f"no image of {collection.path} has a group, so scope {rule.scope} leaves nobody; "
                "import with --group-column"
            )
        # Of another group: whoever has one at all, and not the same.
        same = group if rule.scope == "same" else np.where(group >= 0, 0, -1)
        if rule.scope == "other":
            differ.append(group)
    return (np.column_stack(differ) if differ else None), same
