"""Partners drawn by a rule: who is shown with whom, as a function of seed, epoch and image alone."""

from abc import ABC, abstractmethod
from typing import final

import numpy as np

from likewise.artifacts import Artifact
from likewise.pairs.candidates import Candidates
from likewise.pairs.config import PairConfig
from likewise.rng import Stream, uniform


class PartnerSampler(ABC):
    """The partners that images have, and the draw of one."""

    @property
    @abstractmethod
    def has_partner(self) -> np.ndarray:
        """Which images have a partner: (n,) bool."""

    @abstractmethod
    def sample(self, anchors: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Draw partners by two chances in [0, 1) each: (b,), (b, 2) -> (b,) int64, -1 where there is none."""


@final
class NullSampler(PartnerSampler):
    """No image has a partner: `self`."""

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images

    @property
    def has_partner(self) -> np.ndarray:
        """Nowhere: (n,) bool."""
        return np.zeros(self._num_images, bool)

    def sample(self, anchors: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return -1 for each."""
        return np.full(len(anchors), -1, np.int64)


@final
class CandidateSampler(PartnerSampler):
    """A row of candidates an image, or several of which one is drawn first (a row a caption)."""

    def __init__(
        self, candidates: Candidates, temperature: float | None = None, row_starts: np.ndarray | None = None
    ) -> None:
        """Hold candidates; `row_starts` (n + 1,) has the first row of each image; one row by default.

        Rows without candidates are passed over in the draw of a row.
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
        """Which images have a partner: (n,) bool."""
        return np.diff(self._row_offsets) > 0

    def list_partners(self, position: int) -> list[int]:
        """Return everybody who may be drawn for an image, best first."""
        rows = self._rows[self._row_offsets[position] : self._row_offsets[position + 1]]
        partners = self.candidates.positions[rows].ravel()
        return list(dict.fromkeys(partners[partners >= 0].tolist()))

    def sample(self, anchors: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Draw a row evenly, and from it a candidate evenly or by exp(similarity / temperature)."""
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
    """Any other image of one's own group, evenly: the oracle that knows the labels."""

    def __init__(self, labels: np.ndarray) -> None:
        """Hold the group of every image: (n,) int64, -1 where there is none."""
        self.labels = labels
        self._sorted_positions = np.argsort(labels, kind="stable")
        sorted_labels = labels[self._sorted_positions]
        self._group_starts = np.searchsorted(sorted_labels, labels)
        self._group_sizes = np.searchsorted(sorted_labels, labels, side="right") - self._group_starts
        self._ranks = np.empty(len(labels), np.int64)
        self._ranks[self._sorted_positions] = np.arange(len(labels))

    @property
    def has_partner(self) -> np.ndarray:
        """Which images have a partner: (n,) bool."""
        return (self.labels >= 0) & (self._group_sizes > 1)

    def sample(self, anchors: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Draw one of the others evenly."""
        num_others = self._group_sizes[anchors] - 1
        offset = np.minimum((u[:, 0] * num_others).astype(np.int64), np.maximum(num_others - 1, 0))
        index = self._group_starts[anchors] + offset
        index += index >= self._ranks[anchors]  # oneself is passed over
        return np.where(
            self.has_partner[anchors],
            self._sorted_positions[np.minimum(index, len(self._sorted_positions) - 1)],
            -1,
        )


class Pairs:
    """Partners for the images of a collection, drawn anew each epoch where there is a choice."""

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
        """Hold a choice under a rule.

        Args:
            pair_config: The rule.
            sampler: What it leaves.
            key: A fingerprint of everything that decides the draws.
            excluded: Images that take no part, (n,) bool.
            neighbors: The neighbors that it was made from.
            messages: Counts in words that belong into the summary.
        """
        self.pair_config, self.sampler, self.key = pair_config, sampler, key
        self.excluded, self.neighbors, self.messages = excluded, neighbors, messages
        self.has_partner = sampler.has_partner & ~excluded

    @property
    def anchors(self) -> np.ndarray:
        """The images that take part: (m,) int64, ascending."""
        return np.flatnonzero(~self.excluded)

    @property
    def labels(self) -> np.ndarray | None:
        """The label of each image by number, (n,) int64, -1 without one; None if labels make no pairs."""
        return self.sampler.labels if isinstance(self.sampler, LabelSampler) else None

    def sample_partners(
        self, anchors: np.ndarray, *, seed: int, epoch: int, offset: float = 0.0
    ) -> np.ndarray:
        """Return the partner of each image: (b,) int64 -> (b,) int64; itself where it has no other.

        The draw is a function of seed, epoch and position alone. Turns of 0, 1/m, 2/m, … give m partners that
        differ wherever there are m to draw from evenly (systematic sampling).
        """
        u = uniform(anchors, 3, seed=seed, epoch=epoch, stream=Stream.PARTNERS)
        u[:, 0] = (u[:, 0] + offset) % 1
        partners = self.sampler.sample(anchors, u[:, [0, 2]])
        return np.where((partners < 0) | (u[:, 1] < self.pair_config.self_pair_prob), anchors, partners)

    def summary(self) -> str:
        """Say the rule in plain words, with how many images it leaves with themselves or out."""
        num_anchors, num_paired = int((~self.excluded).sum()), int(self.has_partner.sum())
        parts = [self.pair_config.summary()]
        if self.pair_config.source == "self":
            parts.append(f"{num_anchors:,} images")
        else:
            parts.append(f"{num_paired:,} of {num_anchors:,} images have a partner")
        if num_paired and num_paired < num_anchors:
            parts.append(f"{num_anchors - num_paired:,} are paired with themselves")
        return "; ".join([*parts, *self.messages])
