"""Images instead of captions as what is embedded: one row an image, by a frozen image encoder."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np

from likewise.artifacts import fingerprint
from likewise.collection.images import BadImageError, decode, read_bytes
from likewise.collection.records import Collection, Record
from likewise.embeddings.base import EncoderChoice, unit_rows
from likewise.embeddings.rows import Rows, ShardRows
from likewise.errors import ModelError
from likewise.launch import default_workers, ordered_map, resolve_device
from likewise.progress import Task


def choose_clip(target: str) -> tuple[str, str, str]:
    """Return the short name, source and identity of `ARCH/WEIGHTS`, weights being a tag or a file.

    Raises:
        ModelError: where one of the two is missing, or a path holds no file.
    """
    arch, _, weights = target.partition("/")
    if not arch or not weights:
        raise ModelError(f"clip:{target} lacks its weights: clip:ARCH/WEIGHTS, as in clip:ViT-B-32/openai")
    file = Path(weights).expanduser()
    if file.is_file():
        return f"{arch}/{file.stem}", f"{arch}/{file}", f"{arch}/{fingerprint(file)}"
    if weights.startswith((".", "/", "~")):
        raise ModelError(f"there are no weights at {weights}")
    return target, target, target


def choose_image(target: str) -> tuple[str, str, str]:
    """Return the short name, source and identity of an image encoder, by what `open_encoder` takes.

    Raises:
        ModelError: where it is nothing of these.
    """
    scheme, _, rest = target.partition(":")
    if scheme == "clip" and rest:
        name, source, identity = choose_clip(rest)
        return f"clip:{name}", f"clip:{source}", f"clip:{identity}"
    path = Path(target).expanduser()
    file = path / "encoder.safetensors" if path.is_dir() else path
    if file.is_file():
        return path.resolve().name, str(path), fingerprint(file)
    if not rest:
        raise ModelError(
            f"{target} is no finished run and no file of weights, and not timm:NAME, random:NAME or "
            "clip:ARCH/WEIGHTS"
        )
    return target, target, target


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
