import numpy as np
import pytest
import torch
from torch import Tensor

from likewise.evaluation.protocols.fewshot import (
    Episodes,
    FewShotConfig,
    _sample_subsets,
    evaluate_few_shot,
    sample_episodes,
)

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(8, 16)) * 0.6


def split(counts: list[int], offset: float = 0.0) -> tuple[Tensor, Tensor]:
    labels = np.repeat(np.arange(len(counts)) * 3, counts)
    labels = labels[RNG.permutation(len(labels))]
    features = CENTRES[labels // 3] + RNG.normal(size=(len(labels), 16)) + offset
    return torch.from_numpy(features), torch.from_numpy(labels)


# Class 9 (the fourth) has four train images, class 15 (the sixth) no test image, class 6 three test images.
TRAIN_X, TRAIN_Y = split([20, 15, 9, 4, 30, 10, 7, 5], offset=2.0)
TEST_X, TEST_Y = split([20, 15, 3, 30, 16, 0, 15, 40], offset=2.0)
ELIGIBLE = {0, 3, 6, 12, 18, 21}
SETTINGS = FewShotConfig(ways=4, shots=5, queries=15, episodes=60, seed=7)


def drawn(settings: FewShotConfig = SETTINGS) -> Episodes:
    return sample_episodes(settings, TRAIN_Y.numpy(), TEST_Y.numpy())


def literal_accuracy(support: np.ndarray, query: np.ndarray, valid: np.ndarray) -> float:
    """One episode by the definition, class by class and image by image."""
    centre = np.mean([TRAIN_X[row].numpy() for rows in support for row in rows], axis=0)
    prototypes = []
    for rows in support:
        centred = [TRAIN_X[row].numpy() - centre for row in rows]
        prototypes.append(np.mean([v / np.linalg.norm(v) for v in centred], axis=0))
    hits = []
    for way, rows in enumerate(query):
        for row, real in zip(rows, valid[way], strict=True):
            if real:
                image = TEST_X[row].numpy() - centre
                image = image / np.linalg.norm(image)
                hits.append(np.argmin([np.linalg.norm(image - p) for p in prototypes]) == way)
    return float(np.mean(hits))


def test_accuracy_is_that_of_the_definition() -> None:
    result = evaluate_few_shot(SETTINGS, TRAIN_X, TRAIN_Y, TEST_X, TEST_Y)
    episodes = drawn()
    expected = [
        literal_accuracy(*one) for one in zip(episodes.support, episodes.query, episodes.valid, strict=True)
    ]
    np.testing.assert_allclose(result.per_episode, expected, atol=1e-12)
    assert result.accuracy.value == pytest.approx(np.mean(expected))
    margin = 1.96 * np.std(expected, ddof=1) / np.sqrt(60)
    assert result.accuracy.low == pytest.approx(np.mean(expected) - margin)
    assert 0.3 < result.accuracy.value < 0.95


def test_episodes_hold_what_was_asked_for() -> None:
    episodes = drawn()
    support_y, query_y = TRAIN_Y.numpy()[episodes.support], TEST_Y.numpy()[episodes.query]
    assert (episodes.eligible_classes, episodes.skipped_classes) == (6, 2)
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


def test_episodes_depend_on_the_seed_and_not_on_the_features() -> None:
    first, second, other = drawn(), drawn(), drawn(FewShotConfig(ways=4, episodes=60, seed=8))
    np.testing.assert_array_equal(first.support, second.support)
    np.testing.assert_array_equal(first.query, second.query)
    assert (first.support != other.support).any()
    wide = torch.cat([TRAIN_X, TRAIN_X], dim=1), torch.cat([TEST_X, TEST_X], dim=1)
    narrow = evaluate_few_shot(SETTINGS, TRAIN_X, TRAIN_Y, TEST_X, TEST_Y)
    np.testing.assert_array_equal(
        evaluate_few_shot(SETTINGS, wide[0], TRAIN_Y, wide[1], TEST_Y).per_episode, narrow.per_episode
    )


def test_subsets_are_uniform() -> None:
    rng = np.random.default_rng(0)
    chosen = np.sort(_sample_subsets(rng, np.full(30_000, 5), 2), axis=1)
    pairs, counts = np.unique(chosen, axis=0, return_counts=True)
    assert len(pairs) == 10
    # Six standard deviations of a count of 3,000.
    assert np.abs(counts - 3000).max() < 6 * np.sqrt(30_000 * 0.1 * 0.9)


def test_subsets_of_small_sets_are_whole() -> None:
    chosen = _sample_subsets(np.random.default_rng(0), np.array([[0, 1], [3, 4]]), 4)
    assert chosen.shape == (2, 2, 4)
    assert [sorted(row) for row in chosen.reshape(4, 4).tolist()] == [
        [-1, -1, -1, -1],
        [-1, -1, -1, 0],
        [-1, 0, 1, 2],
        [0, 1, 2, 3],
    ]


def test_offset_and_scale_of_the_features_do_not_matter() -> None:
    plain = evaluate_few_shot(SETTINGS, TRAIN_X, TRAIN_Y, TEST_X, TEST_Y)
    moved = evaluate_few_shot(SETTINGS, TRAIN_X * 7 - 30, TRAIN_Y, TEST_X * 7 - 30, TEST_Y)
    np.testing.assert_array_equal(moved.per_episode, plain.per_episode)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate_few_shot(SETTINGS, TRAIN_X, TRAIN_Y, TEST_X, TEST_Y)
    monkeypatch.setattr("likewise.evaluation.protocols.fewshot._BLOCK_ELEMENTS", 7 * 4 * 15 * 16)
    np.testing.assert_array_equal(
        evaluate_few_shot(SETTINGS, TRAIN_X, TRAIN_Y, TEST_X, TEST_Y).per_episode, whole.per_episode
    )


def test_one_shot_of_perfect_features() -> None:
    eye = torch.eye(6).repeat(3, 1)
    labels = torch.arange(6).repeat(3)
    result = evaluate_few_shot(
        FewShotConfig(ways=6, shots=1, queries=2, episodes=10), eye, labels, eye, labels
    )
    assert result.accuracy.low == result.accuracy.value == 1


def test_too_few_classes_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="only 6 of 8 classes"):
        evaluate_few_shot(FewShotConfig(ways=7, episodes=2), TRAIN_X, TRAIN_Y, TEST_X, TEST_Y)


@pytest.mark.parametrize(
    "settings",
    [
        FewShotConfig(shots=0),
        FewShotConfig(ways=0),
        FewShotConfig(queries=0),
        FewShotConfig(ways=2, episodes=1),
    ],
)
def test_impossible_settings(settings: FewShotConfig) -> None:
    with pytest.raises(ValueError, match="at least"):
        evaluate_few_shot(settings, TRAIN_X, TRAIN_Y, TEST_X, TEST_Y)
