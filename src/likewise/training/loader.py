"""Batches of pairs, each a function of its step alone, so that a run may stop and go on anywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from likewise.artifacts import Artifact, begin, load_array, read_array, shard_name, write_array
from likewise.data.dataset import Collection
from likewise.data.image_cache import PackedImages
from likewise.distributed import Processes
from likewise.models.text_tower import CONTEXT, tokenise
from likewise.neighbors.vectors import RecordVectors
from likewise.pairs.sampling import Pairs
from likewise.parallel import ordered_map
from likewise.progress import SILENT, Progress
from likewise.rng import permutation, uniforms
from likewise.training.augmentations import (
    ViewDraws,
    ViewRecipe,
    change_colours,
    crop_boxes,
    cut,
    draw_view,
    standardise,
    view_recipe,
)
from likewise.training.config import Showing
from likewise.training.methods.base import Shown

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


@dataclass(frozen=True)
class Batch:
    """A batch of b pairs, of which this process shows `part`, before colours are changed.

    Attributes:
        anchors: (b,) int64 positions in the collection.
        partners: One array (b,) for each partner that is shown, equal to the anchor's where it is paired with
            itself.
        sizes: How many pairs each process shows.
        crops: A tensor (part, 3, side, side) uint8 for each view, channels last in memory.
        colours: An array (part, 9) of draws in [0, 1) for each view.
        captions: (2, b, d) float32 unit vectors of what describes anchors and first partners, zero where
            nothing does; None where no method asks for them.
        tokens: (part, t) int64, a caption of each anchor or its partner; None where no method asks for them.
        groups: (b,) int64 labels; None where pairs are not made by them.
    """

    anchors: np.ndarray
    partners: Sequence[np.ndarray]
    sizes: tuple[int, ...]
    crops: Sequence[Tensor]
    colours: Sequence[np.ndarray]
    captions: Tensor | None = None
    tokens: Tensor | None = None
    groups: Tensor | None = None

    def shown(self, recipes: Sequence[ViewRecipe], device: torch.device, progress: float = 0.0) -> Shown:
        """Finish the views on a device, each by its recipe, and send what else a method needs there."""
        views = [
            standardise(change_colours(_floats(crops.to(device, non_blocking=True)), draws, recipe))
            for crops, draws, recipe in zip(self.crops, self.colours, recipes, strict=True)
        ]
        captions, tokens, groups = (
            None if each is None else each.to(device, non_blocking=True)
            for each in (self.captions, self.tokens, self.groups)
        )
        return Shown(
            views=views,
            sizes=self.sizes,
            captions=captions,
            tokens=tokens,
            groups=groups,
            progress=progress,
        )


def _floats(crops: Tensor) -> Tensor:
    """Return pixels (b, 3, h, w) uint8 as float32 in [0, 1], each channel by itself."""
    # In place, as fresh memory for a large batch takes longer than the division.
    return crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a method wants to know of captions beside the images.

    Attributes:
        vectors: Their embeddings, an image.
        tokens: They themselves.
        of_partners: Whether an anchor's caption is that of its partner.
        captioned: Images that have a caption, (n,) bool; the others take no part. None where all do.
    """

    vectors: RecordVectors | None = None
    tokens: Tokens | None = None
    of_partners: bool = True
    captioned: np.ndarray | None = None


NO_WORDS, ALONE = Words(), Processes()


class PairBatches:
    """The batches of a whole run."""

    def __init__(
        self,
        images: PackedImages,
        pairs: Pairs,
        shown: Sequence[Showing],
        *,
        batch_size: int,
        seed: int,
        words: Words = NO_WORDS,
        among: Processes = ALONE,
    ) -> None:
        """Serve pairs of images that take part; each is an anchor once an epoch, but for an incomplete batch.

        Args:
            images: Their pixels; those that cannot be read take no part.
            pairs: Who is shown with whom.
            shown: The views of a pair.
            batch_size: Pairs a batch, over all processes.
            seed: Decides order, partners and views.
            words: What is wanted of the captions.
            among: Which part of each batch is this process's.
        """
        self.images, self.pairs, self.showings, self.words = images, pairs, tuple(shown), words
        self.recipes = tuple(view_recipe(each.views, each.crop) for each in shown)
        self.batch_size, self.seed, self.among = batch_size, seed, among
        self.anchors = np.intersect1d(images.usable, pairs.anchors)
        if words.captioned is not None:
            self.anchors = self.anchors[words.captioned[self.anchors]]
        self._partners = max(each.who for each in shown)
        self._order = lru_cache(maxsize=2)(self._visit)

    @property
    def steps_per_epoch(self) -> int:
        """How many whole batches an epoch has."""
        return len(self.anchors) // self.batch_size

    def batch(self, step: int) -> Batch:
        """Make the batch of a step counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        anchors = self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        return self._made(anchors, self._drawn_partners(anchors, epoch), epoch)

    def shown_pairs(self, anchors: np.ndarray, partners: np.ndarray) -> Batch:
        """Make a batch of given pairs, shown as in the first epoch."""
        return self._made(anchors, [partners], 0)

    def stream(self, start: int, stop: int, workers: int) -> Iterator[Batch]:
        """Yield the batches of steps start to stop, made ahead of time by `workers` threads."""
        return ordered_map(self.batch, range(start, stop), workers)

    def _made(self, anchors: np.ndarray, partners: list[np.ndarray], epoch: int) -> Batch:
        part = self.among.mine(len(anchors))
        of = [each[part] for each in (anchors, *partners)]
        # All views are drawn for the anchor: two anchors that share a partner must not share its view.
        draws = [draw_view(of[0], view, seed=self.seed, epoch=epoch) for view in range(len(self.showings))]
        return Batch(
            anchors,
            partners,
            self.among.sizes(len(anchors)),
            self._cut(of, draws),
            [draw.colour for draw in draws],
            self._described(anchors, partners),
            self._tokens(anchors[part], [each[part] for each in partners], epoch),
            None if self.pairs.groups is None else torch.from_numpy(self.pairs.groups[anchors]),
        )

    def _visit(self, epoch: int) -> np.ndarray:
        return self.anchors[permutation(len(self.anchors), seed=self.seed, epoch=epoch)]

    def _drawn_partners(self, anchors: np.ndarray, epoch: int) -> list[np.ndarray]:
        """Draw as many partners as are shown, and one at least, whose caption may be wanted."""
        count = max(1, self._partners)
        return [
            self.pairs.partners(anchors, seed=self.seed, epoch=epoch, turn=nth / count)
            for nth in range(count)
        ]

    def _described(self, anchors: np.ndarray, partners: Sequence[np.ndarray]) -> Tensor | None:
        if self.words.vectors is None:
            return None
        both = self.words.vectors.of(np.concatenate([anchors, partners[0]]))
        return torch.from_numpy(both).unflatten(0, (2, len(anchors)))

    def _tokens(self, anchors: np.ndarray, partners: Sequence[np.ndarray], epoch: int) -> Tensor | None:
        tokens = self.words.tokens
        if tokens is None:
            return None
        whose = anchors
        if self.words.of_partners:
            whose = np.where(tokens.captioned[partners[0]], partners[0], anchors)
        return tokens.of(whose, seed=self.seed, epoch=epoch)

    def _cut(self, of: Sequence[np.ndarray], draws: Sequence[ViewDraws]) -> list[Tensor]:
        """Cut all views, a pair at a time: an image that is shown more than once in it is decoded once."""
        whose = [of[each.who] for each in self.showings]
        boxes = [
            crop_boxes(self.images.shapes(positions), draw.crop, recipe.crop)
            for positions, draw, recipe in zip(whose, draws, self.recipes, strict=True)
        ]
        views: list[list[Tensor]] = [[] for _ in self.showings]
        for row in range(len(of[0])):
            decoded: dict[int, np.ndarray] = {}
            for view, (each, recipe) in enumerate(zip(self.showings, self.recipes, strict=True)):
                position = int(whose[view][row])
                if position not in decoded:
                    decoded[position] = self.images.pixels(position)
                mirrored = bool(draws[view].crop[row, -1] < recipe.flip)
                views[view].append(cut(decoded[position], boxes[view][row], each.size, mirrored=mirrored))
        # Pixels lie as they were cut, channels last: to lay each channel by itself is left to the device.
        return [torch.stack([view.permute(1, 2, 0) for view in each]).permute(0, 3, 1, 2) for each in views]
