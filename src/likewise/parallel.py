"""Map a function over shards: the one place that knows how work is spread on this machine."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from likewise.errors import InvalidInputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_num_workers() -> int:
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
    except Exception as error:  # each backend raises its own
        raise InvalidInputError(
            f"--device {name}: this machine has no such device that torch can use"
        ) from error
    return name


def prefetch_map(fn: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """Yield `work(shard)` in the order of the shards, a few of them computed in advance by threads.

    Threads suffice because the work behind it (decoding, resizing, matrix products) releases the
    interpreter's lock. `workers=0` computes in the caller's thread.
    """
    if num_workers <= 0:
        yield from map(fn, items)
        return
    with ThreadPoolExecutor(num_workers) as executor:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(executor.submit(fn, item))
                if len(pending) > 2 * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
