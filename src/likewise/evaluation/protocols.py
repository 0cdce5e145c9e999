"""Protocols: what is asked of frozen features, answered with a value, an interval and each item's score."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from likewise.errors import InputError, close_matches
from likewise.evaluation.features import Features
from likewise.evaluation.fewshot import FewShot, few_shot
from likewise.evaluation.knn import KNN, knn
from likewise.evaluation.linear import LinearProbe, linear_probe
from likewise.evaluation.retrieval import retrieve
from likewise.evaluation.statistics import Estimate, bootstrap, mean_per_class
from likewise.evaluation.suite import LabelledSet

RECALL_AT = (1, 5)
PER_CLASS = "mean per-class accuracy"


@dataclass(frozen=True, kw_only=True)
class ProtocolSettings:
    """The settings of all protocols.

    Attributes:
        linear: Of the linear probe.
        fewshot: Of few-shot classification.
        knn: Of the nearest-neighbor classifier.
    """

    linear: LinearProbe = field(default_factory=LinearProbe)
    fewshot: FewShot = field(default_factory=FewShot)
    knn: KNN = field(default_factory=KNN)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure with what it is made of.

    Attributes:
        metric: Such as `accuracy` or `recall@1`.
        estimate: The value and its 95 % interval, as fractions.
        items: (m,) the score of every test image, episode or query, kept for paired tests.
        groups: (m,) what each item belongs to where items are not independent, or None.
        details: What else is worth knowing.
    """

    metric: str
    estimate: Estimate
    items: np.ndarray
    groups: np.ndarray | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A labelled set with features, split up for the protocols."""

    images: LabelledSet
    features: Features

    def part(self, *splits: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (m, d) float32 and labels (m,) int64 of some splits."""
        here = np.isin(self.images.splits[self.features.rows], splits)
        labels = self.images.labels[self.features.rows[here]]
        return torch.from_numpy(self.features.vectors[here]), torch.from_numpy(labels)


def _linear(task: Task, settings: ProtocolSettings) -> list[Score]:
    train_x, train_y = task.part("train")
    val_x, val_y = task.part("val")
    test_x, test_y = task.part("test")
    given = len(val_y) > 0
    result = linear_probe(
        settings.linear,
        train_x,
        train_y,
        test_x,
        test_y,
        val_x=val_x if given else None,
        val_y=val_y if given else None,
        classes=len(task.images.classes),
    )
    details = {
        "cost": result.cost,
        "validation_accuracy": result.validation_accuracy,
        "converged": result.converged,
        "sweep": {f"{cost:g}": accuracy for cost, accuracy in result.sweep.items()},
    }
    return [_accuracy(result.predictions, test_y, settings.linear.mean_per_class, details)]


def _accuracy(
    predictions: torch.Tensor, labels: torch.Tensor, per_class: bool, details: dict[str, Any]
) -> Score:
    correct = (predictions == labels).double().numpy()
    estimate = mean_per_class(correct, labels.numpy()) if per_class else bootstrap(correct)
    name = PER_CLASS if per_class else "accuracy"
    return Score(metric=name, estimate=estimate, items=correct, details=details)


def _fewshot(task: Task, settings: ProtocolSettings) -> list[Score]:
    result = few_shot(settings.fewshot, *task.part("train", "val"), *task.part("test"))
    details = {"eligible_classes": result.eligible_classes, "skipped_classes": result.skipped_classes}
    return [Score(metric="accuracy", estimate=result.accuracy, items=result.episodes, details=details)]


def _knn(task: Task, settings: ProtocolSettings) -> list[Score]:
    test_x, test_y = task.part("test")
    predictions = knn(settings.knn, *task.part("train", "val"), test_x, len(task.images.classes))
    return [_accuracy(predictions, test_y, settings.linear.mean_per_class, {})]


def _retrieval(task: Task, _: ProtocolSettings) -> list[Score]:
    features, labels = task.part("test")
    rows = task.features.rows[task.images.splits[task.features.rows] == "test"]
    instances = labels.numpy() if task.images.instances is None else task.images.instances[rows]
    domains = None if task.images.domains is None else task.images.domains[rows]
    result = retrieve(features, instances, domains, RECALL_AT)
    if not len(result.queries):
        raise InputError(f"{task.images.root}: no test image has another of the same instance to find")
    groups = instances[result.queries]
    details = {"queries": len(result.queries), "skipped_queries": result.skipped}
    found = {f"recall@{k}": hits.astype(np.float64) for k, hits in result.recall.items()}
    found["mean average precision"] = result.average_precision
    return [
        Score(metric=name, estimate=bootstrap(items, groups), items=items, groups=groups, details=details)
        for name, items in found.items()
    ]


@dataclass(frozen=True)
class Protocol:
    """A protocol: how to run it and which of the settings it reads."""

    run: Callable[[Task, ProtocolSettings], list[Score]]
    settings: Callable[[ProtocolSettings], dict[str, Any]]


PROTOCOLS = {
    "linear": Protocol(_linear, lambda s: asdict(s.linear)),
    "fewshot": Protocol(_fewshot, lambda s: asdict(s.fewshot)),
    "knn": Protocol(_knn, lambda s: asdict(s.knn) | {"mean_per_class": s.linear.mean_per_class}),
    "retrieval": Protocol(_retrieval, lambda _: {"recall_at": list(RECALL_AT)}),
}


def check_protocols(names: tuple[str, ...]) -> None:
    """Refuse unknown protocols.

    Raises:
        InputError: listing the known ones.
    """
    for name in names:
        if name not in PROTOCOLS:
            near = close_matches(name, list(PROTOCOLS))
            raise InputError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}.{near}")
