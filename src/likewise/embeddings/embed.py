"""Embed every caption, or every image, of a collection: shard by shard, into an artifact."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import (
    MANIFEST,
    Artifact,
    begin,
    key_of,
    load_array,
    open_artifact,
    read_array,
    read_json,
    shard_name,
    slug,
    write_array,
    write_json,
)
from likewise.collection.records import Collection
from likewise.embeddings.base import Corpus, EncoderChoice
from likewise.embeddings.encoders import PAPER_ENCODER, choose_encoder, load_encoder
from likewise.embeddings.images import ImageRows
from likewise.embeddings.options import DEFAULT_OPTIONS, EncoderOptions, Modality
from likewise.embeddings.rows import CaptionRows, Rows
from likewise.errors import ArtifactError, InputError, LikewiseError
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
        return self.artifact.manifest.counts[self.modality]

    @property
    def modality(self) -> Modality:
        """What was embedded: captions, with one row each, or images."""
        return self.artifact.manifest.settings.get("modality", "captions")

    @property
    def encoder(self) -> str:
        """The name of the encoder."""
        return self.artifact.manifest.settings["encoder"]

    @property
    def without_direction(self) -> int:
        """How many rows are zero, because the encoder knew nothing in them."""
        return self.artifact.manifest.counts.get("without_direction", 0)

    @property
    def shards(self) -> int:
        """The number of shards, equal to that of the collection."""
        return self.artifact.manifest.counts["shards"]

    def vectors(self, index: int) -> np.ndarray:
        """Return the vectors of one shard, (n, d) float16, mapped from disk."""
        return read_array(self.path / shard_name("vectors", index, "npy"))

    def ids(self, index: int) -> np.ndarray:
        """Return the record positions of one shard's rows, (n,) int64, ascending."""
        return load_array(self.path / shard_name("ids", index, "npy"))

    def shard(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the vectors and record positions of one shard."""
        return self.vectors(index), self.ids(index)

    def pooled(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one row a record: the mean of its rows' vectors, of unit length again.

        Returns:
            Vectors (m, d) float32 and record positions (m,) int64; records whose rows have no direction (all
            zero, or cancelling out) are left out.
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
    options: EncoderOptions = DEFAULT_OPTIONS,
    batch_size: int = 64,
    device: str | None = None,
    progress: Progress = SILENT,
) -> Embeddings:
    """Embed all captions, or images, into `COLLECTION/embeddings/…`; finished shards are kept on a rerun.

    Args:
        collection: A collection or its path.
        encoder: A sentence-transformers model by hub name or folder, or another kind by its scheme, as
            `likewise.embeddings.encoders.SCHEMES` lists them; `image:…` embeds images.
        options: How the encoder is used.
        batch_size: Captions or images a forward pass; captions are sorted by length, so batches carry little
            padding.
        device: Where the model runs; chosen by itself where not given.
        progress: Where to report.

    Returns:
        Vectors as float16 on disk, unit length, one row a caption or readable image.

    Raises:
        InputError: where no record has a caption, or none an image that can be read.
        ModelError: where the encoder cannot be loaded.
        ArtifactError: where it gives vectors that are not numbers, or of another length than in an
            unfinished run.
    """
    source = Collection.open(collection)
    if batch_size < 1:
        raise InputError(f"--batch-size is {batch_size}; at least 1 is needed")
    on = None if device is None else resolve_device(device)
    choice = choose_encoder(encoder, options)
    if choice.modality == "captions" and source.artifact.manifest.counts["captions"] == 0:
        raise InputError(
            f"no image of {source.path} has a caption: there is nothing to embed; use --pairs self, or embed "
            "the images with --encoder image:…"
        )
    path, settings, inputs = _place(source, choice)
    # What cannot be loaded leaves no folder behind.
    rows = None if (path / MANIFEST).is_file() else _open_rows(source, choice, batch_size, on)
    artifact = begin(path, KIND, settings, inputs)
    if artifact.complete:
        progress.say(f"embeddings of {len(source):,} images by {choice.name} exist: {artifact.path}")
    else:
        rows = _open_rows(source, choice, batch_size, on) if rows is None else rows
        artifact = _embed_missing(source, choice, artifact, rows, progress)
    return Embeddings(artifact.path)


def _place(source: Collection, choice: EncoderChoice) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Return the folder of the embeddings, and the settings and inputs that its name is keyed by."""
    settings: dict[str, Any] = {"encoder": choice.name, "dtype": "float16"} | choice.options.given
    if choice.modality == "images":
        settings["modality"] = "images"
    inputs = {"collection": source.key, "encoder": choice.identity}
    key = key_of(KIND, settings, inputs)
    # A scheme belongs to the folder's name, but of a hub name only the last part does.
    name = choice.name.replace("/", "-").replace(":", "-") if choice.scheme else choice.name
    return source.path / "embeddings" / f"{slug(name)}-{key[:8]}", settings, inputs


def _embed_missing(
    source: Collection,
    choice: EncoderChoice,
    artifact: Artifact,
    rows: Rows,
    progress: Progress,
) -> Artifact:
    shards = range(len(source.shards))
    done = [i for i in shards if (artifact.path / shard_name("ids", i, "npy")).is_file()]
    told = _Told()
    for shard in done:
        vectors = read_array(artifact.path / shard_name("vectors", shard, "npy"))
        _check_width(vectors, rows.dimension, artifact, choice)
        told.add(vectors, _skipped(artifact, shard))
    total = len(source) if choice.modality == "images" else source.artifact.manifest.counts[choice.modality]
    with progress.task("embedding", total, choice.modality, told.rows + told.skipped.total()) as task:
        for shard in shards:
            if shard in done:
                continue
            made = rows.of(shard, task)
            _check_finite(made.vectors, choice)
            if made.skipped:
                write_json(artifact.path / shard_name("skipped", shard, "json"), dict(made.skipped))
            write_array(artifact.path / shard_name("vectors", shard, "npy"), made.vectors)
            write_array(artifact.path / shard_name("ids", shard, "npy"), made.ids)
            told.add(made.vectors, made.skipped)
            del made  # before the next shard is begun, or two would be in memory
    if not told.rows:
        shutil.rmtree(artifact.path)  # it would only keep a later run from looking again
        reasons = ", ".join(f"{count} {reason}" for reason, count in told.skipped.items())
        raise InputError(f"no image of {source.path} can be read: {reasons}")
    counts = {
        choice.modality: told.rows,
        "dimension": rows.dimension,
        "shards": len(shards),
        "without_direction": told.without_direction,
    }
    return artifact.finish(counts, told.skipped)


def _open_rows(source: Collection, choice: EncoderChoice, batch_size: int, device: str | None) -> Rows:
    if choice.modality == "images":
        return ImageRows(source, choice, batch_size, device)
    return CaptionRows(source, load_encoder(choice, device, _corpus(source)), batch_size)


def _corpus(source: Collection) -> Corpus:
    def captions() -> Iterator[list[str]]:
        for shard in range(len(source.shards)):
            yield [text for each in source.columns(shard, ["captions"])["captions"] for text in each]

    return captions


class _Told:
    """What a run says of itself in the end, gathered shard by shard."""

    def __init__(self) -> None:
        self.rows, self.without_direction = 0, 0
        self.skipped = Counter[str]()

    def add(self, vectors: np.ndarray, skipped: Mapping[str, int]) -> None:
        self.rows += len(vectors)
        self.without_direction += int((~vectors.any(axis=1)).sum())
        self.skipped.update(skipped)


def _skipped(artifact: Artifact, shard: int) -> Mapping[str, int]:
    path = artifact.path / shard_name("skipped", shard, "json")
    return read_json(path) if path.is_file() else {}


def _check_width(vectors: np.ndarray, dimension: int, artifact: Artifact, choice: EncoderChoice) -> None:
    """Refuse to go on with a model that is not the one an unfinished run began with."""
    if vectors.shape[1] != dimension:
        raise ArtifactError(
            f"{artifact.path} holds vectors of length {vectors.shape[1]} from an unfinished run, but "
            f"{choice.name} now gives {dimension}: the model has changed; delete that folder to embed anew"
        )


def _check_finite(vectors: np.ndarray, choice: EncoderChoice) -> None:
    # Sums, as whether each number is finite would take half as much memory again.
    bad = int((~np.isfinite(vectors.sum(axis=1, dtype=np.float32))).sum())
    if bad:
        raise ArtifactError(
            f"{choice.name} gave vectors that are not numbers for {bad:,} of {len(vectors):,} "
            f"{choice.modality} of a shard; nothing was kept of them. Is the model damaged?"
        )


def look_up_embeddings(
    collection: Collection, encoder: str | None, *, modality: Modality = "captions"
) -> Embeddings:
    """Return the finished embeddings of a collection by an encoder, or the only ones there are.

    Args:
        collection: The collection.
        encoder: The encoder as it was named when embedding, the name that tables show (which tells options
            apart, as `hf:bert-base-uncased+cls`), or the name of the folder of its embeddings.
        modality: Whether embeddings of captions or of images are meant.

    Raises:
        ArtifactError: where there are none, or several and no encoder is named.
    """
    found = []
    for path in sorted((collection.path / "embeddings").glob(f"*/{MANIFEST}")):
        try:
            found.append(Embeddings(path.parent))
        except ArtifactError:
            continue
    found = [each for each in found if each.modality == modality]
    if encoder is not None:
        found = _by_encoder(found, encoder)
    wanted = "" if encoder is None else f" by {encoder}"
    if not found:
        hint = {"captions": "", "images": " --encoder image:NAME"}[modality]
        raise ArtifactError(
            f"{collection.path} has no finished embeddings{wanted}{' of images' * (modality == 'images')}; "
            f"run: likewise embed {collection.path}{hint if encoder is None else f' --encoder {encoder}'}"
        )
    if len(found) > 1:
        same = len({each.encoder for each in found}) < len(found)
        names = ", ".join(each.path.name if same else each.encoder for each in found)
        raise ArtifactError(
            f"{collection.path} has embeddings by several encoders ({names}); name one with --encoder"
        )
    return found[0]


def _by_encoder(found: list[Embeddings], encoder: str) -> list[Embeddings]:
    """Keep those of an encoder: of the same weights, and where these differ in options, of the same name."""
    try:
        choice = choose_encoder(encoder)
    except LikewiseError:
        # What it was made from may be gone; the embeddings still go by its name.
        named = [each for each in found if encoder in (each.encoder, each.path.name)]
        if named:
            return named
        raise
    same = [each for each in found if each.artifact.manifest.inputs["encoder"] == choice.identity]
    named = [each for each in found if {each.encoder, each.path.name} & {encoder, choice.name}]
    both = [each for each in same if each in named]
    return both or same or named
