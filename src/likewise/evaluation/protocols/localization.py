"""Localization: ridge regression from frozen features to the bounding box of the object."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int

from likewise.data.images import read_image_size
from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.base import (
    EvalContext,
    Protocol,
    Score,
    check_fraction,
    stratified_split,
)
from likewise.evaluation.results import ResultRow
from likewise.evaluation.statistics import bootstrap

# Penalties relative to the mean variance of a feature, from negligible to one that predicts the mean box.
_PENALTIES = tuple(10.0**e for e in range(-6, 4))


@dataclass(frozen=True, kw_only=True)
class LocalizationConfig:
    """Options of localization."""

    val_fraction: float = 0.2
    """Fraction of each class held out of train to select the penalty."""
    seed: int = 0
    """Seed of the held-out images."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_fraction(self, "val_fraction")


@dataclass(frozen=True, kw_only=True)
class LocalizationResult:
    """Overlap of predicted and true boxes."""

    iou: Float[np.ndarray, " m"]
    """(m,) intersection over union of the predicted and the true box of each test image."""
    penalty: float
    """The selected penalty."""
    sweep: dict[float, float]
    """Mean IoU on the held-out images at each penalty."""


def localize(
    train_x: Float[np.ndarray, "n d"],
    train_boxes: Float[np.ndarray, "n 4"],
    test_x: Float[np.ndarray, "m d"],
    test_boxes: Float[np.ndarray, "m 4"],
    val_indices: Int[np.ndarray, " v"],
) -> LocalizationResult:
    """Predict boxes (x0, y0, x1, y1), relative to the image size, from features; computed in float64.

    Ridge regression: minimize |Y - XW - b|^2 + p n e |W|^2, where e is the mean variance of a feature. The
    penalty p with the largest mean IoU on the held-out images is selected, and the final fit uses all
    training images.

    Args:
        train_x: (n, d) features of the training images.
        train_boxes: (n, 4) their boxes.
        test_x: (m, d) features of the test images.
        test_boxes: (m, 4) their boxes.
        val_indices: (v,) indices of the held-out images in train.

    Raises:
        ValueError: There is no training or no held-out image.
    """
    train_indices = np.setdiff1d(np.arange(len(train_x)), val_indices)
    if not len(train_indices) or not len(val_indices):
        raise ValueError(
            "localization needs training and held-out images with a box, got "
            f"{len(train_indices)} and {len(val_indices)}"
        )
    x, y = train_x.astype(np.float64), train_boxes.astype(np.float64)
    val_predictions = _ridge_predict(x[train_indices], y[train_indices], x[val_indices], _PENALTIES)
    sweep = {
        penalty: float(box_iou(boxes, y[val_indices]).mean())
        for penalty, boxes in zip(_PENALTIES, val_predictions, strict=True)
    }
    best_penalty = max(sweep, key=lambda p: (sweep[p], p))
    (boxes,) = _ridge_predict(x, y, test_x.astype(np.float64), (best_penalty,))
    return LocalizationResult(
        iou=box_iou(boxes, test_boxes.astype(np.float64)), penalty=best_penalty, sweep=sweep
    )


def _ridge_predict(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n 4"], test_x: Float[np.ndarray, "m d"],
    penalties: Sequence[float],
) -> list[Float[np.ndarray, "m 4"]]:  # fmt: skip
    """Return the predictions (m, 4) at every penalty, from one eigendecomposition."""
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    eigenvalues, eigenvectors = np.linalg.eigh((x - x_mean).T @ (x - x_mean) / len(x))
    xty = eigenvectors.T @ ((x - x_mean).T @ (y - y_mean)) / len(x)
    test_projected = (test_x - x_mean) @ eigenvectors
    mean_eigenvalue = max(float(eigenvalues.mean()), 1e-30)
    return [
        test_projected @ (xty / (eigenvalues + penalty * mean_eigenvalue)[:, None]) + y_mean
        for penalty in penalties
    ]


def box_iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Return the intersection over union of each pair of rows; an inverted box has area zero."""
    widths_heights = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = np.clip(widths_heights, 0, None).prod(axis=1)
    areas = sum(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1) for boxes in (a, b))
    return intersection / np.maximum(areas - intersection, 1e-30)


def normalize_boxes(
    boxes: Float[np.ndarray, "n 4"], files: Sequence[str], root: Path
) -> Float[np.ndarray, "n 4"]:
    """Return boxes relative to the image size, clipped to [0, 1].

    If any coordinate is above 1.5, all boxes are in pixels, and the sizes are read from the image headers.
    """
    if np.nanmax(boxes) <= 1.5:
        return boxes.clip(0, 1)
    sizes = np.array([read_image_size(root / file) for file in files], np.float64)
    return (boxes / np.concatenate([sizes, sizes], axis=1)).clip(0, 1)


class Localization(Protocol):
    """Localization of the one object of each image."""

    name = "localization"
    title = "Localization"
    summary = "bounding box of the object, by ridge regression on frozen features"
    config: LocalizationConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Fit on the boxes of train and val, and predict those of the test images."""
        dataset = context.labeled_dataset
        if dataset.boxes is None:
            raise InvalidInputError(
                f"{dataset.path} has no boxes: localization needs the columns x0, y0, x1 and y1",
                path=dataset.path,
            )
        boxed_indices = np.flatnonzero(np.isfinite(dataset.boxes).all(axis=1))
        train_indices, test_indices = (
            np.intersect1d(context.indices(*splits), boxed_indices)
            for splits in (("train", "val"), ("test",))
        )
        files = np.array(dataset.files)
        train_boxes, test_boxes = (
            normalize_boxes(dataset.boxes[indices], files[indices].tolist(), dataset.root)
            for indices in (train_indices, test_indices)
        )
        _, val_indices = stratified_split(
            torch.from_numpy(dataset.labels[train_indices]), self.config.val_fraction, self.config.seed
        )
        vectors = context.features.vectors
        result = localize(
            vectors[train_indices], train_boxes, vectors[test_indices], test_boxes, val_indices.numpy()
        )
        details = {
            "penalty": result.penalty,
            "num_images_without_box": len(dataset) - len(boxed_indices),
        }
        metrics = {
            "mean IoU of boxes": result.iou,
            "boxes with IoU >= 0.5": (result.iou >= 0.5).astype(float),
        }
        return [
            Score(metric=name, estimate=bootstrap(per_item), per_item=per_item, details=details)
            for name, per_item in metrics.items()
        ]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the regression and the metric."""
        return (
            "Ridge regression on the frozen features predicts the bounding box of the object. IoU is the "
            "intersection of predicted and true box over their union."
        )

    @classmethod
    def success_phrase(cls, row: ResultRow) -> str:
        """Return the phrase for one image."""
        return "localize the object"
