"""The one interface of all methods."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from likewise.pretraining.processes import gather


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a step shows.

    A batch has b pairs, of which this process has its own part: `views` and `tokens` are of that part, the
    rest is of the whole batch.

    Attributes:
        views: The views that the method asked for, each (part, 3, side, side) float32, standardised.
        sizes: How many pairs each process has; they sum to b.
        captions: Unit vectors of what describes anchors and partners, (2, b, d); zero where nothing does.
        tokens: The caption of each anchor, (part, t).
        groups: Which label each pair is of, (b,); None where pairs are not made by labels.
        progress: The share of the run that lies behind, in [0, 1).
    """

    views: Sequence[Tensor]
    sizes: tuple[int, ...]
    captions: Float[Tensor, "two b d"] | None = None
    tokens: Int[Tensor, "part t"] | None = None
    groups: Int[Tensor, " b"] | None = None
    progress: float = 0.0


@dataclass(frozen=True)
class Step:
    """What a method makes of a batch.

    Attributes:
        loss: The scalar to descend, of the whole batch.
        features: The backbone's features of all views of this process, detached, for the watch on collapse.
        logs: Further scalars, left on the device until the loop writes them.
        skip: 1 where the batch teaches nothing and no weight should move, else 0; None where that cannot be.
    """

    loss: Float[Tensor, ""]
    features: Float[Tensor, "n w"]
    logs: dict[str, Tensor] = field(default_factory=dict)
    skip: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class Judged:
    """A loss with what is to be logged beside it; the fields are those of `Step`."""

    loss: Float[Tensor, ""]
    logs: dict[str, Tensor] = field(default_factory=dict)
    skip: Float[Tensor, ""] | None = None


class Method(nn.Module, ABC):
    """A loss together with the modules it trains; `backbone` is what is kept afterwards.

    A step has two halves: each process embeds its own part of the batch, then all judge the whole. So no
    method knows how many processes there are.
    """

    backbone: nn.Module

    @abstractmethod
    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features (n, w) of all views, and what is to be judged: tensors of `part` rows each."""

    @abstractmethod
    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss of the whole batch from outputs of b rows each, float32."""

    def forward(self, shown: Shown) -> Step:
        """Embed, gather, judge."""
        features, outputs = self.embed(shown)
        # Similarities decide who is picked: too much for the 8 bits of mixed precision.
        whole = [gather(each.float(), shown.sizes) for each in outputs]
        with torch.autocast(features.device.type, enabled=False):
            judged = self.judge(whole, shown)
        return Step(judged.loss, features.detach(), judged.logs, judged.skip)


def encode(backbone: nn.Module, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the features of each view: views of one size pass through the backbone as one batch.

    Batch norm's statistics are then those of all these views, as in the SimCLR paper.
    """
    sides = [view.shape[-1] for view in views]
    features: list[Tensor] = []
    while len(features) < len(views):
        first = len(features)
        last = next((i for i in range(first, len(views)) if sides[i] != sides[first]), len(views))
        together = torch.cat(list(views[first:last])).contiguous(memory_format=torch.channels_last)
        features += backbone(together).chunk(last - first)
    return tuple(features)
