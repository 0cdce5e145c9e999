"""Partner sampling: the partner of an image is a pure function of seed, epoch and image."""

from abc import ABC, abstractmethod
from typing import final

import numpy as np

from likewise.artifacts import Artifact
from likewise.pairs.candidates import Candidates
from likewise.pairs.config import PairConfig
from likewise.rng import Stream, uniform


class PartnerSampler(ABC):
    """Samples the partners of images from their candidates."""

    @property
    @abstractmethod
    def has_partner(self) -> np.ndarray:
        """Images with a partner, (n,) bool."""

    @abstractmethod
    def sample(self, anchors: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Sample partners by uniform numbers in [0, 1): (b,), (b, 2) -> (b,) int64, -1 without a partner."""


@final
class NullSampler(PartnerSampler):
    """Sampler without partners, for `self`."""

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images

    @property
    def has_partner(self) -> np.ndarray:
        """Mask that is false everywhere, (n,) bool."""
        return np.zeros(self._num_images, bool)

    def sample(self, anchors: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return -1 for each anchor."""
        return np.full(len(anchors), -1, np.int64)


@final
class CandidateSampler(PartnerSampler):
    """Samples from the candidates of an image: from its row, or from one of its rows (one per caption)."""

    def __init__(
        self, candidates: Candidates, temperature: float | None = None, row_starts: np.ndarray | None = None
    ) -> None:
        """Initialize the sampler; rows without candidates are never sampled.

        Args:
            candidates: Candidates, best first.
            temperature: Sample in proportion to exp(similarity / temperature); uniformly by default.
            row_starts: First row of each image, (n + 1,) int64; one row per image by default.
        """
        self.candidates = candidates
        self.temperature = temperature
        rows = np.arange(len(candidates.positions)) if row_starts is None else np.arange(row_starts[-1])
        has_candidates = candidates.mask.any(axis=1)
        bounds = np.arange(len(rows) + 1) if row_starts is None else row_starts
        self._rows = rows[has_candidates]
        self._row_offsets = np.concatenate([[0], np.cumsum(has_candidates)])[bounds]

    @property
    def has_partner(self) -> np.ndarray:
        """Images with a partner, (n,) bool."""
        return np.diff(self._row_offsets) > 0

    def list_partners(self, position: int) -> list[int]:
        """Return all partners of an image, best first."""
        rows = self._rows[self._row_offsets[position] : self._row_offsets[position + 1]]
        partners = self.candidates.positions[rows].ravel()
        return list(dict.fromkeys(partners[partners >= 0].tolist()))

    def sample(self, anchors: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Sample a row uniformly, and from it a candidate uniformly or by exp(similarity / temperature)."""
        start, stop = self._row_offsets[anchors], self._row_offsets[anchors + 1]
        has_rows = stop > start
        partners = np.full(len(anchors), -1, np.int64)
        offset = np.minimum((u[:, 1] * (stop - start)).astype(np.int64), stop - start - 1)
        rows = self._rows[(start + offset)[has_rows]]
        candidates, similarity = self.candidates.positions[rows], self.candidates.similarity[rows]
        column = self._sample_columns(candidates >= 0, similarity, u[has_rows, 0])
        partners[has_rows] = candidates[np.arange(len(rows)), column]
        return partners

    def _sample_columns(self, is_valid: np.ndarray, similarity: np.ndarray, u: np.ndarray) -> np.ndarray:
        counts = is_valid.sum(axis=1)
        if self.temperature is None:
            return np.minimum((u * counts).astype(np.int64), counts - 1)
        logits = np.where(is_valid, similarity.astype(np.float64), -np.inf) / self.temperature
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        cumulative = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
        return np.minimum((cumulative <= u[:, None]).sum(axis=1), counts - 1)


@final
class LabelSampler(PartnerSampler):
    """Samples uniformly from the other images with the same label: an oracle."""

    def __init__(self, labels: np.ndarray) -> None:
        """Initialize the sampler with the label of each image: (n,) int64, -1 without a label."""
        self.labels = labels
        self._sorted_positions = np.argsort(labels, kind="stable")
        sorted_labels = labels[self._sorted_positions]
        self._group_starts = np.searchsorted(sorted_labels, labels)
        self._group_sizes = np.searchsorted(sorted_labels, labels, side="right") - self._group_starts
        self._ranks = np.empty(len(labels), np.int64)
        self._ranks[self._sorted_positions] = np.arange(len(labels))

    @property
    def has_partner(self) -> np.ndarray:
        """Images with a partner, (n,) bool."""
        return (self.labels >= 0) & (self._group_sizes > 1)

    def sample(self, anchors: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Sample one of the other images with the label uniformly."""
        num_others = self._group_sizes[anchors] - 1
        offset = np.minimum((u[:, 0] * num_others).astype(np.int64), np.maximum(num_others - 1, 0))
        index = self._group_starts[anchors] + offset
        index += index >= self._ranks[anchors]  # skip the anchor itself
        return np.where(
            self.has_partner[anchors],
            self._sorted_positions[np.minimum(index, len(self._sorted_positions) - 1)],
            -1,
        )


class Pairs:
    """Positive pairs of the images of a dataset, sampled each epoch.

    ::

        pairs = likewise.build_pairs(dataset, likewise.PairConfig(k=3))
        partners = pairs.sample_partners(pairs.anchors, seed=0, epoch=0)

    Attributes:
        has_partner: Images with a partner, (n,) bool.
    """

    def __init__(
        self,
        pair_config: PairConfig,
        sampler: PartnerSampler,
        key: str,
        *,
        excluded: np.ndarray,
        neighbors: tuple[Artifact, ...] = (),
        messages: tuple[str, ...] = (),
    ) -> None:
        """Initialize the pairs; `build_pairs` does.

        Args:
            pair_config: The pair sampling.
            sampler: Sampler of the partners.
            key: Hash of everything that the samples depend on.
            excluded: Images that are neither anchors nor partners, (n,) bool.
            neighbors: Neighbors artifacts that the pairs derive from.
            messages: Additions to the summary.
        """
        self.pair_config, self.sampler, self.key = pair_config, sampler, key
        self.excluded, self.neighbors, self.messages = excluded, neighbors, messages
        self.has_partner = sampler.has_partner & ~excluded

    @property
    def anchors(self) -> np.ndarray:
        """Positions of the images to train on, (m,) int64, ascending."""
        return np.flatnonzero(~self.excluded)

    @property
    def labels(self) -> np.ndarray | None:
        """Integer labels of the images, (n,) int64, -1 without a label; None if pairs are not by label."""
        return self.sampler.labels if isinstance(self.sampler, LabelSampler) else None

    def sample_partners(
        self, anchors: np.ndarray, *, seed: int, epoch: int, offset: float = 0.0
    ) -> np.ndarray:
        """Return the partner of each anchor: (b,) int64 -> (b,) int64; itself if it has none.

        The sample is a pure function of seed, epoch and position. Offsets of 0, 1/m, 2/m, … give m different
        partners if there are at least m and they are sampled uniformly (systematic sampling).
        """
        u = uniform(anchors, 3, seed=seed, epoch=epoch, stream=Stream.PARTNERS)
        u[:, 0] = (u[:, 0] + offset) % 1
        partners = self.sampler.sample(anchors, u[:, [0, 2]])
        return np.where((partners < 0) | (u[:, 1] < self.pair_config.self_pair_prob), anchors, partners)

    def summary(self) -> str:
        """Return the config in one sentence, with counts of paired, self-paired and excluded images."""
        num_anchors, num_paired = int((~self.excluded).sum()), int(self.has_partner.sum())
        parts = [self.pair_config.summary()]
        if self.pair_config.source == "self":
            parts.append(f"{num_anchors:,} images")
        else:
            parts.append(f"{num_paired:,} of {num_anchors:,} images have a partner")
        if num_paired and num_paired < num_anchors:
            parts.append(f"{num_anchors - num_paired:,} are paired with themselves")
        return "; ".join([*parts, *self.messages])
