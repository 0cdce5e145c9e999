"""The captions of a collection as tokens: made once, then looked up by position."""

import numpy as np
import torch
from torch import Tensor

from likewise.artifacts import Artifact, begin, load_array, read_array, shard_name, write_array
from likewise.collection.records import Collection
from likewise.draws import uniforms
from likewise.models.text import CONTEXT, tokenise
from likewise.progress import SILENT, Progress

KIND = "tokens"
_STREAM = 102  # keeps the draw of captions apart from those of partners and views
_AT_ONCE = 1024


class Tokens:
    """Random access to the tokens of captions."""

    def __init__(self, artifact: Artifact, kept: np.ndarray | None = None) -> None:
        """Map the shards; `kept` tells which captions count, (captions,) bool, all where not given."""
        shards = range(artifact.manifest.counts["shards"])
        self.key = artifact.manifest.key
        self._rows = [read_array(artifact.path / shard_name("tokens", i, "npy")) for i in shards]
        counts = np.concatenate([load_array(artifact.path / shard_name("counts", i, "npy")) for i in shards])
        self._begins = np.concatenate([[0], np.cumsum([len(rows) for rows in self._rows])])
        owners = np.repeat(np.arange(len(counts)), counts)
        self._kept = np.arange(len(owners)) if kept is None else np.flatnonzero(kept)
        owners = owners[self._kept]
        self._first = np.searchsorted(owners, np.arange(len(counts)))
        self._count = np.searchsorted(owners, np.arange(len(counts)), side="right") - self._first

    @property
    def captioned(self) -> np.ndarray:
        """Which images have a caption: (n,) bool."""
        return self._count > 0

    def of(self, positions: np.ndarray, *, seed: int, epoch: int) -> Tensor:
        """Return one caption an image, drawn evenly: (b,) int64 -> (b, t) int64, t as the longest needs."""
        chance = uniforms(positions, 1, seed=seed, epoch=epoch, stream=_STREAM)[:, 0]
        rows = self._kept[self._first[positions] + (chance * self._count[positions]).astype(np.int64)]
        shard = np.searchsorted(self._begins, rows, side="right") - 1
        found = np.stack([
            self._rows[s][row - self._begins[s]] for s, row in zip(shard.tolist(), rows.tolist(), strict=True)
        ])  # fmt: skip
        longest = int((found > 0).sum(axis=1).max())
        return torch.from_numpy(found[:, :longest].astype(np.int64))


def make_tokens(
    collection: Collection, kept: np.ndarray | None = None, *, progress: Progress = SILENT
) -> Tokens:
    """Tokenise all captions of a collection; finished shards are kept on a rerun.

    Args:
        collection: The captions.
        kept: Which of them count, (captions,) bool; all of them where not given.
        progress: Where to report.

    Raises:
        DependencyError: where open_clip, whose tokenizer it is, is not installed.
    """
    path = collection.path / "tokens"
    artifact = begin(path, KIND, {"tokenizer": "clip", "context": CONTEXT}, {"collection": collection.key})
    if artifact.complete:
        return Tokens(artifact, kept)
    shards = range(len(collection.shards))
    with progress.task("tokens", len(collection), "images") as task:
        for shard in shards:
            captions = collection.columns(shard, ["captions"])["captions"]
            if not (path / shard_name("counts", shard, "npy")).is_file():
                flat = [caption for each in captions for caption in each]
                parts = [tokenise(flat[i : i + _AT_ONCE]).numpy() for i in range(0, len(flat), _AT_ONCE)]
                rows = np.concatenate([np.empty((0, CONTEXT)), *parts]).astype(np.uint16)
                write_array(path / shard_name("tokens", shard, "npy"), rows)
                # It comes last: where it exists, its tokens are whole.
                write_array(
                    path / shard_name("counts", shard, "npy"), np.array([len(c) for c in captions], np.int64)
                )
            task.advance(len(captions))
    return Tokens(artifact.finish({"shards": len(shards), "images": len(collection)}), kept)
