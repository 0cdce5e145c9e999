"""The processes of one run: torchrun starts them, each takes a slice of every batch, losses see the whole."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel


def leads() -> bool:
    """Tell whether this is the process that speaks, of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


# The others wait while the one that leads packs images and searches for neighbors, which may take days.
_PATIENCE = timedelta(days=14)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    @property
    def here(self) -> int:
        """How many of the processes share this machine, as torchrun tells."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.count > 1 else 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here, on the host."""
        self.agree()

    def agree(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any process has raised it; on the host, so that no device waits."""
        if self.count == 1:
            return list(flags)
        raised = torch.tensor([*flags, False], dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()[:-1]]

    def sizes(self, rows: int) -> tuple[int, ...]:
        """Return how many of a batch's rows each process takes: contiguous, the first ones one more."""
        share, rest = divmod(rows, self.count)
        return tuple(share + (rank < rest) for rank in range(self.count))

    def mine(self, rows: int) -> slice:
        """Return which of a batch's rows this process takes."""
        sizes = self.sizes(rows)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started; alone where it did not.

    Host tensors go through gloo, those of a GPU through nccl.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Return this process's own GPU where several share a machine."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(local)
    return local


def gather(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Put the rows of all processes one below the other, with gradients to each.

    Every process computes the same loss on the whole, so each row receives its gradient once a process;
    DistributedDataParallel's mean over processes then makes it the gradient of that one loss.

    Args:
        rows: (sizes[rank], …) of this process.
        sizes: How many rows each process has.

    Returns:
        (sum of sizes, …), in the order of ranks.
    """
    if len(sizes) == 1:
        return rows
    missing = max(sizes) - len(rows)
    padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows
    parts = _Gather.apply(padded).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


# torch.distributed.nn.functional has both, but deprecated; what is to follow it has no stable name yet.
class _Gather(torch.autograd.Function):
    """The equally many rows of all processes, one below the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ARG004  # torch's own signature
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(_count())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004  # torch's own signature
        return _total(gradients[0]).chunk(_count())[dist.get_rank()]


class _Sum(torch.autograd.Function):
    """The sum over all processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004  # torch's own signature
        return _total(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004  # torch's own signature
        return _total(gradients[0])


def _count() -> int:
    return dist.get_world_size()


def _total(values: Tensor) -> Tensor:
    total = values.contiguous().clone()
    dist.all_reduce(total)
    return total


class SharedBatchNorm(nn.Module):
    """Batch norm over the rows of all processes, as torch's SyncBatchNorm, which does not run on a CPU.

    Parameters and buffers have the names of the norm that it stands for, so weights fit both.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        """Take the parameters, buffers and, for timm's norms, the activation of a norm."""
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.eps, self.momentum = norm.eps, 0.1 if norm.momentum is None else norm.momentum
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.drop = norm.get_submodule("drop") if "drop" in norm._modules else nn.Identity()
        self.act = norm.get_submodule("act") if "act" in norm._modules else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b, c, …) by the moments of all processes in training, by the running ones else."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean, var = self._moments(x.float()) if self.training else (self.running_mean, self.running_var)
        scale = torch.rsqrt(var + self.eps)
        scale, shift = (scale, -mean * scale) if self.weight is None else (
            self.weight * scale, self.bias - mean * scale * self.weight)  # fmt: skip
        return self.act(self.drop((x.float() * scale.view(shape) + shift.view(shape)).to(x.dtype)))

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        over = [dim for dim in range(x.ndim) if dim != 1]
        rows = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
        total = _Sum.apply(torch.cat([x.sum(dim=over), rows]))
        mean = total[:-1] / total[-1]
        # A second round, because the mean of squares less the square of the mean loses digits.
        away = x - mean.view(1, -1, *[1] * (x.ndim - 2))
        var = _Sum.apply(away.square().sum(dim=over)) / total[-1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total[-1] / (total[-1] - 1), self.momentum)
        return mean, var


def share_batch_norms(module: nn.Module, device: torch.device) -> None:
    """Let every batch norm below a module see the rows of all processes."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        for name, child in module.named_children():
            module.add_module(name, convert_sync_batchnorm(child))
        return
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            module.add_module(name, SharedBatchNorm(child))
        else:
            share_batch_norms(child, device)


def distributed(method: nn.Module) -> nn.Module:
    """Bring the gradients of all processes together in each backward pass.

    Buffers are never sent around: they are equal by construction, as every process computes them from the
    whole batch.
    """
    with warnings.catch_warnings():
        # torch 2.14 gives the argument another name, which 2.8 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(method, broadcast_buffers=False)
