"""Partners drawn by a rule: who is shown with whom, as a function of seed, epoch and image alone."""

from abc import ABC, abstractmethod
from typing import final

import numpy as np

from likewise.artifacts import Artifact
from likewise.pairs.candidates import Candidates
from likewise.pairs.config import PairRule
from likewise.rng import uniforms

_STREAM = 101  # keeps the draw of partners apart from the draws of views


class Choice(ABC):
    """The partners that images have, and the draw of one."""

    @property
    @abstractmethod
    def with_partner(self) -> np.ndarray:
        """Which images have a partner: (n,) bool."""

    @abstractmethod
    def draw(self, positions: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Draw partners by two chances in [0, 1) each: (b,), (b, 2) -> (b,) int64, -1 where there is none."""


@final
class Nobody(Choice):
    """No image has a partner: `self`."""

    def __init__(self, images: int) -> None:
        self._images = images

    @property
    def with_partner(self) -> np.ndarray:
        """Nowhere: (n,) bool."""
        return np.zeros(self._images, bool)

    def draw(self, positions: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Return -1 for each."""
        return np.full(len(positions), -1, np.int64)


@final
class FromTable(Choice):
    """A row of candidates an image, or several of which one is drawn first (a row a caption)."""

    def __init__(
        self, candidates: Candidates, temperature: float | None = None, starts: np.ndarray | None = None
    ) -> None:
        """Hold candidates; `starts` (n + 1,) tells where each image's rows begin, one each where not given.

        Rows without candidates are passed over in the draw of a row.
        """
        self.candidates = candidates
        self.temperature = temperature
        rows = np.arange(len(candidates.positions)) if starts is None else np.arange(starts[-1])
        filled = candidates.found.any(axis=1)
        bounds = np.arange(len(rows) + 1) if starts is None else starts
        self._rows = rows[filled]
        self._bounds = np.concatenate([[0], np.cumsum(filled)])[bounds]

    @property
    def with_partner(self) -> np.ndarray:
        """Which images have a partner: (n,) bool."""
        return np.diff(self._bounds) > 0

    def partners_of(self, position: int) -> list[int]:
        """Return everybody who may be drawn for an image, best first."""
        rows = self._rows[self._bounds[position] : self._bounds[position + 1]]
        found = self.candidates.positions[rows].ravel()
        return list(dict.fromkeys(found[found >= 0].tolist()))

    def draw(self, positions: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Draw a row evenly, and from it a candidate evenly or by exp(similarity / temperature)."""
        first, last = self._bounds[positions], self._bounds[positions + 1]
        some = last > first
        drawn = np.full(len(positions), -1, np.int64)
        nth = np.minimum((chance[:, 1] * (last - first)).astype(np.int64), last - first - 1)
        rows = self._rows[(first + nth)[some]]
        choices, similarity = self.candidates.positions[rows], self.candidates.similarity[rows]
        place = self._place(choices >= 0, similarity, chance[some, 0])
        drawn[some] = choices[np.arange(len(rows)), place]
        return drawn

    def _place(self, there: np.ndarray, similarity: np.ndarray, chance: np.ndarray) -> np.ndarray:
        counts = there.sum(axis=1)
        if self.temperature is None:
            return np.minimum((chance * counts).astype(np.int64), counts - 1)
        likelihood = np.where(there, similarity.astype(np.float64), -np.inf) / self.temperature
        weights = np.exp(likelihood - likelihood.max(axis=1, keepdims=True))
        reached = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
        return np.minimum((reached <= chance[:, None]).sum(axis=1), counts - 1)


@final
class FromGroups(Choice):
    """Any other image of one's own group, evenly: the oracle that knows the labels."""

    def __init__(self, group: np.ndarray) -> None:
        """Hold the group of every image: (n,) int64, -1 where there is none."""
        self.group = group
        self._members = np.argsort(group, kind="stable")
        ordered = group[self._members]
        self._first = np.searchsorted(ordered, group)
        self._size = np.searchsorted(ordered, group, side="right") - self._first
        self._place = np.empty(len(group), np.int64)
        self._place[self._members] = np.arange(len(group))

    @property
    def with_partner(self) -> np.ndarray:
        """Which images have a partner: (n,) bool."""
        return (self.group >= 0) & (self._size > 1)

    def draw(self, positions: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """Draw one of the others evenly."""
        others = self._size[positions] - 1
        nth = np.minimum((chance[:, 0] * others).astype(np.int64), np.maximum(others - 1, 0))
        at = self._first[positions] + nth
        at += at >= self._place[positions]  # oneself is passed over
        return np.where(
            self.with_partner[positions], self._members[np.minimum(at, len(self._members) - 1)], -1
        )


class Pairs:
    """Partners for the images of a collection, drawn anew each epoch where there is a choice."""

    def __init__(
        self,
        rule: PairRule,
        choice: Choice,
        key: str,
        *,
        dropped: np.ndarray,
        neighbors: tuple[Artifact, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> None:
        """Hold a choice under a rule.

        Args:
            rule: The rule.
            choice: What it leaves.
            key: A fingerprint of everything that decides the draws.
            dropped: Images that take no part, (n,) bool.
            neighbors: The neighbors that it was made from.
            notes: Counts in words that belong into the summary.
        """
        self.rule, self.choice, self.key = rule, choice, key
        self.dropped, self.neighbors, self.notes = dropped, neighbors, notes
        self.with_partner = choice.with_partner & ~dropped

    @property
    def anchors(self) -> np.ndarray:
        """The images that take part: (m,) int64, ascending."""
        return np.flatnonzero(~self.dropped)

    @property
    def groups(self) -> np.ndarray | None:
        """The label of each image by number, (n,) int64, -1 without one; None if labels make no pairs."""
        return self.choice.group if isinstance(self.choice, FromGroups) else None

    def partners(self, positions: np.ndarray, *, seed: int, epoch: int, turn: float = 0.0) -> np.ndarray:
        """Return the partner of each image: (b,) int64 -> (b,) int64; itself where it has no other.

        The draw is a function of seed, epoch and position alone. Turns of 0, 1/m, 2/m, … give m partners that
        differ wherever there are m to draw from evenly (systematic sampling).
        """
        chance = uniforms(positions, 3, seed=seed, epoch=epoch, stream=_STREAM)
        chance[:, 0] = (chance[:, 0] + turn) % 1
        drawn = self.choice.draw(positions, chance[:, [0, 2]])
        return np.where((drawn < 0) | (chance[:, 1] < self.rule.self_share), positions, drawn)

    def summary(self) -> str:
        """Say the rule in plain words, with how many images it leaves with themselves or out."""
        taking, paired = int((~self.dropped).sum()), int(self.with_partner.sum())
        told = [self.rule.summary()]
        if self.rule.pairs == "self":
            told.append(f"{taking:,} images")
        else:
            told.append(f"{paired:,} of {taking:,} images have a partner")
        if paired and paired < taking:
            told.append(f"{taking - paired:,} are paired with themselves")
        return "; ".join([*told, *self.notes])
