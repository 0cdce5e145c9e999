"""Validation: metrics against their definitions, and the best encoder is the result of a run."""

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
from likewise.training import trainer as trainer_module
from likewise.training.config import TrainConfig
from likewise.training.train import train
from likewise.training.validation import (
    PairRetrievalEvaluator,
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


def test_ranks_equal_scikit_learn() -> None:
    anchors, partners = torch.randn(2, 40, 6)
    ranks = retrieval_ranks(anchors, partners)
    # With one relevant item per query, mean average precision is the mean reciprocal rank.
    expected = label_ranking_average_precision_score(np.eye(40), unit(anchors) @ unit(partners).T)
    assert float((1 / ranks).mean()) == pytest.approx(expected, abs=1e-6)
    # Constant features: all candidates tie, and the rank is their mean.
    assert retrieval_ranks(torch.ones(9, 3), torch.ones(9, 3)).tolist() == [5.0] * 9


def test_alignment_and_uniformity_equal_their_definitions() -> None:
    anchors, partners = torch.randn(2, 12, 5)
    a, b = unit(anchors), unit(partners)
    assert alignment(anchors, partners).item() == pytest.approx(((a - b) ** 2).sum(axis=1).mean(), abs=1e-5)
    pairs = [np.exp(-2 * ((a[i] - a[j]) ** 2).sum()) for i in range(12) for j in range(i)]
    assert uniformity(anchors).item() == pytest.approx(np.log(np.mean(pairs)), abs=1e-5)


def test_knn_accuracy_equals_scikit_learn() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(60, 4), torch.randint(0, 2, (60,))
    features[labels == 1] += 1
    rows = unit(features)
    is_correct = []
    for i in range(60):
        others = np.arange(60) != i
        classifier = KNeighborsClassifier(20, metric="euclidean").fit(rows[others], labels.numpy()[others])
        votes = classifier.predict_proba(rows[i : i + 1])[0]
        if votes[0] != votes[1]:
            is_correct.append(votes.argmax() == int(labels[i]))
    accuracy = knn_accuracy(features, labels).item()
    ties = 60 - len(is_correct)
    assert sum(is_correct) / 60 <= accuracy <= (sum(is_correct) + ties) / 60
    with_unlabeled = torch.cat([labels, torch.full((5,), -1)])
    assert knn_accuracy(torch.cat([features, torch.randn(5, 4)]), with_unlabeled).item() == pytest.approx(
        accuracy
    )


def test_validation_pairs_are_held_out_of_training(dataset: CaptionDataset) -> None:
    pairs = build_pairs(dataset, PairConfig())
    split = split_validation(pairs, 30, seed=0)
    assert len(split.anchors) == 30
    assert (split.anchors != split.partners).all()
    training_mask = split.training_mask(np.ones(len(dataset), bool))
    train_pairs = build_pairs(dataset, PairConfig(), allowed=training_mask)
    train_images = np.union1d(
        train_pairs.anchors, train_pairs.sample_partners(train_pairs.anchors, seed=0, epoch=0)
    )
    assert not np.intersect1d(train_images, np.concatenate([split.anchors, split.partners])).size
    assert not np.array_equal(split.anchors, split_validation(pairs, 30, seed=1).anchors)
    with pytest.raises(TrainingError, match="at most 103") as excinfo:
        split_validation(pairs, 150, seed=0)
    assert excinfo.value.field == "num_val_pairs"


def test_best_step_is_the_earliest_of_ties_and_patience_counts_from_it() -> None:
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


def test_best_encoder_is_the_result_and_the_last_is_saved_as_well(
    dataset: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(dataset, tmp_path / "run", TINY)
    rows = run.validation_metrics()
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert {"mrr", "recall_at_1", "alignment", "uniformity", "effective_rank", "knn"} <= rows[0].keys()
    assert 0 < rows[0]["mrr"] <= 1
    assert run.best_step == best_step(rows)
    assert (run.path / "encoder-last.safetensors").is_file()
    best = load_tensors(run.encoder_path)[0]
    original, saved = trainer_module.save_encoder, []

    def save_encoder(path, backbone, *args) -> None:  # noqa: ANN001, ANN002
        if "best" in path.name:
            saved.append({name: tensor.clone() for name, tensor in backbone.state_dict().items()})
        original(path, backbone, *args)

    monkeypatch.setattr(trainer_module, "save_encoder", save_encoder)
    repeated_run = train(dataset, tmp_path / "again", TINY)
    assert repeated_run.validation_metrics() == rows
    assert all(torch.equal(saved[-1][name], tensor) for name, tensor in best.items())


def test_early_stopping_completes_a_run_and_a_repeated_call_is_a_no_op(
    dataset: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decreasing = iter([0.5, 0.4, 0.3, 0.2])
    original = PairRetrievalEvaluator.evaluate

    def evaluate_worse(self, *arguments) -> dict[str, float]:  # noqa: ANN001, ANN002
        return original(self, *arguments) | {"mrr": next(decreasing)}

    monkeypatch.setattr(PairRetrievalEvaluator, "evaluate", evaluate_worse)
    patient = replace(TINY, early_stopping_patience=2)
    run = train(dataset, tmp_path / "run", patient)
    assert run.artifact.manifest.counts["steps"] == 6
    assert run.best_step == 2
    train(dataset, tmp_path / "run", patient)
    assert len(run.validation_metrics()) == 3


def test_validation_does_not_change_the_weights(dataset: CaptionDataset, tmp_path: Path) -> None:
    often = train(dataset, tmp_path / "often", replace(TINY, val_every=1))
    once = train(dataset, tmp_path / "once", replace(TINY, val_every=8))
    last = [load_tensors(run.path / "encoder-last.safetensors")[0] for run in (often, once)]
    assert all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())


def test_training_mask_excludes_anchors_and_partners() -> None:
    split = ValidationSplit(np.array([1, 2]), np.array([2, 5]))
    assert np.flatnonzero(split.training_mask(np.ones(7, bool))).tolist() == [0, 3, 4, 6]
