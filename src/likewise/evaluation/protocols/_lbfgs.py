"""Multinomial logistic regression, fitted by L-BFGS along the principal axes of the features."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Class scores held at a time: 64 MiB in float32, whatever the number of images.
_CELLS = 2**24
# Steps and gradient changes L-BFGS remembers.
_MEMORY = 10
# Weights of the classes seen, in the basis of the fit, with the intercept as the last column.
Theta = Float[Tensor, "s r"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Features centred and turned to their principal axes, with a column of ones for the intercept.

    The penalty sees the length of the weights and not the intercept, so neither change moves the optimum. But
    now the columns are uncorrelated, and a diagonal is a good guess at the Hessian.
    """

    rows: Float[Tensor, "n r"]
    lengths: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    seen: Int[Tensor, " s"]
    mean: Float[Tensor, " d"]
    axes: Float[Tensor, "d d"]


@dataclass(frozen=True, kw_only=True)
class _Point:
    """Parameters with their gradient, each class's mean p(1-p), and the mean length of an image's part."""

    theta: Theta
    gradient: Theta
    doubt: Float[Tensor, " s"]
    scale: float


def fit_logistic(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    cost: float,
    classes: int,
    init: tuple[Float[Tensor, "c d"], Float[Tensor, " c"]] | None = None,
    *,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"], bool]:
    """Fit multinomial logistic regression with L-BFGS: minimise C sum_i CE_i + 1/2 |W|^2 over W and b.

    This is scikit-learn's LogisticRegression(C) of three or more classes. Of two classes scikit-learn fits
    one weight vector w = W_1 - W_0, whose penalty is twice ours: its C is twice the cost given here.

    Known deviation: LGSSL's torch code minimises mean_i CE_i + 1/C 1/2 |W| (the mean, and the length not
    squared), which is another family of solutions; its scikit-learn path is the one followed here.

    The gradient g of the objective over C n is mean_i r_i x_i^T + W / (C n), with r the probabilities minus
    one-hot labels and x the centred features and a one. The fit has converged when
    |g| <= tolerance * mean_i |r_i| |x_i|. Unlike a bound on |g| alone this means the same for every cost and
    scale, also where classes are separable and all gradients vanish (measured: 1e-5 puts the objective within
    1e-6 of its minimum, in float32 too).

    Args:
        features: float32 or float64; computed in this precision (other dtypes in float32), in one copy.
        labels: int64, below `classes`.
        cost: C, the inverse of the penalty's strength.
        classes: number of classes. One without labels gets weight 0 and bias -inf: it is never predicted.
        init: weight and bias to start from, all zero if absent.
        max_iterations: L-BFGS iterations.
        tolerance: see above.

    Returns:
        Weight (classes, d), bias (classes,), and whether the tolerance was reached.

    Raises:
        ValueError: no images, features with NaN or infinity, or a cost not above zero.
    """
    if not cost > 0:
        raise ValueError(f"the cost must be above zero, got {cost}")
    problem = prepare(features, labels)
    start = problem.rows.new_zeros(len(problem.seen), problem.rows.shape[1])
    if init is not None:
        weight, bias = (part.to(start)[problem.seen] for part in init)
        start = torch.cat([weight @ problem.axes, (bias + weight @ problem.mean)[:, None]], dim=1)
    point, converged = minimise(problem, cost, start, max_iterations, tolerance)
    return *unprepare(problem, point.theta, classes), converged


def prepare(features: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Problem:
    """Centre and turn features (n, d) for fits of any cost; raises ValueError for NaN or no rows."""
    if len(features) == 0 or not bool(features.isfinite().all()):
        raise ValueError(f"features must be finite and at least one row, got shape {tuple(features.shape)}")
    features = features if features.dtype == torch.float64 else features.float()
    mean = features.mean(dim=0)
    rows = torch.cat([features - mean, features.new_ones(len(features), 1)], dim=1)
    centred = rows[:, :-1]
    axes = torch.linalg.eigh(centred.T @ centred / len(centred)).eigenvectors
    centred.copy_(centred @ axes)
    seen, local = labels.unique(return_inverse=True)
    return Problem(rows=rows, lengths=rows.norm(dim=1), labels=local, seen=seen, mean=mean, axes=axes)


def unprepare(
    problem: Problem, theta: Theta, classes: int
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
    """Weight and bias for the features as they came, of all classes."""
    weight = theta.new_zeros(classes, len(problem.mean))
    bias = theta.new_full((classes,), -torch.inf)
    weight[problem.seen] = theta[:, :-1] @ problem.axes.T
    # A shift of all biases changes no probability; scikit-learn's, and now ours, have mean zero.
    bias[problem.seen] = theta[:, -1] - theta[:, -1].mean() - weight[problem.seen] @ problem.mean
    return weight, bias


def predict(
    weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"], features: Float[Tensor, "m d"]
) -> Int[Tensor, " m"]:
    """Return the class of the greatest score: features (m, d) -> (m,) int64."""
    return (features.to(weight) @ weight.T + bias).argmax(dim=1)


def _evaluate(problem: Problem, ridge: Float[Tensor, " r"], theta: Theta) -> _Point:
    gradient, doubt, scale = theta * ridge, theta.new_zeros(len(theta)), theta.new_zeros(())
    count = len(problem.rows)
    block = max(1, _CELLS // len(theta))
    columns = (problem.rows, problem.labels, problem.lengths)
    for rows, labels, lengths in zip(*(column.split(block) for column in columns), strict=True):
        residual = (rows @ theta.T).softmax(dim=1)
        doubt += (residual * (1 - residual)).sum(dim=0) / count
        # p - 1 has no digits left where p is almost 1; minus the sum of the others has them all.
        residual.scatter_(1, labels[:, None], 0)
        residual.scatter_(1, labels[:, None], -residual.sum(dim=1, keepdim=True))
        gradient += residual.T @ rows / count
        scale += (residual.norm(dim=1) @ lengths) / count
    return _Point(theta=theta, gradient=gradient, doubt=doubt, scale=float(scale))


def minimise(
    problem: Problem, cost: float, start: Theta, max_iterations: int, tolerance: float
) -> tuple[_Point, bool]:
    """L-BFGS (Nocedal and Wright 2006, algorithm 7.4) on the objective over C n."""
    ridge = start.new_full(start.shape[1:], 1 / (cost * len(problem.rows)))
    ridge[-1] = 0
    energy = problem.rows.square().mean(dim=0)
    history: list[tuple[Tensor, Tensor]] = []
    here = _evaluate(problem, ridge, start)
    for _ in range(max_iterations):
        if float(here.gradient.norm()) <= tolerance * here.scale:
            return here, True
        inverse = 1 / (here.doubt[:, None] * energy + ridge).clamp_min(1e-12)
        there = _line_search(problem, ridge, here, -_quasi_newton(here.gradient, inverse, history))
        change = (there.theta - here.theta, there.gradient - here.gradient)
        # Rounding can hide the curvature of a tiny step, and one such pair would spoil all directions.
        if _dot(*change) > 0:
            history = [*history[-_MEMORY + 1 :], change]
        here = there
    return here, float(here.gradient.norm()) <= tolerance * here.scale


def _quasi_newton(gradient: Theta, inverse: Theta, history: list[tuple[Tensor, Tensor]]) -> Theta:
    """Inverse Hessian times gradient, from the diagonal's inverse and the remembered changes."""
    shares: list[Tensor] = []
    for step, change in reversed(history):
        shares.append(_dot(step, gradient) / _dot(step, change))
        gradient = gradient - shares[-1] * change
    result = gradient * inverse
    if history:
        step, change = history[-1]
        result = result * (_dot(step, change) / _dot(change, change * inverse))
    for (step, change), share in zip(history, reversed(shares), strict=True):
        result = result + step * (share - _dot(change, result) / _dot(step, change))
    return result


def _line_search(problem: Problem, ridge: Float[Tensor, " r"], here: _Point, direction: Theta) -> _Point:
    """Step to where the slope has risen but is not clearly uphill.

    The objective is convex, so its slope along a line only rises, and slopes alone find the bracket:
    differences of the objective itself drown in rounding long before its gradient does.
    """
    first = float(_dot(here.gradient, direction))
    low, slope_low, high, length = 0.0, first, math.inf, 1.0
    there = here
    for _ in range(20):
        there = _evaluate(problem, ridge, here.theta + length * direction)
        slope = float(_dot(there.gradient, direction))
        if slope > -0.5 * first:
            high = length
            length = low + (high - low) * min(max(slope_low / (slope_low - slope), 0.1), 0.9)
        elif slope < 0.9 * first:
            low, slope_low = length, slope
            length = 3 * length if math.isinf(high) else (low + high) / 2
        else:
            break
    return there


def _dot(a: Theta, b: Theta) -> Float[Tensor, ""]:
    return (a * b).sum()
