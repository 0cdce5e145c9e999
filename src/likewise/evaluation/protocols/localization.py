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
class BoxResult:
    """How well predicted boxes fit.

    Attributes:
        overlap: (m,) intersection over union of each test image's predicted and true box.
        penalty: The penalty that was chosen.
        sweep: Mean overlap on the held-out images at each penalty.
    """

    overlap: Float[np.ndarray, " m"]
    penalty: float
    sweep: dict[float, float]


def localise(
    train_x: Float[np.ndarray, "n d"],
    train_boxes: Float[np.ndarray, "n 4"],
    test_x: Float[np.ndarray, "m d"],
    test_boxes: Float[np.ndarray, "m 4"],
    held: Int[np.ndarray, " v"],
) -> BoxResult:
    """Predict boxes x0 y0 x1 y1, as shares of the image's sides, from features; computed in float64.

    Least squares with a penalty on the weights, minimise |Y - XW - b|^2 + p n e |W|^2 with e the mean energy
    of a centred feature; p is the one with the largest mean overlap on the held-out images, and the fit is
    repeated on all.

    Args:
        train_x: Features of the images to learn from.
        train_boxes: Their boxes.
        test_x: Features of the images to predict for.
        test_boxes: Their boxes.
        held: Rows of train that the penalty is chosen on.

    Raises:
        ValueError: no images to learn from or to hold out.
    """
    kept = np.setdiff1d(np.arange(len(train_x)), held)
    if not len(kept) or not len(held):
        raise ValueError(f"expected images to learn from and to hold out, got {len(kept)} and {len(held)}")
    x, y = train_x.astype(np.float64), train_boxes.astype(np.float64)
    tried = _ridge(x[kept], y[kept], x[held], _PENALTIES)
    sweep = {p: float(overlap(boxes, y[held]).mean()) for p, boxes in zip(_PENALTIES, tried, strict=True)}
    best = max(sweep, key=lambda p: (sweep[p], p))
    (boxes,) = _ridge(x, y, test_x.astype(np.float64), (best,))
    return BoxResult(overlap=overlap(boxes, test_boxes.astype(np.float64)), penalty=best, sweep=sweep)


def _ridge(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n 4"], asked: Float[np.ndarray, "m d"],
    penalties: Sequence[float],
) -> list[Float[np.ndarray, "m 4"]]:  # fmt: skip
    """Predict by the ridge regressions of all penalties, from one decomposition."""
    mean, middle = x.mean(axis=0), y.mean(axis=0)
    energy, axes = np.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    along = axes.T @ ((x - mean).T @ (y - middle)) / len(x)
    turned = (asked - mean) @ axes
    usual = max(float(energy.mean()), 1e-30)
    return [turned @ (along / (energy + p * usual)[:, None]) + middle for p in penalties]


def overlap(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Return the intersection over union of boxes row by row; a box turned inside out has none."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    shared = np.clip(sides, 0, None).prod(axis=1)
    areas = sum(np.clip(box[:, 2:] - box[:, :2], 0, None).prod(axis=1) for box in (a, b))
    return shared / np.maximum(areas - shared, 1e-30)


def as_shares(boxes: Float[np.ndarray, "n 4"], files: Sequence[str], root: Path) -> Float[np.ndarray, "n 4"]:
    """Return boxes as shares of their images' sides, cut at the edges.

    Where a number is above 1.5 all are taken as pixels, and the sides are read from the images' headers.
    """
    if np.nanmax(boxes) <= 1.5:
        return boxes.clip(0, 1)
    sizes = np.array([_size(root / file) for file in files], np.float64)
    return (boxes / np.concatenate([sizes, sizes], axis=1)).clip(0, 1)


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size
