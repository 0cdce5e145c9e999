"""Counter-based random numbers: each value is a pure function of (seed, epoch, sample, stream).

No generator state is carried along, so a run can stop at any sample and resume with another number of
workers or processes, and draw the same numbers.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Independent streams of random numbers, one per purpose; views use their own index, from 0."""

    PARTNERS = 101
    CAPTIONS = 102
    VALIDATION = 103
    PAIR_STATS = 104
    HEADS = 105
    TRAIN_STEP = 106
    FINETUNE = 301
    DETECTION = 302
    SEGMENTATION = 303


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _as_uint64(value: int | np.ndarray) -> np.ndarray:
    # Arrays, even for one value: integer overflow of arrays wraps silently, that of scalars warns.
    return np.atleast_1d(np.asarray(value, np.int64)).astype(np.uint64)


def uniform(ids: np.ndarray, n: int, *, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Draw `n` uniform numbers in [0, 1) per sample.

    Each coordinate is folded in by one round of the SplitMix64 finalizer (Steele, Lea and Flood 2014, "Fast
    splittable pseudorandom number generators").

    Args:
        ids: (num_samples,) int64, the index of each sample.
        n: Numbers per sample.
        seed: The seed of the run.
        epoch: The epoch; numbers of different epochs are independent.
        stream: A `Stream`, or the index of a view.

    Returns:
        (num_samples, n) float64.
    """
    state = _mix(_as_uint64(seed) + _GOLDEN)
    for coordinate in (epoch, stream, ids):
        state = _mix((state + _GOLDEN) ^ _mix(_as_uint64(coordinate) + _GOLDEN))
    offsets = np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(state[:, None] + offsets)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derive_seed(*key: int) -> int:
    """Return a seed for torch's generators from a seed, a stream and, if any, a step."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def epoch_permutation(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the samples in an epoch: (n,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(n)
