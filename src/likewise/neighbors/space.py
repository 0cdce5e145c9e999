"""What is compared with what: the vectors a search runs over, and who may find whom among them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from likewise.artifacts import told_if_full
from likewise.collection.filters import Filter, read_filter
from likewise.collection.records import Collection
from likewise.embeddings.embed import Embeddings
from likewise.neighbors.admission import caption_codes, image_codes
from likewise.neighbors.rules import SearchRule
from likewise.neighbors.vectors import RecordVectors, block_rows
from likewise.progress import SILENT, Progress


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
