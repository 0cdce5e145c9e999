import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.base import Split
from likewise.evaluation.protocols.knn import KNNConfig, KNNGridConfig, _topk_stable, knn_predict


def problem(seed: int, train: int = 70, test: int = 40, classes: int = 6) -> tuple[Split, Tensor]:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, 12))
    train_y, test_y = rng.integers(0, classes, train), rng.integers(0, classes, test)
    train_x, test_x = (centers[y] + 1.5 * rng.normal(size=(len(y), 12)) for y in (train_y, test_y))
    return Split(torch.from_numpy(train_x), torch.from_numpy(train_y)), torch.from_numpy(test_x)


def brute_force(train: Split, test_x: Tensor, config: KNNConfig, classes: int) -> list[int]:
    predictions = []
    for image in test_x.numpy():
        cosine = [image @ t / np.linalg.norm(image) / np.linalg.norm(t) for t in train.x.numpy()]
        nearest = sorted(range(len(cosine)), key=lambda i: (-cosine[i], i))[: config.k]
        votes = np.zeros(classes)
        for i in nearest:
            votes[train.y[i]] += np.exp(cosine[i] / config.temperature)
        predictions.append(int(votes.argmax()))
    return predictions


@pytest.mark.parametrize("k", [1, 5, 20, 69, 70, 500])
@pytest.mark.parametrize("temperature", [0.07, 10.0])
def test_predictions_match_brute_force(k: int, temperature: float) -> None:
    data, config = problem(0), KNNConfig(k=k, temperature=temperature)
    predictions = knn_predict(config, *data, 6)
    assert predictions.dtype == torch.int64
    assert predictions.tolist() == brute_force(*data, config, 6)


def test_votes_are_weighted_by_similarity_and_temperature() -> None:
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    labels, image = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    # exp(1 / t) equals 2 exp(0.6 / t) at t = 0.4 / ln 2 = 0.577.
    assert knn_predict(KNNConfig(k=3, temperature=0.57), Split(train, labels), image, 2).tolist() == [0]
    assert knn_predict(KNNConfig(k=3, temperature=0.59), Split(train, labels), image, 2).tolist() == [1]
    assert knn_predict(KNNConfig(k=1, temperature=9.0), Split(train, labels), image, 2).tolist() == [0]


def test_small_temperature_equals_one_neighbor() -> None:
    data = problem(3)
    assert torch.equal(
        knn_predict(KNNConfig(k=20, temperature=1e-6), *data, 6), knn_predict(KNNConfig(k=1), *data, 6)
    )


def test_ties_go_to_the_first_image_and_the_first_class() -> None:
    axis = torch.eye(4)
    x = axis[[1, 0, 0, 0, 0]]
    train = Split(x, torch.tensor([4, 3, 2, 1, 0]))
    assert knn_predict(KNNConfig(k=1), train, axis[:1], 5).tolist() == [3]
    assert knn_predict(KNNConfig(k=2), train, axis[:1], 5).tolist() == [2]
    assert knn_predict(KNNConfig(k=3), Split(x, torch.tensor([4, 3, 2, 3, 2])), axis[:1], 5).tolist() == [3]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=5), st.integers(1, 12)
)
def test_topk_is_a_stable_sort(rows: list[list[int]], k: int) -> None:
    similarity = torch.tensor(rows, dtype=torch.float32)
    expected = [sorted(sorted(range(9), key=lambda i: (-row[i], i))[:k]) for row in rows]
    assert _topk_stable(similarity, k).tolist() == expected


def test_predictions_do_not_depend_on_blocks_or_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    data = problem(1)
    expected = knn_predict(KNNConfig(), *data, 6)
    assert torch.equal(knn_predict(KNNConfig(), Split(data[0].x * 5, data[0].y), data[1] * 0.1, 6), expected)
    monkeypatch.setattr("likewise.evaluation.protocols.knn._BLOCK_ELEMENTS", 200)
    assert torch.equal(knn_predict(KNNConfig(), *data, 6), expected)


def test_invalid_config_raises() -> None:
    with pytest.raises(InvalidInputError) as excinfo:
        KNNConfig(k=0)
    assert excinfo.value.field == "k"
    with pytest.raises(InvalidInputError) as excinfo:
        KNNConfig(temperature=0.0)
    assert excinfo.value.field == "temperature"
    with pytest.raises(InvalidInputError) as excinfo:
        KNNGridConfig(ks=(1, 0))
    assert excinfo.value.field == "ks"


def test_no_training_images_raise() -> None:
    train, test_x = problem(0)
    with pytest.raises(ValueError, match="training image"):
        knn_predict(KNNConfig(), train.subset(torch.arange(0)), test_x, 6)
