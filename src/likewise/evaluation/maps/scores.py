"""The protocols that ask where: detection and segmentation, from the encoder's feature maps."""

from typing import Any

import numpy as np

from likewise.errors import InputError
from likewise.evaluation.maps.detection import Detection, detect
from likewise.evaluation.maps.segmentation import (
    Segmentation,
    class_overlap,
    drawn_measures,
    measures,
    segment,
)
from likewise.evaluation.sets.boxes import BoxedSet
from likewise.evaluation.sets.masks import MaskedSet
from likewise.evaluation.statistics import Estimate
from likewise.evaluation.tasks import Score, Task


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
