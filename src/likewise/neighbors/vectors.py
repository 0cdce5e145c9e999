"""One vector an image, looked up by position in the embeddings on disk."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from likewise.artifacts import told_if_full
from likewise.data.dataset import Collection
from likewise.data.filters import Filter, read_filter
from likewise.data.perceptual_hash import image_hashes, near_duplicate_clusters
from likewise.embeddings.store import Embeddings
from likewise.errors import InputError
from likewise.neighbors.config import SearchRule
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


_OPEN_SHARDS = 64  # each mapped file holds a descriptor, of which a process usually has 1,024
_BLOCK_BYTES = 2**25


def block_rows(dimension: int) -> int:
    """Return how many vectors of float32 to hold at a time: 32 MiB of them, however long each is."""
    return max(256, _BLOCK_BYTES // (4 * dimension))


class RecordVectors:
    """Random access to pooled embeddings: the mean of an image's vectors, of unit length again."""

    def __init__(self, embeddings: Embeddings, images: int, kept: np.ndarray | None = None) -> None:
        """Map the shards; holds 16 bytes a caption and 16 an image in memory.

        `kept` tells which rows of the embeddings count, (captions,) bool; all of them where not given.
        """
        self.dimension = embeddings.dimension
        self.key = embeddings.artifact.manifest.key
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(embeddings.vectors)
        owners = [embeddings.ids(i) for i in range(embeddings.shards)]
        self._begins = np.concatenate([[0], np.cumsum([len(each) for each in owners])])
        ids = np.concatenate(owners)
        self.rows = np.arange(len(ids)) if kept is None else np.flatnonzero(kept)
        self.ids = ids[self.rows]
        self.first = np.searchsorted(self.ids, np.arange(images))
        self.count = np.searchsorted(self.ids, np.arange(images), side="right") - self.first

    def of(self, positions: np.ndarray) -> np.ndarray:
        """Return the vectors of some images: (b,) int64 -> (b, d) float32, zero where one has none."""
        counts = self.count[positions]
        sums = np.zeros((len(positions), self.dimension), np.float32)
        for nth in range(counts.max(initial=0)):
            some = counts > nth
            sums[some] += self.caption(self.first[positions[some]] + nth)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        return np.where(norms > 1e-6, sums / np.maximum(norms, 1e-6), 0)

    def similarity(self, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return the cosine of each image and its candidates: (n,), (n, k) -> (n, k) float32; 0 at -1."""
        values = np.zeros(candidates.shape, np.float32)
        step = max(1, block_rows(self.dimension) // max(1, candidates.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            there = candidates[part] >= 0
            row, _ = np.nonzero(there)
            others, which = np.unique(candidates[part][there], return_inverse=True)
            own, vectors = self.of(rows[part]), self.of(others)
            values[part][there] = np.einsum("md,md->m", own[row], vectors[which])
        return values

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of each image's similarity to all others: (n,), (n,) float64.

        From the sum and the second moment of all vectors, so that no pair is looked at. Images without a
        vector get mean 0 and deviation 0.
        """
        n, d = len(self.count), self.dimension
        total, second, m = np.zeros(d), np.zeros((d, d)), 0
        rows = block_rows(d)
        steps = [np.arange(start, min(start + rows, n)) for start in range(0, n, rows)]
        for step in steps:
            vectors = self.of(step).astype(np.float64)
            total += vectors.sum(axis=0)
            second += vectors.T @ vectors
            m += int((np.abs(vectors).sum(axis=1) > 0).sum())
        means, deviations = np.zeros(n), np.zeros(n)
        for step in steps:
            vectors = self.of(step).astype(np.float64)
            itself = (vectors**2).sum(axis=1)
            mean = (vectors @ total - itself) / max(1, m - 1)
            square = (np.einsum("nd,de,ne->n", vectors, second, vectors, optimize=True) - itself**2) / max(
                1, m - 1
            )
            means[step] = mean
            deviations[step] = np.sqrt(np.maximum(square - mean**2, 0))
        return means, deviations

    def caption(self, places: np.ndarray) -> np.ndarray:
        """Return the vectors of single captions, by their place among those that count: (m,) -> (m, d)."""
        rows = self.rows[places]
        gathered = np.empty((len(rows), self.dimension), np.float32)
        shard = np.searchsorted(self._begins, rows, side="right") - 1
        for index in np.unique(shard):
            here = shard == index
            gathered[here] = self._shard(int(index))[rows[here] - self._begins[index]]
        return gathered


@dataclass(frozen=True)
class Space:
    """The rows of a search: images, or captions.

    Attributes:
        vectors: (m, d) float32 unit vectors, mapped from disk.
        record: (m,) int64, the image of each row, ascending.
        place: (m,) int64, which of all images or captions each row is, ascending.
        owner: (t,) int64, the image of each of all images or captions, also of those that are not searched.
        differ: (m, c) int64 codes of which none may be equal, -1 never being equal; or None.
        same: (m,) int64 codes that must be equal, -1 finding nobody; or None.
        by_caption: Whether rows are captions, of which an image may have several.
    """

    vectors: np.ndarray
    record: np.ndarray
    place: np.ndarray
    owner: np.ndarray
    differ: np.ndarray | None
    same: np.ndarray | None
    by_caption: bool


def kept_captions(collection: Collection, left_out: Filter | None) -> np.ndarray | None:
    """Return which rows of the embeddings of captions a filter leaves, (captions,) bool; None for all."""
    if left_out is None:
        return None
    return np.concatenate([left_out.caption_rows(collection, i) for i in range(len(collection.shards))])


@contextmanager
def open_space(
    collection: Collection,
    embeddings: Embeddings,
    rule: SearchRule,
    folder: Path,
    *,
    progress: Progress = SILENT,
) -> Iterator[Space]:
    """Gather what is compared into one file in `folder`, which goes when the block ends.

    Rows without direction (zero vectors) stay out.

    Raises:
        ArtifactError: where the disk is full.
    """
    images = embeddings.modality == "images"
    left_out = None if rule.filter is None else read_filter(rule.filter, collection)
    kept = None if images else kept_captions(collection, left_out)
    stored = RecordVectors(embeddings, len(collection), kept)
    by_caption = rule.captions != "mean" and not images
    images_of = stored.ids if by_caption else np.arange(len(collection))
    taking = np.ones(len(collection), bool) if left_out is None else ~left_out.images
    scratch = folder / f".vectors.{os.getpid()}.tmp"
    try:
        with told_if_full(scratch), scratch.open("wb") as stream:
            directed = taking[images_of]
            step = block_rows(embeddings.dimension)
            for start in range(0, len(images_of), step):
                part = np.arange(start, min(start + step, len(images_of)))
                vectors = stored.caption(part) if by_caption else stored.of(part)
                directed[part] &= np.abs(vectors).sum(axis=1) > 0
                stream.write(_unit(vectors[directed[part]]).tobytes())
        place = np.flatnonzero(directed)
        record = images_of[place]
        shape = (len(place), embeddings.dimension)
        mapped = (
            np.memmap(scratch, np.float32, "r", shape=shape) if len(place) else np.empty(shape, np.float32)
        )
        captions = stored.rows[place] if by_caption else None
        differ, same = _codes(collection, rule, left_out, record, captions, progress)
        yield Space(mapped, record, place, images_of, differ, same, by_caption)
    finally:
        scratch.unlink(missing_ok=True)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _codes(
    collection: Collection,
    rule: SearchRule,
    left_out: Filter | None,
    record: np.ndarray,
    caption: np.ndarray | None,
    progress: Progress,
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the codes of a search's rows; `caption` tells which caption each is, where rows are captions."""
    differ, same = image_codes(collection, rule, progress)
    columns = [] if differ is None else [differ[record]]
    if rule.distinct_captions:
        codes = caption_codes(collection, left_out, each=caption is not None)
        columns.append(codes[record if caption is None else caption][:, None])
    return (np.concatenate(columns, axis=1) if columns else None), None if same is None else same[record]
