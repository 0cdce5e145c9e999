"""Map a function over shards: the one place that knows how work is spread on this machine."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from likewise.errors import InputError

Shard = TypeVar("Shard")
Result = TypeVar("Result")


def default_workers() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(name: str | None) -> str:
    """Return the device by that name, or the best there is where none is named.

    Raises:
        InputError: where torch does not know it or this machine does not have it.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as fault:  # each backend raises its own
        raise InputError(f"--device {name}: this machine has no such device that torch can use") from fault
    return name


def ordered_map(work: Callable[[Shard], Result], shards: Iterable[Shard], workers: int) -> Iterator[Result]:
    """Yield `work(shard)` in the order of the shards, a few of them computed in advance by threads.

    Threads suffice because the work behind it (decoding, resizing, matrix products) releases the
    interpreter's lock. `workers=0` computes in the caller's thread.
    """
    if workers <= 0:
        yield from map(work, shards)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for shard in shards:
                waiting.append(pool.submit(work, shard))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
