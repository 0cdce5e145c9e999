"""What methods remember from step to step: a queue of earlier outputs, and a slow copy of the encoder."""

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize


def projector(width: int, layers: Sequence[int], *, final_norm: bool = False) -> nn.Sequential:
    """Build the projection MLP of SimCLR as the paper uses it: features (b, width) -> (b, layers[-1]).

    Linear without bias, BatchNorm and ReLU for each layer, the last one linear alone (Chen et al. 2020,
    section 2.1; widths 2048-2048-128 in El Banani et al. 2023). `final_norm` puts BatchNorm without gain and
    shift behind it, as SimSiam does.
    """
    modules: list[nn.Module] = []
    for after in layers[:-1]:
        modules += [nn.Linear(width, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        width = after
    modules.append(nn.Linear(width, layers[-1], bias=False))
    return nn.Sequential(*modules, *[nn.BatchNorm1d(layers[-1], affine=False)] * final_norm)


def predictor(width: int, hidden: int) -> nn.Sequential:
    """Build a prediction MLP: (b, width) -> (b, width) through a hidden layer with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, width),
    )


class Queue(nn.Module):
    """The last outputs, the oldest overwritten first; all of it is state that checkpoints keep."""

    def __init__(self, length: int, width: int) -> None:
        """Start with random directions, as MoCo does: they are told apart easily and soon gone."""
        super().__init__()
        self.register_buffer("rows", normalize(torch.randn(length, width), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.rows: Tensor
        self.place: Tensor

    @torch.no_grad()
    def push(self, rows: Float[Tensor, "b d"]) -> None:
        """Put rows in, of unit length; `place` stays on the device."""
        length = len(self.rows)
        at = (self.place + torch.arange(len(rows), device=rows.device)) % length
        self.rows.index_copy_(0, at, rows.detach())
        self.place.copy_((self.place + len(rows)) % length)

    def nearest(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Return for each row the most similar one in the queue."""
        with torch.no_grad():
            return self.rows[(normalize(rows, dim=1) @ self.rows.T).argmax(dim=1)]


class Slow(nn.Module):
    """A copy of modules whose weights follow the originals as a moving average, without gradients.

    Batch norm's statistics are its own, taken from the batches that it sees.
    """

    def __init__(self, *modules: nn.Module) -> None:
        """Copy modules."""
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(module) for module in modules)
        for parameter in self.copies.parameters():
            parameter.requires_grad_(False)  # torch's own name for it is positional

    @torch.no_grad()
    def follow(self, *modules: nn.Module, keep: float) -> None:
        """Move towards the originals: `keep` of one's own weights, the rest of theirs."""
        mine = list(self.copies.parameters())
        theirs = [p for module in modules for p in module.parameters()]
        for own, other in zip(mine, theirs, strict=True):
            own.lerp_(other, 1 - keep)


def rising(base: float, progress: float) -> float:
    """Raise a momentum from `base` to 1 along a cosine (Grill et al. 2020, section 3.3)."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2
