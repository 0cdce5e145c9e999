"""Object detection: Faster R-CNN with a feature pyramid on the encoder, scored as COCO does."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from likewise.data.dataset import ImageRef
from likewise.data.images import UnreadableImageError, decode_image, read_image_bytes
from likewise.errors import InvalidInputError, ModelError
from likewise.evaluation.datasets.dense import DetectionDataset
from likewise.evaluation.protocols.average_precision import (
    Boxes,
    average_precision,
    bootstrap_average_precision,
    match_detections,
)
from likewise.models.encoders import ImageEncoder
from likewise.parallel import prefetch_map
from likewise.rng import Stream, uniform

# A side that every usual stride divides, so that strides can be read off the maps.
_PROBE_SIZE = 224


class FeatureMapExtractor(nn.Module):
    """The maps of an encoder's stages, from fine to coarse, a map for each stride.

    Attributes:
        channels: Channels of each map.
        strides: Pixels of the image a cell of each map.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        """Wrap a timm model, which is not copied.

        Raises:
            ModelError: where it gives no maps.
        """
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ModelError(
                f"{name} gives no feature maps: detection and segmentation need a run or a timm model"
            )
        self.model: Any = model
        self._stages: list[int] = []
        try:
            with torch.no_grad():
                feature_maps = self.forward_all(torch.zeros(1, 3, _PROBE_SIZE, _PROBE_SIZE))
        except Exception as error:  # shape faults deep in somebody else's forward
            raise ModelError(f"{name} gives no feature maps of {_PROBE_SIZE} px images: {error}") from error
        # Of maps at one stride the last has seen the most.
        last_stages = {
            _PROBE_SIZE // feature_map.shape[-1]: stage for stage, feature_map in enumerate(feature_maps)
        }
        self.strides = tuple(sorted(last_stages))
        self._stages = [last_stages[stride] for stride in self.strides]
        self.channels = tuple(feature_maps[stage].shape[1] for stage in self._stages)

    def forward_all(self, images: Tensor) -> list[Tensor]:
        """Return the maps of all stages, (b, c, h, w) each."""
        return self.model.forward_intermediates(images, intermediates_only=True)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (b, 3, h, w) -> maps (b, width, h / stride, w / stride)."""
        feature_maps = self.forward_all(images)
        return [feature_maps[stage] for stage in self._stages]


# Anchors of each level: three sizes an octave, from four times its stride, in three shapes.
_ANCHOR_SCALES, _ASPECT_RATIOS = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)), (0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Settings of detection.

    Attributes:
        backbone: `frozen`, or `tuned` together with the rest.
        image_size: The short side that images are shown at.
        epochs: How often every training image is shown.
        batch_size: Images a step.
        lr: SGD's peak rate, after a tenth of the steps; it falls to zero as a cosine.
        pyramid_channels: Channels of the pyramid.
        num_resamples: Drawn test sets for the interval.
        seed: Of the start, the order, flips and draws.
    """

    backbone: Literal["frozen", "tuned"] = "frozen"
    image_size: int = 224
    epochs: int = 12
    batch_size: int = 8
    lr: float = 0.02
    pyramid_channels: int = 256
    num_resamples: int = 200
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DetectionResult:
    """Average precision on the test images.

    Attributes:
        values: AP over overlaps of 0.5 to 0.95, AP at 0.5 and at 0.75.
        bootstrap_values: (resamples, 3) the same of drawn test sets.
        per_class: AP of each class that occurs in test.
        num_images: How many test images were read.
        skipped: Images that could not be read, by reason.
    """

    values: tuple[float, float, float]
    bootstrap_values: Float[np.ndarray, "r 3"]
    per_class: dict[str, float]
    num_images: int
    skipped: dict[str, int]


class _PyramidBackbone(nn.Module):
    """The encoder's maps, and a pyramid of one width on them."""

    def __init__(self, extractor: FeatureMapExtractor, out_channels: int, *, is_frozen: bool) -> None:
        super().__init__()
        # Maps finer than a quarter of the image cost the most and tell the least.
        self.levels = [i for i, stride in enumerate(extractor.strides) if stride >= 4] or [
            len(extractor.strides) - 1
        ]
        self.extractor, self.is_frozen, self.out_channels = extractor, is_frozen, out_channels
        in_channels = [extractor.channels[i] for i in self.levels]
        self.pyramid = FeaturePyramidNetwork(in_channels, out_channels, extra_blocks=LastLevelMaxPool())
        strides = [extractor.strides[i] for i in self.levels]
        self.strides = [*strides, 2 * strides[-1]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            feature_maps = self.extractor(images)
        return self.pyramid(OrderedDict((str(k), feature_maps[i]) for k, i in enumerate(self.levels)))

    def train(self, mode: bool = True) -> "_PyramidBackbone":  # torch's signature
        """Keep batch norms at what the encoder learned: a few images tell too little to learn them anew."""
        super().train(mode)
        self.extractor.eval()
        return self


def build_detector(config: DetectionConfig, encoder: ImageEncoder, num_classes: int) -> nn.Module:
    """Build Faster R-CNN (Ren et al. 2015, Lin et al. 2017) on a copy of the encoder.

    Raises:
        ModelError: where the encoder gives no feature maps.
    """
    torch.manual_seed(config.seed)
    is_frozen = config.backbone == "frozen"
    extractor = FeatureMapExtractor(deepcopy(encoder.model).requires_grad_(not is_frozen), encoder.name)
    backbone = _PyramidBackbone(extractor, config.pyramid_channels, is_frozen=is_frozen)
    anchor_sizes = tuple(
        tuple(round(stride * scale) for scale in _ANCHOR_SCALES) for stride in backbone.strides
    )
    level_names = [str(k) for k in range(len(backbone.levels))]
    return FasterRCNN(
        backbone,
        num_classes=num_classes + 1,
        min_size=config.image_size,
        max_size=4 * config.image_size,
        image_mean=list(encoder.transform.mean),
        image_std=list(encoder.transform.std),
        rpn_anchor_generator=AnchorGenerator(anchor_sizes, (_ASPECT_RATIOS,) * len(anchor_sizes)),
        box_roi_pool=MultiScaleRoIAlign(level_names, output_size=7, sampling_ratio=2),
        # A quarter of the usual: most of the time goes into these, and small sets have few boxes.
        box_batch_size_per_image=128,
    )


def run_detection(
    config: DetectionConfig,
    encoder: ImageEncoder,
    dataset: DetectionDataset,
    *,
    device: torch.device,
    num_workers: int,
    update_progress: Callable[[int], None] = lambda _: None,
) -> DetectionResult:
    """Train a detector on the train images of a set and score it on the test images.

    The last weights are used: nothing is chosen by looking at the test images. Batch norms of the encoder
    stay as they are, also where it is tuned. Training images are flipped half of the time; images without a
    box count as background.

    Args:
        config: See `Detection`.
        encoder: It is not changed.
        dataset: The set.
        device: Where to train.
        num_workers: Threads that read images.
        update_progress: Called with the number of images after every step of training and test.

    Raises:
        InputError: where no image of a split can be read.
        ModelError: where the encoder gives no feature maps.
    """
    model = build_detector(config, encoder, len(dataset.classes)).to(device)
    skipped: Counter[str] = Counter()
    split_indices = {split: np.flatnonzero(dataset.splits == split) for split in ("train", "test")}
    _train_detector(
        config, model, dataset, split_indices["train"], device, num_workers, skipped, update_progress
    )
    predictions, targets = _predict(
        model, dataset, split_indices["test"], device, num_workers, skipped, update_progress
    )
    matches = match_detections(predictions, targets, len(dataset.classes))
    result = average_precision(matches)
    with np.errstate(all="ignore"):
        class_ap = result.per_class.mean(axis=1)
    named_ap = zip(dataset.classes, class_ap.tolist(), strict=True)
    return DetectionResult(
        values=(result.ap, result.ap50, result.ap75),
        bootstrap_values=bootstrap_average_precision(matches, config.num_resamples, config.seed),
        per_class={name: value for name, value in named_ap if np.isfinite(value)},
        num_images=len(predictions),
        skipped=dict(skipped),
    )


def _train_detector(
    config: DetectionConfig,
    model: nn.Module,
    dataset: DetectionDataset,
    indices: np.ndarray,
    device: torch.device,
    num_workers: int,
    skipped: Counter[str],
    update_progress: Callable[[int], None],
) -> None:
    batches = list(_batches(config, indices))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=config.lr, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=len(batches) + 1, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    num_updates = 0
    for epoch, loaded in prefetch_map(
        lambda batch: (batch[0], _load_batch(config, dataset, *batch)), batches, num_workers
    ):
        samples = [sample for sample in loaded if not isinstance(sample, str)]
        if epoch == 0:
            skipped.update(sample for sample in loaded if isinstance(sample, str))
        if samples:
            num_updates += 1
            targets = [{k: v.to(device) for k, v in target.items()} for _, target in samples]
            losses: dict[str, Tensor] = model([image.to(device) for image, _ in samples], targets)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(params, 10.0)
            optimizer.step()
            scheduler.step()
        update_progress(len(loaded))
    if not num_updates:
        raise InvalidInputError(f"no train image of {dataset.root} can be read: {dict(skipped)}")


def _batches(config: DetectionConfig, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(indices)
        for start in range(0, len(order), config.batch_size):
            yield epoch, order[start : start + config.batch_size]


def _load_batch(
    config: DetectionConfig, dataset: DetectionDataset, epoch: int, indices: np.ndarray
) -> list[tuple[Tensor, dict[str, Tensor]] | str]:
    """Return images with their boxes in pixels, flipped half of the time, or why one cannot be read."""
    flips = uniform(indices, 1, seed=config.seed, epoch=epoch, stream=Stream.DETECTION)[:, 0] < 0.5
    return [
        _load_sample(dataset, index, flip=bool(flip))
        for index, flip in zip(indices.tolist(), flips, strict=True)
    ]


def _load_sample(
    dataset: DetectionDataset, index: int, *, flip: bool
) -> tuple[Tensor, dict[str, Tensor]] | str:
    try:
        pixels = decode_image(read_image_bytes(ImageRef(path=dataset.files[index]), dataset.root))
    except UnreadableImageError as error:
        return str(error)
    mask = ~dataset.is_crowd[index]
    boxes, labels = dataset.boxes[index][mask], dataset.labels[index][mask]
    if flip:
        pixels = pixels[:, ::-1]
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    height, width = pixels.shape[:2]
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    xyxy = torch.from_numpy(boxes * (width, height, width, height)).float()
    return image, {"boxes": xyxy, "labels": torch.from_numpy(labels + 1)}


@torch.inference_mode()
def _predict(
    model: nn.Module,
    dataset: DetectionDataset,
    indices: np.ndarray,
    device: torch.device,
    num_workers: int,
    skipped: Counter[str],
    update_progress: Callable[[int], None],
) -> tuple[list[Boxes], list[Boxes]]:
    """Return what the detector finds in each readable image, and what is there, in pixels."""
    model.eval()
    predictions, targets = [], []
    samples = prefetch_map(
        lambda index: _load_sample(dataset, index, flip=False), indices.tolist(), num_workers
    )
    for index, sample in zip(indices.tolist(), samples, strict=True):
        update_progress(1)
        if isinstance(sample, str):
            skipped[sample] += 1
            continue
        (output,) = model([sample[0].to(device)])
        predictions.append(_to_boxes(output))
        height, width = sample[0].shape[1:]
        labels = dataset.labels[index]
        xyxy, is_crowd = dataset.boxes[index] * (width, height, width, height), dataset.is_crowd[index]
        targets.append(Boxes(xyxy=xyxy, labels=labels, scores=np.ones(len(labels)), is_crowd=is_crowd))
    if not predictions:
        raise InvalidInputError(f"no test image of {dataset.root} can be read: {dict(skipped)}")
    return predictions, targets


def _to_boxes(output: dict[str, Any]) -> Boxes:
    xyxy, labels, scores = (output[k].cpu().numpy() for k in ("boxes", "labels", "scores"))
    return Boxes(
        xyxy=xyxy.astype(np.float64),
        labels=labels - 1,
        scores=scores.astype(np.float64),
        is_crowd=np.zeros(len(labels), bool),
    )
