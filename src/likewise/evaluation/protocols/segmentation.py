"""Semantic segmentation: a linear head on frozen maps, or a small network tuned together with the encoder."""

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models.segmentation.fcn import FCNHead

from likewise.data.dataset import ImageRef
from likewise.data.images import UnreadableImageError, decode_image, read_image_bytes
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.dense import SegmentationDataset
from likewise.evaluation.protocols.detection import FeatureMapExtractor
from likewise.models.encoders import ImageEncoder
from likewise.parallel import prefetch_map
from likewise.rng import Stream, uniform

_NUM_LEVELS = 2  # the coarsest maps, which know most; the coarser is enlarged to the finer


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """Settings of segmentation.

    Attributes:
        backbone: `frozen`, with batch norm and one linear layer on the maps; or `tuned`, with the head of a
            fully convolutional network (Long et al. 2015).
        image_size: The side of the square that images are squeezed into.
        epochs: How often every training image is shown.
        batch_size: Images a step.
        lr: AdamW's peak rate for the head, after a tenth of the steps; it falls to zero as a cosine.
        backbone_lr: The same for a tuned encoder.
        num_resamples: Drawn test sets for the interval.
        seed: Of the start, the order, flips and draws.
    """

    backbone: Literal["frozen", "tuned"] = "frozen"
    image_size: int = 224
    epochs: int = 20
    batch_size: int = 8
    lr: float = 1e-3
    backbone_lr: float = 1e-4
    num_resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """How well pixels were named.

    Attributes:
        confusion: (n, c, c) pixels of each test image, by true class and by the class given.
        indices: Its rows in the set.
        skipped: Images that could not be read, by reason.
    """

    confusion: Int[np.ndarray, "n c c"]
    indices: Int[np.ndarray, " n"]
    skipped: dict[str, int]


def per_class_iou(confusion: Float[np.ndarray, "*r c c"]) -> Float[np.ndarray, "*r c"]:
    """Return the intersection over union of each class, NaN for one that is neither there nor given."""
    intersection = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(axis=-1) + confusion.sum(axis=-2) - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), np.nan)


def segmentation_metrics(confusion: Float[np.ndarray, "*r c c"]) -> dict[str, Float[np.ndarray, "*r"]]:
    """Return mean IoU and pixel accuracy of confusion matrices."""
    num_correct = np.diagonal(confusion, axis1=-2, axis2=-1).sum(axis=-1)
    num_pixels = confusion.sum(axis=(-2, -1))
    mean_iou = np.nanmean(per_class_iou(confusion), axis=-1)
    return {
        "mean IoU": np.asarray(mean_iou),
        "pixel accuracy": np.asarray(num_correct / np.maximum(num_pixels, 1)),
    }


def bootstrap_metrics(
    confusion: Int[np.ndarray, "n c c"], num_resamples: int, seed: int
) -> dict[str, Float[np.ndarray, " r"]]:
    """Return the same of test sets drawn with replacement from the images.

    For the same number of images and seed the same images are drawn, so that two encoders can be compared
    draw by draw.
    """
    num_images = len(confusion)
    counts = np.random.default_rng(seed).multinomial(
        num_images, np.full(num_images, 1 / num_images), size=num_resamples
    )
    return segmentation_metrics(np.tensordot(counts.astype(np.float64), confusion.astype(np.float64), axes=1))


class _SegmentationHead(nn.Module):
    """Maps of an encoder -> class scores at the finer map's resolution."""

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
    """Train a head on the train images of a set and name the pixels of the test images, at their own size.

    The last weights are used: nothing is chosen by looking at the test images. Images are flipped half of the
    time while training. With a frozen encoder its maps are computed once, of each image and its mirror image.

    Args:
        config: See `Segmentation`.
        encoder: It is not changed.
        dataset: The set.
        device: Where to train.
        num_workers: Threads that read images.
        update_progress: Called with the number of images after every step.

    Raises:
        InputError: where no image of a split can be read.
        ModelError: where the encoder gives no feature maps.
    """
    torch.manual_seed(config.seed)
    finetune_backbone = config.backbone == "tuned"
    extractor = FeatureMapExtractor(
        deepcopy(encoder.model).requires_grad_(finetune_backbone), encoder.name
    ).to(device)
    head = _SegmentationHead(
        extractor.channels[-_NUM_LEVELS:], len(dataset.classes), finetune_backbone=finetune_backbone
    ).to(device)
    trainer = _SegmentationTrainer(
        config, encoder, dataset, extractor, head, device, num_workers, update_progress
    )
    trainer.train(np.flatnonzero(dataset.splits == "train"))
    confusion, indices = trainer.evaluate(np.flatnonzero(dataset.splits == "test"))
    return SegmentationResult(confusion=confusion, indices=indices, skipped=dict(trainer.skipped))


@dataclass
class _SegmentationTrainer:
    """A head in training."""

    config: SegmentationConfig
    encoder: ImageEncoder
    dataset: SegmentationDataset
    extractor: FeatureMapExtractor
    head: _SegmentationHead
    device: torch.device
    num_workers: int
    update_progress: Callable[[int], None]

    def __post_init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self.finetune_backbone = self.config.backbone == "tuned"
        self.feature_cache: dict[tuple[int, bool], Tensor] = {}

    def train(self, indices: np.ndarray) -> None:
        """Train on rows of the set."""
        readable = np.array(
            [index for index, images in self._iter_pixels(indices) if images is not None], np.int64
        )
        if not len(readable):
            raise InvalidInputError(
                f"no train image of {self.dataset.root} can be read: {dict(self.skipped)}"
            )
        config = self.config
        param_groups = [{"params": list(self.head.parameters()), "lr": config.lr}]
        if self.finetune_backbone:
            param_groups.append({"params": list(self.extractor.parameters()), "lr": config.backbone_lr})
        batches = list(self._batches(readable))
        optimizer = torch.optim.AdamW(param_groups, weight_decay=1e-4)
        max_lrs = [float(param_group["lr"]) for param_group in param_groups]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lrs, total_steps=len(batches) + 1, pct_start=0.1, cycle_momentum=False
        )
        self.head.train()
        self.extractor.train(self.finetune_backbone)
        for batch_indices, flips, images in prefetch_map(self._load_batch, batches, self.num_workers):
            features = self._compute_features(batch_indices, flips, images)
            targets = torch.stack(
                [self._load_target(*args) for args in zip(batch_indices.tolist(), flips, strict=True)]
            )
            logits = interpolate(self.head(features), targets.shape[1:], mode="bilinear", align_corners=False)
            optimizer.zero_grad()
            cross_entropy(logits, targets.to(self.device), ignore_index=-1).backward()
            optimizer.step()
            scheduler.step()
            self.update_progress(len(batch_indices))

    @torch.inference_mode()
    def evaluate(self, indices: np.ndarray) -> tuple[Int[np.ndarray, "n c c"], Int[np.ndarray, " n"]]:
        """Return each readable image's confusion matrix, and the rows of these images."""
        self.head.eval()
        self.extractor.eval()
        confusions, read_indices = [], []
        for index, pixels in self._iter_pixels(indices):
            self.update_progress(1)
            if pixels is not None:
                mask = self.dataset.load_mask(index)
                logits = self.head(self._concat_maps(self._normalize([pixels])))
                upsampled = interpolate(logits, mask.shape, mode="bilinear", align_corners=False)
                confusions.append(
                    confusion_matrix(
                        mask, upsampled[0].argmax(dim=0).cpu().numpy(), len(self.dataset.classes)
                    )
                )
                read_indices.append(index)
        if not confusions:
            raise InvalidInputError(f"no test image of {self.dataset.root} can be read: {dict(self.skipped)}")
        return np.stack(confusions), np.array(read_indices)

    def _iter_pixels(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray | None]]:
        """Yield rows with their pixels; None, counted, where they cannot be read."""
        for index, pixels in zip(
            indices.tolist(), prefetch_map(self._read_pixels, indices.tolist(), self.num_workers), strict=True
        ):
            if isinstance(pixels, str):
                self.skipped[pixels] += 1
            yield index, None if isinstance(pixels, str) else pixels

    def _read_pixels(self, index: int) -> np.ndarray | str:
        """Return an image squeezed into the square, (size, size, 3) uint8, or why it cannot be read."""
        try:
            pixels = decode_image(
                read_image_bytes(ImageRef(path=self.dataset.files[index]), self.dataset.root)
            )
        except UnreadableImageError as error:
            return str(error)
        size = (self.config.image_size, self.config.image_size)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        resized = interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
        return resized[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()

    def _load_batch(
        self, batch: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        indices, flips = batch
        if not self.finetune_backbone and all(
            key in self.feature_cache for key in zip(indices.tolist(), flips.tolist(), strict=True)
        ):
            return indices, flips, []
        loaded = (self._read_pixels(row) for row in indices.tolist())
        images = [pixels for pixels in loaded if not isinstance(pixels, str)]
        return (
            indices,
            flips,
            [pixels[:, ::-1] if flip else pixels for pixels, flip in zip(images, flips, strict=True)],
        )

    def _compute_features(self, indices: np.ndarray, flips: np.ndarray, images: list[np.ndarray]) -> Tensor:
        """Return joined maps; of a frozen encoder they are computed once and kept in half precision."""
        if self.finetune_backbone:
            return self._concat_maps(self._normalize(images))
        keys = list(zip(indices.tolist(), flips.tolist(), strict=True))
        if images:
            with torch.inference_mode():
                features = self._concat_maps(self._normalize(images)).half().cpu()
            self.feature_cache |= dict(zip(keys, features, strict=True))
        return torch.stack([self.feature_cache[key] for key in keys]).to(self.device).float()

    def _normalize(self, images: list[np.ndarray]) -> Tensor:
        return self.encoder.transform.normalize(torch.from_numpy(np.stack(images)).to(self.device))

    def _concat_maps(self, images: Tensor) -> Tensor:
        feature_maps = self.extractor(images)[-_NUM_LEVELS:]
        size = feature_maps[0].shape[-2:]
        return torch.cat(
            [
                interpolate(feature_map, size, mode="bilinear", align_corners=False)
                for feature_map in feature_maps
            ],
            dim=1,
        )

    def _load_target(self, index: int, flip: Any) -> Tensor:
        """Return a mask at the size of the square, by its nearest pixels."""
        mask = torch.from_numpy(self.dataset.load_mask(index))
        resized = interpolate(mask[None, None].float(), (self.config.image_size,) * 2, mode="nearest")[
            0, 0
        ].long()
        return resized.flip(1) if flip else resized

    def _batches(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        config = self.config
        for epoch in range(config.epochs):
            order = np.random.default_rng((config.seed, epoch)).permutation(indices)
            for start in range(0, len(order), config.batch_size):
                batch_indices = order[start : start + config.batch_size]
                u = uniform(batch_indices, 1, seed=config.seed, epoch=epoch, stream=Stream.SEGMENTATION)[:, 0]
                yield batch_indices, u < 0.5


def confusion_matrix(
    target: Int[np.ndarray, "h w"], pred: Int[np.ndarray, "h w"], num_classes: int
) -> Int[np.ndarray, "c c"]:
    """Count pixels by true class and by the class given; a true class below zero counts neither way."""
    mask = target >= 0
    return np.bincount(target[mask] * num_classes + pred[mask], minlength=num_classes**2).reshape(
        num_classes, num_classes
    )
