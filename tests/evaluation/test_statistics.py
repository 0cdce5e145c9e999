"""Bootstrap and permutation tests: known values, direct implementations and simulated coverage."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from likewise.evaluation.statistics import bootstrap, mean_per_class, normal_interval, paired_difference

# The import hook of the tests checks annotations, which raises first.
WRONG_SHAPE = (ValueError, TypeCheckError)


def test_estimates_of_four_scores() -> None:
    scores = np.array([True, False, True, True])
    assert bootstrap(scores).value == 0.75
    assert bootstrap(scores, np.array(["a", "a", "b", "b"])).value == 0.75
    assert mean_per_class(scores, np.array([0, 0, 0, 1])).value == pytest.approx((2 / 3 + 1) / 2)
    assert paired_difference(scores, np.array([True, True, True, True])).value == 0.25


def test_interval_of_fair_coins_is_binomial() -> None:
    scores = np.arange(400) % 2
    interval = bootstrap(scores, num_resamples=20_000)
    assert interval.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
    assert interval.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.004)


def naive_bootstrap(
    scores: np.ndarray, groups: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    names = np.unique(groups)
    members = {name: scores[groups == name] for name in names}
    resampled = rng.choice(names, size=(resamples, len(names)))
    return np.array([np.concatenate([members[name] for name in row]).mean() for row in resampled])


def test_cluster_bootstrap_matches_a_naive_implementation() -> None:
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 25, 200)
    scores = rng.random(200) + groups / 25
    low, high = np.quantile(naive_bootstrap(scores, groups, 8000, rng), [0.025, 0.975])
    interval = bootstrap(scores, groups, num_resamples=8000)
    width = high - low
    assert interval.low == pytest.approx(low, abs=0.06 * width)
    assert interval.high == pytest.approx(high, abs=0.06 * width)


def test_intervals_have_the_nominal_coverage_on_simulated_data() -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap(rng.random(100) < 0.7, num_resamples=400, seed=seed) for seed in range(400)]
    covered = np.mean([interval.low <= 0.7 <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.985


def test_cluster_bootstrap_covers_correlated_groups_and_the_naive_one_does_not() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 10)
    covered = {"naive": 0, "cluster": 0}
    for seed in range(200):
        scores = rng.random(400) < np.repeat(rng.choice([0.2, 0.8], 40), 10)
        naive = bootstrap(scores, num_resamples=300, seed=seed)
        cluster = bootstrap(scores, groups, num_resamples=300, seed=seed)
        assert cluster.high - cluster.low > naive.high - naive.low
        covered["naive"] += naive.low <= 0.5 <= naive.high
        covered["cluster"] += cluster.low <= 0.5 <= cluster.high
    assert covered["naive"] < 150
    assert covered["cluster"] > 175


def enumerated_p_value(differences: list[float]) -> float:
    sums = [abs(np.dot(signs, differences)) for signs in product([-1, 1], repeat=len(differences))]
    return float(np.mean(np.array(sums) >= abs(np.sum(differences)) - 1e-12))


@pytest.mark.parametrize(
    "differences",
    [
        [1, 1, 1, 1, 1, -1, 0, 0],
        [0.3, -0.1, 0.25, 0.7, 0.05, 0.2, -0.4, 0.1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0],
    ],
)
def test_p_value_matches_enumeration(differences: list[float]) -> None:
    a = np.full(len(differences), 0.5)
    result = paired_difference(a, a + differences, num_resamples=40_000)
    assert result.p_value == pytest.approx(enumerated_p_value(differences), abs=0.01)
    assert result.value == pytest.approx(np.mean(differences))


def test_p_value_flips_whole_groups() -> None:
    groups = np.repeat(np.arange(6), 5)
    difference = np.repeat([1.0, 1, 1, 1, 1, -1], 5)
    zeros = np.zeros(30)
    grouped = paired_difference(zeros, difference, groups, num_resamples=40_000)
    assert grouped.p_value == pytest.approx(enumerated_p_value([5.0, 5, 5, 5, 5, -5]), abs=0.01)
    assert paired_difference(zeros, difference).p_value < 0.01


def test_p_value_is_uniform_without_a_difference_and_never_zero() -> None:
    rng = np.random.default_rng(5)
    values = [
        paired_difference(rng.random(60), rng.random(60), num_resamples=200, seed=s).p_value
        for s in range(300)
    ]
    assert 0.02 <= np.mean(np.array(values) <= 0.05) <= 0.09
    assert 0.4 <= np.mean(values) <= 0.6
    certain = paired_difference(np.zeros(500), np.ones(500), num_resamples=999)
    assert certain.p_value == 1 / 1000


def test_paired_interval_is_narrower_than_the_two_intervals() -> None:
    rng = np.random.default_rng(2)
    a = rng.random(500)
    b = a + 0.01 + 0.01 * rng.random(500)
    result = paired_difference(a, b)
    assert 0.01 < result.low < result.value < result.high < 0.02
    assert result.p_value == 1 / 2001
    single = bootstrap(a)
    assert single.high - single.low > 10 * (result.high - result.low)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 5))
def test_order_and_single_item_groups_do_not_matter(flags: list[bool], seed: int) -> None:
    scores = np.array(flags)
    interval = bootstrap(scores, seed=seed, num_resamples=50)
    assert 0 <= interval.low <= interval.high <= 1
    assert bootstrap(scores[::-1], seed=seed, num_resamples=50) == interval
    assert bootstrap(scores, np.arange(len(scores)), 50, seed) == interval
    zeros = np.zeros(len(scores))
    forward = paired_difference(zeros, scores, num_resamples=50, seed=seed)
    backward = paired_difference(scores, zeros, num_resamples=50, seed=seed)
    assert forward.value == -backward.value
    assert forward.p_value == backward.p_value


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(40), rng.random(40)
    whole = paired_difference(a, b), bootstrap(a), mean_per_class(a, np.arange(40) % 7)
    monkeypatch.setattr("likewise.evaluation.statistics._BLOCK_ELEMENTS", 1000)
    assert (paired_difference(a, b), bootstrap(a), mean_per_class(a, np.arange(40) % 7)) == whole


def test_mean_per_class_resamples_inside_classes() -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat(np.arange(4), [200, 100, 50, 25])
    correct = rng.random(375) < np.array([0.9, 0.7, 0.5, 0.3])[labels]
    accuracies = np.array([correct[labels == label].mean() for label in range(4)])
    error = np.sqrt(np.sum(accuracies * (1 - accuracies) / np.array([200, 100, 50, 25]))) / 4
    interval = mean_per_class(correct, labels, num_resamples=10_000)
    assert interval.value == pytest.approx(accuracies.mean())
    assert interval.low == pytest.approx(accuracies.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(accuracies.mean() + 1.96 * error, abs=0.1 * error)
    # Scores are constant within classes, so an interval from resampling within classes has no width.
    certain = mean_per_class(np.array([1, 1, 0, 0]), np.array(["cat", "cat", "dog", "dog"]))
    assert (certain.low, certain.high) == (0.5, 0.5)


def test_normal_interval_equals_the_formula() -> None:
    interval = normal_interval(np.array([0.0, 1.0, 0.0, 1.0]))
    margin = 1.96 * np.sqrt(1 / 3) / 2
    assert interval.value == 0.5
    assert interval.low == pytest.approx(0.5 - margin)
    assert interval.high == pytest.approx(0.5 + margin)


def test_invalid_arguments_raise() -> None:
    two, three = np.zeros(2), np.zeros(3)
    with pytest.raises(WRONG_SHAPE):
        bootstrap(two, three)
    with pytest.raises(WRONG_SHAPE):
        paired_difference(two, three)
    with pytest.raises(WRONG_SHAPE):
        paired_difference(two, two, three)
    with pytest.raises(WRONG_SHAPE):
        mean_per_class(two, three)
    with pytest.raises(WRONG_SHAPE):
        bootstrap(np.zeros((2, 2)))
    for empty in (bootstrap, normal_interval):
        with pytest.raises(ValueError, match="0"):
            empty(np.zeros(0))
    with pytest.raises(ValueError, match="resamples"):
        bootstrap(two, num_resamples=0)
    with pytest.raises(ValueError, match="two values"):
        normal_interval(np.ones(1))
