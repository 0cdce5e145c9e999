"""Average precision against pycocotools, and its bootstrap against explicitly resampled test sets."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from likewise.evaluation.protocols.detection import (
    Boxes,
    average_precision,
    bootstrap_average_precision,
    match_detections,
)

CLASSES = 4


def boxes(
    rng: np.random.Generator, count: int, *, crowds: bool = False, targets: Boxes | None = None
) -> Boxes:
    low = rng.uniform(0, 60, (count, 2))
    corners = np.concatenate([low, low + rng.uniform(4, 40, (count, 2))], axis=1)
    labels = rng.integers(0, CLASSES - 1, count)  # the last class never occurs
    if targets is not None and len(targets.labels):
        copied = rng.integers(0, len(targets.labels), count)
        close = rng.random(count) < 0.8
        moved = targets.xyxy[copied] + rng.normal(0, 2, (count, 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        corners, labels = (
            np.where(close[:, None], moved, corners),
            np.where(close, targets.labels[copied], labels),
        )
    crowd = rng.random(count) < 0.2 if crowds else np.zeros(count, bool)
    # Few distinct scores, so that there are ties.
    return Boxes(xyxy=corners, labels=labels, scores=rng.integers(1, 12, count) / 12, is_crowd=crowd)


def random_boxes(seed: int) -> tuple[list[Boxes], list[Boxes]]:
    rng = np.random.default_rng(seed)
    targets = [
        boxes(rng, int(rng.integers(0, 9)), crowds=seed % 2 == 0) for _ in range(int(rng.integers(1, 9)))
    ]
    return [boxes(rng, int(rng.integers(0, 14)), targets=gt) for gt in targets], targets


def reference(predictions: list[Boxes], targets: list[Boxes]) -> np.ndarray:
    """Return AP, AP50 and AP75 of pycocotools."""
    annotations, detections = [], []
    for image, (pred, gt) in enumerate(zip(predictions, targets, strict=True), start=1):
        for corners, label, crowd in zip(gt.xyxy, gt.labels, gt.is_crowd, strict=True):
            x0, y0, x1, y1 = corners.tolist()
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": int(label) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": int(crowd),
            })  # fmt: skip
        for corners, label, score in zip(pred.xyxy, pred.labels, pred.scores, strict=True):
            x0, y0, x1, y1 = corners.tolist()
            box = [x0, y0, x1 - x0, y1 - y0]
            detections.append(
                {"image_id": image, "category_id": int(label) + 1, "bbox": box, "score": float(score)}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco: Any = COCO()
        coco.dataset = {
            "images": [{"id": i + 1} for i in range(len(targets))],
            "annotations": annotations,
            "categories": [{"id": c + 1} for c in range(CLASSES)],
        }
        coco.createIndex()
        if not detections:
            return np.zeros(3)
        evaluator = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return np.maximum(evaluator.stats[:3], 0)


@pytest.mark.parametrize("seed", range(60))
def test_average_precision_matches_pycocotools(seed: int) -> None:
    predictions, targets = random_boxes(seed)
    result = average_precision(match_detections(predictions, targets, CLASSES))
    has_boxes = any((~boxes.is_crowd).any() for boxes in targets)
    # pycocotools returns -1 where nothing can be measured.
    expected = reference(predictions, targets) if has_boxes else np.full(3, np.nan)
    np.testing.assert_allclose([result.ap, result.ap50, result.ap75], expected, atol=1e-9)
    assert np.isnan(result.per_class[CLASSES - 1]).all()


def test_at_most_100_detections_per_image_and_class_count() -> None:
    rng = np.random.default_rng(5)
    targets = [boxes(rng, 30)]
    predictions = [boxes(rng, 700, targets=targets[0])]
    result = average_precision(match_detections(predictions, targets, CLASSES))
    assert [result.ap, result.ap50, result.ap75] == pytest.approx(reference(predictions, targets), abs=1e-9)


def test_image_counts_equal_repeated_images() -> None:
    predictions, targets = random_boxes(11)
    matched = match_detections(predictions, targets, CLASSES)
    rng = np.random.default_rng(3)
    for _ in range(20):
        counts = rng.multinomial(len(targets), np.full(len(targets), 1 / len(targets)))
        rows = np.repeat(np.arange(len(targets)), counts)
        expected = average_precision(
            match_detections([predictions[i] for i in rows], [targets[i] for i in rows], CLASSES)
        )
        # Copies with equal scores are ordered differently, which changes their precision.
        result = average_precision(matched, counts)
        assert result.ap == pytest.approx(expected.ap, abs=0.05)
    ones = average_precision(matched, np.ones(len(targets), np.int64))
    np.testing.assert_allclose(ones.per_class, average_precision(matched).per_class, atol=1e-9)


def test_bootstrap_resamples_are_a_function_of_the_seed() -> None:
    predictions, targets = random_boxes(4)
    matched = match_detections(predictions, targets, CLASSES)
    first, repeated = (bootstrap_average_precision(matched, 50, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, repeated)
    assert first.shape == (50, 3)
    assert first[:, 0].std() > 0
    assert abs(first[:, 0].mean() - average_precision(matched).ap) < 3 * first[:, 0].std()
