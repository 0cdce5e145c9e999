"""The neighbors artifact: for each image of a collection, those most alike to it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from likewise.artifacts import MANIFEST, Artifact, atomic, begin, key_of, open_artifact, shard_name, slug
from likewise.data.dataset import Collection
from likewise.data.filters import read_filter
from likewise.data.perceptual_hash import DIFFERENCE, DISTANCE
from likewise.embeddings.store import Embeddings, look_up_embeddings
from likewise.errors import ArtifactError, InputError
from likewise.neighbors.config import TABLE_DEPTH, SearchRule
from likewise.neighbors.faiss_index import IvfIndex
from likewise.neighbors.search import ExactIndex, Index
from likewise.neighbors.vectors import RecordVectors, Space, kept_captions, open_space
from likewise.parallel import resolve_device
from likewise.progress import SILENT, Progress

KIND = "neighbors"
EXACT_LIMIT = 1_000_000  # rows up to which `auto` compares everything with everything
_STEP_ROWS = 4096  # an engine reads all columns once a call

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("neighbors", pa.list_(pa.int64()), nullable=False),
        pa.field("similarity", pa.list_(pa.float32()), nullable=False),
    ]
)


class Neighbors:
    """Finished neighbors: a row an image, or a row a caption where captions are drawn."""

    def __init__(self, path: str | Path) -> None:
        """Open neighbors; raises ArtifactError where there are none."""
        self.artifact = open_artifact(Path(path), KIND)
        self.path = self.artifact.path
        self.k: int = self.artifact.manifest.settings["k"]
        self.encoder: str = self.artifact.manifest.settings["encoder"]
        self.embeddings: str = self.artifact.manifest.inputs["embeddings"]

    @property
    def identity(self) -> str:
        """A fingerprint of the order of neighbors; exact ones are the same however many are kept."""
        manifest = self.artifact.manifest
        if manifest.settings["index"] != "exact":
            return manifest.key
        kept = {name: value for name, value in manifest.settings.items() if name != "k"}
        return key_of(KIND, kept, manifest.inputs)

    def __len__(self) -> int:
        """How many rows there are."""
        return self.artifact.manifest.counts["rows"]

    def table(self, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the first k neighbors of every row.

        Returns:
            Positions (n, k) int64, nearest first, -1 where there is none; similarities (n, k) float32, -inf
            there.
        """
        width = self.k if k is None else k
        if not 1 <= width <= self.k:
            raise ArtifactError(
                f"{self.path} holds {self.k} neighbors an image, not {width}; make it with -k {width}"
            )
        positions = np.full((len(self), width), -1, np.int64)
        similarity = np.full((len(self), width), -np.inf, np.float32)
        row = 0
        for shard in range(self.artifact.manifest.counts["shards"]):
            table = pq.read_table(self.path / shard_name("neighbors", shard, "parquet"))
            lists = table["neighbors"].combine_chunks()
            lengths = lists.value_lengths().to_numpy()
            place = _places(lengths)
            kept = place < width
            at = row + np.repeat(np.arange(len(lengths)), lengths)[kept]
            positions[at, place[kept]] = lists.flatten().to_numpy()[kept]
            similarity[at, place[kept]] = table["similarity"].combine_chunks().flatten().to_numpy()[kept]
            row += len(lengths)
        return positions, similarity


def _places(lengths: np.ndarray) -> np.ndarray:
    """Return the place in its list of every entry of concatenated lists of these lengths."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def find_neighbors(
    collection: Collection | str | Path,
    encoder: str | None = None,
    *,
    k: int = TABLE_DEPTH,
    rule: SearchRule | None = None,
    images: bool = False,
    memory_mb: int = 512,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Neighbors:
    """Find the k images most alike to each, into `COLLECTION/neighbors/…`.

    Images without a caption take no part and get an empty list.

    Args:
        collection: A collection or its path.
        encoder: Whose embeddings to use; may be left out where there is only one.
        k: Neighbors an image.
        rule: Who may be found at all; everybody where not given.
        images: Compare images by embeddings of themselves instead of their captions; so does an `encoder`
            whose name begins with `image:`.
        memory_mb: MiB that a block of similarities may take; the vectors are mapped from disk.
        device: Where blocks are compared.
        progress: Where to report.

    Raises:
        InputError: for a k that the collection cannot give.
        ArtifactError: where embeddings are missing.
    """
    source, asked = Collection.open(collection), rule or SearchRule()
    images = images or (encoder or "").startswith("image:")
    embeddings = look_up_embeddings(source, encoder, modality="images" if images else "captions")
    if k < 1:
        raise InputError(f"-k is {k}; at least 1 neighbor is needed")
    there = _comparable(source, embeddings, asked, images=images)
    if there <= k:
        raise InputError(f"{_those(source, asked, there, images=images)}; -k {k} needs at least {k + 1}")
    return _find(source, embeddings, asked, k, memory_mb * 2**20, device, progress)


def _find(
    source: Collection,
    embeddings: Embeddings,
    rule: SearchRule,
    k: int,
    memory: int,
    device: str,
    progress: Progress,
) -> Neighbors:
    on = resolve_device(device)
    settings, inputs = _told(source, embeddings, rule)
    settings["k"] = k
    folder = f"{slug(settings['encoder'])}-k{k}-{key_of(KIND, settings, inputs)[:8]}"
    artifact = begin(source.path / "neighbors" / folder, KIND, settings, inputs)
    if artifact.complete:
        progress.say(f"neighbors by {settings['encoder']} exist: {artifact.path}")
        return Neighbors(artifact.path)
    with open_space(source, embeddings, rule, artifact.path, progress=progress) as space:
        index = _index(space, settings, memory, on, progress)
        filled = _search_missing(source, artifact, space, index, progress)
        rows = len(space.owner) if settings["captions"] == "draw" else len(source)
    counts = {"images": len(source), "rows": rows, "shards": len(source.shards), "with_neighbors": filled}
    if isinstance(index, IvfIndex):
        counts["recall_permille"] = round(1000 * index.recall)
    return Neighbors(artifact.finish(counts).path)


def _comparable(source: Collection, embeddings: Embeddings, rule: SearchRule, *, images: bool) -> int:
    """Return how many images have a vector and are not left out."""
    left_out = None if rule.filter is None else read_filter(rule.filter, source)
    kept = None if images else kept_captions(source, left_out)
    there = RecordVectors(embeddings, len(source), kept).count > 0
    return int(there.sum() if left_out is None else (there & ~left_out.images).sum())


def _those(source: Collection, rule: SearchRule, there: int, *, images: bool) -> str:
    what = "a vector" if images else "a caption"
    left = "" if rule.filter is None else f" that {rule.filter} leaves"
    return f"{there} images of {source.path} have {what} to compare{left}"


def obtain_neighbors(
    collection: Collection,
    encoder: str | None,
    rule: SearchRule,
    k: int,
    *,
    images: bool = False,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Neighbors:
    """Return neighbors of at least k an image, searched for where there are none yet.

    Where the collection is too small for k, rows hold as many as there are.

    Raises:
        InputError: where the collection has fewer than two images to compare.
        ArtifactError: where the embeddings are missing.
    """
    embeddings = look_up_embeddings(collection, encoder, modality="images" if images else "captions")
    settings, inputs = _told(collection, embeddings, rule)
    found = []
    for path in sorted((collection.path / "neighbors").glob(f"*/{MANIFEST}")):
        try:
            neighbors = Neighbors(path.parent)
        except ArtifactError:
            continue
        same = {name: value for name, value in neighbors.artifact.manifest.settings.items() if name != "k"}
        if same == settings and neighbors.artifact.manifest.inputs == inputs and neighbors.k >= k:
            found.append(neighbors)
    if found:
        return min(found, key=lambda n: n.k)
    there = _comparable(collection, embeddings, rule, images=images)
    if there < 2:
        raise InputError(f"{_those(collection, rule, there, images=images)}; pairs need at least 2")
    return _find(collection, embeddings, rule, max(k, TABLE_DEPTH), 512 * 2**20, device, progress)


def _told(
    source: Collection, embeddings: Embeddings, rule: SearchRule
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings, all but k, and the inputs of neighbors."""
    images = embeddings.modality == "images"
    several = len(embeddings) if rule.captions != "mean" and not images else len(source)
    kind = ("exact" if several <= EXACT_LIMIT else "ivf") if rule.index == "auto" else rule.index
    settings: dict[str, Any] = {"encoder": embeddings.encoder, "metric": "cosine"}
    # A whole rule of pairs may be given; what it decides later is no part of the search.
    settings |= {field.name: getattr(rule, field.name) for field in fields(SearchRule)}
    settings |= {"index": kind, "captions": "none" if images else rule.captions}
    del settings["filter"]
    if kind == "exact":
        del settings["index_recall"]
    if rule.distinct_images:
        settings["near_duplicates"] = [DISTANCE, DIFFERENCE]
    inputs = {"embeddings": embeddings.artifact.manifest.key}
    if rule.filter is not None:
        inputs["filter"] = read_filter(rule.filter, source).key
    return settings, inputs


def _index(space: Space, settings: dict[str, Any], memory: int, device: str, progress: Progress) -> Index:
    record = space.record if space.by_caption else None
    if settings["index"] == "exact":
        return ExactIndex(
            space.vectors, differ=space.differ, same=space.same, record=record, memory=memory, device=device
        )
    index = IvfIndex(
        space.vectors,
        differ=space.differ,
        same=space.same,
        record=record,
        memory=memory,
        recall=settings["index_recall"],
    )
    progress.say(
        f"approximate index: {index.nlist:,} lists of which {index.nprobe:,} are searched; "
        f"recall@10 {index.recall:.3f} on {index.sample:,} images searched exactly"
    )
    return index


def _search_missing(
    source: Collection, artifact: Artifact, space: Space, index: Index, progress: Progress
) -> int:
    """Write the shards that are missing and return how many rows have a neighbor."""
    settings = artifact.manifest.settings
    paths = [artifact.path / shard_name("neighbors", i, "parquet") for i in range(len(source.shards))]
    bounds = np.searchsorted(space.record, source.starts)
    done = sum(int(bounds[i + 1] - bounds[i]) for i, path in enumerate(paths) if path.is_file())
    filled = 0
    with progress.task("neighbors", len(space.record), "rows", done) as task:
        for shard, path in enumerate(paths):
            if not path.is_file():
                rows = np.arange(bounds[shard], bounds[shard + 1])
                found = []
                for start in range(0, len(rows), _STEP_ROWS):
                    step = rows[start : start + _STEP_ROWS]
                    found.append(index.search(step, settings["k"]))
                    task.advance(len(step))
                _write_shard(path, source, shard, space, settings, rows, found)
            lengths = pq.read_table(path, columns=["neighbors"])["neighbors"].combine_chunks().value_lengths()
            filled += int((lengths.to_numpy() > 0).sum())
    return filled


def _write_shard(
    path: Path,
    source: Collection,
    shard: int,
    space: Space,
    settings: dict[str, Any],
    rows: np.ndarray,
    found: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write one shard: a row an image, or a row a caption that counts where these are drawn from."""
    k = settings["k"]
    near = np.concatenate([n for n, _ in found]) if found else np.empty((0, k), np.int64)
    similarity = np.concatenate([s for _, s in found]) if found else np.empty((0, k), np.float32)
    near = np.append(space.record, -1)[near]
    first, last = source.starts[shard], source.starts[shard + 1]
    ids = np.array(source.columns(shard, ["id"])["id"], object)
    if settings["captions"] == "draw":
        at, owner = _slots(space, first, last, rows)
    elif settings["captions"] == "best":
        near, similarity, images = _best_of_captions(near, similarity, space.record[rows], k)
        at, owner = images - first, np.arange(last - first)
    else:
        at, owner = space.record[rows] - first, np.arange(last - first)
    lengths = np.zeros(len(owner), np.int64)
    lengths[at] = (near >= 0).sum(axis=1)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, pa.array(near[near >= 0]))
    values = pa.ListArray.from_arrays(offsets, pa.array(similarity[near >= 0]))
    table = pa.table({"id": ids[owner], "neighbors": lists, "similarity": values}, schema=SCHEMA)
    with atomic(path) as temporary:
        pq.write_table(table, temporary)


def _slots(space: Space, first: int, last: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where in a shard's table searched captions stand, and whose each row of the table is."""
    start, stop = np.searchsorted(space.owner, [first, last])
    return space.place[rows] - start, space.owner[start:stop] - first


def _best_of_captions(
    near: np.ndarray, similarity: np.ndarray, record: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge the rows of each image's captions: the k best images by their best match, ties to the next."""
    image = np.repeat(record, near.shape[1])
    flat, value = near.ravel(), similarity.ravel()
    order = np.lexsort((-value, flat, image))
    order = order[flat[order] >= 0]
    image, flat, value = image[order], flat[order], value[order]
    fresh = np.ones(len(flat), bool)
    fresh[1:] = (image[1:] != image[:-1]) | (flat[1:] != flat[:-1])
    image, flat, value = image[fresh], flat[fresh], value[fresh]
    turned = np.where(flat > image, 0, 1)
    order = np.lexsort((flat, turned, -value, image))
    image, flat, value = image[order], flat[order], value[order]
    images, starts = np.unique(image, return_index=True)
    place = np.arange(len(image)) - np.repeat(starts, np.diff(np.append(starts, len(image))))
    kept = place < k
    row = np.searchsorted(images, image[kept])
    best = np.full((len(images), k), -1, np.int64)
    values = np.full((len(images), k), -np.inf, np.float32)
    best[row, place[kept]], values[row, place[kept]] = flat[kept], value[kept]
    return best, values, images
