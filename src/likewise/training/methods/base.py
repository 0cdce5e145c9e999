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

from likewise.distributed import CPUSyncBatchNorm, all_gather_with_grad


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step shows.

    A batch has b pairs, of which this process has its own part: `views` and `tokens` are of that part, the
    rest is of the whole batch.

    Attributes:
        views: The views that the method asked for, each (part, 3, side, side) float32, standardised.
        rank_sizes: How many pairs each process has; they sum to b.
        caption_embeddings: Unit vectors of what describes anchors and partners, (2, b, d); zero where
            nothing does.
        tokens: The caption of each anchor, (part, t).
        labels: Which label each pair is of, (b,); None where pairs are not made by labels.
        train_fraction: The share of the run that lies behind, in [0, 1).
    """

    views: Sequence[Tensor]
    rank_sizes: tuple[int, ...]
    caption_embeddings: Float[Tensor, "two b d"] | None = None
    tokens: Int[Tensor, "part t"] | None = None
    labels: Int[Tensor, " b"] | None = None
    train_fraction: float = 0.0


@dataclass(frozen=True)
class StepOutput:
    """What a method makes of a batch.

    Attributes:
        loss: The scalar to descend, of the whole batch.
        features: The backbone's features of all views of this process, detached, for the watch on collapse.
        logs: Further scalars, left on the device until the loop writes them.
        skip_update: 1 where the batch teaches nothing and no weight should move, else 0; None where that
            cannot be.
    """

    loss: Float[Tensor, ""]
    features: Float[Tensor, "n w"]
    logs: dict[str, Tensor] = field(default_factory=dict)
    skip_update: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class LossOutput:
    """A loss with what is to be logged beside it; the fields are those of `Step`."""

    loss: Float[Tensor, ""]
    logs: dict[str, Tensor] = field(default_factory=dict)
    skip_update: Float[Tensor, ""] | None = None


class Method(nn.Module, ABC):
    """A loss together with the modules it trains; `backbone` is what is kept afterwards.

    A step has two halves: each process embeds its own part of the batch, then all judge the whole. So no
    method knows how many processes there are, nor in how many chunks its part passes through the network.

    Attributes:
        grad_cache_chunk_size: Pairs that all processes embed at a time; None for the whole batch at once.
    """

    backbone: nn.Module
    grad_cache_chunk_size: int | None = None

    def on_step_start(self, batch: Batch) -> None:
        """Do what is done once a step, before anything is embedded."""

    @abstractmethod
    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features (n, w) of all views, and what is to be judged: tensors of `part` rows each."""

    @abstractmethod
    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the loss of the whole batch from outputs of b rows each, float32."""

    def forward(self, batch: Batch) -> StepOutput:
        """Embed, gather, judge."""
        self.on_step_start(batch)
        features, outputs = _encode_in_chunks(self, batch)
        # Similarities decide who is picked: too much for the 8 bits of mixed precision.
        gathered = [all_gather_with_grad(output.float(), batch.rank_sizes) for output in outputs]
        with torch.autocast(features.device.type, enabled=False):
            loss_output = self.compute_loss(gathered, batch)
        return StepOutput(loss_output.loss, features.detach(), loss_output.logs, loss_output.skip_update)


def forward_views(backbone: nn.Module, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the features of each view: views of one size pass through the backbone as one batch.

    Batch norm's statistics are then those of all these views, as in the SimCLR paper.
    """
    image_sizes = [view.shape[-1] for view in views]
    features: list[Tensor] = []
    while len(features) < len(views):
        start = len(features)
        stop = next((i for i in range(start, len(views)) if image_sizes[i] != image_sizes[start]), len(views))
        images = torch.cat(list(views[start:stop])).contiguous(memory_format=torch.channels_last)
        features += backbone(images).chunk(stop - start)
    return tuple(features)


def _encode_in_chunks(method: Method, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
    """Embed a part of a batch chunk by chunk, and once more in the backward pass; one chunk is just embedded.

    This is gradient caching (Gao et al. 2021, arXiv 2101.06983): the loss is that of the whole batch, and one
    chunk's activations are in memory at a time.
    """
    # As many in every process, whose norms wait for each other; and two pairs at least, for norms to compare.
    num_chunks = min(
        -(-sum(batch.rank_sizes) // (method.grad_cache_chunk_size or sum(batch.rank_sizes))),
        min(batch.rank_sizes) // 2,
    )
    if num_chunks <= 1:
        return method.encode(batch)

    def encode_chunk(tokens: Tensor | None, *views: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        return method.encode(replace(batch, views=views, tokens=tokens))

    view_chunks = [view.tensor_split(num_chunks) for view in batch.views]
    token_chunks = [None] * num_chunks if batch.tokens is None else batch.tokens.tensor_split(num_chunks)
    chunk_outputs = [
        # Tensors are arguments, so that the generators of their devices are set back for the repetition.
        checkpoint(
            encode_chunk,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _frozen_bn_stats(method)),
        )
        for inputs in zip(token_chunks, *view_chunks, strict=True)
    ]
    outputs = [torch.cat(tensors) for tensors in zip(*(outputs for _, outputs in chunk_outputs), strict=True)]
    return torch.cat([features for features, _ in chunk_outputs]), outputs


@contextmanager
def _frozen_bn_stats(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are while batches pass through."""
    norms: list[Any] = [norm for norm in module.modules() if isinstance(norm, _BatchNorm | CPUSyncBatchNorm)]
    saved_counts = [
        (norm.num_batches_tracked, norm.num_batches_tracked.clone())
        for norm in norms
        if norm.num_batches_tracked is not None
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, saved in saved_counts:
            counter.copy_(saved)
