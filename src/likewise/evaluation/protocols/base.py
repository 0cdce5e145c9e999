"""The `Protocol` base class, its input `EvalContext` and its output `Score`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.captioned import CaptionedDataset
from likewise.evaluation.datasets.detection import DetectionDataset
from likewise.evaluation.datasets.labeled import LabeledDataset
from likewise.evaluation.datasets.registry import MEAN_CLASS_ACCURACY
from likewise.evaluation.datasets.segmentation import SegmentationDataset
from likewise.evaluation.results import ResultRow
from likewise.evaluation.statistics import Estimate, bootstrap, mean_per_class
from likewise.models.encoders import ImageEncoder
from likewise.models.features import Features
from likewise.models.text_tower import TextAlignment
from likewise.progress import Progress

EvalDataset = LabeledDataset | CaptionedDataset | DetectionDataset | SegmentationDataset
AnnotationType = Literal["labels", "captions", "boxes", "masks"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The value of one metric with its confidence interval and the scores it is computed from."""

    metric: str
    """Name of the metric, such as `accuracy` or `recall@1`."""
    estimate: Estimate
    """Value and 95 % confidence interval, as fractions."""
    per_item: np.ndarray
    """(m,) score of each test image, episode, query or restart, stored for paired tests; the value on each
    bootstrap resample if `pairing` is `draws`."""
    groups: np.ndarray | None = None
    """(m,) cluster of each item for the cluster bootstrap, if the items are not independent."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further facts for `results.json`, such as selected hyperparameters."""
    pairing: Literal["items", "draws", "no"] = "items"
    """How two encoders are compared: item by item, resample by resample, or not at all."""
    n: int | None = None
    """Number of items; defaults to `len(per_item)`."""


@dataclass(frozen=True)
class Split:
    """Features and labels of one split of a dataset."""

    x: Float[Tensor, "n d"]
    """Features, float32 or float64."""
    y: Int[Tensor, " n"]
    """Class indices, int64."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.y)

    def subset(self, indices: Int[Tensor, " m"]) -> "Split":
        """Return the images at `indices` (m,)."""
        return Split(self.x[indices], self.y[indices])

    def concat(self, other: "Split") -> "Split":
        """Return the images of this split followed by those of another one."""
        return Split(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """An encoder, a dataset and the resources to evaluate one on the other."""

    encoder: ImageEncoder
    dataset: EvalDataset
    precomputed_features: Features | None
    device: torch.device
    num_workers: int
    """Threads that decode images."""
    progress: Progress

    @property
    def labeled_dataset(self) -> LabeledDataset:
        """The dataset, if it has labels.

        Raises:
            InvalidInputError: The dataset has no labels.
        """
        if not isinstance(self.dataset, LabeledDataset):
            raise InvalidInputError(f"{self.dataset.path} has no labels", path=self.dataset.path)
        return self.dataset

    @property
    def text_alignment(self) -> TextAlignment:
        """The joint embedding space of images and captions.

        Raises:
            InvalidInputError: The encoder has no text tower.
        """
        if self.encoder.text_alignment is None:
            raise InvalidInputError(
                f"{self.encoder.name} has no text tower, which zeroshot and image-text require; use a run "
                "of clip, siglip, declip or slip with a trained text tower, clip:ARCH/WEIGHTS, or hf:NAME of "
                "such a model",
                field="encoder",
            )
        return self.encoder.text_alignment

    @property
    def features(self) -> Features:
        """The features of all images of the dataset."""
        if self.precomputed_features is None:
            raise InvalidInputError(f"the features of {self.dataset.name} have not been computed")
        return self.precomputed_features

    def indices(self, *splits: str) -> np.ndarray:
        """Return the ascending indices (m,) of the readable images in the given splits."""
        return self.features.indices[np.isin(self.labeled_dataset.splits[self.features.indices], splits)]

    def split(self, *splits: str) -> Split:
        """Return features (m, d) float32 and labels (m,) int64 of the readable images in the given splits."""
        indices = self.indices(*splits)
        return Split(
            torch.from_numpy(self.features.vectors[indices]),
            torch.from_numpy(self.labeled_dataset.labels[indices]),
        )


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """Options of every protocol that classifies the test images."""

    mean_class_accuracy: bool = False
    """Report the mean of the per-class accuracies instead of the accuracy."""


class Protocol(ABC):
    """An evaluation protocol: measures an encoder on a dataset and returns scores.

    Subclasses set the class attributes, hold their config and implement `run`.
    """

    name: ClassVar[str]
    """The name users type, and the key in `results.json`."""
    title: ClassVar[str]
    """The heading in tables and reports."""
    summary: ClassVar[str]
    """One line for listings."""
    requires: ClassVar[AnnotationType] = "labels"
    """The annotations that the dataset must have."""
    item_nouns: ClassVar[tuple[str, str]] = ("test image", "test images")
    """Singular and plural noun for the items of `Score.per_item`."""

    def __init__(self, config: Any) -> None:
        """Store the protocol's own config."""
        self.config = config

    def config_dict(self) -> dict[str, Any]:
        """Return the config as written to `results.json`."""
        return asdict(self.config)

    @abstractmethod
    def run(self, context: EvalContext) -> list[Score]:
        """Measure the encoder on the dataset.

        Raises:
            InvalidInputError: The dataset lacks the required annotations, or is too small for the config.
            ModelError: The encoder lacks what the protocol requires, such as feature maps.
        """

    @classmethod
    @abstractmethod
    def explain(cls, row: ResultRow) -> str:
        """Return one or two sentences for the report: the procedure and its settings."""

    @classmethod
    def success_phrase(cls, row: ResultRow) -> str:
        """Return the verb phrase for one correct item, as in `the encoders <phrase> about equally often`."""
        return "name the right class"


def check_positive(config: Any, *names: str) -> None:
    """Raise InvalidInputError for the first of the config's fields that is not above zero."""
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise InvalidInputError(f"`{name}` must be positive, got {value}", field=name)


def check_fraction(config: Any, name: str) -> None:
    """Raise InvalidInputError unless the field is strictly between 0 and 1."""
    value = getattr(config, name)
    if not 0 < value < 1:
        raise InvalidInputError(f"`{name}` must be between 0 and 1, got {value}", field=name)


def accuracy_score(
    predictions: Int[Tensor, " m"],
    labels: Int[Tensor, " m"],
    config: ClassificationConfig,
    details: dict[str, Any] | None = None,
) -> Score:
    """Return the accuracy, or the mean per-class accuracy, of predicted labels with its interval."""
    correct = (predictions == labels).double().numpy()
    return Score(
        metric=MEAN_CLASS_ACCURACY if config.mean_class_accuracy else "accuracy",
        estimate=mean_per_class(correct, labels.numpy())
        if config.mean_class_accuracy
        else bootstrap(correct),
        per_item=correct,
        details=details or {},
    )


def stratified_split(
    labels: Int[Tensor, " n"], val_fraction: float, seed: int
) -> tuple[Int[Tensor, " t"], Int[Tensor, " v"]]:
    """Split off a validation set, stratified by class.

    Each class gives the fraction of its images, rounded down, but at least one if it has two images.

    Args:
        labels: (n,) int64.
        val_fraction: Fraction of each class to hold out, in (0, 1).
        seed: Seed of the random choice.

    Returns:
        Ascending indices of the training and of the validation images.

    Raises:
        InvalidInputError: `val_fraction` is out of range, or every class has a single image.
    """
    if not 0 < val_fraction < 1:
        raise InvalidInputError(
            f"`val_fraction` must be between 0 and 1, got {val_fraction}", field="val_fraction"
        )
    label_array = labels.cpu().numpy()
    order = np.random.default_rng(seed).permutation(len(label_array))
    order = order[np.argsort(label_array[order], kind="stable")]
    _, class_starts, counts = np.unique(label_array[order], return_index=True, return_counts=True)
    val_counts = np.minimum(np.maximum((counts * val_fraction).astype(np.int64), 1), counts - 1)
    rank_in_class = np.arange(len(label_array)) - np.repeat(class_starts, counts)
    val_mask = np.zeros(len(label_array), dtype=bool)
    val_mask[order] = rank_in_class < np.repeat(val_counts, counts)
    if not val_mask.any():
        raise InvalidInputError(
            "no class has two training images, so none can be held out for validation; add a val split"
        )
    train_indices, val_indices = (
        torch.from_numpy(np.flatnonzero(mask)).to(labels.device) for mask in (~val_mask, val_mask)
    )
    return train_indices, val_indices


@contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore their state afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
