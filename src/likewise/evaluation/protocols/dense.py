"""Shared parts of detection and segmentation: options, feature maps, data order and bootstrap scores."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from likewise.data.dataset import ImageRef
from likewise.data.images import UnreadableImageError, read_image
from likewise.errors import InvalidInputError, ModelError
from likewise.evaluation.datasets.detection import DetectionDataset
from likewise.evaluation.datasets.segmentation import SegmentationDataset
from likewise.evaluation.protocols.base import EvalContext, Protocol, Score, check_positive
from likewise.evaluation.statistics import Estimate
from likewise.models.encoders import ImageEncoder
from likewise.rng import Stream, uniform

# An image size that every common stride divides, so that strides follow from the sizes of the maps.
_PROBE_SIZE = 224
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Options of detection and segmentation."""

    finetune_backbone: bool = False
    """Train the backbone together with the head; by default it is frozen."""
    image_size: int = 224
    """Image size in pixels."""
    epochs: int = 12
    """Number of epochs."""
    batch_size: int = 8
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate, with warmup over 10 % of the steps and cosine decay."""
    num_resamples: int = 1000
    """Bootstrap resamples of the test images for the confidence interval."""
    seed: int = 0
    """Seed of the initialization, the order, flips and resamples."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(self, "image_size", "epochs", "batch_size", "lr", "num_resamples")


class FeatureMapExtractor(nn.Module):
    """Feature maps of an encoder, one per stride, from fine to coarse.

    Strides and channels are measured on a blank image: timm's `feature_info` does not know about a changed
    stem. Of several stages with the same stride the last one is used.

    Attributes:
        channels: Channels of each map.
        strides: Stride of each map in pixels.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        """Wrap a timm model without copying it.

        Raises:
            ModelError: The model has no feature maps.
        """
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ModelError(
                f"{name} has no feature maps: detection and segmentation require a run or a timm model",
                field="encoder",
            )
        self.model = model
        try:
            with torch.no_grad():
                blank = torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE)
                feature_maps = self._all_maps(blank)
        except Exception as error:  # any error inside the model's own forward
            raise ModelError(
                f"{name} has no feature maps of {_PROBE_SIZE} px images: {error}", field="encoder"
            ) from error
        stage_by_stride = {
            _PROBE_SIZE // feature_map.shape[-1]: stage for stage, feature_map in enumerate(feature_maps)
        }
        self.strides = tuple(sorted(stage_by_stride))
        self.stages = [stage_by_stride[stride] for stride in self.strides]
        self.channels = tuple(feature_maps[stage].shape[1] for stage in self.stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (b, 3, h, w) -> maps (b, channels, h / stride, w / stride)."""
        feature_maps = self._all_maps(images)
        return [feature_maps[stage] for stage in self.stages]

    def _all_maps(self, images: Tensor) -> list[Tensor]:
        model: Any = self.model
        return model.forward_intermediates(images, intermediates_only=True)


class FlipBatch(NamedTuple):
    """The images of one training step."""

    epoch: int
    """Epoch, from 0."""
    indices: Int[np.ndarray, " b"]
    """Indices of the images in the dataset."""
    flips: Bool[np.ndarray, " b"]
    """Images to flip horizontally."""


@dataclass(kw_only=True)
class DenseTrainer(ABC):
    """Base of the trainers of detection and segmentation; subclasses add the model, `train` and the test."""

    stream: ClassVar[Stream]
    """Random stream of the flips."""

    config: Any
    """The `DenseConfig` of the protocol."""
    encoder: ImageEncoder
    dataset: Any
    """The `DetectionDataset` or `SegmentationDataset`."""
    device: torch.device
    num_workers: int
    update_progress: Callable[[int], None]
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of unreadable images by reason."""

    @abstractmethod
    def build_model(self) -> None:
        """Copy the encoder and initialize the head."""

    @abstractmethod
    def train(self) -> None:
        """Train on the images of the train split."""

    def split_indices(self, split: str) -> Int[np.ndarray, " n"]:
        """Return the ascending indices of the images of a split."""
        return np.flatnonzero(self.dataset.splits == split)

    def batches(self, indices: Int[np.ndarray, " n"]) -> list[FlipBatch]:
        """Return the batches of all epochs; order and flips depend on the seed alone."""
        config, batches = self.config, []
        for epoch in range(config.epochs):
            order = np.random.default_rng((config.seed, epoch)).permutation(indices)
            for start in range(0, len(order), config.batch_size):
                batch = order[start : start + config.batch_size]
                u = uniform(batch, 1, seed=config.seed, epoch=epoch, stream=self.stream)[:, 0]
                batches.append(FlipBatch(epoch, batch, u < 0.5))
        return batches

    def one_cycle(self, optimizer: torch.optim.Optimizer, num_steps: int) -> OneCycleLR:
        """Return warmup over 10 % of the steps to the learning rate of each group, then cosine decay."""
        max_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lrs, total_steps=num_steps + 1, pct_start=0.1, cycle_momentum=False)

    def read_pixels(self, index: int) -> np.ndarray | str:
        """Return an image (h, w, 3) uint8, or the reason why it cannot be read."""
        try:
            ref = ImageRef(path=self.dataset.files[index], bands=self.encoder.transform.bands)
            return read_image(ref, self.dataset.root)
        except UnreadableImageError as error:
            return str(error)

    def unreadable_split(self, split: str) -> InvalidInputError:
        """Return the error for a split without readable images."""
        root = self.dataset.root
        return InvalidInputError(f"no {split} image of {root} can be read: {dict(self.skipped)}", path=root)


class DenseProtocol(Protocol):
    """Base of detection and segmentation: train on the train split, score bootstrap resamples of test."""

    def train_and_test(
        self,
        context: EvalContext,
        dataset: DetectionDataset | SegmentationDataset,
        function: Callable[..., Result],
    ) -> Result:
        """Call `run_detection` or `run_segmentation` with a progress bar over all images of all epochs."""
        num_train, num_test = (int((dataset.splits == split).sum()) for split in ("train", "test"))
        num_images = self.config.epochs * num_train + num_test
        with context.progress.task(f"{self.name} on {dataset.name}", num_images, "images") as bar:
            return function(
                self.config,
                context.encoder,
                dataset,
                device=context.device,
                num_workers=context.num_workers,
                update_progress=bar.update,
            )


def bootstrap_score(
    metric: str, value: float, resampled: Float[np.ndarray, " r"], n: int, details: dict[str, Any]
) -> Score:
    """Return a score with the percentile interval over bootstrap resamples of the n test images.

    Resamples of images without annotations, where nothing can be measured, are NaN and are left out. They are
    the same for all encoders.

    Raises:
        InvalidInputError: if nothing can be measured on the test images, or on any resample of them.
    """
    resampled = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or not len(resampled):
        raise InvalidInputError(f"no readable test image has annotations: {metric} cannot be measured")
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Score(
        metric=metric,
        estimate=Estimate(value=value, low=float(low), high=float(high)),
        per_item=resampled,
        details=details,
        pairing="draws",
        n=n,
    )
