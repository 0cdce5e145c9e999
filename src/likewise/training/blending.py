"""Choice of the blend of a start and its adapted version, on held-out pairs and a retention dataset."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from likewise.artifacts import read_json
from likewise.run_directory import RunDirectory
from likewise.training.train import Run
from likewise.training.validation import knn_accuracy, retrieval_ranks

BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class BlendScore:
    """Validation of one blend of the start (0) and the adapted encoder (1)."""

    blend: float
    """Weight of the adapted features, or of the adapted weights."""
    mrr: float
    """Mean reciprocal rank of the partner of each validation anchor."""
    knn: float | None
    """Accuracy of a nearest-neighbor classifier on the validation anchors; None without labels."""
    retention: float | None
    """The same accuracy on the retention dataset; None without one."""


@dataclass(frozen=True, kw_only=True)
class AdaptOutcome:
    """The chosen blend, and what was measured to choose it."""

    blend: float
    """The chosen weight of the adapted encoder; 0 if the start was kept."""
    scores: tuple[BlendScore, ...]
    """Validation of all blends."""
    num_val_pairs: int
    """Number of validation pairs."""
    gain: tuple[float, float, float] | None
    """Difference of the mean reciprocal rank between the best blend and the start, with its 95 % interval
    (paired bootstrap over the validation pairs); None if no blend other than 0 was admissible."""

    @classmethod
    def read(cls, run: Run) -> "AdaptOutcome":
        """Return the outcome of a finished run of `adapt`."""
        values: dict[str, Any] = read_json(RunDirectory(run.path).adaptation_path)
        values["scores"] = tuple(BlendScore(**score) for score in values["scores"])
        values["gain"] = None if values["gain"] is None else tuple(values["gain"])
        return cls(**values)

    def summary(self) -> str:
        """Return the outcome in one sentence."""
        by_blend = {score.blend: score for score in self.scores}
        if self.gain is None:
            return "kept the start: every blend loses too much on the retention dataset"
        value, low, high = self.gain
        gain = f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points of MRR"
        if self.blend == 0:
            return f"kept the start: the adapted encoder is not significantly better ({gain})"
        return (
            f"adapted, blend {self.blend:g}: MRR of {self.num_val_pairs:,} held-out pairs "
            f"{100 * by_blend[0.0].mrr:.1f} -> {100 * by_blend[self.blend].mrr:.1f} ({gain})"
        )


@dataclass(frozen=True, kw_only=True)
class BlendFeatures:
    """Features of one blend."""

    anchors: Float[Tensor, "m d"]
    """The validation anchors."""
    partners: Float[Tensor, "m d"]
    """Their partners."""
    retained: Float[Tensor, "r d"] | None
    """Images of the retention dataset; None without one."""


class Blender(ABC):
    """A start and its adapted version, from which encoders in between are made."""

    @abstractmethod
    def features(self, blend: float) -> BlendFeatures:
        """Return the features of a blend: 0 is the start, 1 the adapted version."""

    @abstractmethod
    def save(self, path: Path, blend: float) -> None:
        """Write the encoder of a blend."""


@torch.no_grad()
def choose_blend(
    blender: Blender,
    *,
    labels: Int[Tensor, " m"] | None,
    retained_labels: Int[Tensor, " r"] | None,
    max_retention_loss: float,
    seed: int,
) -> AdaptOutcome:
    """Choose the blend that is best on validation pairs and loses little on the retention dataset.

    Args:
        blender: The start and its adapted version.
        labels: Labels of the validation anchors, -1 without one; None without labels.
        retained_labels: Labels of the images of the retention dataset; None without one.
        max_retention_loss: Largest loss of accuracy on the retention dataset, as a fraction.
        seed: Seed of the bootstrap.
    """
    reciprocal_ranks: dict[float, Tensor] = {}
    scores = []
    for blend in BLENDS:
        features = blender.features(blend)
        reciprocal_ranks[blend] = 1 / retrieval_ranks(features.anchors, features.partners)
        retention = None
        if features.retained is not None and retained_labels is not None:
            retention = float(knn_accuracy(features.retained, retained_labels))
        scores.append(
            BlendScore(
                blend=blend,
                mrr=float(reciprocal_ranks[blend].mean()),
                knn=None if labels is None else float(knn_accuracy(features.anchors, labels)),
                retention=retention,
            )
        )
    num_val_pairs = len(reciprocal_ranks[0.0])
    admissible = [
        score
        for score in scores[1:]
        if score.retention is None
        or scores[0].retention is None
        or score.retention >= scores[0].retention - max_retention_loss
    ]
    if not admissible:
        return AdaptOutcome(blend=0.0, scores=tuple(scores), num_val_pairs=num_val_pairs, gain=None)
    best = max(admissible, key=lambda score: (score.mrr + (score.knn or 0.0), -score.blend))
    gain = _bootstrap_difference(reciprocal_ranks[best.blend] - reciprocal_ranks[0.0], seed)
    return AdaptOutcome(
        blend=best.blend if gain[1] > 0 else 0.0,
        scores=tuple(scores),
        num_val_pairs=num_val_pairs,
        gain=gain,
    )


def _bootstrap_difference(differences: Float[Tensor, " m"], seed: int) -> tuple[float, float, float]:
    """Return the mean of paired differences with its 95 % percentile interval over resamples."""
    values = differences.double().numpy()
    counts = np.random.default_rng(seed).multinomial(
        len(values), np.full(len(values), 1 / len(values)), size=_NUM_RESAMPLES
    )
    low, high = np.quantile(counts @ values / len(values), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
