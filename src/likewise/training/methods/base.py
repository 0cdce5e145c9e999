"""The one interface of all methods."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from likewise.distributed import SharedBatchNorm, gather


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
    method knows how many processes there are, nor in how many chunks its part passes through the network.

    Attributes:
        chunk_size: Pairs that all processes embed at a time; None for the whole batch at once.
    """

    backbone: nn.Module
    chunk_size: int | None = None

    def begin(self, shown: Shown) -> None:
        """Do what is done once a step, before anything is embedded."""

    @abstractmethod
    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features (n, w) of all views, and what is to be judged: tensors of `part` rows each."""

    @abstractmethod
    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss of the whole batch from outputs of b rows each, float32."""

    def forward(self, shown: Shown) -> Step:
        """Embed, gather, judge."""
        self.begin(shown)
        features, outputs = _embed_in_chunks(self, shown)
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


def _embed_in_chunks(method: Method, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
    """Embed a part of a batch chunk by chunk, and once more in the backward pass; one chunk is just embedded.

    This is gradient caching (Gao et al. 2021, arXiv 2101.06983): the loss is that of the whole batch, and one
    chunk's activations are in memory at a time.
    """
    # As many in every process, whose norms wait for each other; and two pairs at least, for norms to compare.
    chunks = min(-(-sum(shown.sizes) // (method.chunk_size or sum(shown.sizes))), min(shown.sizes) // 2)
    if chunks <= 1:
        return method.embed(shown)

    def embed(tokens: Tensor | None, *views: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        return method.embed(replace(shown, views=views, tokens=tokens))

    each = [view.tensor_split(chunks) for view in shown.views]
    tokens = [None] * chunks if shown.tokens is None else shown.tokens.tensor_split(chunks)
    parts = [
        # Tensors are arguments, so that the generators of their devices are set back for the repetition.
        checkpoint(
            embed,
            *given,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _norms_remember_nothing(method)),
        )
        for given in zip(tokens, *each, strict=True)
    ]
    outputs = [torch.cat(rows) for rows in zip(*(outputs for _, outputs in parts), strict=True)]
    return torch.cat([features for features, _ in parts]), outputs


@contextmanager
def _norms_remember_nothing(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are while batches pass through."""
    norms: list[Any] = [m for m in module.modules() if isinstance(m, _BatchNorm | SharedBatchNorm)]
    counted = [
        (m.num_batches_tracked, m.num_batches_tracked.clone())
        for m in norms
        if m.num_batches_tracked is not None
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, before in counted:
            counter.copy_(before)
