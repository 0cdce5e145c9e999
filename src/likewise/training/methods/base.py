"""The interface of all methods, gradient caching, and the modules that methods share."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from likewise.distributed import CPUSyncBatchNorm, all_gather_with_grad


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of b pairs on the device.

    `views` and `tokens` belong to the local part of this process; all other fields to the whole batch.

    Attributes:
        views: The views of the method, each (local, 3, size, size) float32, normalized.
        rank_sizes: Pairs per process; they sum to b.
        caption_embeddings: (2, b, d) float32, the caption embeddings of anchors and partners, of unit length;
            zero without a caption.
        tokens: (local, t) int64, the tokenized caption of each pair.
        labels: (b,) int64, the label of each pair; None unless pairs are sampled by label.
        train_fraction: The completed fraction of the run, in [0, 1).
    """

    views: Sequence[Tensor]
    rank_sizes: tuple[int, ...]
    caption_embeddings: Float[Tensor, "two b d"] | None = None
    tokens: Int[Tensor, "part t"] | None = None
    labels: Int[Tensor, " b"] | None = None
    train_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The loss of a batch and what is logged beside it.

    Attributes:
        loss: The loss of the whole batch.
        features: (n, feature_dim), the backbone's features of all local views, detached; set by
            `Method.forward`.
        logs: Further scalars to log, on the device.
        skip_update: 1 if the optimizer update must be skipped (a batch without pairs), else 0; None if the
            method never skips.
    """

    loss: Float[Tensor, ""]
    features: Float[Tensor, "n w"] | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)
    skip_update: Float[Tensor, ""] | None = None


class Method(nn.Module, ABC):
    """A pre-training objective with the modules it trains; the backbone is the result of a run.

    A step has two halves: `encode` runs on the local part of the batch, `compute_loss` on the outputs of the
    whole batch, gathered over all processes. Methods therefore depend neither on the number of processes nor
    on the number of chunks in which the local part passes through the network.

    Attributes:
        backbone: Images (b, 3, h, w) -> features (b, feature_dim).
        grad_cache_chunk_size: Pairs of all processes per chunk; None for the whole batch at once.
    """

    grad_cache_chunk_size: int | None = None

    def __init__(self, backbone: nn.Module, feature_dim: int, options: Any) -> None:
        """Set the backbone; subclasses add their heads.

        Args:
            backbone: Images (b, 3, h, w) -> features (b, feature_dim).
            feature_dim: Features per image.
            options: The options of the method, of its own class in `methods.options`.
        """
        super().__init__()
        self.backbone = backbone

    def on_step_start(self, batch: Batch) -> None:
        """Update state at the start of a step, such as a momentum encoder; nothing by default."""

    @abstractmethod
    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Encode the local part of a batch.

        Returns:
            The features (n, feature_dim) of all views, and the inputs of `compute_loss`, (local, …) each.
        """

    @abstractmethod
    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the loss of the whole batch from its gathered outputs, (b, …) float32 each."""

    def forward(self, batch: Batch) -> StepOutput:
        """Encode the local part, gather the outputs of all processes, and compute the loss."""
        self.on_step_start(batch)
        features, outputs = _encode_in_chunks(self, batch)
        # In float32: the 8 bits of mixed precision are too few to rank similarities.
        gathered = [all_gather_with_grad(output.float(), batch.rank_sizes) for output in outputs]
        with torch.autocast(features.device.type, enabled=False):
            output = self.compute_loss(gathered, batch)
        return replace(output, features=features.detach())


class SiameseMethod(Method):
    """A method that encodes all views by one backbone and one projection head."""

    def __init__(
        self, backbone: nn.Module, feature_dim: int, options: Any, *, final_norm: bool = False
    ) -> None:
        """Set the backbone and the projection head of `options.projector_dims`."""
        super().__init__(backbone, feature_dim, options)
        self.projector = projection_head(feature_dim, options.projector_dims, final_norm=final_norm)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features and the projection of each view."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        return features, self.projector(features).chunk(len(batch.views))


class EMAPredictorMethod(SiameseMethod):
    """A method whose predictions of each view match the projections of an EMA copy, as in BYOL and MoCo v3.

    The momentum of the copy rises to 1 along a cosine.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, options: Any) -> None:
        """Add a projection head, a prediction head, and an EMA copy of backbone and projection head."""
        super().__init__(backbone, feature_dim, options)
        self.predictor = prediction_head(options.projector_dims[-1], options.predictor_hidden_dim)
        self.ema_model = EMAModel(self.backbone, self.projector)
        self.ema_momentum = options.ema_momentum

    def on_step_start(self, batch: Batch) -> None:
        """Update the EMA copy."""
        if self.training:
            momentum = cosine_momentum(self.ema_momentum, batch.train_fraction)
            self.ema_model.update(self.backbone, self.projector, momentum=momentum)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features, the predictions of both views, and their projections by the EMA copy."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        predictions = self.predictor(self.projector(features))
        # Last: the second forward pass of gradient caching stops before it.
        ema_backbone, ema_projector = self.ema_model.ema_modules
        with torch.no_grad():
            targets = ema_projector(torch.cat(forward_views(ema_backbone, batch.views)))
        return features, (*predictions.chunk(2), *targets.chunk(2))


def forward_views(backbone: nn.Module, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the features of each view; consecutive views of one size pass through the backbone together.

    The statistics of batch norm are then those of all these views, as in the SimCLR paper.
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
    """Encode the local part in chunks that are encoded again in the backward pass (gradient caching).

    The loss is that of the whole batch, but only the activations of one chunk are in memory at a time (Gao et
    al. 2021, arXiv 2101.06983).
    """
    # The same number in every process, because batch norm synchronizes; at least two pairs per chunk.
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
        # Tensors are arguments, so that checkpoint restores the generators of their devices.
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
    """Keep the running statistics of batch norm unchanged while batches pass through."""
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


def projection_head(in_dim: int, dims: Sequence[int], *, final_norm: bool = False) -> nn.Sequential:
    """Build the projection MLP of SimCLR, (b, in_dim) -> (b, dims[-1]).

    Each layer is Linear without bias, BatchNorm and ReLU; the last one is Linear alone (Chen et al. 2020,
    section 2.1; dims 2048-2048-128 in El Banani et al. 2023).

    Args:
        in_dim: Width of the features.
        dims: Widths of the layers.
        final_norm: End with BatchNorm without gain and shift, as SimSiam does.
    """
    layers: list[nn.Module] = []
    for out_dim in dims[:-1]:
        layers += [nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim), nn.ReLU(inplace=True)]
        in_dim = out_dim
    layers.append(nn.Linear(in_dim, dims[-1], bias=False))
    return nn.Sequential(*layers, *[nn.BatchNorm1d(dims[-1], affine=False)] * final_norm)


def prediction_head(dim: int, hidden_dim: int) -> nn.Sequential:
    """Build a prediction MLP, (b, dim) -> (b, dim), with one hidden layer, BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, dim),
    )


class MemoryBank(nn.Module):
    """A queue of the last outputs; its buffers are part of checkpoints."""

    def __init__(self, size: int, dim: int) -> None:
        """Initialize with random unit vectors (as in MoCo), which are soon overwritten."""
        super().__init__()
        self.register_buffer("bank", normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.long))
        self.bank: Tensor
        self.ptr: Tensor

    @torch.no_grad()
    def enqueue(self, vectors: Float[Tensor, "b d"]) -> None:
        """Overwrite the oldest vectors with new ones, of unit length; `ptr` stays on the device."""
        size = len(self.bank)
        indices = (self.ptr + torch.arange(len(vectors), device=vectors.device)) % size
        self.bank.index_copy_(0, indices, vectors.detach())
        self.ptr.copy_((self.ptr + len(vectors)) % size)

    def nearest(self, queries: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return the most similar vector of the bank for each query."""
        with torch.no_grad():
            return self.bank[(normalize(queries, dim=1) @ self.bank.T).argmax(dim=1)]


class EMAModel(nn.Module):
    """A copy of modules whose weights are an exponential moving average (EMA) of the originals.

    Buffers are not averaged: batch norm takes its statistics from the batches that pass through the copy.
    """

    def __init__(self, *modules: nn.Module) -> None:
        """Copy modules, without gradients."""
        super().__init__()
        self.ema_modules = nn.ModuleList(copy.deepcopy(module) for module in modules)
        for parameter in self.ema_modules.parameters():
            parameter.requires_grad_(False)  # torch's own name for it is positional

    @torch.no_grad()
    def update(self, *modules: nn.Module, momentum: float) -> None:
        """Set each weight to `momentum` times itself plus `1 - momentum` times the original."""
        ema_params = list(self.ema_modules.parameters())
        params = [p for module in modules for p in module.parameters()]
        for ema_param, param in zip(ema_params, params, strict=True):
            ema_param.lerp_(param, 1 - momentum)


def cosine_momentum(base_momentum: float, train_fraction: float) -> float:
    """Return a momentum that rises to 1 along a cosine (Grill et al. 2020, section 3.3)."""
    return 1 - (1 - base_momentum) * (math.cos(math.pi * train_fraction) + 1) / 2
