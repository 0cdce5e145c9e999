"""Fair timing on shared machines: in one process, one after the other, alternating, median of several."""

import statistics
import time
from collections.abc import Callable

import torch


def alternate(
    ours: Callable[[], object], peer: Callable[[], object], rounds: int = 5
) -> tuple[float, float, float]:
    """Time two functions in turn after a warm-up of each.

    Returns:
        The median seconds of ours and of the peer, and the median of the rounds' ratios peer / ours: above 1,
        ours is faster.
    """
    ours()
    peer()
    mine, theirs = [], []
    for _ in range(rounds):
        for function, seconds in ((ours, mine), (peer, theirs)):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    ratios = [other / own for own, other in zip(mine, theirs, strict=True)]
    return statistics.median(mine), statistics.median(theirs), statistics.median(ratios)


def told(name: str, peer: str, seconds: tuple[float, float, float]) -> str:
    """Lay one comparison out as a line."""
    return f"{name:<44} {seconds[0]:8.3f} s   {peer:<34} {seconds[1]:8.3f} s   ratio {seconds[2]:.2f}"


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Return the FLOP/s of a product of square matrices, the best of ten."""
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        matrix @ matrix
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
