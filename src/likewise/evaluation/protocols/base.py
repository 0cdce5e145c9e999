"""What a protocol is given, and what it gives: an encoder with a set, and scores."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.captioned import CaptionedDataset
from likewise.evaluation.datasets.dense import DetectionDataset, SegmentationDataset
from likewise.evaluation.datasets.labeled import LabeledDataset
from likewise.evaluation.features import Features
from likewise.evaluation.statistics import Estimate
from likewise.models.encoders import ImageEncoder
from likewise.models.text_tower import TextAlignment
from likewise.parallel import default_num_workers
from likewise.progress import Progress

EvalDataset = LabeledDataset | CaptionedDataset | DetectionDataset | SegmentationDataset


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure with what it is made of.

    Attributes:
        metric: Such as `accuracy` or `recall@1`.
        estimate: The value and its 95 % interval, as fractions.
        per_item: (m,) the score of every test image, episode, query or start, kept for paired tests; or the
            value on each drawn test set, where it is no mean of items.
        groups: (m,) what each item belongs to where items are not independent, or None.
        details: What else is worth knowing.
        pairing: Whether encoders can be compared on the same `per_item`, whose mean is the value, on the same
            `draws` of test sets, or not at all.
        n: How many there are; as many as items where not given.
    """

    metric: str
    estimate: Estimate
    per_item: np.ndarray
    groups: np.ndarray | None = None
    details: dict[str, Any] = field(default_factory=dict)
    pairing: Literal["items", "draws", "no"] = "items"
    n: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """An encoder and a set to measure it on."""

    encoder: ImageEncoder
    dataset: EvalDataset
    precomputed_features: Features | None
    device: torch.device
    requested_workers: int | None
    progress: Progress

    @property
    def labeled_dataset(self) -> LabeledDataset:
        """The set, where it has labels."""
        if not isinstance(self.dataset, LabeledDataset):
            raise InvalidInputError(f"{self.dataset.path} has no labels")
        return self.dataset

    @property
    def text_alignment(self) -> TextAlignment:
        """How captions come into one space with the features.

        Raises:
            InputError: where the encoder has no text tower.
        """
        if self.encoder.text_alignment is None:
            raise InvalidInputError(
                f"{self.encoder.name} has no text tower; zero-shot and image-text need one: a run of clip, "
                "siglip, declip or slip that trained its tower, clip:ARCH/WEIGHTS, or hf:NAME of such a model"
            )
        return self.encoder.text_alignment

    @property
    def num_workers(self) -> int:
        """How many threads read images."""
        return default_num_workers() if self.requested_workers is None else self.requested_workers

    @property
    def features(self) -> Features:
        """The features of the images, one vector each."""
        if self.precomputed_features is None:
            raise InvalidInputError(f"no features of {self.dataset.name} were computed")
        return self.precomputed_features

    def indices(self, *splits: str) -> np.ndarray:
        """Return the readable rows of some splits, ascending."""
        return self.features.indices[np.isin(self.labeled_dataset.splits[self.features.indices], splits)]

    def split(self, *splits: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (m, d) float32 and labels (m,) int64 of some splits."""
        indices = self.indices(*splits)
        return torch.from_numpy(self.features.vectors[indices]), torch.from_numpy(
            self.labeled_dataset.labels[indices]
        )
