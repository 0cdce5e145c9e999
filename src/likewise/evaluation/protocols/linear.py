"""Linear probe: logistic regression on frozen features, with C selected on validation images."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from likewise.evaluation.protocols.base import (
    ClassificationConfig,
    EvalContext,
    Protocol,
    Score,
    Split,
    accuracy_score,
    check_fraction,
    check_positive,
    stratified_split,
)
from likewise.evaluation.results import ResultRow

logger = logging.getLogger(__name__)

# Logits per block: 64 MiB in float32, independent of the number of images.
_BLOCK_ELEMENTS = 2**24
# Pairs of steps and gradient changes in the L-BFGS history.
_HISTORY_SIZE = 10
# Weights of the classes with labels, in the rotated basis, with the intercept as the last column.
Theta = Float[Tensor, "s r"]
# C is 10^(step / 8) for integer steps in [-48, 48]: 8 steps per decade from 1e-6 to 1e6.
_GRID_LIMIT = 48


@dataclass(frozen=True, kw_only=True)
class WhitenedProblem:
    """Features centered and rotated to their principal axes, with a column of ones for the intercept.

    The penalty depends on the norm of the weights and not on the intercept, so neither change moves the
    optimum. The columns become uncorrelated, so that a diagonal approximates the Hessian well.
    """

    features: Float[Tensor, "n r"]
    norms: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    classes: Int[Tensor, " s"]
    mean: Float[Tensor, " d"]
    axes: Float[Tensor, "d d"]


@dataclass(frozen=True, kw_only=True)
class _Point:
    """Parameters with their gradient, the mean p(1-p) per class, and the mean norm of an image's gradient."""

    theta: Theta
    gradient: Theta
    hessian_diag: Float[Tensor, " s"]
    gradient_scale: float


def fit_logistic(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    C: float,
    num_classes: int,
    init: tuple[Float[Tensor, "c d"], Float[Tensor, " c"]] | None = None,
    *,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"], bool]:
    """Fit multinomial logistic regression with L-BFGS: minimize C sum_i CE_i + 1/2 |W|^2 over W and b.

    This is scikit-learn's LogisticRegression(C) for three or more classes. For two classes scikit-learn fits
    one weight vector w = W_1 - W_0, whose penalty is twice this one: its C is twice the C here.

    Deviation from LGSSL's torch code, which minimizes mean_i CE_i + 1/C 1/2 |W| (the mean, and the norm not
    squared), another family of solutions; this follows LGSSL's scikit-learn path.

    The gradient g of the objective over C n is mean_i r_i x_i^T + W / (C n), with r the probabilities minus
    one-hot labels and x the centered features and a one. The fit has converged when
    |g| <= tolerance * mean_i |r_i| |x_i|. In contrast to a bound on |g| alone, this criterion does not depend
    on C or on the scale of the features, and works for separable classes, where all gradients vanish
    (measured: 1e-5 puts the objective within 1e-6 of its minimum, in float32 too).

    Args:
        features: (n, d) float32 or float64, the precision of the fit (float32 for other dtypes).
        labels: (n,) int64 below `num_classes`.
        C: Inverse regularization strength.
        num_classes: Number of classes. A class without labels gets weight 0 and bias -inf.
        init: Initial weight and bias; defaults to zeros.
        max_iterations: Maximum number of L-BFGS iterations.
        tolerance: Convergence threshold, see above.

    Returns:
        Weight (classes, d), bias (classes,), and True if the tolerance was reached.

    Raises:
        ValueError: There are no images, the features contain NaN or infinity, or C is not positive.
    """
    if not C > 0:
        raise ValueError(f"`C` must be positive, got {C}")
    problem = whiten(features, labels)
    init_theta = problem.features.new_zeros(len(problem.classes), problem.features.shape[1])
    if init is not None:
        weight, bias = (tensor.to(init_theta)[problem.classes] for tensor in init)
        init_theta = torch.cat([weight @ problem.axes, (bias + weight @ problem.mean)[:, None]], dim=1)
    point, converged = lbfgs(problem, C, init_theta, max_iterations, tolerance)
    return *unwhiten(problem, point.theta, num_classes), converged


def whiten(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> WhitenedProblem:
    """Center and rotate features (n, d) for fits at any C; raises ValueError for NaN or no rows."""
    if len(features) == 0 or not bool(features.isfinite().all()):
        raise ValueError(f"features must be finite with at least one row, got shape {tuple(features.shape)}")
    features = features if features.dtype == torch.float64 else features.float()
    mean = features.mean(dim=0)
    augmented = torch.cat([features - mean, features.new_ones(len(features), 1)], dim=1)
    centered = augmented[:, :-1]
    # In double precision: in single precision, LAPACK fails for some matrices of low rank.
    axes = torch.linalg.eigh((centered.T @ centered / len(centered)).double()).eigenvectors.to(features)
    centered.copy_(centered @ axes)
    classes, class_index = labels.unique(return_inverse=True)
    return WhitenedProblem(
        features=augmented,
        norms=augmented.norm(dim=1),
        labels=class_index,
        classes=classes,
        mean=mean,
        axes=axes,
    )


def unwhiten(
    problem: WhitenedProblem, theta: Theta, num_classes: int
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
    """Return weight and bias of all classes for the original features."""
    weight = theta.new_zeros(num_classes, len(problem.mean))
    bias = theta.new_full((num_classes,), -torch.inf)
    weight[problem.classes] = theta[:, :-1] @ problem.axes.T
    # A shift of all biases changes no probability; scikit-learn's biases have mean zero.
    bias[problem.classes] = theta[:, -1] - theta[:, -1].mean() - weight[problem.classes] @ problem.mean
    return weight, bias


def predict(
    weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"], features: Float[Tensor, "m d"]
) -> Int[Tensor, " m"]:
    """Return the class with the largest logit: features (m, d) -> (m,) int64."""
    return (features.to(weight) @ weight.T + bias).argmax(dim=1)


def _evaluate(problem: WhitenedProblem, ridge: Float[Tensor, " r"], theta: Theta) -> _Point:
    gradient, hessian_diag, gradient_scale = theta * ridge, theta.new_zeros(len(theta)), theta.new_zeros(())
    n = len(problem.features)
    block_size = max(1, _BLOCK_ELEMENTS // len(theta))
    tensors = (problem.features, problem.labels, problem.norms)
    for features, labels, norms in zip(*(tensor.split(block_size) for tensor in tensors), strict=True):
        residual = (features @ theta.T).softmax(dim=1)
        hessian_diag += (residual * (1 - residual)).sum(dim=0) / n
        # p - 1 cancels if p is almost 1; minus the sum of the other probabilities keeps full precision.
        residual.scatter_(1, labels[:, None], 0)
        residual.scatter_(1, labels[:, None], -residual.sum(dim=1, keepdim=True))
        gradient += residual.T @ features / n
        gradient_scale += (residual.norm(dim=1) @ norms) / n
    return _Point(
        theta=theta, gradient=gradient, hessian_diag=hessian_diag, gradient_scale=float(gradient_scale)
    )


def lbfgs(
    problem: WhitenedProblem, C: float, init_theta: Theta, max_iterations: int, tolerance: float
) -> tuple[_Point, bool]:
    """Minimize the objective over C n by L-BFGS (Nocedal and Wright 2006, algorithm 7.4)."""
    ridge = init_theta.new_full(init_theta.shape[1:], 1 / (C * len(problem.features)))
    ridge[-1] = 0
    mean_square = problem.features.square().mean(dim=0)
    history: list[tuple[Tensor, Tensor]] = []
    point = _evaluate(problem, ridge, init_theta)
    for _ in range(max_iterations):
        if float(point.gradient.norm()) <= tolerance * point.gradient_scale:
            return point, True
        inverse_diag = 1 / (point.hessian_diag[:, None] * mean_square + ridge).clamp_min(1e-12)
        next_point = _line_search(
            problem, ridge, point, -_two_loop_recursion(point.gradient, inverse_diag, history)
        )
        change = (next_point.theta - point.theta, next_point.gradient - point.gradient)
        # Rounding can hide the curvature of a tiny step; such a pair would spoil all later directions.
        if _dot(*change) > 0:
            history = [*history[-_HISTORY_SIZE + 1 :], change]
        point = next_point
    return point, float(point.gradient.norm()) <= tolerance * point.gradient_scale


def _two_loop_recursion(gradient: Theta, inverse_diag: Theta, history: list[tuple[Tensor, Tensor]]) -> Theta:
    """Return the inverse Hessian times the gradient, from the inverse diagonal and the history."""
    alphas: list[Tensor] = []
    for s, y in reversed(history):
        alphas.append(_dot(s, gradient) / _dot(s, y))
        gradient = gradient - alphas[-1] * y
    direction = gradient * inverse_diag
    if history:
        s, y = history[-1]
        direction = direction * (_dot(s, y) / _dot(y, y * inverse_diag))
    for (s, y), alpha in zip(history, reversed(alphas), strict=True):
        direction = direction + s * (alpha - _dot(y, direction) / _dot(s, y))
    return direction


def _line_search(
    problem: WhitenedProblem, ridge: Float[Tensor, " r"], point: _Point, direction: Theta
) -> _Point:
    """Return a point along the direction that satisfies the curvature condition.

    The objective is convex, so its slope along a line increases monotonically, and slopes alone give the
    bracket: differences of the objective suffer from rounding much earlier than its gradient.
    """
    slope_start = float(_dot(point.gradient, direction))
    lower, slope_lower, upper, step_size = 0.0, slope_start, math.inf, 1.0
    next_point = point
    for _ in range(20):
        next_point = _evaluate(problem, ridge, point.theta + step_size * direction)
        slope = float(_dot(next_point.gradient, direction))
        if slope > -0.5 * slope_start:
            upper = step_size
            step_size = lower + (upper - lower) * min(max(slope_lower / (slope_lower - slope), 0.1), 0.9)
        elif slope < 0.9 * slope_start:
            lower, slope_lower = step_size, slope
            step_size = 3 * step_size if math.isinf(upper) else (lower + upper) / 2
        else:
            break
    return next_point


def _dot(a: Theta, b: Theta) -> Float[Tensor, ""]:
    return (a * b).sum()


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(ClassificationConfig):
    """Options of the linear probe."""

    max_iterations: int = 1000
    """Maximum number of L-BFGS iterations per fit. The 100 of the LGSSL code and of scikit-learn are too few
    for fewer images than features and a large C: accuracies of unfinished fits were 20 points too low."""
    tolerance: float = 1e-5
    """Convergence threshold of the final fit, relative to the gradient's scale (see `fit_logistic`)."""
    sweep_tolerance: float = 1e-4
    """Convergence threshold of the fits of the sweep; at 1e-4 they are still closer to their minima than
    scikit-learn's are by default."""
    val_fraction: float = 0.2
    """Fraction of each class held out of train if the dataset has no validation split."""
    seed: int = 0
    """Seed of the held-out images."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(self, "max_iterations", "tolerance", "sweep_tolerance")
        check_fraction(self, "val_fraction")


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A fitted linear classifier; `LinearProbe.fit` selects C as in El Banani et al. 2023."""

    weight: Float[Tensor, "c d"]
    """Weights of each class."""
    bias: Float[Tensor, " c"]
    """Bias of each class; -inf for a class without training images."""
    C: float
    """Inverse regularization strength of the final fit."""
    val_accuracy: float
    """Validation accuracy at this C, of the fit on train alone."""
    sweep: dict[float, float]
    """Validation accuracy at every C of the sweep, in ascending order of C."""
    converged: bool
    """Whether the final fit reached the tolerance."""

    @classmethod
    def fit(
        cls,
        train: Split,
        val: Split | None = None,
        config: LinearProbeConfig | None = None,
        *,
        num_classes: int,
        callback: Callable[[float, float], None] | None = None,
    ) -> "LinearProbe":
        """Select C on validation images and refit on train and validation together.

        As in El Banani et al. 2023 (section 4.2), after CLIP: seven values of C two decades apart, then a
        binary search around the best over 33 values, 8 per decade and two decades to both sides. Features are
        not normalized. Of values with equal accuracy the smaller C is selected.

        Deviation from LGSSL's code: the objective (see `fit_logistic`); its 29 points are 7 per decade, not
        the 8 its comment names; its ties partly go to the larger C; it holds out no image of a class of two
        to four images, this one.

        Args:
            train: Training features (n, d) float32 or float64, the precision of the fits, and labels (n,).
            val: Validation features and labels; defaults to `config.val_fraction` of each class of train.
            config: Defaults to `LinearProbeConfig()`.
            num_classes: Number of classes; labels are below it.
            callback: Called after each fit of the sweep with C and the validation accuracy.

        Raises:
            InvalidInputError: No class has two images, so that none can be held out.
            ValueError: The features contain NaN or infinity.
        """
        config = config or LinearProbeConfig()
        if val is None:
            all_images = train
            train_indices, val_indices = stratified_split(train.y, config.val_fraction, config.seed)
            train, val = train.subset(train_indices), train.subset(val_indices)
        else:
            all_images = train.concat(val)
        problem = whiten(train.x, train.y)
        sweep, thetas = _sweep(config, problem, val, num_classes=num_classes, callback=callback)
        best_step = _best_step(sweep, list(sweep))
        init_weight, init_bias = unwhiten(problem, thetas[best_step], num_classes)
        weight, bias, converged = fit_logistic(
            all_images.x,
            all_images.y,
            _c_at_step(best_step),
            num_classes,
            # Classes that only the validation images have start at 0.
            (init_weight, init_bias.nan_to_num(neginf=0.0)),
            max_iterations=config.max_iterations,
            tolerance=config.tolerance,
        )
        if not converged:
            logger.warning(
                "the linear probe has not converged in %s iterations: its accuracy may be too low",
                f"{config.max_iterations:,}",
            )
        return cls(
            weight=weight,
            bias=bias,
            C=_c_at_step(best_step),
            val_accuracy=sweep[best_step],
            sweep={_c_at_step(step): sweep[step] for step in sorted(sweep)},
            converged=converged,
        )

    def predict(self, x: Float[Tensor, "m d"]) -> Int[Tensor, " m"]:
        """Return the class with the largest logit: features (m, d) -> (m,) int64."""
        return predict(self.weight, self.bias, x)


def _sweep(
    config: LinearProbeConfig,
    problem: WhitenedProblem,
    val: Split,
    *,
    num_classes: int,
    callback: Callable[[float, float], None] | None,
) -> tuple[dict[int, float], dict[int, Theta]]:
    """Return the validation accuracy and the weights at each step of the grid that the search visits."""
    thetas = {-_GRID_LIMIT - 1: problem.features.new_zeros(len(problem.classes), problem.features.shape[1])}

    def score(step: int) -> float:
        # Warm start from the next smaller C: the solution is close, and weights grow faster than they shrink.
        init_theta = thetas[max(fitted_step for fitted_step in thetas if fitted_step < step)]
        point, _ = lbfgs(problem, _c_at_step(step), init_theta, config.max_iterations, config.sweep_tolerance)
        thetas[step] = point.theta
        predictions = predict(*unwhiten(problem, point.theta, num_classes), val.x)
        accuracy = _accuracy(predictions, val.y, config.mean_class_accuracy)
        if callback is not None:
            callback(_c_at_step(step), accuracy)
        return accuracy

    return search_grid(score), thetas


def search_grid(score_step: Callable[[int], float]) -> dict[int, float]:
    """Score the coarse steps of the grid of C, then search around the best with distances 8, 4, 2 and 1.

    Returns:
        The score of each visited step.
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


class Linear(Protocol):
    """Linear probe on the train, val and test splits."""

    name = "linear"
    title = "Linear probe"
    summary = "logistic regression on frozen features"
    config: LinearProbeConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Fit on train and val, and classify the test images."""
        val, test = context.split("val"), context.split("test")
        probe = LinearProbe.fit(
            context.split("train"),
            val if len(val) else None,
            self.config,
            num_classes=len(context.labeled_dataset.classes),
        )
        details: dict[str, Any] = {
            "C": probe.C,
            "val_accuracy": probe.val_accuracy,
            "converged": probe.converged,
            "sweep": {f"{C:g}": accuracy for C, accuracy in probe.sweep.items()},
        }
        return [accuracy_score(probe.predict(test.x), test.y, self.config, details)]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the probe."""
        return (
            "Logistic regression on the frozen features of the training images classifies the test images. "
            "The regularization strength is selected on held-out training images."
        )
