"""Semantic segmentation: a linear head on frozen feature maps, or an FCN head with fine-tuning."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models.segmentation.fcn import FCNHead

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.segmentation import SegmentationDataset
from likewise.evaluation.protocols.base import (
    EvalContext,
    Score,
    check_positive,
    seeded_rng,
)
from likewise.evaluation.protocols.dense import (
    DenseConfig,
    DenseProtocol,
    DenseTrainer,
    FeatureMapExtractor,
    FlipBatch,
    bootstrap_score,
)
from likewise.evaluation.results import ResultRow
from likewise.models.encoders import ImageEncoder
from likewise.parallel import prefetch_map
from likewise.rng import Stream

_NUM_LEVELS = 2  # the two coarsest feature maps; the coarser one is upsampled to the finer


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(DenseConfig):
    """Options of segmentation."""

    finetune_backbone: bool = False
    """Train the backbone together with an FCN head (Long et al. 2015); by default it is frozen, and the head
    is batch norm and one linear layer."""
    image_size: int = 224
    """Side of the square to which images are resized, without keeping the aspect ratio."""
    epochs: int = 20
    """Number of epochs."""
    lr: float = 1e-3
    """Peak learning rate of the head (AdamW), with warmup over 10 % of the steps and cosine decay."""
    backbone_lr: float = 1e-4
    """Peak learning rate of a fine-tuned backbone."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        DenseConfig.__post_init__(self)
        check_positive(self, "backbone_lr")


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """Confusion matrices of the test images."""

    confusion: Int[np.ndarray, "n c c"]
    """(n, c, c) number of pixels of each test image, by true and predicted class."""
    indices: Int[np.ndarray, " n"]
    """(n,) indices of these images in the dataset."""
    skipped: dict[str, int]
    """Number of unreadable images by reason."""


def per_class_iou(confusion: Float[np.ndarray, "*r c c"]) -> Float[np.ndarray, "*r c"]:
    """Return the intersection over union of each class, NaN for a class without true or predicted pixels."""
    intersection = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(axis=-1) + confusion.sum(axis=-2) - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), np.nan)


def segmentation_metrics(confusion: Float[np.ndarray, "*r c c"]) -> dict[str, Float[np.ndarray, "*r"]]:
    """Return mean IoU over the classes that occur, and pixel accuracy, of confusion matrices.

    Rows are true and columns predicted classes. Both metrics are NaN for a matrix without pixels.
    """
    num_correct = np.diagonal(confusion, axis1=-2, axis2=-1).sum(axis=-1)
    num_pixels = confusion.sum(axis=(-2, -1))
    ious = per_class_iou(confusion)
    num_classes = np.isfinite(ious).sum(axis=-1)
    mean_iou = np.where(num_classes > 0, np.nansum(ious, axis=-1) / np.maximum(num_classes, 1), np.nan)
    return {
        "mean IoU": np.asarray(mean_iou),
        "pixel accuracy": np.where(num_pixels > 0, num_correct / np.maximum(num_pixels, 1), np.nan),
    }


def bootstrap_metrics(
    confusion: Int[np.ndarray, "n c c"], num_resamples: int, seed: int
) -> dict[str, Float[np.ndarray, " r"]]:
    """Return the metrics on bootstrap resamples of the images, from per-image confusion matrices (n, c, c).

    The resamples depend on the number of images and the seed alone, so that two encoders can be compared
    resample by resample.
    """
    num_images = len(confusion)
    counts = np.random.default_rng(seed).multinomial(
        num_images, np.full(num_images, 1 / num_images), size=num_resamples
    )
    return segmentation_metrics(np.tensordot(counts.astype(np.float64), confusion.astype(np.float64), axes=1))


class _SegmentationHead(nn.Module):
    """Concatenated feature maps -> class logits at the resolution of the finer map."""

    def __init__(self, in_channels: tuple[int, ...], num_classes: int, *, finetune_backbone: bool) -> None:
        super().__init__()
        total_channels = sum(in_channels)
        linear = nn.Sequential(nn.BatchNorm2d(total_channels), nn.Conv2d(total_channels, num_classes, 1))
        self.layers = FCNHead(total_channels, num_classes) if finetune_backbone else linear

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def run_segmentation(
    config: SegmentationConfig,
    encoder: ImageEncoder,
    dataset: SegmentationDataset,
    *,
    device: torch.device,
    num_workers: int,
    update_progress: Callable[[int], None] = lambda _: None,
) -> SegmentationResult:
    """Train a head on the train split and segment the test images at their original size.

    The last checkpoint is evaluated; nothing is selected on the test images. Training images are flipped
    horizontally with probability 0.5. The feature maps of a frozen encoder are computed once per image and
    once per flipped image.

    Args:
        config: The options.
        encoder: Not modified.
        dataset: The dataset.
        device: Device of training and inference.
        num_workers: Threads that decode images.
        update_progress: Called with the number of images after every step.

    Raises:
        InvalidInputError: No image of a split can be read.
        ModelError: The encoder has no feature maps.
    """
    trainer = _SegmentationTrainer(
        config=config,
        encoder=encoder,
        dataset=dataset,
        device=device,
        num_workers=num_workers,
        update_progress=update_progress,
    )
    with seeded_rng(config.seed):
        trainer.build_model()
        trainer.train()
        confusion, indices = trainer.evaluate()
    return SegmentationResult(confusion=confusion, indices=indices, skipped=dict(trainer.skipped))


class _SegmentationTrainer(DenseTrainer):
    """Training and inference of a segmentation head."""

    stream = Stream.SEGMENTATION
    config: SegmentationConfig
    extractor: FeatureMapExtractor
    head: _SegmentationHead
    feature_cache: dict[tuple[int, bool], Tensor]

    def build_model(self) -> None:
        """Copy the encoder and initialize the head."""
        finetune_backbone = self.config.finetune_backbone
        model = deepcopy(self.encoder.model).requires_grad_(finetune_backbone)
        self.extractor = FeatureMapExtractor(model, self.encoder.name).to(self.device)
        self.head = _SegmentationHead(
            self.extractor.channels[-_NUM_LEVELS:],
            len(self.dataset.classes),
            finetune_backbone=finetune_backbone,
        ).to(self.device)
        self.feature_cache = {}

    def train(self) -> None:
        """Train the head, and the backbone if it is fine-tuned, on the train split by AdamW."""
        train_indices = self.split_indices("train")
        readable = [index for index, image in self._iter_images(train_indices) if image is not None]
        if not readable:
            raise self.unreadable_split("train")
        self._train_steps(self.batches(np.array(readable, np.int64)))

    def _train_steps(self, batches: list[FlipBatch]) -> None:
        config = self.config
        param_groups: list[dict[str, Any]] = [{"params": list(self.head.parameters()), "lr": config.lr}]
        if config.finetune_backbone:
            param_groups.append({"params": list(self.extractor.parameters()), "lr": config.backbone_lr})
        optimizer = torch.optim.AdamW(param_groups, weight_decay=1e-4)
        scheduler = self.one_cycle(optimizer, len(batches))
        self.head.train()
        self.extractor.train(config.finetune_backbone)
        images = prefetch_map(self._load_images, batches, self.num_workers)
        for batch, batch_images in zip(batches, images, strict=True):
            features = self._compute_features(batch, batch_images)
            targets = self._load_targets(batch)
            logits = interpolate(self.head(features), targets.shape[1:], mode="bilinear", align_corners=False)
            optimizer.zero_grad()
            cross_entropy(logits, targets.to(self.device), ignore_index=-1).backward()
            optimizer.step()
            scheduler.step()
            self.update_progress(len(batch.indices))

    @torch.inference_mode()
    def evaluate(self) -> tuple[Int[np.ndarray, "n c c"], Int[np.ndarray, " n"]]:
        """Return the confusion matrices of the readable test images and the indices of these images."""
        self.head.eval()
        self.extractor.eval()
        num_classes = len(self.dataset.classes)
        confusions, indices = [], []
        for index, image in self._iter_images(self.split_indices("test")):
            self.update_progress(1)
            if image is None:
                continue
            mask = self.dataset.load_mask(index)
            logits = self.head(self._concat_maps([image]))
            upsampled = interpolate(logits, mask.shape, mode="bilinear", align_corners=False)
            confusions.append(confusion_matrix(mask, upsampled[0].argmax(dim=0).cpu().numpy(), num_classes))
            indices.append(index)
        if not confusions:
            raise self.unreadable_split("test")
        return np.stack(confusions), np.array(indices)

    def _iter_images(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray | None]]:
        """Yield each index with its image; None for an unreadable image, which is counted."""
        images = prefetch_map(self._load_image, indices.tolist(), self.num_workers)
        for index, image in zip(indices.tolist(), images, strict=True):
            if isinstance(image, str):
                self.skipped[image] += 1
            yield index, None if isinstance(image, str) else image

    def _load_image(self, index: int) -> np.ndarray | str:
        """Return an image resized to the square, (size, size, 3) uint8, or why it cannot be read."""
        pixels = self.read_pixels(index)
        if isinstance(pixels, str):
            return pixels
        size = (self.config.image_size, self.config.image_size)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        resized = interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
        return resized[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()

    def _load_images(self, batch: FlipBatch) -> list[np.ndarray]:
        """Return the images of a batch, flipped; an empty list if all their feature maps are cached."""
        if not self.config.finetune_backbone and all(key in self.feature_cache for key in _cache_keys(batch)):
            return []
        loaded = (self._load_image(index) for index in batch.indices.tolist())
        images = [image for image in loaded if not isinstance(image, str)]
        return [image[:, ::-1] if flip else image for image, flip in zip(images, batch.flips, strict=True)]

    def _compute_features(self, batch: FlipBatch, images: list[np.ndarray]) -> Tensor:
        """Return concatenated feature maps; those of a frozen encoder are cached in half precision."""
        if self.config.finetune_backbone:
            return self._concat_maps(images)
        keys = _cache_keys(batch)
        if images:
            with torch.inference_mode():
                features = self._concat_maps(images).half().cpu()
            self.feature_cache |= dict(zip(keys, features, strict=True))
        return torch.stack([self.feature_cache[key] for key in keys]).to(self.device).float()

    def _concat_maps(self, images: list[np.ndarray]) -> Tensor:
        """Return the coarsest feature maps, upsampled to the finest of them and concatenated."""
        inputs = self.encoder.transform.normalize(torch.from_numpy(np.stack(images)).to(self.device))
        feature_maps = self.extractor(inputs)[-_NUM_LEVELS:]
        size = feature_maps[0].shape[-2:]
        upsampled = [interpolate(m, size, mode="bilinear", align_corners=False) for m in feature_maps]
        return torch.cat(upsampled, dim=1)

    def _load_targets(self, batch: FlipBatch) -> Tensor:
        """Return the masks of a batch (b, size, size) int64, resized by nearest neighbor."""
        size, targets = (self.config.image_size, self.config.image_size), []
        for index, flip in zip(batch.indices.tolist(), batch.flips.tolist(), strict=True):
            mask = torch.from_numpy(self.dataset.load_mask(index))
            resized = interpolate(mask[None, None].float(), size, mode="nearest")[0, 0].long()
            targets.append(resized.flip(1) if flip else resized)
        return torch.stack(targets)


def _cache_keys(batch: FlipBatch) -> list[tuple[int, bool]]:
    return list(zip(batch.indices.tolist(), batch.flips.tolist(), strict=True))


def confusion_matrix(
    target: Int[np.ndarray, "h w"], pred: Int[np.ndarray, "h w"], num_classes: int
) -> Int[np.ndarray, "c c"]:
    """Count pixels by true and predicted class; a true class below zero is ignored."""
    mask = target >= 0
    return np.bincount(target[mask] * num_classes + pred[mask], minlength=num_classes**2).reshape(
        num_classes, num_classes
    )


class Segmentation(DenseProtocol):
    """Semantic segmentation with a head on the encoder's feature maps."""

    name = "segmentation"
    title = "Segmentation"
    summary = "semantic segmentation with a linear or FCN head on the encoder's feature maps"
    requires = "masks"
    config: SegmentationConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Train on the train split and report mean IoU and pixel accuracy on the test split."""
        dataset = context.dataset
        if not isinstance(dataset, SegmentationDataset):
            raise InvalidInputError(f"{dataset.path} has no masks", path=dataset.path)
        result = self.train_and_test(context, dataset, run_segmentation)
        total_confusion = result.confusion.sum(axis=0).astype(np.float64)
        resampled = bootstrap_metrics(result.confusion, self.config.num_resamples, self.config.seed)
        class_ious = zip(dataset.classes, per_class_iou(total_confusion).tolist(), strict=True)
        details = {
            "per_class": {name: value for name, value in class_ious if np.isfinite(value)},
            "skipped": result.skipped,
        }
        return [
            bootstrap_score(name, float(value), resampled[name], len(result.indices), details)
            for name, value in segmentation_metrics(total_confusion).items()
        ]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the head and the metric."""
        model = (
            "An FCN head and the encoder are trained together"
            if row.config["finetune_backbone"]
            else "A linear head is trained on the feature maps of the frozen encoder"
        )
        return f"{model} and classifies every pixel. IoU is the overlap of predicted and true regions."

    @classmethod
    def success_phrase(cls, row: ResultRow) -> str:
        """Return the phrase for one image."""
        return "segment the image"
