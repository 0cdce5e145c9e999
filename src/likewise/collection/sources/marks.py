"""What has been seen of names without number: eight bytes each, where Python's own set takes ninety."""

import numpy as np

_FRESH = 2**15
_SHARE = 64  # one of so many marks may be fresh: merging then takes linear time, and fresh ones little memory


class Marks:
    """A set of 64-bit numbers that only grows."""

    def __init__(self) -> None:
        """Begin with none."""
        self._settled = np.empty(0, np.uint64)  # ascending
        self._fresh: set[int] = set()

    def add(self, mark: int) -> bool:
        """Add a number of 64 bits, without sign, and tell whether it is new."""
        if mark in self._fresh or self._has_settled(mark):
            return False
        self._fresh.add(mark)
        if len(self._fresh) >= max(_FRESH, len(self._settled) // _SHARE):
            fresh = np.fromiter(self._fresh, np.uint64, len(self._fresh))
            self._fresh.clear()
            # Two ascending runs are merged in one pass by a stable sort.
            fresh.sort()
            self._settled = np.concatenate([self._settled, fresh])
            self._settled.sort(kind="stable")
        return True

    def _has_settled(self, mark: int) -> bool:
        place = int(self._settled.searchsorted(np.uint64(mark)))
        return place < len(self._settled) and int(self._settled[place]) == mark
