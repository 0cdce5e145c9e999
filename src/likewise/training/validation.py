"""Validation on held-out pairs, and metrics that detect collapse."""

from dataclasses import dataclass, replace
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
from likewise.training.loader import PairDataset

PRIMARY_METRIC = "mrr"  # selects the best encoder
_BATCH_SIZE = 256
_KNN_K = 20
_MAX_VAL_FRACTION = 0.5  # of the images
_COLLAPSE_RANK = 2.0
_COLLAPSE_STD = 0.01


@dataclass(frozen=True)
class ValidationSplit:
    """Pairs that are held out of training.

    Attributes:
        anchors: (m,) int64, positions of the anchors.
        partners: (m,) int64, positions of their partners.
    """

    anchors: np.ndarray
    partners: np.ndarray

    def training_mask(self, readable_mask: np.ndarray) -> np.ndarray:
        """Return the readable images that are neither anchor nor partner: (n,) bool -> (n,) bool."""
        mask = readable_mask.copy()
        mask[self.anchors] = mask[self.partners] = False
        return mask


def split_validation(pairs: Pairs, num_pairs: int, *, seed: int) -> ValidationSplit:
    """Sample validation pairs: pairs of different images, or single images for self pairs.

    Raises:
        TrainingError: if there are too few images.
    """
    is_self_paired = pairs.pair_config.source == "self"
    eligible = (
        pairs.anchors if is_self_paired else np.intersect1d(pairs.anchors, np.flatnonzero(pairs.has_partner))
    )
    if num_pairs > _MAX_VAL_FRACTION * len(eligible):
        raise TrainingError(
            f"`num_val_pairs` must be at most {int(_MAX_VAL_FRACTION * len(eligible))}, half of the "
            f"{len(eligible):,} images with a partner, got {num_pairs}",
            field="num_val_pairs",
        )
    anchors = np.sort(np.random.default_rng([seed, Stream.VALIDATION]).permutation(eligible)[:num_pairs])
    partners = pairs.sample_partners(anchors, seed=seed, epoch=0)
    return ValidationSplit(anchors, partners)


class PairRetrievalEvaluator:
    """Evaluates an encoder by retrieving the partners of validation anchors."""

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
        """Make two fixed views of each pair, as in training.

        Args:
            image_cache: The images.
            pairs: The pairs from which `split` was sampled.
            split: The validation pairs.
            view_spec: The view of an anchor in training.
            labels: (m,) int64, the label of each validation anchor, -1 without one; None without labels.
            seed: Seed of the augmentation.
        """
        partner_spec = replace(view_spec, source=1)
        pair_dataset = PairDataset(image_cache, pairs, seed=seed, view_specs=[view_spec, partner_spec])
        batch = pair_dataset.collate(split.anchors, [split.partners], epoch=0)
        self._views = batch.to_device(pair_dataset.augmentations, torch.device("cpu")).views
        self._labels = None if labels is None else torch.from_numpy(labels)

    def evaluate(self, encoder: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        """Compute the validation metrics of an encoder; it is in training mode afterwards.

        Returns:
            `mrr` and `recall_at_1` of the partner, `alignment`, `uniformity`, `effective_rank` and, with
            labels, `knn`, the accuracy of a nearest-neighbor classifier on the other anchors.
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


def feature_std(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return the standard deviation of normalized features: 1 for uniform directions, 0 for constant ones.

    The standard deviation of each coordinate, averaged and multiplied by the square root of d (Chen and He
    2021, "Exploring Simple Siamese", section 4.1).
    """
    normalized = normalize(features.float(), dim=1)
    return normalized.std(dim=0).mean() * normalized.shape[1] ** 0.5


def effective_rank(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return the effective rank of the centered features: the exponential of the entropy of their spectrum.

    Roy and Vetterli 2007, definition 1, with singular values that sum to 1; between 1 and min(n - 1, d).
    (RankMe, Garrido et al. 2023, uses features that are not centered.)
    """
    centered = features.float() - features.float().mean(dim=0)
    singular_values = torch.linalg.svdvals(centered)
    p = singular_values / singular_values.sum().clamp(min=1e-12)
    return torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum())


def has_collapsed(*, rank: float, std: float) -> bool:
    """Return whether features are nearly the same for all images."""
    return rank < _COLLAPSE_RANK or std < _COLLAPSE_STD


def retrieval_ranks(anchors: Float[Tensor, "m d"], partners: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
    """Return the rank of each anchor's partner, from 1, among all partners by cosine similarity.

    Half of the tied similarities rank higher, so that constant features have the middle rank.
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
    """Return the mean squared distance of normalized partners (Wang and Isola 2020, section 4.1.1)."""
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
    """Return the step with the best primary metric, the earliest of ties; 0 without validation."""
    return max(rows, key=lambda row: (row[PRIMARY_METRIC], -row["step"]))["step"] if rows else 0


def should_stop(rows: list[dict[str, Any]], patience: int | None) -> bool:
    """Return whether the last `patience` validations brought no improvement; False if it is None."""
    best = best_step(rows)
    return patience is not None and sum(row["step"] > best for row in rows) >= patience
