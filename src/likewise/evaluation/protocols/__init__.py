"""Protocols: what is asked of frozen features, answered with a value, an interval and each item's score."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from likewise.errors import InputError, close_matches
from likewise.evaluation.datasets.captioned import CaptionedSet
from likewise.evaluation.datasets.dense import BoxedSet, MaskedSet
from likewise.evaluation.datasets.registry import PER_CLASS
from likewise.evaluation.protocols.base import Score, Task
from likewise.evaluation.protocols.clustering import Clustering, cluster
from likewise.evaluation.protocols.detection import Detection, detect
from likewise.evaluation.protocols.fewshot import FewShot, few_shot
from likewise.evaluation.protocols.finetune import FineTuning, fine_tune
from likewise.evaluation.protocols.knn import KNN, KNNGrid, knn, knn_grid
from likewise.evaluation.protocols.linear import LinearProbe, hold_out, linear_probe
from likewise.evaluation.protocols.localization import as_shares, localise
from likewise.evaluation.protocols.retrieval import retrieve
from likewise.evaluation.protocols.segmentation import (
    Segmentation,
    class_overlap,
    drawn_measures,
    measures,
    segment,
)
from likewise.evaluation.protocols.zero_shot import ZeroShot, match_captions, zero_shot
from likewise.evaluation.statistics import Estimate, bootstrap, mean_per_class


def detection_scores(task: Task, settings: Detection) -> list[Score]:
    """Train and score a detector on the encoder; intervals and tests are over drawn test sets.

    Raises:
        InputError: where the set has no boxes, or a split cannot be read.
        ModelError: where the encoder gives no feature maps.
    """
    images = task.images
    if not isinstance(images, BoxedSet):
        raise InputError(f"{images.source} has no boxes")
    shown = settings.epochs * int((images.splits == "train").sum()) + int((images.splits == "test").sum())
    with task.progress.task(f"detecting in {images.name}", shown, "images") as bar:
        found = detect(
            settings, task.encoder, images, device=task.device, workers=task.threads, advance=bar.advance
        )
    names = ("AP", "AP50", "AP75")
    details = {"per_class": found.per_class, "images": found.images, "skipped": found.skipped}
    return [
        _drawn(name, value, found.drawn[:, place], found.images, details)
        for place, (name, value) in enumerate(zip(names, found.values, strict=True))
    ]


def segmentation_scores(task: Task, settings: Segmentation) -> list[Score]:
    """Train and score a segmentation head on the encoder; intervals and tests are over drawn test sets.

    Raises:
        InputError: where the set has no masks, or a split cannot be read.
        ModelError: where the encoder gives no feature maps.
    """
    images = task.images
    if not isinstance(images, MaskedSet):
        raise InputError(f"{images.source} has no masks")
    shown = settings.epochs * int((images.splits == "train").sum()) + int((images.splits == "test").sum())
    with task.progress.task(f"segmenting {images.name}", shown, "images") as bar:
        found = segment(
            settings, task.encoder, images, device=task.device, workers=task.threads, advance=bar.advance
        )
    whole = found.confusion.sum(axis=0).astype(np.float64)
    drawn = drawn_measures(found.confusion, settings.resamples, settings.seed)
    each = zip(images.classes, class_overlap(whole).tolist(), strict=True)
    details = {
        "per_class": {name: value for name, value in each if np.isfinite(value)},
        "skipped": found.skipped,
    }
    return [
        _drawn(name, float(value), drawn[name], len(found.images), details)
        for name, value in measures(whole).items()
    ]


def _drawn(name: str, value: float, drawn: np.ndarray, images: int, details: dict[str, Any]) -> Score:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Score(
        metric=name,
        estimate=Estimate(value=value, low=float(low), high=float(high)),
        items=drawn,
        details=details,
        paired="draws",
        n=images,
    )


RECALL_AT = (1, 5)
CAPTION_RECALL_AT = (1, 5, 10)
# What a set must come with.
Kind = Literal["labels", "captions", "boxes", "masks"]


@dataclass(frozen=True, kw_only=True)
class ProtocolSettings:
    """The settings of all protocols.

    Attributes:
        linear: Of the linear probe.
        fewshot: Of few-shot classification.
        knn: Of the nearest-neighbor classifier.
        knn_grid: Of its settings' choice on validation images.
        clustering: Of k-means.
        zeroshot: Of classification by names.
        finetune: Of training the encoder too.
        detection: Of object detection.
        segmentation: Of semantic segmentation.
    """

    linear: LinearProbe = field(default_factory=LinearProbe)
    fewshot: FewShot = field(default_factory=FewShot)
    knn: KNN = field(default_factory=KNN)
    knn_grid: KNNGrid = field(default_factory=KNNGrid)
    clustering: Clustering = field(default_factory=Clustering)
    zeroshot: ZeroShot = field(default_factory=ZeroShot)
    finetune: FineTuning = field(default_factory=FineTuning)
    detection: Detection = field(default_factory=Detection)
    segmentation: Segmentation = field(default_factory=Segmentation)


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
        classes=len(task.labelled.classes),
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
    predictions = knn(settings.knn, *task.part("train", "val"), test_x, len(task.labelled.classes))
    return [_accuracy(predictions, test_y, settings.linear.mean_per_class, {})]


def _knn_grid(task: Task, settings: ProtocolSettings) -> list[Score]:
    """Choose k and temperature on validation images, then vote with train and validation together."""
    grid, classes = settings.knn_grid, len(task.labelled.classes)
    train, val, (test_x, test_y) = task.part("train"), task.part("val"), task.part("test")
    if not len(val[1]):
        kept, held = hold_out(train[1], grid.validation_share, grid.seed)
        train, val = (train[0][kept], train[1][kept]), (train[0][held], train[1][held])
    found = knn_grid(grid, train, val, classes)
    best = max(found, key=lambda each: found[each])
    predictions = knn(best, *task.part("train", "val"), test_x, classes)
    details = asdict(best) | {"validation_accuracy": found[best]}
    return [_accuracy(predictions, test_y, settings.linear.mean_per_class, details)]


def _clustering(task: Task, settings: ProtocolSettings) -> list[Score]:
    features, labels = task.part("test")
    found = cluster(settings.clustering, features.numpy(), labels.numpy())
    return [
        Score(metric="NMI", estimate=found.nmi, items=found.nmi_starts, paired="no"),
        Score(metric="ARI", estimate=found.ari, items=found.ari_starts, paired="no"),
    ]


def _zero_shot(task: Task, settings: ProtocolSettings) -> list[Score]:
    features, labels = task.part("test")
    predictions = zero_shot(settings.zeroshot, features, task.labelled.classes, task.language)
    return [_accuracy(predictions, labels, settings.linear.mean_per_class, {})]


def _finetune(task: Task, settings: ProtocolSettings) -> list[Score]:
    train, test = task.rows("train", "val"), task.rows("test")
    with task.progress.task(
        f"fine-tuning on {task.images.name}", len(train) * settings.finetune.epochs, "images"
    ) as bar:
        predictions = fine_tune(
            settings.finetune,
            task.encoder,
            task.labelled,
            train,
            test,
            device=task.device,
            workers=task.threads,
            advance=bar.advance,
        )
    labels = torch.from_numpy(task.labelled.labels[test])
    return [_accuracy(predictions, labels, settings.linear.mean_per_class, {})]


def _localisation(task: Task, settings: ProtocolSettings) -> list[Score]:
    images = task.labelled
    if images.boxes is None:
        raise InputError(f"{images.source} has no boxes: localisation needs columns x0, y0, x1 and y1")
    boxed = np.flatnonzero(np.isfinite(images.boxes).all(axis=1))
    train, test = (np.intersect1d(rows, boxed) for rows in (task.rows("train", "val"), task.rows("test")))
    files = np.array(images.files)
    train_boxes, test_boxes = (
        as_shares(images.boxes[rows], files[rows].tolist(), images.root) for rows in (train, test)
    )
    probe = settings.linear
    _, held = hold_out(torch.from_numpy(images.labels[train]), probe.validation_share, probe.seed)
    vectors = task.pooled.vectors
    found = localise(vectors[train], train_boxes, vectors[test], test_boxes, held.numpy())
    details = {"penalty": found.penalty, "images_without_a_box": len(images) - len(boxed)}
    shown = {
        "mean IoU of boxes": found.overlap,
        "boxes with IoU >= 0.5": (found.overlap >= 0.5).astype(float),
    }
    return [
        Score(metric=name, estimate=bootstrap(items), items=items, details=details)
        for name, items in shown.items()
    ]


def _retrieval(task: Task, _: ProtocolSettings) -> list[Score]:
    features, labels = task.part("test")
    rows, images = task.rows("test"), task.labelled
    instances = labels.numpy() if images.instances is None else images.instances[rows]
    domains = None if images.domains is None else images.domains[rows]
    result = retrieve(features, instances, domains, RECALL_AT)
    if not len(result.queries):
        raise InputError(f"{images.root}: no test image has another of the same instance to find")
    groups = instances[result.queries]
    details = {"queries": len(result.queries), "skipped_queries": result.skipped}
    found = {f"recall@{k}": hits.astype(np.float64) for k, hits in result.recall.items()}
    found["mean average precision"] = result.average_precision
    return [
        Score(metric=name, estimate=bootstrap(items, groups), items=items, groups=groups, details=details)
        for name, items in found.items()
    ]


def _image_text(task: Task, _: ProtocolSettings) -> list[Score]:
    if not isinstance(task.images, CaptionedSet):
        raise InputError(f"{task.images.source} has no captions")
    rows, language = task.pooled.rows, task.language
    captions = [task.images.captions[row] for row in rows]
    owners = np.repeat(np.arange(len(rows)), [len(each) for each in captions])
    projected = language.project(torch.from_numpy(task.pooled.vectors[rows]))
    texts = language.embed([caption for each in captions for caption in each])
    by_image, by_text = match_captions(projected, texts, torch.from_numpy(owners), CAPTION_RECALL_AT)
    scores = []
    for direction, hits, groups in (("image to text", by_image, None), ("text to image", by_text, owners)):
        for column, k in enumerate(CAPTION_RECALL_AT):
            items = hits[:, column].astype(np.float64)
            estimate = bootstrap(items, groups)
            scores.append(
                Score(metric=f"{direction} recall@{k}", estimate=estimate, items=items, groups=groups)
            )
    return scores


@dataclass(frozen=True)
class Protocol:
    """A protocol: how to run it, which of the settings it reads, and what a set must come with."""

    run: Callable[[Task, ProtocolSettings], list[Score]]
    settings: Callable[[ProtocolSettings], dict[str, Any]]
    what: str
    kind: Kind = "labels"


def _per_class(settings: ProtocolSettings) -> dict[str, Any]:
    return {"mean_per_class": settings.linear.mean_per_class}


PROTOCOLS = {
    "linear": Protocol(_linear, lambda s: asdict(s.linear), "a logistic regression on frozen features"),
    "fewshot": Protocol(_fewshot, lambda s: asdict(s.fewshot), "many small tasks of a few images a class"),
    "knn": Protocol(_knn, lambda s: asdict(s.knn) | _per_class(s), "the vote of the nearest images"),
    "knn-grid": Protocol(
        _knn_grid,
        lambda s: asdict(s.knn_grid) | _per_class(s),
        "knn, its settings chosen on validation images",
    ),
    "retrieval": Protocol(
        _retrieval, lambda _: {"recall_at": list(RECALL_AT)}, "find images of the same thing"
    ),
    "clustering": Protocol(_clustering, lambda s: asdict(s.clustering), "k-means against the labels"),
    "finetune": Protocol(
        _finetune, lambda s: asdict(s.finetune) | _per_class(s), "train the encoder and a classifier together"
    ),
    "localisation": Protocol(
        _localisation, lambda s: {"seed": s.linear.seed}, "a box around the subject, from frozen features"
    ),
    "zeroshot": Protocol(
        _zero_shot, lambda s: asdict(s.zeroshot) | _per_class(s), "classes by their names, with a text tower"
    ),
    "image-text": Protocol(
        _image_text,
        lambda _: {"recall_at": list(CAPTION_RECALL_AT)},
        "find captions by images and back, with a text tower",
        kind="captions",
    ),
    "detection": Protocol(
        lambda task, s: detection_scores(task, s.detection),
        lambda s: asdict(s.detection),
        "boxes, by Faster R-CNN on the encoder's maps",
        kind="boxes",
    ),
    "segmentation": Protocol(
        lambda task, s: segmentation_scores(task, s.segmentation),
        lambda s: asdict(s.segmentation),
        "a class for each pixel, from the encoder's maps",
        kind="masks",
    ),
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
