"""Embed every caption, or every image, of a collection: shard by shard, into an artifact."""

import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np

from likewise.artifacts import (
    MANIFEST,
    Artifact,
    begin,
    key_of,
    read_array,
    read_json,
    shard_name,
    slug,
    write_array,
    write_json,
)
from likewise.data.dataset import Collection, Record
from likewise.data.images import BadImageError, decode, read_bytes
from likewise.embeddings.base import CaptionEncoder, Corpus, EncoderChoice, unit_rows
from likewise.embeddings.config import DEFAULT_OPTIONS, EncoderOptions
from likewise.embeddings.registry import PAPER_ENCODER, choose_encoder, load_encoder
from likewise.embeddings.store import KIND, Embeddings
from likewise.errors import ArtifactError, InputError
from likewise.parallel import default_workers, ordered_map, resolve_device
from likewise.progress import SILENT, Progress, Task

_BATCHES = 16


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """What is kept of one shard.

    Attributes:
        vectors: (n, d) float16.
        ids: (n,) int64, the position of each row's record, ascending.
        skipped: Records left out, by reason.
    """

    vectors: np.ndarray
    ids: np.ndarray
    skipped: Mapping[str, int] = field(default_factory=dict)


class Rows(ABC):
    """A collection seen through a loaded encoder.

    Attributes:
        dimension: Length of a vector.
    """

    dimension: int

    @abstractmethod
    def of(self, shard: int, task: Task) -> ShardRows:
        """Embed one shard, advancing the task by what is done."""


@final
class CaptionRows(Rows):
    """One row a caption. Each distinct caption of a shard is embedded once, the longest first."""

    def __init__(self, source: Collection, encoder: CaptionEncoder, batch_size: int) -> None:
        """Look at a collection through an encoder of captions."""
        self._source, self._encoder, self._batch_size = source, encoder, batch_size
        self.dimension = encoder.dimension

    def of(self, shard: int, task: Task) -> ShardRows:
        """Embed the captions of one shard."""
        captions = self._source.columns(shard, ["captions"])["captions"]
        ids = np.repeat(np.arange(len(captions)), [len(c) for c in captions]) + self._source.starts[shard]
        places: dict[str, int] = {}
        row = [places.setdefault(text, len(places)) for each in captions for text in each]
        texts, times = list(places), np.bincount(row, minlength=len(places))
        vectors = np.empty((len(texts), self.dimension), np.float16)
        # Sorting by length keeps padding small (encoders sort each part by tokens); parts of a few batches
        # keep the bar moving.
        order = np.argsort([-len(text) for text in texts], kind="stable")
        for start in range(0, len(order), _BATCHES * self._batch_size):
            part = order[start : start + _BATCHES * self._batch_size]
            vectors[part] = self._encoder.encode([texts[i] for i in part], self._batch_size)
            task.advance(int(times[part].sum()))
        # Where all captions differ they are in order already, and a copy would double the memory.
        return ShardRows(vectors=vectors if len(texts) == len(row) else vectors[np.array(row)], ids=ids)


@final
class ImageRows(Rows):
    """One row an image; those that cannot be read are left out and counted."""

    def __init__(
        self, source: Collection, choice: EncoderChoice, batch_size: int, device: str | None
    ) -> None:
        """Load the encoder; raises ModelError where that fails."""
        import torch

        from likewise.models.encoders import open_encoder

        self._source, self._batch_size = source, batch_size
        self._encoder = open_encoder(choice.source)
        self._device = torch.device(resolve_device(device))
        self._encoder.model.to(self._device).to(memory_format=torch.channels_last)
        self.dimension = self._encoder.width

    def of(self, shard: int, task: Task) -> ShardRows:
        """Embed the images of one shard."""
        vectors, ids, faults = [np.empty((0, self.dimension), np.float16)], [], Counter[str]()
        begin = self._source.starts[shard]
        for crops, reasons in ordered_map(self._load, self._batches(shard), default_workers()):
            kept = [place for place, reason in enumerate(reasons) if not reason]
            if kept:
                vectors.append(self._forward(crops[kept]).astype(np.float16))
            ids += [begin + place for place in kept]
            begin += len(reasons)
            faults.update(reason for reason in reasons if reason)
            task.advance(len(reasons))
        return ShardRows(vectors=np.concatenate(vectors), ids=np.array(ids, np.int64), skipped=faults)

    def _batches(self, shard: int) -> Iterator[list[Record]]:
        """Yield records a batch at a time: they may hold the images themselves."""
        first, last = self._source.starts[shard : shard + 2]
        for start in range(first, last, self._batch_size):
            yield [self._source[i] for i in range(start, min(start + self._batch_size, last))]

    def _load(self, records: list[Record]) -> tuple[np.ndarray, list[str]]:
        """Return crops, (b, size, size, 3) uint8, and for each why it could not be read, or nothing."""
        transform = self._encoder.transform
        crops, reasons = np.zeros((len(records), transform.size, transform.size, 3), np.uint8), []
        for place, record in enumerate(records):
            try:
                pixels = decode(read_bytes(record.image, self._source.root), transform.resize)
                crops[place] = transform.crop(pixels)
                reasons.append("")
            except BadImageError as fault:
                reasons.append(str(fault))
        return crops, reasons

    def _forward(self, crops: np.ndarray) -> np.ndarray:
        import torch

        parts = torch.from_numpy(crops).split(self._encoder.at_once(self._device))
        with torch.inference_mode():
            standard = (self._encoder.transform.standardise(part.to(self._device)) for part in parts)
            features = torch.cat([self._encoder.model(part).float() for part in standard])
        return unit_rows(features.cpu().numpy())


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
