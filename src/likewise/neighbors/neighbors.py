"""The neighbors artifact: for each image of a collection, those described most alike."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from likewise.artifacts import MANIFEST, Artifact, atomic, begin, key_of, open_artifact, shard_name, slug
from likewise.collection.records import Collection
from likewise.embeddings.embed import Embeddings, look_up_embeddings
from likewise.errors import ArtifactError, InputError
from likewise.launch import resolve_device
from likewise.neighbors.search import Grouped, group_equal, top_k
from likewise.progress import SILENT, Progress

KIND = "neighbors"
DEFAULT_K = 10
_STEP_ROWS = 1024

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("neighbors", pa.list_(pa.int64()), nullable=False),
        pa.field("similarity", pa.list_(pa.float32()), nullable=False),
    ]
)


class Neighbors:
    """Finished neighbors, by position in the collection."""

    def __init__(self, path: str | Path) -> None:
        """Open neighbors; raises ArtifactError where there are none."""
        self.artifact = open_artifact(Path(path), KIND)
        self.path = self.artifact.path
        self.k: int = self.artifact.manifest.settings["k"]
        self.encoder: str = self.artifact.manifest.settings["encoder"]
        self.embeddings: str = self.artifact.manifest.inputs["embeddings"]

    def __len__(self) -> int:
        return self.artifact.manifest.counts["images"]

    def table(self, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the first k neighbors of every image.

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
    k: int = DEFAULT_K,
    memory_mb: int = 512,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Neighbors:
    """Find the k images whose captions are most alike, into `COLLECTION/neighbors/…`.

    Images without a caption take no part and get an empty list.

    Args:
        collection: A collection or its path.
        encoder: Whose embeddings to use; may be left out where there is only one.
        k: Neighbors an image.
        memory_mb: MiB that a block of similarities may take; the distinct caption vectors come on top.
        device: Where blocks are compared.
        progress: Where to report.

    Raises:
        InputError: for a k that the collection cannot give.
        ArtifactError: where embeddings are missing.
    """
    source = Collection.open(collection)
    embeddings = look_up_embeddings(source, encoder)
    device = resolve_device(device)
    if k < 1:
        raise InputError(f"-k is {k}; at least 1 neighbor is needed")
    name = embeddings.artifact.manifest.settings["encoder"]
    settings = {"encoder": name, "k": k, "metric": "cosine", "captions": "mean"}
    inputs = {"embeddings": embeddings.artifact.manifest.key}
    folder = f"{slug(name)}-k{k}-{key_of(KIND, settings, inputs)[:8]}"
    artifact = begin(source.path / "neighbors" / folder, KIND, settings, inputs)
    if artifact.complete:
        progress.say(f"neighbors by {name} exist: {artifact.path}")
        return Neighbors(artifact.path)
    with _record_vectors(embeddings, artifact.path) as (vectors, positions):
        if len(positions) <= k:
            raise InputError(
                f"{len(positions)} images of {source.path} have a caption to compare; "
                f"-k {k} needs at least {k + 1}"
            )
        _search_missing(source, artifact, vectors, positions, memory_mb * 2**20, device, progress)
    counts = {"images": len(source), "shards": len(source.shards), "with_neighbors": len(positions)}
    return Neighbors(artifact.finish(counts).path)


@contextmanager
def _record_vectors(embeddings: Embeddings, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gather one unit vector a captioned record, on disk: (m, d) float32 and positions (m,) int64."""
    scratch = folder / f".vectors.{os.getpid()}.tmp"
    positions = []
    try:
        with scratch.open("wb") as stream:
            for shard in range(embeddings.shards):
                vectors, here = embeddings.pooled(shard)
                positions.append(here)
                vectors.tofile(stream)
        rows = np.concatenate(positions)
        mapped = (
            np.memmap(scratch, np.float32, "r", shape=(len(rows), embeddings.dimension))
            if len(rows)
            else rows
        )
        yield mapped, rows
    finally:
        scratch.unlink(missing_ok=True)


def _search_missing(
    source: Collection,
    artifact: Artifact,
    vectors: np.ndarray,
    positions: np.ndarray,
    memory: int,
    device: str,
    progress: Progress,
) -> None:
    paths = [artifact.path / shard_name("neighbors", i, "parquet") for i in range(len(source.shards))]
    bounds = np.searchsorted(positions, source.starts)
    done = sum(int(bounds[i + 1] - bounds[i]) for i, path in enumerate(paths) if path.is_file())
    grouped = group_equal(vectors)
    with progress.task("neighbors", len(positions), "images", done) as task:
        for shard, path in enumerate(paths):
            if path.is_file():
                continue
            rows = np.arange(bounds[shard], bounds[shard + 1])
            found = []
            for start in range(0, len(rows), _STEP_ROWS):
                step = rows[start : start + _STEP_ROWS]
                found.append(_search(vectors, grouped, step, artifact, memory, device))
                task.advance(len(step))
            _write_shard(path, source, shard, positions, rows, found)


def _search(
    vectors: np.ndarray, grouped: Grouped, rows: np.ndarray, artifact: Artifact, memory: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    return top_k(vectors, grouped, rows, artifact.manifest.settings["k"], memory=memory, device=device)


def _write_shard(
    path: Path,
    source: Collection,
    shard: int,
    positions: np.ndarray,
    rows: np.ndarray,
    found: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    ids = source.columns(shard, ["id"])["id"]
    lists: list[list[int]] = [[] for _ in ids]
    values: list[list[float]] = [[] for _ in ids]
    here = positions[rows] - source.starts[shard]
    nearest = np.concatenate([n for n, _ in found]) if found else np.empty((0, 1), np.int64)
    similarity = np.concatenate([s for _, s in found]) if found else np.empty((0, 1), np.float32)
    for place, near, similar in zip(here, nearest, similarity, strict=True):
        real = near >= 0
        lists[place] = positions[near[real]].tolist()
        values[place] = similar[real].tolist()
    table = pa.table({"id": ids, "neighbors": lists, "similarity": values}, schema=SCHEMA)
    with atomic(path) as temporary:
        pq.write_table(table, temporary)


def look_up_neighbors(collection: Collection, encoder: str | None, k: int) -> Neighbors:
    """Return finished neighbors with at least k an image, by an encoder or the only one there is.

    Raises:
        ArtifactError: where there are none, or several encoders and none is named.
    """
    found = []
    for path in sorted((collection.path / "neighbors").glob(f"*/{MANIFEST}")):
        try:
            found.append(Neighbors(path.parent))
        except ArtifactError:
            continue
    wanted = None if encoder is None else look_up_embeddings(collection, encoder).artifact.manifest.key
    found = [n for n in found if n.k >= k and wanted in (None, n.embeddings)]
    if not found:
        by = "" if encoder is None else f" by {encoder}"
        flag = "" if encoder is None else f" --encoder {encoder}"
        raise ArtifactError(
            f"{collection.path} has no finished neighbors{by} with k >= {k}; "
            f"run: likewise neighbors {collection.path}{flag} -k {max(k, DEFAULT_K)}"
        )
    if len({n.embeddings for n in found}) > 1:
        names = ", ".join(sorted({n.encoder for n in found}))
        raise ArtifactError(
            f"{collection.path} has neighbors by several encoders ({names}); name one with --encoder"
        )
    return min(found, key=lambda n: n.k)
