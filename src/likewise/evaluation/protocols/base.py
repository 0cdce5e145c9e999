"""What a protocol is given, and what it gives: an encoder with a set, and scores."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from likewise.errors import InputError
from likewise.evaluation.datasets.captioned import CaptionedSet
from likewise.evaluation.datasets.dense import BoxedSet, MaskedSet
from likewise.evaluation.datasets.labeled import LabelledSet
from likewise.evaluation.features import Features
from likewise.evaluation.statistics import Estimate
from likewise.models.encoders import ImageEncoder
from likewise.models.text_tower import Language
from likewise.parallel import default_workers
from likewise.progress import Progress

AnySet = LabelledSet | CaptionedSet | BoxedSet | MaskedSet


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure with what it is made of.

    Attributes:
        metric: Such as `accuracy` or `recall@1`.
        estimate: The value and its 95 % interval, as fractions.
        items: (m,) the score of every test image, episode, query or start, kept for paired tests; or the
            value on each drawn test set, where it is no mean of items.
        groups: (m,) what each item belongs to where items are not independent, or None.
        details: What else is worth knowing.
        paired: Whether encoders can be compared on the same `items`, whose mean is the value, on the same
            `draws` of test sets, or not at all.
        n: How many there are; as many as items where not given.
    """

    metric: str
    estimate: Estimate
    items: np.ndarray
    groups: np.ndarray | None = None
    details: dict[str, Any] = field(default_factory=dict)
    paired: Literal["items", "draws", "no"] = "items"
    n: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """An encoder and a set to measure it on."""

    encoder: ImageEncoder
    images: AnySet
    features: Features | None
    device: torch.device
    workers: int | None
    progress: Progress

    @property
    def labelled(self) -> LabelledSet:
        """The set, where it has labels."""
        if not isinstance(self.images, LabelledSet):
            raise InputError(f"{self.images.source} has no labels")
        return self.images

    @property
    def language(self) -> Language:
        """How captions come into one space with the features.

        Raises:
            InputError: where the encoder has no text tower.
        """
        if self.encoder.language is None:
            raise InputError(
                f"{self.encoder.name} has no text tower; zero-shot and image-text need one: a run of clip, "
                "siglip, declip or slip that trained its tower, clip:ARCH/WEIGHTS, or hf:NAME of such a model"
            )
        return self.encoder.language

    @property
    def threads(self) -> int:
        """How many threads read images."""
        return default_workers() if self.workers is None else self.workers

    @property
    def pooled(self) -> Features:
        """The features of the images, one vector each."""
        if self.features is None:
            raise InputError(f"no features of {self.images.name} were computed")
        return self.features

    def rows(self, *splits: str) -> np.ndarray:
        """Return the readable rows of some splits, ascending."""
        return self.pooled.rows[np.isin(self.labelled.splits[self.pooled.rows], splits)]

    def part(self, *splits: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (m, d) float32 and labels (m,) int64 of some splits."""
        rows = self.rows(*splits)
        return torch.from_numpy(self.pooled.vectors[rows]), torch.from_numpy(self.labelled.labels[rows])
