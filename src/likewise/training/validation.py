"""Scoring an encoder while it learns, by pairs that it is not trained on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from likewise.data.image_cache import ImageCache
from likewise.errors import TrainingError
from likewise.pairs.sampling import Pairs
from likewise.rng import Stream
from likewise.training.config import ViewSpec
from likewise.training.loader import PairLoader
from likewise.training.run_dir import effective_rank

PRIMARY_METRIC = "mrr"  # what decides which encoder is the best
_BATCH_SIZE = 256
_KNN_K = 20
_MAX_VAL_FRACTION = 0.5  # of the images, at most, are held out


@dataclass(frozen=True)
class ValidationSplit:
    """Pairs that no step of training sees: anchors (m,) and their partners (m,) int64."""

    anchors: np.ndarray
    partners: np.ndarray

    def training_positions(self, readable: np.ndarray) -> np.ndarray:
        """Return the usable images that are left to train on: no anchor, no partner."""
        return np.setdiff1d(readable, np.concatenate([self.anchors, self.partners]))


def split_validation(pairs: Pairs, num_pairs: int, *, seed: int) -> ValidationSplit:
    """Draw pairs of different images, or, where images are paired with themselves, images.

    Raises:
        TrainingError: where there are too few.
    """
    is_self_paired = pairs.pair_config.source == "self"
    eligible = (
        pairs.anchors if is_self_paired else np.intersect1d(pairs.anchors, np.flatnonzero(pairs.has_partner))
    )
    if num_pairs > _MAX_VAL_FRACTION * len(eligible):
        raise TrainingError(
            f"--held-out {num_pairs}: only {len(eligible):,} images could be held out, of which at "
            f"most half are; "
            f"use {int(_MAX_VAL_FRACTION * len(eligible))} or less"
        )
    anchors = np.sort(np.random.default_rng([seed, Stream.VALIDATION]).permutation(eligible)[:num_pairs])
    partners = pairs.sample_partners(anchors, seed=seed, epoch=0)
    return ValidationSplit(anchors, partners)


class PairRetrievalEvaluator:
    """Scores an encoder by how well it finds the partners of held-out images."""

    def __init__(
        self,
        image_cache: ImageCache,
        pairs: Pairs,
        split: ValidationSplit,
        view_spec: ViewSpec,
        labels: np.ndarray | None,
        *,
        seed: int,
    ) -> None:
        """Fix two views of each pair, made as in training.

        Args:
            image_cache: The pixels.
            pairs: The pairs that `split` was drawn from.
            split: What is held out.
            view_spec: How an anchor is shown in training.
            labels: The label of each held-out anchor by number, (m,) int64, -1 without one; None where there
                are none.
            seed: Decides the views.
        """
        loader = PairLoader(
            image_cache,
            pairs,
            [
                view_spec,
                ViewSpec(source=1, augmentation=view_spec.augmentation, image_size=view_spec.image_size),
            ],
            batch_size=len(split.anchors),
            seed=seed,
        )
        host_batch = loader.batch_of(split.anchors, split.partners)
        self._views = host_batch.to_device(loader.augmentations, torch.device("cpu")).views
        self._labels = None if labels is None else torch.from_numpy(labels)

    def evaluate(self, encoder: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """Embed both views of all pairs and compare them; the encoder is left in training mode.

        Returns:
            `mrr` and `recall_at_1` of the partner, `alignment`, `uniformity`, `effective_rank` and, where
            there are labels, `knn`, the accuracy of the nearest other anchors.
        """
        encoder.eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            anchors, partners = (
                torch.cat([
                    encoder(chunk.to(device, memory_format=torch.channels_last)).float()
                    for chunk in view.split(_BATCH_SIZE)
                ])
                for view in self._views
            )  # fmt: skip
        encoder.train()
        ranks = retrieval_ranks(anchors, partners)
        metrics: dict[str, Any] = {
            "mrr": (1 / ranks).mean(),
            "recall_at_1": (ranks == 1).float().mean(),
            "alignment": alignment(anchors, partners),
            "uniformity": uniformity(anchors),
            "effective_rank": effective_rank(anchors),
        }
        if self._labels is not None:
            metrics["knn"] = knn_accuracy(anchors, self._labels.to(device))
        return {name: float(value) for name, value in metrics.items()}


def retrieval_ranks(anchors: Float[Tensor, "m d"], partners: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """Return at which place each anchor finds its partner among all partners, by cosine; 1 is first.

    Of equal similarities half count as nearer, so that features that are all the same rank in the middle.
    """
    similarity = normalize(anchors, dim=1) @ normalize(partners, dim=1).T
    positive = similarity.diagonal()[:, None]
    off_diagonal = ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    return (
        1
        + ((similarity > positive) & off_diagonal).sum(dim=1)
        + ((similarity == positive) & off_diagonal).sum(dim=1) / 2
    )


def alignment(anchors: Float[Tensor, "m d"], partners: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Return the mean squared distance of unit partners (Wang and Isola 2020, section 4.1.1)."""
    return (normalize(anchors, dim=1) - normalize(partners, dim=1)).square().sum(dim=1).mean()


def uniformity(features: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """Return the logarithm of the mean Gaussian potential, t = 2 (Wang and Isola 2020, section 4.1.2)."""
    return torch.pdist(normalize(features, dim=1)).square().mul(-2).exp().mean().log()


def knn_accuracy(features: Float[Tensor, "m d"], labels: Int[Tensor, " m"]) -> Float[Tensor, ""]:
    """Return how often the majority of the 20 nearest others has an image's own label, among the labelled."""
    features, labels = features[labels >= 0], labels[labels >= 0]
    normalized = normalize(features, dim=1)
    similarity = (normalized @ normalized.T).fill_diagonal_(-torch.inf)
    neighbor_labels = labels[similarity.topk(min(_KNN_K, len(labels) - 1)).indices]
    votes = torch.zeros(len(labels), int(labels.max()) + 1, device=labels.device)
    votes.scatter_add_(1, neighbor_labels, torch.ones_like(neighbor_labels, dtype=votes.dtype))
    return (votes.argmax(dim=1) == labels).float().mean()


def best_step(rows: list[dict[str, Any]]) -> int:
    """Return the step of the best score, the earliest of equals; 0 where nothing was scored."""
    return max(rows, key=lambda row: (row[PRIMARY_METRIC], -row["step"]))["step"] if rows else 0


def should_stop(rows: list[dict[str, Any]], patience: int | None) -> bool:
    """Tell whether so many scores have passed without a better one."""
    best = best_step(rows)
    return patience is not None and sum(row["step"] > best for row in rows) >= patience
