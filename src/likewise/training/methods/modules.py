"""Modules that methods share: projection and prediction heads, memory bank, EMA model."""

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize


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
