"""The linear probe: logistic regression on frozen features, its cost chosen on validation images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from likewise.evaluation.protocols._lbfgs import (
    WhitenedProblem,
    fit_logistic,
    lbfgs,
    predict,
    unwhiten,
    whiten,
)

# Costs are 10^(e / 8) for whole e: 8 steps a decade from 1e-6 to 1e6.
_GRID_LIMIT = 48


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig:
    """Settings of the probe.

    Attributes:
        max_iterations: L-BFGS iterations a fit; 100 as in the LGSSL code and in scikit-learn.
        tolerance: convergence of the final fit, the gradient's length relative to its parts (see
            `fit_logistic`).
        sweep_tolerance: the same for the fits that are only compared with each other; at 1e-4 they are still
            closer to their minima than scikit-learn's are by default.
        val_fraction: share of each class held out of train where no validation split is given.
        mean_class_accuracy: score validation and test by the mean over classes of each class's accuracy.
        seed: seed of the held-out images.
    """

    max_iterations: int = 100
    tolerance: float = 1e-5
    sweep_tolerance: float = 1e-4
    val_fraction: float = 0.2
    mean_class_accuracy: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LinearProbeResult:
    """The chosen cost, how it was chosen, and the refitted classifier's answers on test.

    Attributes:
        C: the cost of the final fit on train and validation together.
        val_accuracy: validation accuracy at this cost, of the fit on train alone.
        sweep: validation accuracy of every cost visited, by ascending cost.
        accuracy: test accuracy.
        predictions: predicted test labels, int64.
        converged: whether the final fit reached the tolerance.
    """

    C: float
    val_accuracy: float
    sweep: dict[float, float]
    accuracy: float
    predictions: Int[Tensor, " m"]
    converged: bool


def fit_linear_probe(
    config: LinearProbeConfig,
    train_x: Float[Tensor, "n d"],
    train_y: Int[Tensor, " n"],
    test_x: Float[Tensor, "m d"],
    test_y: Int[Tensor, " m"],
    *,
    val_x: Float[Tensor, "v d"] | None = None,
    val_y: Int[Tensor, " v"] | None = None,
    num_classes: int,
    callback: Callable[[float, float], None] | None = None,
) -> LinearProbeResult:
    """Choose the cost on validation images, refit on train and validation, and classify the test images.

    As in El Banani et al. 2023 (section 4.2), after CLIP: seven costs two decades apart, then a search by
    halves around the best of 33 costs, 8 steps a decade over two decades to both sides. Features are used as
    they are. Of costs of equal accuracy the smaller one is taken.

    Known deviations from LGSSL's code: the objective (see `fit_logistic`); its 29 points are 7 steps a
    decade, not the 8 its comment names; its ties go partly to the larger cost; it holds out none of a class
    of two to four images, we one.

    Args:
        config: see `LinearProbe`.
        train_x: features, float32 or float64; fits are computed in this precision.
        train_y: int64 labels below `num_classes`.
        test_x: features of the images to classify.
        test_y: their labels, for the accuracy.
        val_x: validation features; without them a share of each class of train is held out.
        val_y: validation labels.
        num_classes: number of classes.
        callback: called after each fit of the sweep with its cost and validation accuracy.

    Raises:
        ValueError: features with NaN or infinity, no image to hold out, or one of val_x and val_y missing.
    """
    if val_x is None or val_y is None:
        if val_x is not None or val_y is not None:
            raise ValueError("validation features and labels must be given together")
        all_x, all_y = train_x, train_y
        train_indices, val_indices = stratified_split(train_y, config.val_fraction, config.seed)
        train_x, train_y, val_x, val_y = (
            all_x[train_indices],
            all_y[train_indices],
            all_x[val_indices],
            all_y[val_indices],
        )
    else:
        all_x, all_y = torch.cat([train_x, val_x]), torch.cat([train_y, val_y])
    sweep = _sweep(config, whiten(train_x, train_y), val_x, val_y, num_classes=num_classes, callback=callback)
    best_step, (max_iterations, tolerance) = (
        _best_step(sweep, list(sweep)),
        (config.max_iterations, config.tolerance),
    )
    weight, bias, converged = fit_logistic(
        all_x, all_y, _c_at_step(best_step), num_classes, max_iterations=max_iterations, tolerance=tolerance
    )
    predictions = predict(weight, bias, test_x)
    return LinearProbeResult(
        C=_c_at_step(best_step),
        val_accuracy=sweep[best_step],
        sweep={_c_at_step(step): sweep[step] for step in sorted(sweep)},
        accuracy=_accuracy(predictions, test_y, config.mean_class_accuracy),
        predictions=predictions,
        converged=converged,
    )


def stratified_split(
    labels: Int[Tensor, " n"], fraction: float, seed: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """Hold out a share of each class, rounded down, but at least one image of a class that has two.

    Returns the ascending indices of the images kept and of those held out.

    Raises:
        ValueError: a share outside 0..1, or no class with two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the validation share must be between 0 and 1, got {fraction}")
    label_array = labels.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(label_array))
    order = order[np.argsort(label_array[order], kind="stable")]
    _, class_starts, counts = np.unique(label_array[order], return_index=True, return_counts=True)
    val_counts = np.minimum(np.maximum((counts * fraction).astype(np.int64), 1), counts - 1)
    val_mask = np.zeros(len(label_array), dtype=bool)
    val_mask[order] = np.arange(len(label_array)) - np.repeat(class_starts, counts) < np.repeat(
        val_counts, counts
    )
    if not val_mask.any():
        raise ValueError("no class has two images, so none can be held out: give a validation split")
    train_indices, val_indices = (
        torch.from_numpy(np.flatnonzero(mask)).to(labels.device) for mask in (~val_mask, val_mask)
    )
    return train_indices, val_indices


def _sweep(
    config: LinearProbeConfig,
    problem: WhitenedProblem,
    val_x: Float[Tensor, "v d"],
    val_y: Int[Tensor, " v"],
    *,
    num_classes: int,
    callback: Callable[[float, float], None] | None,
) -> dict[int, float]:
    """Validation accuracy at every cost that the two-stage search visits, by step of the grid."""
    thetas = {-_GRID_LIMIT - 1: problem.features.new_zeros(len(problem.classes), problem.features.shape[1])}

    def score(step: int) -> float:
        # The next weaker classifier is close by, and growing is quicker than shrinking.
        init_theta = thetas[max(fitted_step for fitted_step in thetas if fitted_step < step)]
        point, _ = lbfgs(problem, _c_at_step(step), init_theta, config.max_iterations, config.sweep_tolerance)
        thetas[step] = point.theta
        predictions = predict(*unwhiten(problem, point.theta, num_classes), val_x)
        accuracy = _accuracy(predictions, val_y, config.mean_class_accuracy)
        if callback is not None:
            callback(_c_at_step(step), accuracy)
        return accuracy

    return search_grid(score)


def search_grid(score_step: Callable[[int], float]) -> dict[int, float]:
    """Score the coarse steps of the cost grid, then halve the distance around the best until it is one.

    Returns the score of each step visited.
    """
    scores = {step: score_step(step) for step in range(-_GRID_LIMIT, _GRID_LIMIT + 1, 16)}
    center = _best_step(scores, list(scores))
    for distance in (8, 4, 2, 1):
        candidates = [
            step for step in (center - distance, center, center + distance) if abs(step) <= _GRID_LIMIT
        ]
        scores |= {step: score_step(step) for step in candidates if step not in scores}
        center = _best_step(scores, candidates)
    return scores


def _best_step(scores: dict[int, float], steps: Sequence[int]) -> int:
    return max(steps, key=lambda step: (scores[step], -step))


def _c_at_step(step: int) -> float:
    return 10.0 ** (step / 8)


def _accuracy(predictions: Int[Tensor, " m"], labels: Int[Tensor, " m"], mean_class_accuracy: bool) -> float:
    correct = (predictions == labels).double()
    if not mean_class_accuracy:
        return float(correct.mean())
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    return float((inverse.bincount(weights=correct) / counts).mean())
