"""What methods remember from step to step: a queue of earlier outputs, and a slow copy of the encoder."""

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize


def projection_head(in_dim: int, dims: Sequence[int], *, final_norm: bool = False) -> nn.Sequential:
    """Build the projection MLP of SimCLR as the paper uses it: features (b, width) -> (b, layers[-1]).

    Linear without bias, BatchNorm and ReLU for each layer, the last one linear alone (Chen et al. 2020,
    section 2.1; widths 2048-2048-128 in El Banani et al. 2023). `final_norm` puts BatchNorm without gain and
    shift behind it, as SimSiam does.
    """
    layers: list[nn.Module] = []
    for out_dim in dims[:-1]:
        layers += [nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim), nn.ReLU(inplace=True)]
        in_dim = out_dim
    layers.append(nn.Linear(in_dim, dims[-1], bias=False))
    return nn.Sequential(*layers, *[nn.BatchNorm1d(dims[-1], affine=False)] * final_norm)


def prediction_head(dim: int, hidden_dim: int) -> nn.Sequential:
    """Build a prediction MLP: (b, width) -> (b, width) through a hidden layer with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, dim),
    )


class MemoryBank(nn.Module):
    """The last outputs, the oldest overwritten first; all of it is state that checkpoints keep."""

    def __init__(self, size: int, dim: int) -> None:
        """Start with random directions, as MoCo does: they are told apart easily and soon gone."""
        super().__init__()
        self.register_buffer("bank", normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.long))
        self.bank: Tensor
        self.ptr: Tensor

    @torch.no_grad()
    def enqueue(self, vectors: Float[Tensor, "b d"]) -> None:
        """Put rows in, of unit length; `place` stays on the device."""
        size = len(self.bank)
        indices = (self.ptr + torch.arange(len(vectors), device=vectors.device)) % size
        self.bank.index_copy_(0, indices, vectors.detach())
        self.ptr.copy_((self.ptr + len(vectors)) % size)

    def nearest(self, queries: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return for each row the most similar one in the queue."""
        with torch.no_grad():
            return self.bank[(normalize(queries, dim=1) @ self.bank.T).argmax(dim=1)]


class EMAModel(nn.Module):
    """A copy of modules whose weights follow the originals as a moving average, without gradients.

    Batch norm's statistics are its own, taken from the batches that it sees.
    """

    def __init__(self, *modules: nn.Module) -> None:
        """Copy modules."""
        super().__init__()
        self.ema_modules = nn.ModuleList(copy.deepcopy(module) for module in modules)
        for parameter in self.ema_modules.parameters():
            parameter.requires_grad_(False)  # torch's own name for it is positional

    @torch.no_grad()
    def update(self, *modules: nn.Module, momentum: float) -> None:
        """Move towards the originals: `momentum` of one's own weights, the rest of theirs."""
        ema_params = list(self.ema_modules.parameters())
        params = [p for module in modules for p in module.parameters()]
        for ema_param, param in zip(ema_params, params, strict=True):
            ema_param.lerp_(param, 1 - momentum)


def cosine_momentum(base_momentum: float, train_fraction: float) -> float:
    """Raise a momentum from `base_momentum` to 1 along a cosine (Grill et al. 2020, section 3.3)."""
    return 1 - (1 - base_momentum) * (math.cos(math.pi * train_fraction) + 1) / 2
