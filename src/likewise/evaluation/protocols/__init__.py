"""Protocols: what is asked of frozen features, answered with a value, an interval and each item's score."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from likewise.errors import InvalidInputError, did_you_mean
from likewise.evaluation.datasets.captioned import CaptionedDataset
from likewise.evaluation.datasets.dense import DetectionDataset, SegmentationDataset
from likewise.evaluation.datasets.registry import MEAN_CLASS_ACCURACY
from likewise.evaluation.protocols.base import EvalContext, Score
from likewise.evaluation.protocols.clustering import ClusteringConfig, evaluate_clustering
from likewise.evaluation.protocols.detection import DetectionConfig, run_detection
from likewise.evaluation.protocols.fewshot import FewShotConfig, evaluate_few_shot
from likewise.evaluation.protocols.finetune import FineTuningConfig, fine_tune
from likewise.evaluation.protocols.knn import KNNConfig, KNNGridConfig, knn_predict, search_knn_grid
from likewise.evaluation.protocols.linear import LinearProbeConfig, fit_linear_probe, stratified_split
from likewise.evaluation.protocols.localization import localize, normalize_boxes
from likewise.evaluation.protocols.retrieval import retrieve
from likewise.evaluation.protocols.segmentation import (
    SegmentationConfig,
    bootstrap_metrics,
    per_class_iou,
    run_segmentation,
    segmentation_metrics,
)
from likewise.evaluation.protocols.zero_shot import ZeroShotConfig, match_captions, zero_shot_predict
from likewise.evaluation.statistics import Estimate, bootstrap, mean_per_class


def score_detection(context: EvalContext, config: DetectionConfig) -> list[Score]:
    """Train and score a detector on the encoder; intervals and tests are over drawn test sets.

    Raises:
        InputError: where the set has no boxes, or a split cannot be read.
        ModelError: where the encoder gives no feature maps.
    """
    dataset = context.dataset
    if not isinstance(dataset, DetectionDataset):
        raise InvalidInputError(f"{dataset.path} has no boxes")
    num_images = config.epochs * int((dataset.splits == "train").sum()) + int(
        (dataset.splits == "test").sum()
    )
    with context.progress.task(f"detecting in {dataset.name}", num_images, "images") as bar:
        result = run_detection(
            config,
            context.encoder,
            dataset,
            device=context.device,
            num_workers=context.num_workers,
            update_progress=bar.update,
        )
    metric_names = ("AP", "AP50", "AP75")
    details = {"per_class": result.per_class, "images": result.num_images, "skipped": result.skipped}
    return [
        _bootstrap_score(name, value, result.bootstrap_values[:, i], result.num_images, details)
        for i, (name, value) in enumerate(zip(metric_names, result.values, strict=True))
    ]


def score_segmentation(context: EvalContext, config: SegmentationConfig) -> list[Score]:
    """Train and score a segmentation head on the encoder; intervals and tests are over drawn test sets.

    Raises:
        InputError: where the set has no masks, or a split cannot be read.
        ModelError: where the encoder gives no feature maps.
    """
    dataset = context.dataset
    if not isinstance(dataset, SegmentationDataset):
        raise InvalidInputError(f"{dataset.path} has no masks")
    num_images = config.epochs * int((dataset.splits == "train").sum()) + int(
        (dataset.splits == "test").sum()
    )
    with context.progress.task(f"segmenting {dataset.name}", num_images, "images") as bar:
        result = run_segmentation(
            config,
            context.encoder,
            dataset,
            device=context.device,
            num_workers=context.num_workers,
            update_progress=bar.update,
        )
    total_confusion = result.confusion.sum(axis=0).astype(np.float64)
    bootstrap_values = bootstrap_metrics(result.confusion, config.num_resamples, config.seed)
    class_ious = zip(dataset.classes, per_class_iou(total_confusion).tolist(), strict=True)
    details = {
        "per_class": {name: value for name, value in class_ious if np.isfinite(value)},
        "skipped": result.skipped,
    }
    return [
        _bootstrap_score(name, float(value), bootstrap_values[name], len(result.indices), details)
        for name, value in segmentation_metrics(total_confusion).items()
    ]


def _bootstrap_score(
    name: str, value: float, bootstrap_values: np.ndarray, num_images: int, details: dict[str, Any]
) -> Score:
    low, high = np.quantile(bootstrap_values, [0.025, 0.975])
    return Score(
        metric=name,
        estimate=Estimate(value=value, low=float(low), high=float(high)),
        per_item=bootstrap_values,
        details=details,
        pairing="draws",
        n=num_images,
    )


RECALL_KS = (1, 5)
CAPTION_RECALL_KS = (1, 5, 10)
# What a set must come with.
AnnotationType = Literal["labels", "captions", "boxes", "masks"]


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
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

    linear: LinearProbeConfig = field(default_factory=LinearProbeConfig)
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)
    knn_grid: KNNGridConfig = field(default_factory=KNNGridConfig)
    clustering: ClusteringConfig = field(default_factory=ClusteringConfig)
    zeroshot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    finetune: FineTuningConfig = field(default_factory=FineTuningConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)


def _run_linear(context: EvalContext, config: ProtocolConfig) -> list[Score]:
    train_x, train_y = context.split("train")
    val_x, val_y = context.split("val")
    test_x, test_y = context.split("test")
    has_val = len(val_y) > 0
    result = fit_linear_probe(
        config.linear,
        train_x,
        train_y,
        test_x,
        test_y,
        val_x=val_x if has_val else None,
        val_y=val_y if has_val else None,
        num_classes=len(context.labeled_dataset.classes),
    )
    details = {
        "cost": result.C,
        "validation_accuracy": result.val_accuracy,
        "converged": result.converged,
        "sweep": {f"{C:g}": accuracy for C, accuracy in result.sweep.items()},
    }
    return [_accuracy_score(result.predictions, test_y, config.linear.mean_class_accuracy, details)]


def _accuracy_score(
    predictions: torch.Tensor, labels: torch.Tensor, mean_class_accuracy: bool, details: dict[str, Any]
) -> Score:
    correct = (predictions == labels).double().numpy()
    estimate = mean_per_class(correct, labels.numpy()) if mean_class_accuracy else bootstrap(correct)
    metric = MEAN_CLASS_ACCURACY if mean_class_accuracy else "accuracy"
    return Score(metric=metric, estimate=estimate, per_item=correct, details=details)


def _run_fewshot(context: EvalContext, config: ProtocolConfig) -> list[Score]:
    result = evaluate_few_shot(config.fewshot, *context.split("train", "val"), *context.split("test"))
    details = {"eligible_classes": result.eligible_classes, "skipped_classes": result.skipped_classes}
    return [Score(metric="accuracy", estimate=result.accuracy, per_item=result.per_episode, details=details)]


def _run_knn(context: EvalContext, config: ProtocolConfig) -> list[Score]:
    test_x, test_y = context.split("test")
    predictions = knn_predict(
        config.knn, *context.split("train", "val"), test_x, len(context.labeled_dataset.classes)
    )
    return [_accuracy_score(predictions, test_y, config.linear.mean_class_accuracy, {})]


def _run_knn_grid(context: EvalContext, config: ProtocolConfig) -> list[Score]:
    """Choose k and temperature on validation images, then vote with train and validation together."""
    grid, num_classes = config.knn_grid, len(context.labeled_dataset.classes)
    train, val, (test_x, test_y) = context.split("train"), context.split("val"), context.split("test")
    if not len(val[1]):
        train_indices, val_indices = stratified_split(train[1], grid.val_fraction, grid.seed)
        train, val = (
            (train[0][train_indices], train[1][train_indices]),
            (train[0][val_indices], train[1][val_indices]),
        )
    val_accuracies = search_knn_grid(grid, train, val, num_classes)
    best_config = max(val_accuracies, key=lambda knn_config: val_accuracies[knn_config])
    predictions = knn_predict(best_config, *context.split("train", "val"), test_x, num_classes)
    details = asdict(best_config) | {"validation_accuracy": val_accuracies[best_config]}
    return [_accuracy_score(predictions, test_y, config.linear.mean_class_accuracy, details)]


def _run_clustering(context: EvalContext, config: ProtocolConfig) -> list[Score]:
    features, labels = context.split("test")
    result = evaluate_clustering(config.clustering, features.numpy(), labels.numpy())
    return [
        Score(metric="NMI", estimate=result.nmi, per_item=result.nmi_per_restart, pairing="no"),
        Score(metric="ARI", estimate=result.ari, per_item=result.ari_per_restart, pairing="no"),
    ]


def _run_zero_shot(context: EvalContext, config: ProtocolConfig) -> list[Score]:
    features, labels = context.split("test")
    predictions = zero_shot_predict(
        config.zeroshot, features, context.labeled_dataset.classes, context.text_alignment
    )
    return [_accuracy_score(predictions, labels, config.linear.mean_class_accuracy, {})]


def _run_finetune(context: EvalContext, config: ProtocolConfig) -> list[Score]:
    train_indices, test_indices = context.indices("train", "val"), context.indices("test")
    with context.progress.task(
        f"fine-tuning on {context.dataset.name}", len(train_indices) * config.finetune.epochs, "images"
    ) as bar:
        predictions = fine_tune(
            config.finetune,
            context.encoder,
            context.labeled_dataset,
            train_indices,
            test_indices,
            device=context.device,
            num_workers=context.num_workers,
            update_progress=bar.update,
        )
    labels = torch.from_numpy(context.labeled_dataset.labels[test_indices])
    return [_accuracy_score(predictions, labels, config.linear.mean_class_accuracy, {})]


def _run_localization(context: EvalContext, config: ProtocolConfig) -> list[Score]:
    dataset = context.labeled_dataset
    if dataset.boxes is None:
        raise InvalidInputError(f"{dataset.path} has no boxes: localisation needs columns x0, y0, x1 and y1")
    boxed_indices = np.flatnonzero(np.isfinite(dataset.boxes).all(axis=1))
    train_indices, test_indices = (
        np.intersect1d(indices, boxed_indices)
        for indices in (context.indices("train", "val"), context.indices("test"))
    )
    files = np.array(dataset.files)
    train_boxes, test_boxes = (
        normalize_boxes(dataset.boxes[indices], files[indices].tolist(), dataset.root)
        for indices in (train_indices, test_indices)
    )
    probe_config = config.linear
    _, val_indices = stratified_split(
        torch.from_numpy(dataset.labels[train_indices]), probe_config.val_fraction, probe_config.seed
    )
    vectors = context.features.vectors
    result = localize(
        vectors[train_indices], train_boxes, vectors[test_indices], test_boxes, val_indices.numpy()
    )
    details = {"penalty": result.penalty, "images_without_a_box": len(dataset) - len(boxed_indices)}
    metrics = {
        "mean IoU of boxes": result.iou,
        "boxes with IoU >= 0.5": (result.iou >= 0.5).astype(float),
    }
    return [
        Score(metric=name, estimate=bootstrap(per_item), per_item=per_item, details=details)
        for name, per_item in metrics.items()
    ]


def _run_retrieval(context: EvalContext, _: ProtocolConfig) -> list[Score]:
    features, labels = context.split("test")
    indices, dataset = context.indices("test"), context.labeled_dataset
    instances = labels.numpy() if dataset.instances is None else dataset.instances[indices]
    domains = None if dataset.domains is None else dataset.domains[indices]
    result = retrieve(features, instances, domains, RECALL_KS)
    if not len(result.queries):
        raise InvalidInputError(f"{dataset.root}: no test image has another of the same instance to find")
    groups = instances[result.queries]
    details = {"queries": len(result.queries), "skipped_queries": result.skipped}
    metrics = {f"recall@{k}": hits.astype(np.float64) for k, hits in result.recall.items()}
    metrics["mean average precision"] = result.average_precision
    return [
        Score(
            metric=name,
            estimate=bootstrap(per_item, groups),
            per_item=per_item,
            groups=groups,
            details=details,
        )
        for name, per_item in metrics.items()
    ]


def _run_image_text(context: EvalContext, _: ProtocolConfig) -> list[Score]:
    if not isinstance(context.dataset, CaptionedDataset):
        raise InvalidInputError(f"{context.dataset.path} has no captions")
    indices, text_alignment = context.features.indices, context.text_alignment
    captions = [context.dataset.captions[index] for index in indices]
    image_ids = np.repeat(np.arange(len(indices)), [len(image_captions) for image_captions in captions])
    image_embeddings = text_alignment.project_image(torch.from_numpy(context.features.vectors[indices]))
    text_embeddings = text_alignment.encode_text(
        [caption for image_captions in captions for caption in image_captions]
    )
    image_to_text, text_to_image = match_captions(
        image_embeddings, text_embeddings, torch.from_numpy(image_ids), CAPTION_RECALL_KS
    )
    scores = []
    for direction, hits, groups in (
        ("image to text", image_to_text, None),
        ("text to image", text_to_image, image_ids),
    ):
        for i, k in enumerate(CAPTION_RECALL_KS):
            per_item = hits[:, i].astype(np.float64)
            estimate = bootstrap(per_item, groups)
            scores.append(
                Score(metric=f"{direction} recall@{k}", estimate=estimate, per_item=per_item, groups=groups)
            )
    return scores


@dataclass(frozen=True)
class Protocol:
    """A protocol: how to run it, which of the settings it reads, and what a set must come with."""

    run: Callable[[EvalContext, ProtocolConfig], list[Score]]
    config_dict: Callable[[ProtocolConfig], dict[str, Any]]
    summary: str
    requires: AnnotationType = "labels"


def _accuracy_settings(config: ProtocolConfig) -> dict[str, Any]:
    return {"mean_class_accuracy": config.linear.mean_class_accuracy}


PROTOCOLS = {
    "linear": Protocol(_run_linear, lambda s: asdict(s.linear), "a logistic regression on frozen features"),
    "fewshot": Protocol(
        _run_fewshot, lambda s: asdict(s.fewshot), "many small tasks of a few images a class"
    ),
    "knn": Protocol(
        _run_knn, lambda s: asdict(s.knn) | _accuracy_settings(s), "the vote of the nearest images"
    ),
    "knn-grid": Protocol(
        _run_knn_grid,
        lambda s: asdict(s.knn_grid) | _accuracy_settings(s),
        "knn, its settings chosen on validation images",
    ),
    "retrieval": Protocol(
        _run_retrieval, lambda _: {"recall_at": list(RECALL_KS)}, "find images of the same thing"
    ),
    "clustering": Protocol(_run_clustering, lambda s: asdict(s.clustering), "k-means against the labels"),
    "finetune": Protocol(
        _run_finetune,
        lambda s: asdict(s.finetune) | _accuracy_settings(s),
        "train the encoder and a classifier together",
    ),
    "localisation": Protocol(
        _run_localization, lambda s: {"seed": s.linear.seed}, "a box around the subject, from frozen features"
    ),
    "zeroshot": Protocol(
        _run_zero_shot,
        lambda s: asdict(s.zeroshot) | _accuracy_settings(s),
        "classes by their names, with a text tower",
    ),
    "image-text": Protocol(
        _run_image_text,
        lambda _: {"recall_at": list(CAPTION_RECALL_KS)},
        "find captions by images and back, with a text tower",
        requires="captions",
    ),
    "detection": Protocol(
        lambda task, s: score_detection(task, s.detection),
        lambda s: asdict(s.detection),
        "boxes, by Faster R-CNN on the encoder's maps",
        requires="boxes",
    ),
    "segmentation": Protocol(
        lambda task, s: score_segmentation(task, s.segmentation),
        lambda s: asdict(s.segmentation),
        "a class for each pixel, from the encoder's maps",
        requires="masks",
    ),
}


def validate_protocols(names: tuple[str, ...]) -> None:
    """Refuse unknown protocols.

    Raises:
        InputError: listing the known ones.
    """
    for name in names:
        if name not in PROTOCOLS:
            suggestion = did_you_mean(name, list(PROTOCOLS))
            raise InvalidInputError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}.{suggestion}")
