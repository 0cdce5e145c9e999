"""Where in the image its subject is: a box, by ridge regression on frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

# Penalties relative to the mean energy of a feature, from almost none to one that leaves the mean box.
_PENALTIES = tuple(10.0**e for e in range(-6, 4))


@dataclass(frozen=True, kw_only=True)
class LocalizationResult:
    """How well predicted boxes fit.

    Attributes:
        iou: (m,) intersection over union of each test image's predicted and true box.
        penalty: The penalty that was chosen.
        sweep: Mean overlap on the held-out images at each penalty.
    """

    iou: Float[np.ndarray, " m"]
    penalty: float
    sweep: dict[float, float]


def localize(
    train_x: Float[np.ndarray, "n d"],
    train_boxes: Float[np.ndarray, "n 4"],
    test_x: Float[np.ndarray, "m d"],
    test_boxes: Float[np.ndarray, "m 4"],
    val_indices: Int[np.ndarray, " v"],
) -> LocalizationResult:
    """Predict boxes x0 y0 x1 y1, as shares of the image's sides, from features; computed in float64.

    Least squares with a penalty on the weights, minimise |Y - XW - b|^2 + p n e |W|^2 with e the mean energy
    of a centred feature; p is the one with the largest mean overlap on the held-out images, and the fit is
    repeated on all.

    Args:
        train_x: Features of the images to learn from.
        train_boxes: Their boxes.
        test_x: Features of the images to predict for.
        test_boxes: Their boxes.
        val_indices: Rows of train that the penalty is chosen on.

    Raises:
        ValueError: no images to learn from or to hold out.
    """
    train_indices = np.setdiff1d(np.arange(len(train_x)), val_indices)
    if not len(train_indices) or not len(val_indices):
        raise ValueError(
            f"expected images to learn from and to hold out, got {len(train_indices)} and {len(val_indices)}"
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
    """Predict by the ridge regressions of all penalties, from one decomposition."""
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
    """Return the intersection over union of boxes row by row; a box turned inside out has none."""
    widths_heights = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = np.clip(widths_heights, 0, None).prod(axis=1)
    areas = sum(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1) for boxes in (a, b))
    return intersection / np.maximum(areas - intersection, 1e-30)


def normalize_boxes(
    boxes: Float[np.ndarray, "n 4"], files: Sequence[str], root: Path
) -> Float[np.ndarray, "n 4"]:
    """Return boxes as shares of their images' sides, cut at the edges.

    Where a number is above 1.5 all are taken as pixels, and the sides are read from the images' headers.
    """
    if np.nanmax(boxes) <= 1.5:
        return boxes.clip(0, 1)
    sizes = np.array([_image_size(root / file) for file in files], np.float64)
    return (boxes / np.concatenate([sizes, sizes], axis=1)).clip(0, 1)


def _image_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size
