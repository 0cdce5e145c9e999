"""Map a function over shards: the one place that knows how work is spread on this machine."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Shard = TypeVar("Shard")
Result = TypeVar("Result")


def default_workers() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    work: Callable[[Shard], Result], shards: Iterable[Shard], workers: int, ahead: int | None = None
) -> Iterator[Result]:
    """Yield `work(shard)` in the order of the shards, with up to `ahead` computed in advance by threads.

    Threads suffice because the work behind it (decoding, resizing, matrix products) releases the
    interpreter's lock. `workers=0` computes in the caller's thread.
    """
    if workers <= 0:
        yield from map(work, shards)
        return
    depth = 2 * workers if ahead is None else ahead
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for shard in shards:
                waiting.append(pool.submit(work, shard))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
