"""Fair timing on shared machines: in one process, one after the other, alternating, median of several."""

import statistics
import time
from collections.abc import Callable


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
