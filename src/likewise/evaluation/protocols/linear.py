"""Linear probe: logistic regression on frozen features, with C selected on validation images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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

# C is 10^(step / 8) for integer steps in [-48, 48]: 8 steps per decade from 1e-6 to 1e6.
_GRID_LIMIT = 48


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(ClassificationConfig):
    """Options of the linear probe."""

    max_iterations: int = 100
    """L-BFGS iterations per fit; 100 as in the LGSSL code and in scikit-learn."""
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
        sweep = _sweep(config, whiten(train.x, train.y), val, num_classes=num_classes, callback=callback)
        best_step = _best_step(sweep, list(sweep))
        weight, bias, converged = fit_logistic(
            all_images.x,
            all_images.y,
            _c_at_step(best_step),
            num_classes,
            max_iterations=config.max_iterations,
            tolerance=config.tolerance,
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
) -> dict[int, float]:
    """Return the validation accuracy at every step of the grid that the two-stage search visits."""
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

    return search_grid(score)


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
