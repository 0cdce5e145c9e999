"""Scoring an encoder while it learns, by pairs that it is not trained on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from likewise.data.image_cache import PackedImages
from likewise.errors import TrainingError
from likewise.pairs.sampling import Pairs
from likewise.training.config import Showing
from likewise.training.loader import PairBatches
from likewise.training.run_dir import effective_rank

SCORE = "mrr"  # what decides which encoder is the best
_STREAM = 103
_BATCH = 256
_NEIGHBORS = 20
_SHARE = 0.5  # of the images, at most, are held out


@dataclass(frozen=True)
class HeldOut:
    """Pairs that no step of training sees: anchors (m,) and their partners (m,) int64."""

    anchors: np.ndarray
    partners: np.ndarray

    def rest(self, usable: np.ndarray) -> np.ndarray:
        """Return the usable images that are left to train on: no anchor, no partner."""
        return np.setdiff1d(usable, np.concatenate([self.anchors, self.partners]))


def hold_out(pairs: Pairs, count: int, *, seed: int) -> HeldOut:
    """Draw pairs of different images, or, where images are paired with themselves, images.

    Raises:
        TrainingError: where there are too few.
    """
    alone = pairs.rule.pairs == "self"
    able = pairs.anchors if alone else np.intersect1d(pairs.anchors, np.flatnonzero(pairs.with_partner))
    if count > _SHARE * len(able):
        raise TrainingError(
            f"--held-out {count}: only {len(able):,} images could be held out, of which at most half are; "
            f"use {int(_SHARE * len(able))} or less"
        )
    anchors = np.sort(np.random.default_rng([seed, _STREAM]).permutation(able)[:count])
    partners = pairs.partners(anchors, seed=seed, epoch=0)
    return HeldOut(anchors, partners)


class PairScorer:
    """Scores an encoder by how well it finds the partners of held-out images."""

    def __init__(
        self,
        images: PackedImages,
        pairs: Pairs,
        held: HeldOut,
        shown: Showing,
        labels: np.ndarray | None,
        *,
        seed: int,
    ) -> None:
        """Fix two views of each pair, made as in training.

        Args:
            images: The pixels.
            pairs: The pairs that `held` was drawn from.
            held: What is held out.
            shown: How an anchor is shown in training.
            labels: The label of each held-out anchor by number, (m,) int64, -1 without one; None where there
                are none.
            seed: Decides the views.
        """
        views = PairBatches(
            images,
            pairs,
            [shown, Showing(who=1, views=shown.views, size=shown.size)],
            batch_size=len(held.anchors),
            seed=seed,
        )
        batch = views.shown_pairs(held.anchors, held.partners)
        self._views = batch.shown(views.recipes, torch.device("cpu")).views
        self._labels = None if labels is None else torch.from_numpy(labels)

    def score(self, encoder: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """Embed both views of all pairs and compare them; the encoder is left in training mode.

        Returns:
            `mrr` and `recall_at_1` of the partner, `alignment`, `uniformity`, `effective_rank` and, where
            there are labels, `knn`, the accuracy of the nearest other anchors.
        """
        encoder.eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            first, second = (
                torch.cat([
                    encoder(part.to(device, memory_format=torch.channels_last)).float()
                    for part in each.split(_BATCH)
                ])
                for each in self._views
            )  # fmt: skip
        encoder.train()
        ranks = partner_ranks(first, second)
        scores: dict[str, Any] = {
            "mrr": (1 / ranks).mean(),
            "recall_at_1": (ranks == 1).float().mean(),
            "alignment": alignment(first, second),
            "uniformity": uniformity(first),
            "effective_rank": effective_rank(first),
        }
        if self._labels is not None:
            scores["knn"] = nearest_accuracy(first, self._labels.to(device))
        return {name: float(value) for name, value in scores.items()}


def partner_ranks(anchors: Float[Tensor, "m d"], partners: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """Return at which place each anchor finds its partner among all partners, by cosine; 1 is first.

    Of equal similarities half count as nearer, so that features that are all the same rank in the middle.
    """
    similarity = normalize(anchors, dim=1) @ normalize(partners, dim=1).T
    own = similarity.diagonal()[:, None]
    others = ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    return 1 + ((similarity > own) & others).sum(dim=1) + ((similarity == own) & others).sum(dim=1) / 2


def alignment(anchors: Float[Tensor, "m d"], partners: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Return the mean squared distance of unit partners (Wang and Isola 2020, section 4.1.1)."""
    return (normalize(anchors, dim=1) - normalize(partners, dim=1)).square().sum(dim=1).mean()


def uniformity(features: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Return the logarithm of the mean Gaussian potential, t = 2 (Wang and Isola 2020, section 4.1.2)."""
    return torch.pdist(normalize(features, dim=1)).square().mul(-2).exp().mean().log()


def nearest_accuracy(features: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> Float[Tensor, ""]:
    """Return how often the majority of the 20 nearest others has an image's own label, among the labelled."""
    features, labels = features[labels >= 0], labels[labels >= 0]
    unit = normalize(features, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    nearest = labels[similarity.topk(min(_NEIGHBORS, len(labels) - 1)).indices]
    votes = torch.zeros(len(labels), int(labels.max()) + 1, device=labels.device)
    votes.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=votes.dtype))
    return (votes.argmax(dim=1) == labels).float().mean()


def best_step(rows: list[dict[str, Any]]) -> int:
    """Return the step of the best score, the earliest of equals; 0 where nothing was scored."""
    return max(rows, key=lambda row: (row[SCORE], -row["step"]))["step"] if rows else 0


def is_exhausted(rows: list[dict[str, Any]], patience: int | None) -> bool:
    """Tell whether so many scores have passed without a better one."""
    best = best_step(rows)
    return patience is not None and sum(row["step"] > best for row in rows) >= patience
