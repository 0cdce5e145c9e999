"""Devices, worker threads and ordered parallel maps on one machine."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from likewise.errors import InvalidInputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_num_workers() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(device: str | None) -> str:
    """Return the name of a usable device; None selects `cuda` if available, else `cpu`.

    Raises:
        InvalidInputError: if torch cannot use the device on this machine.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each backend raises its own
        raise InvalidInputError(
            f"`device` {device!r} is not available to torch on this machine", field="device"
        ) from error
    return device


def prefetch_map(
    fn: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Yield `fn(item)` in the order of the items, computing up to `2 * num_workers` results ahead in threads.

    Threads suffice because decoding, resizing and matrix products release the interpreter lock.
    `num_workers=0` computes in the calling thread.
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
