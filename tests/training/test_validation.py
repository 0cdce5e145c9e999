"""Scores on held-out pairs: each figure against its definition, and the best encoder is kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from likewise.data.dataset import CaptionDataset
from likewise.errors import TrainingError
from likewise.models.checkpoints import load_tensors
from likewise.pairs.build import build_pairs
from likewise.pairs.config import PairConfig
from likewise.training import trainer as loop
from likewise.training.config import TrainConfig
from likewise.training.train import train
from likewise.training.validation import (
    ValidationSplit,
    alignment,
    best_step,
    knn_accuracy,
    retrieval_ranks,
    should_stop,
    split_validation,
    uniformity,
)

TINY = TrainConfig(
    backbone="resnet10t",
    image_size=32,
    stem="default",
    batch_size=32,
    max_steps=8,
    base_lr=0.01,
    num_val_pairs=30,
    val_every=2,
)


def unit(rows: torch.Tensor) -> np.ndarray:
    array = rows.numpy().astype(np.float64)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_ranks_are_those_of_scikit_learn() -> None:
    first, second = torch.randn(2, 40, 6)
    ranks = retrieval_ranks(first, second)
    # With one relevant item a query, its mean average precision is the mean reciprocal rank.
    expected = label_ranking_average_precision_score(np.eye(40), unit(first) @ unit(second).T)
    assert float((1 / ranks).mean()) == pytest.approx(expected, abs=1e-6)
    # Features that are all the same find nothing: every rank is the middle one.
    assert retrieval_ranks(torch.ones(9, 3), torch.ones(9, 3)).tolist() == [5.0] * 9


def test_alignment_and_uniformity_are_their_definitions() -> None:
    first, second = torch.randn(2, 12, 5)
    a, b = unit(first), unit(second)
    assert alignment(first, second).item() == pytest.approx(((a - b) ** 2).sum(axis=1).mean(), abs=1e-5)
    pairs = [np.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(12) for j in range(i)]
    assert uniformity(first).item() == pytest.approx(np.log(np.mean(pairs)), abs=1e-5)


def test_nearest_neighbors_vote_as_in_scikit_learn() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(60, 4), torch.randint(0, 2, (60,))
    features[labels == 1] += 1
    rows = unit(features)
    right = []
    for i in range(60):
        others = np.arange(60) != i
        voters = KNeighborsClassifier(20, metric="euclidean").fit(rows[others], labels.numpy()[others])
        votes = voters.predict_proba(rows[i : i + 1])[0]
        if votes[0] != votes[1]:
            right.append(votes.argmax() == int(labels[i]))
    ours = knn_accuracy(features, labels).item()
    ties = 60 - len(right)
    assert sum(right) / 60 <= ours <= (sum(right) + ties) / 60
    without = torch.cat([labels, torch.full((5,), -1)])
    assert knn_accuracy(torch.cat([features, torch.randn(5, 4)]), without).item() == pytest.approx(ours)


def test_what_is_held_out_is_not_trained_on(collection: CaptionDataset) -> None:
    pairs = build_pairs(collection, PairConfig())
    held = split_validation(pairs, 30, seed=0)
    assert len(held.anchors) == 30
    assert (held.anchors != held.partners).all()
    left = build_pairs(collection, PairConfig(), held.training_positions(pairs.anchors))
    shown = np.union1d(left.anchors, left.sample_partners(left.anchors, seed=0, epoch=0))
    assert not np.intersect1d(shown, np.concatenate([held.anchors, held.partners])).size
    assert not np.array_equal(held.anchors, split_validation(pairs, 30, seed=1).anchors)
    with pytest.raises(TrainingError, match="--held-out 150: .*use 103 or less"):
        split_validation(pairs, 150, seed=0)


def test_the_best_is_the_earliest_of_equals_and_patience_counts_from_it() -> None:
    rows = [
        {"step": 2, "mrr": 0.1},
        {"step": 4, "mrr": 0.3},
        {"step": 6, "mrr": 0.3},
        {"step": 8, "mrr": 0.2},
    ]
    assert best_step(rows) == 4
    assert best_step([]) == 0
    assert should_stop(rows, 2)
    assert not should_stop(rows, 3)
    assert not should_stop(rows, None)


def test_the_best_encoder_is_kept_and_the_last_beside_it(
    collection: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(collection, tmp_path / "run", TINY)
    rows = run.validation_metrics()
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert {"mrr", "recall_at_1", "alignment", "uniformity", "effective_rank", "knn"} <= rows[0].keys()
    assert 0 < rows[0]["mrr"] <= 1
    # Stopped just where a score is best, the run ends with the encoder that was kept.
    best = best_step(rows)
    assert run.best_step == best
    assert (run.path / "encoder-last.safetensors").is_file()
    kept = load_tensors(run.encoder_path)[0]
    original, seen = loop.save_method_encoder, {}

    def remember(path, method, spec) -> None:  # noqa: ANN001
        seen[len(seen)] = {name: tensor.clone() for name, tensor in method.backbone.state_dict().items()}
        original(path, method, spec)

    monkeypatch.setattr(loop, "keep_encoder", remember)
    again = train(collection, tmp_path / "again", TINY)
    assert again.validation_metrics() == rows
    assert all(torch.equal(seen[len(seen) - 1][name], tensor) for name, tensor in kept.items())


def test_patience_ends_a_run_early_and_running_again_finds_it_finished(
    collection: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from likewise.training import validation as scoring

    falling = iter([0.5, 0.4, 0.3, 0.2])
    original = scoring.PairRetrievalEvaluator.evaluate

    def worse(self, *arguments) -> dict[str, float]:  # noqa: ANN001, ANN002
        return original(self, *arguments) | {"mrr": next(falling)}

    monkeypatch.setattr(scoring.PairRetrievalEvaluator, "score", worse)
    patient = replace(TINY, early_stopping_patience=2)
    run = train(collection, tmp_path / "run", patient)
    assert run.artifact.manifest.counts["steps"] == 6
    assert run.best_step == 2
    train(collection, tmp_path / "run", patient)
    assert len(run.validation_metrics()) == 3


def test_scoring_changes_nothing_of_the_training(collection: CaptionDataset, tmp_path: Path) -> None:
    often = train(collection, tmp_path / "often", replace(TINY, val_every=1))
    once = train(collection, tmp_path / "once", replace(TINY, val_every=8))
    last = [load_tensors(run.path / "encoder-last.safetensors")[0] for run in (often, once)]
    assert all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())


def test_what_remains_by_hand() -> None:
    held = ValidationSplit(np.array([1, 2]), np.array([2, 5]))
    assert held.training_positions(np.arange(7)).tolist() == [0, 3, 4, 6]
