"""Batches of pairs, each a function of its step alone, so that a run may stop and go on anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from likewise.collection.packed import PackedImages
from likewise.draws import permutation
from likewise.launch import ordered_map
from likewise.neighbors.pairs import Pairs
from likewise.neighbors.vectors import RecordVectors
from likewise.pretraining.views import (
    ViewDraws,
    ViewRecipe,
    change_colours,
    crop_boxes,
    cut,
    draw_view,
    standardise,
)


@dataclass(frozen=True)
class Batch:
    """A batch of b pairs, two views each, before colours are changed.

    Attributes:
        anchors: (b,) int64 positions in the collection.
        partners: (b,) int64 positions, equal to the anchor's where it is paired with itself.
        crops: (2, b, 3, size, size) uint8.
        colours: Two (b, 9) arrays of draws in [0, 1).
        captions: (2, b, d) float32 unit vectors of what describes anchors and partners, zero where nothing
            does; None where no method asks for them.
    """

    anchors: np.ndarray
    partners: np.ndarray
    crops: Tensor
    colours: tuple[np.ndarray, np.ndarray]
    captions: Tensor | None = None

    def views(self, recipe: ViewRecipe, device: torch.device) -> Float[Tensor, "v b c h w"]:
        """Finish the views on a device: (2, b, 3, size, size) float32, standardised."""
        crops = self.crops.to(device, non_blocking=True).float() / 255
        return torch.stack(
            [
                standardise(change_colours(each, draws, recipe))
                for each, draws in zip(crops, self.colours, strict=True)
            ]
        )


class PairBatches:
    """The batches of a whole run."""

    def __init__(
        self,
        images: PackedImages,
        pairs: Pairs,
        recipe: ViewRecipe,
        *,
        batch_size: int,
        size: int,
        seed: int,
        captions: RecordVectors | None = None,
    ) -> None:
        """Serve pairs of images that take part; each is an anchor once an epoch, but for an incomplete batch.

        `captions` gives each batch the vectors of its captions.
        """
        self.images, self.pairs, self.recipe, self.captions = images, pairs, recipe, captions
        self.batch_size, self.size, self.seed = batch_size, size, seed
        self.anchors = np.intersect1d(images.usable, pairs.anchors)
        self._order = lru_cache(maxsize=2)(self._visit)

    @property
    def steps_per_epoch(self) -> int:
        """How many whole batches an epoch has."""
        return len(self.anchors) // self.batch_size

    def batch(self, step: int) -> Batch:
        """Make the batch of a step counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        anchors = self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        partners = self.pairs.partners(anchors, seed=self.seed, epoch=epoch)
        # Both views are drawn for the anchor: two anchors that share a partner must not share its view.
        draws = [draw_view(anchors, view, seed=self.seed, epoch=epoch) for view in (0, 1)]
        crops = torch.stack([self._cut(anchors, draws[0]), self._cut(partners, draws[1])])
        return Batch(
            anchors, partners, crops, (draws[0].colour, draws[1].colour), self._described(anchors, partners)
        )

    def stream(self, start: int, stop: int, workers: int) -> Iterator[Batch]:
        """Yield the batches of steps start to stop, made ahead of time by `workers` threads."""
        return ordered_map(self.batch, range(start, stop), workers)

    def _visit(self, epoch: int) -> np.ndarray:
        return self.anchors[permutation(len(self.anchors), seed=self.seed, epoch=epoch)]

    def _described(self, anchors: np.ndarray, partners: np.ndarray) -> Tensor | None:
        if self.captions is None:
            return None
        both = self.captions.of(np.concatenate([anchors, partners]))
        return torch.from_numpy(both).unflatten(0, (2, len(anchors)))

    def _cut(self, positions: np.ndarray, draws: ViewDraws) -> Tensor:
        boxes = crop_boxes(self.images.shapes(positions), draws.crop, self.recipe.crop)
        mirrored = draws.crop[:, -1] < self.recipe.flip
        return torch.stack(
            [
                cut(self.images.pixels(position), box, self.size, mirrored=bool(mirror))
                for position, box, mirror in zip(positions.tolist(), boxes, mirrored, strict=True)
            ]
        )
