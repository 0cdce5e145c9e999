"""Data-parallel training: the process group that torchrun starts, and collectives with gradients."""

import logging
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


def is_main_process() -> bool:
    """Return whether this process has rank 0, or is the only one."""
    return os.environ.get("RANK", "0") == "0"


# Other ranks wait while rank 0 builds caches and searches for neighbors, which may take days.
_TIMEOUT = timedelta(days=14)


@dataclass(frozen=True)
class DistributedContext:
    """Rank and number of the processes of a run."""

    rank: int = 0
    world_size: int = 1

    @property
    def local_world_size(self) -> int:
        """Number of processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world_size > 1 else 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes, on the CPU."""
        self.any_rank()

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank; reduced on the CPU, without a GPU sync."""
        if self.world_size == 1:
            return list(flags)
        raised_flags = torch.tensor([*flags, False], dtype=torch.int32)
        dist.all_reduce(raised_flags, dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised_flags.tolist()[:-1]]

    def shard_sizes(self, n: int) -> tuple[int, ...]:
        """Return the number of rows per rank of a batch of n: contiguous, at most one row apart."""
        shard_size, remainder = divmod(n, self.world_size)
        return tuple(shard_size + (rank < remainder) for rank in range(self.world_size))

    def local_slice(self, n: int) -> slice:
        """Return the rows of a batch of n that belong to this rank."""
        shard_sizes = self.shard_sizes(n)
        start = sum(shard_sizes[: self.rank])
        return slice(start, start + shard_sizes[self.rank])


@contextmanager
def init_distributed(device: torch.device) -> Iterator[DistributedContext]:
    """Join the process group that torchrun started, or yield a context of one process.

    CPU tensors go through gloo, CUDA tensors through nccl. Ranks above 0 log warnings only.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield DistributedContext()
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    logger = logging.getLogger("likewise")
    level = logger.level
    if dist.get_rank() > 0:
        logger.setLevel(logging.WARNING)
    try:
        yield DistributedContext(dist.get_rank(), world_size)
    finally:
        logger.setLevel(level)
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Return the GPU of this process if several processes share a machine."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    local_gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(local_gpu)
    return local_gpu


def all_gather_with_grad(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Concatenate the rows of all processes; gradients flow back to the process of each row.

    Every process computes the same loss of the whole batch, so the gradient of a row is summed over
    processes; the mean in `DistributedDataParallel` turns the sum into the gradient of that loss.

    Args:
        x: (sizes[rank], …), the rows of this process.
        sizes: Rows per process.

    Returns:
        (sum(sizes), …), in the order of ranks.
    """
    if len(sizes) == 1:
        return x
    num_padding = max(sizes) - len(x)
    padded = torch.cat([x, x.new_zeros(num_padding, *x.shape[1:])]) if num_padding else x
    parts = _AllGather.apply(padded).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


# torch.distributed.nn.functional is deprecated, and the functional collectives are private in torch.
class _AllGather(torch.autograd.Function):
    """The concatenated rows of all processes, of equal number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  # torch's own signature
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004  # torch's own signature
        return _all_reduce_sum(gradients[0]).chunk(_world_size())[dist.get_rank()]


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004  # torch's own signature
        return _all_reduce_sum(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004  # torch's own signature
        return _all_reduce_sum(gradients[0])


def _world_size() -> int:
    return dist.get_world_size()


def _all_reduce_sum(values: Tensor) -> Tensor:
    total = values.contiguous().clone()
    dist.all_reduce(total)
    return total


class CPUSyncBatchNorm(nn.Module):
    """Batch norm over the rows of all processes; torch's SyncBatchNorm does not run on a CPU.

    Parameters and buffers have the names of the replaced norm, so that weights fit both.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        """Share the parameters and buffers of a norm and, for a norm of timm, its activation."""
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
        """Normalize (b, c, …): in training by the moments of all processes, else by the running ones."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean, var = self._moments(x.float()) if self.training else (self.running_mean, self.running_var)
        scale = torch.rsqrt(var + self.eps)
        scale, shift = (scale, -mean * scale) if self.weight is None else (
            self.weight * scale, self.bias - mean * scale * self.weight)  # fmt: skip
        return self.act(self.drop((x.float() * scale.view(shape) + shift.view(shape)).to(x.dtype)))

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = [dim for dim in range(x.ndim) if dim != 1]
        count = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
        totals = _AllReduceSum.apply(torch.cat([x.sum(dim=dims), count]))
        mean = totals[:-1] / totals[-1]
        # A second reduction, because E[x^2] - E[x]^2 loses digits.
        centered = x - mean.view(1, -1, *[1] * (x.ndim - 2))
        var = _AllReduceSum.apply(centered.square().sum(dim=dims)) / totals[-1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * totals[-1] / (totals[-1] - 1), self.momentum)
        return mean, var


def convert_to_sync_batchnorm(module: nn.Module, device: torch.device) -> None:
    """Replace every batch norm below a module by one over the rows of all processes."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        for name, child in module.named_children():
            module.add_module(name, convert_sync_batchnorm(child))
        return
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            module.add_module(name, CPUSyncBatchNorm(child))
        else:
            convert_to_sync_batchnorm(child, device)


def wrap_ddp(method: nn.Module) -> nn.Module:
    """Wrap a method in `DistributedDataParallel`, which averages gradients over processes.

    Buffers are not broadcast: every process computes them from the whole batch, so they are equal.
    """
    with warnings.catch_warnings():
        # torch 2.14 renames the argument; torch 2.8 does not know the new name.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(method, broadcast_buffers=False)
