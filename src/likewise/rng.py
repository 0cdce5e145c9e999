"""Randomness as a function: a number drawn for (seed, epoch, sample, …) is the same wherever it is drawn.

No generator is carried along, so a run can stop at any sample and go on elsewhere, with another number of
workers or processes, and draw the very same numbers.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_uint64(value: int | np.ndarray) -> np.ndarray:
    # Arrays, even of one: their products wrap around in silence, as scalars' do not.
    return np.atleast_1d(np.asarray(value, np.int64)).astype(np.uint64)


def uniform(ids: np.ndarray, n: int, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Draw `n` numbers in [0, 1) for each sample: (n,) int64 -> (n, count) float64.

    `stream` separates purposes (which partner, which view). Each coordinate is folded in by one round of
    the SplitMix64 finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
    """
    state = _mix(_as_uint64(seed) + _GOLDEN)
    for coordinate in (epoch, stream, ids):
        state = _mix((state + _GOLDEN) ^ _mix(_as_uint64(coordinate) + _GOLDEN))
    offsets = np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(state[:, None] + offsets)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_permutation(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits its samples: (n,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(n)
