"""Embed every caption of a collection: one row a caption, shard by shard."""

from pathlib import Path

import numpy as np

from likewise.artifacts import (
    MANIFEST,
    Artifact,
    begin,
    key_of,
    open_artifact,
    read_array,
    shard_name,
    slug,
    write_array,
)
from likewise.collection.records import Collection
from likewise.embeddings.encoders import PAPER_ENCODER, EncoderChoice, SentenceEncoder, choose_encoder
from likewise.errors import ArtifactError, InputError
from likewise.launch import resolve_device
from likewise.progress import SILENT, Progress

KIND = "embeddings"


class Embeddings:
    """Finished embeddings: rows of unit vectors and, for each, the position of its record."""

    def __init__(self, path: str | Path) -> None:
        """Open embeddings; raises ArtifactError where there are none."""
        self.artifact = open_artifact(Path(path), KIND)
        self.path = self.artifact.path
        self.dimension: int = self.artifact.manifest.counts["dimension"]

    def __len__(self) -> int:
        return self.artifact.manifest.counts["captions"]

    @property
    def shards(self) -> int:
        """The number of shards, equal to that of the collection."""
        return self.artifact.manifest.counts["shards"]

    def shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one shard: vectors (n, d) float16 and record positions (n,) int64, ascending."""
        return (
            read_array(self.path / shard_name("vectors", index, "npy")),
            read_array(self.path / shard_name("ids", index, "npy")),
        )

    def pooled(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one row a record: the mean of its captions' vectors, of unit length again.

        Returns:
            Vectors (m, d) float32 and record positions (m,) int64; records whose captions have no
            direction (all zero, or cancelling out) are left out.
        """
        vectors, ids = self.shard(index)
        positions, starts = np.unique(ids, return_index=True)
        if not len(positions):
            return np.empty((0, self.dimension), np.float32), positions
        sums = np.add.reduceat(vectors.astype(np.float32), starts, axis=0)
        norms = np.linalg.norm(sums, axis=1)
        directed = norms > 1e-6
        return sums[directed] / norms[directed, None], positions[directed]


def embed(
    collection: Collection | str | Path,
    encoder: str = PAPER_ENCODER,
    *,
    batch_size: int = 64,
    device: str | None = None,
    progress: Progress = SILENT,
) -> Embeddings:
    """Embed all captions into `COLLECTION/embeddings/…`; finished shards are kept on a rerun.

    Args:
        collection: A collection or its path.
        encoder: A sentence-transformers model by hub name or folder.
        batch_size: Captions a forward pass; captions are sorted by length, so batches carry little padding.
        device: Where the model runs; chosen by itself where not given.
        progress: Where to report.

    Returns:
        Vectors as float16 on disk, unit length, one row a caption.

    Raises:
        InputError: where no record has a caption.
        ModelError: where the encoder cannot be loaded.
    """
    source = Collection.open(collection)
    if source.artifact.manifest.counts["captions"] == 0:
        raise InputError(
            f"no image of {source.path} has a caption: there is nothing to embed; use --pairs self"
        )
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; at least 1 is needed")
    on = None if device is None else resolve_device(device)
    choice = choose_encoder(encoder)
    artifact = _begin(source, choice)
    if artifact.complete:
        progress.say(f"embeddings of {len(source):,} images by {choice.name} exist: {artifact.path}")
        return Embeddings(artifact.path)
    return _embed_missing(source, choice, artifact, batch_size, on, progress)


def _begin(source: Collection, choice: EncoderChoice) -> Artifact:
    settings = {"encoder": choice.name, "dtype": "float16"}
    inputs = {"collection": source.key, "encoder": choice.identity}
    key = key_of(KIND, settings, inputs)
    return begin(source.path / "embeddings" / f"{slug(choice.name)}-{key[:8]}", KIND, settings, inputs)


def _embed_missing(
    source: Collection,
    choice: EncoderChoice,
    artifact: Artifact,
    batch_size: int,
    device: str | None,
    progress: Progress,
) -> Embeddings:
    shards = range(len(source.shards))
    rows = {
        i: len(read_array(artifact.path / shard_name("ids", i, "npy")))
        for i in shards
        if (artifact.path / shard_name("ids", i, "npy")).is_file()
    }
    total = source.artifact.manifest.counts["captions"]
    model = SentenceEncoder(choice, device)
    with progress.task("embedding", total, "captions", sum(rows.values())) as task:
        for shard in shards:
            if shard in rows:
                continue
            captions = source.columns(shard, ["captions"])["captions"]
            ids = np.repeat(np.arange(len(captions)), [len(c) for c in captions]) + source.starts[shard]
            texts = [text for each in captions for text in each]
            vectors = np.empty((len(texts), model.dimension), np.float16)
            # Sorting by length keeps padding small; chunks of it keep the bar moving.
            order = np.argsort([-len(text) for text in texts], kind="stable")
            for start in range(0, len(order), 8 * batch_size):
                part = order[start : start + 8 * batch_size]
                vectors[part] = model.encode([texts[i] for i in part], batch_size)
                task.advance(len(part))
            if not np.isfinite(vectors).all():
                raise ArtifactError(
                    f"{choice.name} gave vectors that are not numbers; nothing was kept of them"
                )
            write_array(artifact.path / shard_name("vectors", shard, "npy"), vectors)
            write_array(artifact.path / shard_name("ids", shard, "npy"), ids)
            rows[shard] = len(ids)
    counts = {"captions": sum(rows.values()), "dimension": model.dimension, "shards": len(shards)}
    return Embeddings(artifact.finish(counts).path)


def look_up_embeddings(collection: Collection, encoder: str | None) -> Embeddings:
    """Return the finished embeddings of a collection by an encoder, or the only ones there are.

    Raises:
        ArtifactError: where there are none, or several and no encoder is named.
    """
    folder = collection.path / "embeddings"
    found = []
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        try:
            found.append(Embeddings(path.parent))
        except ArtifactError:
            continue
    if encoder is not None:
        identity = choose_encoder(encoder).identity
        found = [e for e in found if e.artifact.manifest.inputs["encoder"] == identity]
    wanted = "" if encoder is None else f" by {encoder}"
    if not found:
        hint = "" if encoder is None else f" --encoder {encoder}"
        raise ArtifactError(
            f"{collection.path} has no finished embeddings{wanted}; "
            f"run: likewise embed {collection.path}{hint}"
        )
    if len(found) > 1:
        names = ", ".join(e.artifact.manifest.settings["encoder"] for e in found)
        raise ArtifactError(
            f"{collection.path} has embeddings by several encoders ({names}); name one with --encoder"
        )
    return found[0]
