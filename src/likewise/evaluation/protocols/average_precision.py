"""COCO average precision of boxes, with a bootstrap over images.

The rules are those of pycocotools for all areas and at most 100 detections per image and class: greedy
matching by score, crowd boxes ignored, precision made monotone and sampled at 101 recall values, the mean
over ten IoU thresholds and all classes with boxes. Reimplemented because a bootstrap needs the curves of many
resamples, while matching, the expensive part, is the same for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALL_POINTS = np.linspace(0, 1, 101)
_MAX_DETECTIONS = 100


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Predicted or true boxes of one image."""

    xyxy: Float[np.ndarray, "k 4"]
    """(k, 4) corners x0, y0, x1, y1."""
    labels: Int[np.ndarray, " k"]
    """(k,) class of each box."""
    scores: Float[np.ndarray, " k"]
    """(k,) confidence of each predicted box; ignored for true boxes."""
    is_crowd: Bool[np.ndarray, " k"]
    """(k,) true boxes that cover a group of objects."""


@dataclass(frozen=True, kw_only=True)
class AveragePrecision:
    """Average precision on the test images or on a resample of them."""

    per_class: Float[np.ndarray, "c 10"]
    """(classes, 10) by class and IoU threshold; NaN for classes without true boxes."""

    @property
    def ap(self) -> float:
        """Mean over IoU thresholds and classes; NaN without any true box."""
        return _mean_over_classes(self.per_class)

    @property
    def ap50(self) -> float:
        """Mean over classes at IoU 0.5; NaN without any true box."""
        return _mean_over_classes(self.per_class[:, 0])

    @property
    def ap75(self) -> float:
        """Mean over classes at IoU 0.75; NaN without any true box."""
        return _mean_over_classes(self.per_class[:, 5])


def _mean_over_classes(values: Float[np.ndarray, "c ..."]) -> float:
    """Return the mean over the classes that occur."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


@dataclass(frozen=True, kw_only=True)
class _Matches:
    """All detections of one class in descending order of score, and the number of true boxes per image."""

    image_index: Int[np.ndarray, " d"]
    true_positive: Bool[np.ndarray, "10 d"]
    false_positive: Bool[np.ndarray, "10 d"]
    num_gt: Int[np.ndarray, " n"]


def match_detections(
    predictions: Sequence[Boxes], targets: Sequence[Boxes], num_classes: int
) -> list[_Matches]:
    """Match the predicted with the true boxes of each image, per class.

    Raises:
        ValueError: The two lists differ in length.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"expected boxes of the same images, got {len(predictions)} and {len(targets)}")
    return [_match_class(predictions, targets, label) for label in range(num_classes)]


def average_precision(
    matches: Sequence[_Matches], image_counts: Int[np.ndarray, " n"] | None = None
) -> AveragePrecision:
    """Return average precision with each image counted `image_counts` times, by default once."""
    return AveragePrecision(
        per_class=np.stack(
            [_class_average_precision(class_matches, image_counts) for class_matches in matches]
        )
    )


def bootstrap_average_precision(
    matches: Sequence[_Matches], num_resamples: int, seed: int = 0
) -> Float[np.ndarray, "r 3"]:
    """Return AP, AP50 and AP75 on bootstrap resamples of the images; NaN on resamples without any true box.

    The resamples depend on the number of images and the seed alone, so that two detectors can be compared
    resample by resample.
    """
    num_images = len(matches[0].num_gt)
    rng = np.random.default_rng(seed)
    sampled_counts = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_resamples)
    results = (average_precision(matches, image_counts) for image_counts in sampled_counts)
    return np.array([(result.ap, result.ap50, result.ap75) for result in results])


def _match_class(predictions: Sequence[Boxes], targets: Sequence[Boxes], label: int) -> _Matches:
    scores, image_index, true_positive, false_positive, num_gt = [], [], [], [], []
    for i, (pred, gt) in enumerate(zip(predictions, targets, strict=True)):
        pred_idx = np.flatnonzero(pred.labels == label)
        pred_idx = pred_idx[np.argsort(-pred.scores[pred_idx], kind="stable")][:_MAX_DETECTIONS]
        gt_idx = np.flatnonzero(gt.labels == label)
        gt_idx = gt_idx[np.argsort(gt.is_crowd[gt_idx], kind="stable")]
        is_crowd = gt.is_crowd[gt_idx]
        is_matched, is_ignored = _match_image(pred.xyxy[pred_idx], gt.xyxy[gt_idx], is_crowd)
        scores.append(pred.scores[pred_idx])
        image_index.append(np.full(len(pred_idx), i))
        true_positive.append(is_matched & ~is_ignored)
        false_positive.append(~is_matched & ~is_ignored)
        num_gt.append(int((~is_crowd).sum()))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _Matches(
        image_index=np.concatenate(image_index)[order],
        true_positive=np.concatenate(true_positive, axis=1)[:, order],
        false_positive=np.concatenate(false_positive, axis=1)[:, order],
        num_gt=np.array(num_gt),
    )


def _match_image(
    pred_boxes: Float[np.ndarray, "d 4"], gt_boxes: Float[np.ndarray, "g 4"], is_crowd: Bool[np.ndarray, " g"]
) -> tuple[Bool[np.ndarray, "10 d"], Bool[np.ndarray, "10 d"]]:
    """Return for each IoU threshold which boxes, by descending score, are matched, and which to a crowd."""
    iou = _box_iou(pred_boxes, gt_boxes, is_crowd)
    is_matched, is_ignored = (np.zeros((len(IOU_THRESHOLDS), len(pred_boxes)), bool) for _ in range(2))
    for t, threshold in enumerate(IOU_THRESHOLDS):
        is_free = np.ones(len(gt_boxes), bool)
        for d, pred_iou in enumerate(iou):
            is_candidate = (pred_iou >= min(threshold, 1 - 1e-10)) & (is_free | is_crowd)
            # Single objects take precedence over crowds; of ties the last one, as in pycocotools.
            for gt_mask in (~is_crowd, is_crowd):
                candidates = np.flatnonzero(is_candidate & gt_mask)
                if len(candidates):
                    best_gt = candidates[len(candidates) - 1 - np.argmax(pred_iou[candidates][::-1])]
                    is_free[best_gt] = False
                    is_matched[t, d], is_ignored[t, d] = True, is_crowd[best_gt]
                    break
    return is_matched, is_ignored


def _box_iou(
    pred_boxes: Float[np.ndarray, "d 4"], gt_boxes: Float[np.ndarray, "g 4"], is_crowd: Bool[np.ndarray, " g"]
) -> Float[np.ndarray, "d g"]:
    """Return the intersection over union; for a crowd, over the area of the predicted box."""
    top_left = np.maximum(pred_boxes[:, None, :2], gt_boxes[None, :, :2])
    widths_heights = (np.minimum(pred_boxes[:, None, 2:], gt_boxes[None, :, 2:]) - top_left).clip(min=0)
    intersection = widths_heights.prod(axis=2)
    pred_area, gt_area = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (pred_boxes, gt_boxes))
    union = np.where(is_crowd[None], pred_area[:, None], pred_area[:, None] + gt_area[None] - intersection)
    return intersection / np.maximum(union, 1e-30)


def _class_average_precision(
    matches: _Matches, image_counts: Int[np.ndarray, " n"] | None
) -> Float[np.ndarray, " 10"]:
    image_weights = np.ones(len(matches.num_gt)) if image_counts is None else image_counts.astype(np.float64)
    num_gt = float(image_weights @ matches.num_gt)
    if not num_gt:
        return np.full(len(IOU_THRESHOLDS), np.nan)
    detection_weights = image_weights[matches.image_index]
    tp, fp = (
        np.cumsum(mask * detection_weights, axis=1)
        for mask in (matches.true_positive, matches.false_positive)
    )
    recall, precision = tp / num_gt, tp / np.maximum(tp + fp, np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    ap = np.zeros(len(IOU_THRESHOLDS))
    for t in range(len(IOU_THRESHOLDS)):
        positions = np.searchsorted(
            recall[t], _RECALL_POINTS - (1e-12 if image_counts is not None else 0), side="left"
        )
        reached = positions[positions < recall.shape[1]]
        ap[t] = precision[t, reached].sum() / len(_RECALL_POINTS)
    return ap
