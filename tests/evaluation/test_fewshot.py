import numpy as np
import pytest
import torch

from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.base import Split
from likewise.evaluation.protocols.fewshot import (
    Episodes,
    FewShotConfig,
    _sample_subsets,
    evaluate_few_shot,
    sample_episodes,
)

RNG = np.random.default_rng(0)
CENTERS = RNG.normal(size=(8, 16)) * 0.6


def split(counts: list[int], offset: float = 0.0) -> Split:
    labels = np.repeat(np.arange(len(counts)) * 3, counts)
    labels = labels[RNG.permutation(len(labels))]
    features = CENTERS[labels // 3] + RNG.normal(size=(len(labels), 16)) + offset
    return Split(torch.from_numpy(features), torch.from_numpy(labels))


# Class 9 (the fourth) has four train images, class 15 (the sixth) no test image, class 6 three test images.
TRAIN = split([20, 15, 9, 4, 30, 10, 7, 5], offset=2.0)
TEST = split([20, 15, 3, 30, 16, 0, 15, 40], offset=2.0)
ELIGIBLE = {0, 3, 6, 12, 18, 21}
CONFIG = FewShotConfig(ways=4, shots=5, queries=15, episodes=60, seed=7)


def sampled(config: FewShotConfig = CONFIG) -> Episodes:
    return sample_episodes(config, TRAIN.y.numpy(), TEST.y.numpy())


def naive_accuracy(support: np.ndarray, query: np.ndarray, valid: np.ndarray) -> float:
    """Return the accuracy of one episode, computed class by class and image by image."""
    center = np.mean([TRAIN.x[row].numpy() for rows in support for row in rows], axis=0)
    prototypes = []
    for rows in support:
        centered = [TRAIN.x[row].numpy() - center for row in rows]
        prototypes.append(np.mean([v / np.linalg.norm(v) for v in centered], axis=0))
    hits = []
    for way, rows in enumerate(query):
        for row, is_valid in zip(rows, valid[way], strict=True):
            if is_valid:
                image = TEST.x[row].numpy() - center
                image = image / np.linalg.norm(image)
                hits.append(np.argmin([np.linalg.norm(image - p) for p in prototypes]) == way)
    return float(np.mean(hits))


def test_accuracy_matches_the_definition() -> None:
    result = evaluate_few_shot(CONFIG, TRAIN, TEST)
    episodes = sampled()
    expected = [
        naive_accuracy(*episode)
        for episode in zip(episodes.support, episodes.query, episodes.valid, strict=True)
    ]
    np.testing.assert_allclose(result.per_episode, expected, atol=1e-12)
    assert result.accuracy.value == pytest.approx(np.mean(expected))
    margin = 1.96 * np.std(expected, ddof=1) / np.sqrt(60)
    assert result.accuracy.low == pytest.approx(np.mean(expected) - margin)
    assert 0.3 < result.accuracy.value < 0.95


def test_episodes_have_distinct_classes_and_images() -> None:
    episodes = sampled()
    support_y, query_y = TRAIN.y.numpy()[episodes.support], TEST.y.numpy()[episodes.query]
    assert (episodes.num_eligible_classes, episodes.num_skipped_classes) == (6, 2)
    assert set(support_y.flat) == ELIGIBLE
    assert (support_y == support_y[:, :, :1]).all()
    assert (query_y == support_y[:, :, :1])[episodes.valid].all()
    for support, query, valid, labels in zip(
        episodes.support, episodes.query, episodes.valid, support_y[:, :, 0], strict=True
    ):
        assert len(set(labels)) == 4
        assert len(set(support.flat)) == support.size
        assert len(set(query[valid])) == valid.sum()
        np.testing.assert_array_equal(valid.sum(axis=1), np.where(labels == 6, 3, 15))


def test_episodes_depend_on_seed_not_on_features() -> None:
    first, second, other_seed = sampled(), sampled(), sampled(FewShotConfig(ways=4, episodes=60, seed=8))
    np.testing.assert_array_equal(first.support, second.support)
    np.testing.assert_array_equal(first.query, second.query)
    assert (first.support != other_seed.support).any()
    wide = (Split(torch.cat([part.x, part.x], dim=1), part.y) for part in (TRAIN, TEST))
    narrow = evaluate_few_shot(CONFIG, TRAIN, TEST)
    np.testing.assert_array_equal(evaluate_few_shot(CONFIG, *wide).per_episode, narrow.per_episode)


def test_subsets_are_sampled_uniformly() -> None:
    rng = np.random.default_rng(0)
    subsets = np.sort(_sample_subsets(rng, np.full(30_000, 5), 2), axis=1)
    pairs, counts = np.unique(subsets, axis=0, return_counts=True)
    assert len(pairs) == 10
    # Six standard deviations of a count of 3,000.
    assert np.abs(counts - 3000).max() < 6 * np.sqrt(30_000 * 0.1 * 0.9)


def test_subset_of_a_small_range_is_the_whole_range() -> None:
    subsets = _sample_subsets(np.random.default_rng(0), np.array([[0, 1], [3, 4]]), 4)
    assert subsets.shape == (2, 2, 4)
    assert [sorted(row) for row in subsets.reshape(4, 4).tolist()] == [
        [-1, -1, -1, -1],
        [-1, -1, -1, 0],
        [-1, 0, 1, 2],
        [0, 1, 2, 3],
    ]


def test_accuracy_is_invariant_to_offset_and_scale() -> None:
    plain = evaluate_few_shot(CONFIG, TRAIN, TEST)
    transformed = evaluate_few_shot(CONFIG, *(Split(part.x * 7 - 30, part.y) for part in (TRAIN, TEST)))
    np.testing.assert_array_equal(transformed.per_episode, plain.per_episode)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate_few_shot(CONFIG, TRAIN, TEST)
    monkeypatch.setattr("likewise.evaluation.protocols.fewshot._BLOCK_ELEMENTS", 7 * 4 * 15 * 16)
    np.testing.assert_array_equal(evaluate_few_shot(CONFIG, TRAIN, TEST).per_episode, expected.per_episode)


def test_accuracy_of_separable_features_is_1() -> None:
    eye = torch.eye(6).repeat(3, 1)
    labels = torch.arange(6).repeat(3)
    split = Split(eye, labels)
    result = evaluate_few_shot(FewShotConfig(ways=6, shots=1, queries=2, episodes=10), split, split)
    assert result.accuracy.low == result.accuracy.value == 1


def test_too_few_eligible_classes_raise() -> None:
    with pytest.raises(InvalidInputError, match="only 6 of 8 classes") as excinfo:
        evaluate_few_shot(FewShotConfig(ways=7, episodes=2), TRAIN, TEST)
    assert excinfo.value.field == "ways"


@pytest.mark.parametrize(("field", "value"), [("shots", 0), ("ways", 0), ("queries", 0), ("episodes", 1)])
def test_invalid_config_raises(field: str, value: int) -> None:
    with pytest.raises(InvalidInputError) as excinfo:
        FewShotConfig(**{field: value})
    assert excinfo.value.field == field
