"""Timing on shared machines: two functions alternate in one process, and the median counts."""

import statistics
import time
from collections.abc import Callable

import torch


def alternate(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int = 5
) -> tuple[float, float, float]:
    """Time two functions alternately, after one warm-up call of each.

    Returns:
        The median seconds of `ours` and of `peer`, and the median ratio peer / ours: above 1, `ours` is
        faster.
    """
    ours()
    peer()
    our_seconds, peer_seconds = [], []
    for _ in range(rounds):
        for function, seconds in ((ours, our_seconds), (peer, peer_seconds)):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(our_seconds, peer_seconds, strict=True)]
    return statistics.median(our_seconds), statistics.median(peer_seconds), statistics.median(ratios)


def format_result(name: str, peer: str, seconds: tuple[float, float, float]) -> str:
    """Return the result of one comparison as a line."""
    return f"{name:<44} {seconds[0]:8.3f} s   {peer:<34} {seconds[1]:8.3f} s   ratio {seconds[2]:.2f}"


def synchronize(device: torch.device) -> None:
    """Wait until all kernels of a device have finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_flops(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Return the FLOP/s of a product of square matrices, the best of ten runs."""
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
