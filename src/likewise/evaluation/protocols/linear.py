"""The linear probe: logistic regression on frozen features, its cost chosen on validation images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from likewise.evaluation.protocols._lbfgs import Problem, fit_logistic, minimise, predict, prepare, unprepare

# Costs are 10^(e / 8) for whole e: 8 steps a decade from 1e-6 to 1e6.
_LIMIT = 48


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Settings of the probe.

    Attributes:
        max_iterations: L-BFGS iterations a fit; 100 as in the LGSSL code and in scikit-learn.
        tolerance: convergence of the final fit, the gradient's length relative to its parts (see
            `fit_logistic`).
        sweep_tolerance: the same for the fits that are only compared with each other; at 1e-4 they are still
            closer to their minima than scikit-learn's are by default.
        validation_share: share of each class held out of train where no validation split is given.
        mean_per_class: score validation and test by the mean over classes of each class's accuracy.
        seed: seed of the held-out images.
    """

    max_iterations: int = 100
    tolerance: float = 1e-5
    sweep_tolerance: float = 1e-4
    validation_share: float = 0.2
    mean_per_class: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """The chosen cost, how it was chosen, and the refitted classifier's answers on test.

    Attributes:
        cost: the cost of the final fit on train and validation together.
        validation_accuracy: validation accuracy at this cost, of the fit on train alone.
        sweep: validation accuracy of every cost visited, by ascending cost.
        accuracy: test accuracy.
        predictions: predicted test labels, int64.
        converged: whether the final fit reached the tolerance.
    """

    cost: float
    validation_accuracy: float
    sweep: dict[float, float]
    accuracy: float
    predictions: Int[Tensor, " m"]
    converged: bool


def linear_probe(
    settings: LinearProbe,
    train_x: Float[Tensor, "n d"],
    train_y: Int[Tensor, " n"],
    test_x: Float[Tensor, "m d"],
    test_y: Int[Tensor, " m"],
    *,
    val_x: Float[Tensor, "v d"] | None = None,
    val_y: Int[Tensor, " v"] | None = None,
    classes: int,
    progress: Callable[[float, float], None] | None = None,
) -> LinearResult:
    """Choose the cost on validation images, refit on train and validation, and classify the test images.

    As in El Banani et al. 2023 (section 4.2), after CLIP: seven costs two decades apart, then a search by
    halves around the best of 33 costs, 8 steps a decade over two decades to both sides. Features are used as
    they are. Of costs of equal accuracy the smaller one is taken.

    Known deviations from LGSSL's code: the objective (see `fit_logistic`); its 29 points are 7 steps a
    decade, not the 8 its comment names; its ties go partly to the larger cost; it holds out none of a class
    of two to four images, we one.

    Args:
        settings: see `LinearProbe`.
        train_x: features, float32 or float64; fits are computed in this precision.
        train_y: int64 labels below `classes`.
        test_x: features of the images to classify.
        test_y: their labels, for the accuracy.
        val_x: validation features; without them a share of each class of train is held out.
        val_y: validation labels.
        classes: number of classes.
        progress: called after each fit of the sweep with its cost and validation accuracy.

    Raises:
        ValueError: features with NaN or infinity, no image to hold out, or one of val_x and val_y missing.
    """
    if val_x is None or val_y is None:
        if val_x is not None or val_y is not None:
            raise ValueError("validation features and labels must be given together")
        all_x, all_y = train_x, train_y
        kept, held = hold_out(train_y, settings.validation_share, settings.seed)
        train_x, train_y, val_x, val_y = all_x[kept], all_y[kept], all_x[held], all_y[held]
    else:
        all_x, all_y = torch.cat([train_x, val_x]), torch.cat([train_y, val_y])
    sweep = _sweep(settings, prepare(train_x, train_y), val_x, val_y, classes=classes, progress=progress)
    best, (steps, tolerance) = _best(sweep, list(sweep)), (settings.max_iterations, settings.tolerance)
    weight, bias, converged = fit_logistic(
        all_x, all_y, _cost(best), classes, max_iterations=steps, tolerance=tolerance
    )
    predictions = predict(weight, bias, test_x)
    return LinearResult(
        cost=_cost(best),
        validation_accuracy=sweep[best],
        sweep={_cost(step): sweep[step] for step in sorted(sweep)},
        accuracy=_accuracy(predictions, test_y, settings.mean_per_class),
        predictions=predictions,
        converged=converged,
    )


def hold_out(
    labels: Int[Tensor, " n"], share: float, seed: int
) -> tuple[Int[Tensor, " kept"], Int[Tensor, " held"]]:
    """Hold out a share of each class, rounded down, but at least one image of a class that has two.

    Returns the ascending indices of the images kept and of those held out.

    Raises:
        ValueError: a share outside 0..1, or no class with two images.
    """
    if not 0 < share < 1:
        raise ValueError(f"the validation share must be between 0 and 1, got {share}")
    names = labels.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(names[order], kind="stable")]
    _, first, counts = np.unique(names[order], return_index=True, return_counts=True)
    quota = np.minimum(np.maximum((counts * share).astype(np.int64), 1), counts - 1)
    held = np.zeros(len(names), dtype=bool)
    held[order] = np.arange(len(names)) - np.repeat(first, counts) < np.repeat(quota, counts)
    if not held.any():
        raise ValueError("no class has two images, so none can be held out: give a validation split")
    kept, out = (torch.from_numpy(np.flatnonzero(mask)).to(labels.device) for mask in (~held, held))
    return kept, out


def _sweep(
    settings: LinearProbe,
    problem: Problem,
    val_x: Float[Tensor, "v d"],
    val_y: Int[Tensor, " v"],
    *,
    classes: int,
    progress: Callable[[float, float], None] | None,
) -> dict[int, float]:
    """Validation accuracy at every cost that the two-stage search visits, by step of the grid."""
    fits = {-_LIMIT - 1: problem.rows.new_zeros(len(problem.seen), problem.rows.shape[1])}

    def score(step: int) -> float:
        # The next weaker classifier is close by, and growing is quicker than shrinking.
        start = fits[max(known for known in fits if known < step)]
        point, _ = minimise(problem, _cost(step), start, settings.max_iterations, settings.sweep_tolerance)
        fits[step] = point.theta
        predictions = predict(*unprepare(problem, point.theta, classes), val_x)
        accuracy = _accuracy(predictions, val_y, settings.mean_per_class)
        if progress is not None:
            progress(_cost(step), accuracy)
        return accuracy

    return search(score)


def search(score: Callable[[int], float]) -> dict[int, float]:
    """Score the coarse steps of the cost grid, then halve the distance around the best until it is one.

    Returns the score of each step visited.
    """
    scores = {step: score(step) for step in range(-_LIMIT, _LIMIT + 1, 16)}
    centre = _best(scores, list(scores))
    for distance in (8, 4, 2, 1):
        candidates = [step for step in (centre - distance, centre, centre + distance) if abs(step) <= _LIMIT]
        scores |= {step: score(step) for step in candidates if step not in scores}
        centre = _best(scores, candidates)
    return scores


def _best(scores: dict[int, float], steps: Sequence[int]) -> int:
    return max(steps, key=lambda step: (scores[step], -step))


def _cost(step: int) -> float:
    return 10.0 ** (step / 8)


def _accuracy(predictions: Int[Tensor, " m"], labels: Int[Tensor, " m"], mean_per_class: bool) -> float:
    correct = (predictions == labels).double()
    if not mean_per_class:
        return float(correct.mean())
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    return float((inverse.bincount(weights=correct) / counts).mean())
