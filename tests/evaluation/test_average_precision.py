"""Average precision against pycocotools, and its bootstrap against test sets that are written out."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from likewise.evaluation.protocols.average_precision import (
    Boxes,
    average_precision,
    bootstrap_average_precision,
    match_detections,
)

CLASSES = 4


def boxes(rng: np.random.Generator, count: int, *, crowds: bool = False, near: Boxes | None = None) -> Boxes:
    low = rng.uniform(0, 60, (count, 2))
    corners = np.concatenate([low, low + rng.uniform(4, 40, (count, 2))], axis=1)
    labels = rng.integers(0, CLASSES - 1, count)  # the last class never occurs
    if near is not None and len(near.labels):
        copied = rng.integers(0, len(near.labels), count)
        close = rng.random(count) < 0.8
        moved = near.xyxy[copied] + rng.normal(0, 2, (count, 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        corners, labels = (
            np.where(close[:, None], moved, corners),
            np.where(close, near.labels[copied], labels),
        )
    crowd = rng.random(count) < 0.2 if crowds else np.zeros(count, bool)
    # Few distinct scores, so that there are ties.
    return Boxes(xyxy=corners, labels=labels, scores=rng.integers(1, 12, count) / 12, is_crowd=crowd)


def case(seed: int) -> tuple[list[Boxes], list[Boxes]]:
    rng = np.random.default_rng(seed)
    true = [boxes(rng, int(rng.integers(0, 9)), crowds=seed % 2 == 0) for _ in range(int(rng.integers(1, 9)))]
    return [boxes(rng, int(rng.integers(0, 14)), near=each) for each in true], true


def peer(found: list[Boxes], true: list[Boxes]) -> np.ndarray:
    """AP, AP50, AP75 by pycocotools."""
    annotations, detections = [], []
    for image, (shown, there) in enumerate(zip(found, true, strict=True), start=1):
        for corners, label, crowd in zip(there.xyxy, there.labels, there.is_crowd, strict=True):
            x0, y0, x1, y1 = corners.tolist()
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": int(label) + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": int(crowd),
            })  # fmt: skip
        for corners, label, score in zip(shown.xyxy, shown.labels, shown.scores, strict=True):
            x0, y0, x1, y1 = corners.tolist()
            box = [x0, y0, x1 - x0, y1 - y0]
            detections.append(
                {"image_id": image, "category_id": int(label) + 1, "bbox": box, "score": float(score)}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco: Any = COCO()
        coco.dataset = {
            "images": [{"id": i + 1} for i in range(len(true))],
            "annotations": annotations,
            "categories": [{"id": c + 1} for c in range(CLASSES)],
        }
        coco.createIndex()
        if not detections:
            return np.zeros(3)
        judge = COCOeval(coco, coco.loadRes(detections), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return np.maximum(judge.stats[:3], 0)


@pytest.mark.parametrize("seed", range(60))
def test_average_precision_is_pycocotools(seed: int) -> None:
    found, true = case(seed)
    got = average_precision(match_detections(found, true, CLASSES))
    np.testing.assert_allclose([got.ap, got.ap50, got.ap75], peer(found, true), atol=1e-9)
    assert np.isnan(got.per_class[CLASSES - 1]).all()


def test_more_than_a_hundred_detections_an_image_and_class_do_not_count() -> None:
    rng = np.random.default_rng(5)
    true = [boxes(rng, 30)]
    found = [boxes(rng, 700, near=true[0])]
    got = average_precision(match_detections(found, true, CLASSES))
    assert [got.ap, got.ap50, got.ap75] == pytest.approx(peer(found, true), abs=1e-9)


def test_a_drawn_test_set_counts_as_if_its_images_were_written_out() -> None:
    found, true = case(11)
    matched = match_detections(found, true, CLASSES)
    rng = np.random.default_rng(3)
    for _ in range(20):
        counts = rng.multinomial(len(true), np.full(len(true), 1 / len(true)))
        rows = np.repeat(np.arange(len(true)), counts)
        written = average_precision(
            match_detections([found[i] for i in rows], [true[i] for i in rows], CLASSES)
        )
        # Equal scores of several copies come in another order, which moves precision between them.
        distinct = average_precision(matched, counts)
        assert distinct.ap == pytest.approx(written.ap, abs=0.05)
    ones = average_precision(matched, np.ones(len(true), np.int64))
    np.testing.assert_allclose(ones.per_class, average_precision(matched).per_class, atol=1e-9)


def test_the_bootstrap_draws_the_same_images_for_every_detector() -> None:
    found, true = case(4)
    matched = match_detections(found, true, CLASSES)
    first, again = (bootstrap_average_precision(matched, 50, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (50, 3)
    assert first[:, 0].std() > 0
    assert abs(first[:, 0].mean() - average_precision(matched).ap) < 3 * first[:, 0].std()
