"""Partners drawn from neighbors by a rule: who is shown with whom."""

import numpy as np

from likewise.collection.records import Collection
from likewise.draws import uniforms
from likewise.neighbors.neighbors import Neighbors, look_up_neighbors
from likewise.neighbors.rules import PairRule

_STREAM = 101  # keeps the draw of partners apart from the draws of views


class Pairs:
    """Partners for every image of a collection, drawn anew each epoch where there is a choice."""

    def __init__(self, images: int, candidates: np.ndarray | None, rule: PairRule, key: str) -> None:
        """Hold the candidates (n, k) int64 of every image, -1 where there is none, or None for `self`."""
        self.images = images
        self.candidates = candidates
        self.rule = rule
        self.key = key

    @property
    def with_partner(self) -> np.ndarray:
        """Which images have a partner other than themselves: (n,) bool."""
        if self.candidates is None:
            return np.zeros(self.images, bool)
        return self.candidates[:, 0] >= 0

    def partners(self, positions: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
        """Return the partner of each image: (b,) int64 -> (b,) int64; itself where it has no other.

        The draw is a function of seed, epoch and position alone.
        """
        if self.candidates is None:
            return positions
        choices = self.candidates[positions]
        counts = (choices >= 0).sum(axis=1)
        draws = uniforms(positions, 1, seed=seed, epoch=epoch, stream=_STREAM)[:, 0]
        drawn = np.minimum((draws * counts).astype(np.int64), np.maximum(counts - 1, 0))
        return np.where(counts > 0, choices[np.arange(len(positions)), drawn], positions)

    def summary(self) -> str:
        """Say the rule in plain words, with how many images it leaves with themselves."""
        if self.candidates is None:
            return f"each of {self.images:,} images is paired with another view of itself"
        whom = "the image" if self.rule.k == 1 else f"one of the {self.rule.k} images"
        alone = int((~self.with_partner).sum())
        rest = f"; {alone:,} without a caption are paired with themselves" if alone else ""
        return f"each of {self.images - alone:,} images is paired with {whom} described most like it{rest}"


def make_pairs(
    collection: Collection, rule: PairRule, encoder: str | None, usable: np.ndarray
) -> tuple[Pairs, Neighbors | None]:
    """Apply a rule to a collection.

    Args:
        collection: The images.
        rule: Who may be paired with whom.
        encoder: Whose neighbors to use for `language`; may be left out where there is only one.
        usable: Positions of the images whose pixels can be read, (m,) int64; no other becomes a partner.

    Raises:
        ArtifactError: where the neighbors are missing.
    """
    if rule.source == "self":
        return Pairs(len(collection), None, rule, "self"), None
    found = look_up_neighbors(collection, encoder, rule.k)
    candidates, _ = found.table(rule.k)
    readable = np.zeros(len(collection) + 1, bool)  # the last place answers for -1
    readable[usable] = True
    candidates = np.where(readable[candidates], candidates, -1)
    order = np.argsort(candidates < 0, axis=1, kind="stable")
    return Pairs(
        len(collection), np.take_along_axis(candidates, order, axis=1), rule, f"{found.embeddings}-{rule.k}"
    ), found
