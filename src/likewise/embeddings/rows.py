"""The rows of one shard of embeddings, whatever is embedded."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import numpy as np

from likewise.collection.records import Collection
from likewise.embeddings.base import CaptionEncoder
from likewise.progress import Task

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
