"""Bootstrap intervals, paired tests of differences, and means over episodes.

Scores are fractions in [0, 1], one per test item: 0 or 1 for accuracy, any value for average precision. All
intervals are 95 %.

Items with equal scores are interchangeable, so resampling works on the distinct scores and their counts. The
distribution is exactly that of resampling items, and the accuracy over a million images costs as much as that
over two.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped

# Elements of a block of resamples: 32 MiB as 64-bit integers, for any number of items and resamples.
_BLOCK_ELEMENTS = 2**22


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference with its 95 % interval and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p_value: float


def bootstrap(
    scores: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate the mean score with a percentile bootstrap interval (Efron 1979).

    Args:
        scores: (n,) one score per item, boolean or float.
        groups: (n,) group of each item, any dtype. If given, whole groups are resampled (the cluster
            bootstrap: Field and Welsh 2007), for items that are correlated within groups.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the random numbers.

    Raises:
        ValueError: for no scores, different shapes, or no resamples.
    """
    sums, sizes = _group_sums(_validate_scores(scores, groups, num_resamples), groups)
    means = _resampled_means(sums, sizes, num_resamples, np.random.default_rng(seed))
    return _percentile_interval(sums.sum() / sizes.sum(), means)


def paired_difference(
    a: Shaped[np.ndarray, " n"],
    b: Shaped[np.ndarray, " n"],
    groups: Shaped[np.ndarray, " n"] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Estimate mean(b) - mean(a) for two systems scored on the same items, and test that it is zero.

    The interval is that of the bootstrap on the differences. The p-value is the fraction of random sign flips
    of the items (or of whole groups) whose mean is at least as far from zero (Fisher's randomization test),
    two-sided, with one added to numerator and denominator so that it is never zero (Phipson and Smyth 2010).

    Args:
        a: (n,) scores of the first system, boolean or float.
        b: (n,) scores of the second system on the same items in the same order.
        groups: (n,) group of each item; whole groups are resampled and flipped.
        num_resamples: Number of bootstrap resamples, and of sign flips.
        seed: Seed of the random numbers.

    Raises:
        ValueError: for no scores, different shapes, or no resamples.
    """
    scores_a, scores_b = _validate_scores(a, b, num_resamples), _validate_scores(b, groups, num_resamples)
    sums, sizes = _group_sums(scores_b - scores_a, groups)
    rng = np.random.default_rng(seed)
    interval = _percentile_interval(
        sums.sum() / sizes.sum(), _resampled_means(sums, sizes, num_resamples, rng)
    )
    return Difference(
        value=interval.value,
        low=interval.low,
        high=interval.high,
        p_value=_permutation_p_value(sums, num_resamples, rng),
    )


def bootstrap_difference(value: float, differences: Float[np.ndarray, " r"]) -> Difference:
    """Test a difference by its values on resampled test sets, with a percentile interval (Efron 1979).

    The p-value is twice the fraction of resamples on the opposite side of zero, or on it, with one added to
    numerator and denominator so that it is never zero.

    Args:
        value: The observed difference.
        differences: (r,) the difference on each resample.
    """
    low, high = np.quantile(differences, [0.025, 0.975])
    num_opposite = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    p_value = min(1.0, 2 * (1 + num_opposite) / (1 + len(differences)))
    return Difference(value=value, low=float(low), high=float(high), p_value=p_value)


def mean_per_class(
    correct: Shaped[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Estimate the mean over classes of each class's mean score; items are resampled within their class.

    The classes are fixed, not a sample of classes. A class with one item adds nothing to the width of the
    interval, so with many such classes the interval is too narrow.

    Args:
        correct: (n,) one score per item, boolean or float.
        labels: (n,) class of each item, any dtype.
        num_resamples: Number of bootstrap resamples.
        seed: Seed of the random numbers.

    Raises:
        ValueError: for no scores, different shapes, or no resamples.
    """
    scores = _validate_scores(correct, labels, num_resamples)
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    scores_by_class = np.split(scores[np.argsort(inverse, kind="stable")], np.cumsum(counts)[:-1])
    rng = np.random.default_rng(seed)
    means = np.zeros(num_resamples)
    for class_scores in scores_by_class:
        means += _resampled_means(class_scores, np.ones_like(class_scores), num_resamples, rng) / len(
            scores_by_class
        )
    return _percentile_interval(np.mean([class_scores.mean() for class_scores in scores_by_class]), means)


def normal_interval(values: Float[np.ndarray, " n"]) -> Estimate:
    """Estimate the mean of independent values with an interval of 1.96 standard errors to both sides.

    Raises:
        ValueError: for fewer than two values, which have no standard error.
    """
    if len(values) < 2:
        raise ValueError(f"a standard error needs at least two values, got {len(values)}")
    mean = values.mean(dtype=np.float64)
    margin = 1.96 * values.std(dtype=np.float64, ddof=1) / np.sqrt(len(values))
    return Estimate(value=float(mean), low=float(mean - margin), high=float(mean + margin))


def _validate_scores(
    scores: Shaped[np.ndarray, "..."], reference: Shaped[np.ndarray, "..."] | None, num_resamples: int
) -> Float[np.ndarray, " n"]:
    if scores.ndim != 1 or (reference is not None and reference.shape != scores.shape):
        shapes = [array.shape for array in (scores, reference) if array is not None]
        raise ValueError(f"expected arrays of one dimension and equal length, got shapes {shapes}")
    if len(scores) == 0 or num_resamples < 1:
        raise ValueError(f"expected items and resamples, got {len(scores)} items, {num_resamples} resamples")
    return scores.astype(np.float64)


def _group_sums(
    scores: Float[np.ndarray, " n"], groups: Shaped[np.ndarray, " n"] | None
) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]:
    """Return the sum and size of each group; without groups each item is a group of one."""
    if groups is None:
        return scores, np.ones_like(scores)
    _, inverse = np.unique(groups, return_inverse=True)
    return np.bincount(inverse, weights=scores), np.bincount(inverse).astype(np.float64)


def _resampled_means(
    sums: Float[np.ndarray, " g"],
    sizes: Float[np.ndarray, " g"],
    num_resamples: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, " r"]:
    """Return the mean of each resample: multinomial counts of distinct groups times their sums and sizes."""
    distinct, counts = np.unique(np.stack([sums, sizes], axis=1), axis=0, return_counts=True)
    block_totals = [
        rng.multinomial(len(sums), counts / len(sums), size=block_size) @ distinct
        for block_size in _block_sizes(num_resamples, len(distinct))
    ]
    totals = np.concatenate(block_totals)
    return totals[:, 0] / totals[:, 1]


def _permutation_p_value(
    sums: Float[np.ndarray, " g"], num_resamples: int, rng: np.random.Generator
) -> float:
    """Return the fraction of random signs with |sum| at least as large as observed; one sign per group."""
    magnitudes, counts = np.unique(np.abs(sums), return_counts=True)
    # Sums in another order differ in the last bits, but outcomes equal to the observed one must count.
    observed = abs(sums.sum()) - 1e-9 * magnitudes @ counts
    num_extreme = 0
    for block_size in _block_sizes(num_resamples, len(magnitudes)):
        num_positive = rng.binomial(counts, 0.5, size=(block_size, len(magnitudes)))
        num_extreme += int(np.count_nonzero(np.abs((2 * num_positive - counts) @ magnitudes) >= observed))
    return (1 + num_extreme) / (1 + num_resamples)


def _block_sizes(num_resamples: int, num_columns: int) -> list[int]:
    """Return the number of resamples of each block; results do not depend on it."""
    block_size = max(1, _BLOCK_ELEMENTS // num_columns)
    return [min(block_size, num_resamples - start) for start in range(0, num_resamples, block_size)]


def _percentile_interval(value: float, means: Float[np.ndarray, " r"]) -> Estimate:
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value=float(value), low=float(low), high=float(high))
