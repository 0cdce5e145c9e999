"""Object detection: Faster R-CNN with a feature pyramid on the encoder, scored by COCO average precision.

The rules of average precision are those of pycocotools for all areas and at most 100 detections per image and
class: greedy matching by score, crowd boxes ignored, precision made monotone and sampled at 101 recall
values, the mean over ten IoU thresholds and all classes with boxes. Reimplemented because a bootstrap needs
the curves of many resamples, while matching, the expensive part, is the same for all of them.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.detection import DetectionDataset
from likewise.evaluation.protocols.base import EvalContext, Score, seeded_rng
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

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALL_POINTS = np.linspace(0, 1, 101)
_MAX_DETECTIONS = 100
# Anchors per level: three sizes per octave from four times the stride, in three aspect ratios.
_ANCHOR_SCALES, _ASPECT_RATIOS = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)), (0.5, 1.0, 2.0)
Sample = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Predicted or true boxes of one image."""

    xyxy: Float[np.ndarray, "k 4"]
    """(k, 4) corners x0, y0, x1, y1."""
    labels: Int[np.ndarray, " k"]
    """(k,) class of each box."""
    scores: Float[np.ndarray, " k"]
    """(k,) confidence of each predicted box; ignored for true boxes."""
    is_crowd: Bool[np.ndarray, " k"]
    """(k,) true boxes that cover a group of objects."""


@dataclass(frozen=True, kw_only=True)
class AveragePrecision:
    """Average precision on the test images or on a resample of them."""

    per_class: Float[np.ndarray, "c 10"]
    """(classes, 10) by class and IoU threshold; NaN for classes without true boxes."""

    @property
    def ap(self) -> float:
        """Mean over IoU thresholds and classes; NaN without any true box."""
        return _mean_over_classes(self.per_class)

    @property
    def ap50(self) -> float:
        """Mean over classes at IoU 0.5; NaN without any true box."""
        return _mean_over_classes(self.per_class[:, 0])

    @property
    def ap75(self) -> float:
        """Mean over classes at IoU 0.75; NaN without any true box."""
        return _mean_over_classes(self.per_class[:, 5])


def _mean_over_classes(values: Float[np.ndarray, "c ..."]) -> float:
    """Return the mean over the classes that occur."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


@dataclass(frozen=True, kw_only=True)
class _Matches:
    """All detections of one class in descending order of score, and the number of true boxes per image."""

    image_index: Int[np.ndarray, " d"]
    true_positive: Bool[np.ndarray, "10 d"]
    false_positive: Bool[np.ndarray, "10 d"]
    num_gt: Int[np.ndarray, " n"]


def match_detections(
    predictions: Sequence[Boxes], targets: Sequence[Boxes], num_classes: int
) -> list[_Matches]:
    """Match the predicted with the true boxes of each image, per class.

    Raises:
        ValueError: The two lists differ in length.
    """
    if len(predictions) != len(targets):
        raise ValueError(f"expected boxes of the same images, got {len(predictions)} and {len(targets)}")
    return [_match_class(predictions, targets, label) for label in range(num_classes)]


def average_precision(
    matches: Sequence[_Matches], image_counts: Int[np.ndarray, " n"] | None = None
) -> AveragePrecision:
    """Return average precision with each image counted `image_counts` times, by default once."""
    return AveragePrecision(
        per_class=np.stack(
            [_class_average_precision(class_matches, image_counts) for class_matches in matches]
        )
    )


def bootstrap_average_precision(
    matches: Sequence[_Matches], num_resamples: int, seed: int = 0
) -> Float[np.ndarray, "r 3"]:
    """Return AP, AP50 and AP75 on bootstrap resamples of the images; NaN on resamples without any true box.

    The resamples depend on the number of images and the seed alone, so that two detectors can be compared
    resample by resample.
    """
    num_images = len(matches[0].num_gt)
    rng = np.random.default_rng(seed)
    sampled_counts = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=num_resamples)
    results = (average_precision(matches, image_counts) for image_counts in sampled_counts)
    return np.array([(result.ap, result.ap50, result.ap75) for result in results])


def _match_class(predictions: Sequence[Boxes], targets: Sequence[Boxes], label: int) -> _Matches:
    scores, image_index, true_positive, false_positive, num_gt = [], [], [], [], []
    for i, (pred, gt) in enumerate(zip(predictions, targets, strict=True)):
        pred_idx = np.flatnonzero(pred.labels == label)
        pred_idx = pred_idx[np.argsort(-pred.scores[pred_idx], kind="stable")][:_MAX_DETECTIONS]
        gt_idx = np.flatnonzero(gt.labels == label)
        gt_idx = gt_idx[np.argsort(gt.is_crowd[gt_idx], kind="stable")]
        is_crowd = gt.is_crowd[gt_idx]
        is_matched, is_ignored = _match_image(pred.xyxy[pred_idx], gt.xyxy[gt_idx], is_crowd)
        scores.append(pred.scores[pred_idx])
        image_index.append(np.full(len(pred_idx), i))
        true_positive.append(is_matched & ~is_ignored)
        false_positive.append(~is_matched & ~is_ignored)
        num_gt.append(int((~is_crowd).sum()))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _Matches(
        image_index=np.concatenate(image_index)[order],
        true_positive=np.concatenate(true_positive, axis=1)[:, order],
        false_positive=np.concatenate(false_positive, axis=1)[:, order],
        num_gt=np.array(num_gt),
    )


def _match_image(
    pred_boxes: Float[np.ndarray, "d 4"], gt_boxes: Float[np.ndarray, "g 4"], is_crowd: Bool[np.ndarray, " g"]
) -> tuple[Bool[np.ndarray, "10 d"], Bool[np.ndarray, "10 d"]]:
    """Return for each IoU threshold which boxes, by descending score, are matched, and which to a crowd."""
    iou = _box_iou(pred_boxes, gt_boxes, is_crowd)
    is_matched, is_ignored = (np.zeros((len(IOU_THRESHOLDS), len(pred_boxes)), bool) for _ in range(2))
    for t, threshold in enumerate(IOU_THRESHOLDS):
        is_free = np.ones(len(gt_boxes), bool)
        for d, pred_iou in enumerate(iou):
            is_candidate = (pred_iou >= min(threshold, 1 - 1e-10)) & (is_free | is_crowd)
            # Single objects take precedence over crowds; of ties the last one, as in pycocotools.
            for gt_mask in (~is_crowd, is_crowd):
                candidates = np.flatnonzero(is_candidate & gt_mask)
                if len(candidates):
                    best_gt = candidates[len(candidates) - 1 - np.argmax(pred_iou[candidates][::-1])]
                    is_free[best_gt] = False
                    is_matched[t, d], is_ignored[t, d] = True, is_crowd[best_gt]
                    break
    return is_matched, is_ignored


def _box_iou(
    pred_boxes: Float[np.ndarray, "d 4"], gt_boxes: Float[np.ndarray, "g 4"], is_crowd: Bool[np.ndarray, " g"]
) -> Float[np.ndarray, "d g"]:
    """Return the intersection over union; for a crowd, over the area of the predicted box."""
    top_left = np.maximum(pred_boxes[:, None, :2], gt_boxes[None, :, :2])
    widths_heights = (np.minimum(pred_boxes[:, None, 2:], gt_boxes[None, :, 2:]) - top_left).clip(min=0)
    intersection = widths_heights.prod(axis=2)
    pred_area, gt_area = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (pred_boxes, gt_boxes))
    union = np.where(is_crowd[None], pred_area[:, None], pred_area[:, None] + gt_area[None] - intersection)
    return intersection / np.maximum(union, 1e-30)


def _class_average_precision(
    matches: _Matches, image_counts: Int[np.ndarray, " n"] | None
) -> Float[np.ndarray, " 10"]:
    image_weights = np.ones(len(matches.num_gt)) if image_counts is None else image_counts.astype(np.float64)
    num_gt = float(image_weights @ matches.num_gt)
    if not num_gt:
        return np.full(len(IOU_THRESHOLDS), np.nan)
    detection_weights = image_weights[matches.image_index]
    tp, fp = (
        np.cumsum(mask * detection_weights, axis=1)
        for mask in (matches.true_positive, matches.false_positive)
    )
    recall, precision = tp / num_gt, tp / np.maximum(tp + fp, np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    ap = np.zeros(len(IOU_THRESHOLDS))
    for t in range(len(IOU_THRESHOLDS)):
        positions = np.searchsorted(
            recall[t], _RECALL_POINTS - (1e-12 if image_counts is not None else 0), side="left"
        )
        reached = positions[positions < recall.shape[1]]
        ap[t] = precision[t, reached].sum() / len(_RECALL_POINTS)
    return ap


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(DenseConfig):
    """Options of detection."""

    image_size: int = 224
    """Length of the shorter side, to which images are resized."""
    epochs: int = 12
    """Number of epochs."""
    lr: float = 0.02
    """Peak learning rate of SGD, with warmup over 10 % of the steps and cosine decay."""
    pyramid_channels: int = 256
    """Channels of the feature pyramid."""
    num_resamples: int = 200
    """Bootstrap resamples of the test images for the confidence interval."""


@dataclass(frozen=True, kw_only=True)
class DetectionResult:
    """Average precision on the test images."""

    values: tuple[float, float, float]
    """AP averaged over IoU thresholds from 0.5 to 0.95, AP at 0.5, and AP at 0.75."""
    bootstrap_values: Float[np.ndarray, "r 3"]
    """(resamples, 3) the same values on bootstrap resamples of the test images."""
    per_class: dict[str, float]
    """AP of each class with test boxes."""
    num_images: int
    """Number of readable test images."""
    skipped: dict[str, int]
    """Number of unreadable images by reason."""


class _PyramidBackbone(nn.Module):
    """The encoder's feature maps with a feature pyramid on top."""

    def __init__(self, extractor: FeatureMapExtractor, out_channels: int, *, is_frozen: bool) -> None:
        super().__init__()
        # Maps with strides below 4 are the most expensive and the least informative.
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
        """Keep the encoder in eval mode: small batches give poor batch-norm statistics."""
        super().train(mode)
        self.extractor.eval()
        return self


def build_detector(config: DetectionConfig, encoder: ImageEncoder, num_classes: int) -> nn.Module:
    """Build Faster R-CNN (Ren et al. 2015, Lin et al. 2017) on a copy of the encoder.

    Raises:
        ModelError: The encoder has no feature maps.
    """
    is_frozen = not config.finetune_backbone
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
        # A quarter of torchvision's default: these dominate the run time, and small datasets have few boxes.
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
    """Train a detector on the train split and evaluate it on the test split.

    The last checkpoint is evaluated; nothing is selected on the test images. Batch-norm statistics of the
    encoder are frozen even if the encoder is fine-tuned. Training images are flipped horizontally with
    probability 0.5; images without boxes serve as background.

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
    trainer = _DetectionTrainer(
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
        predictions, targets = trainer.predict()
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
        skipped=dict(trainer.skipped),
    )


class _DetectionTrainer(DenseTrainer):
    """Training and inference of a detector."""

    stream = Stream.DETECTION
    config: DetectionConfig
    model: nn.Module

    def build_model(self) -> None:
        """Build the detector on a copy of the encoder."""
        model = build_detector(self.config, self.encoder, len(self.dataset.classes))
        self.model = model.to(self.device)

    def train(self) -> None:
        """Train on the train split by SGD with gradient clipping."""
        batches = self.batches(self.split_indices("train"))
        params = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=self.config.lr, momentum=0.9, weight_decay=1e-4)
        scheduler = self.one_cycle(optimizer, len(batches))
        self.model.train()
        num_updates = 0
        for batch, loaded in zip(
            batches, prefetch_map(self._load_batch, batches, self.num_workers), strict=True
        ):
            samples = [sample for sample in loaded if not isinstance(sample, str)]
            if batch.epoch == 0:
                self.skipped.update(sample for sample in loaded if isinstance(sample, str))
            if samples:
                num_updates += 1
                targets = [{k: v.to(self.device) for k, v in target.items()} for _, target in samples]
                losses: dict[str, Tensor] = self.model(
                    [image.to(self.device) for image, _ in samples], targets
                )
                optimizer.zero_grad()
                torch.stack(list(losses.values())).sum().backward()
                nn.utils.clip_grad_norm_(params, 10.0)
                optimizer.step()
                scheduler.step()
            self.update_progress(len(loaded))
        if not num_updates:
            raise self.unreadable_split("train")

    @torch.inference_mode()
    def predict(self) -> tuple[list[Boxes], list[Boxes]]:
        """Return the predicted and the true boxes of each readable test image, in pixels."""
        self.model.eval()
        predictions, targets = [], []
        indices = self.split_indices("test").tolist()
        samples = prefetch_map(lambda index: self._load_sample(index, flip=False), indices, self.num_workers)
        for index, sample in zip(indices, samples, strict=True):
            self.update_progress(1)
            if isinstance(sample, str):
                self.skipped[sample] += 1
                continue
            (output,) = self.model([sample[0].to(self.device)])
            predictions.append(_to_boxes(output))
            height, width = sample[0].shape[1:]
            labels, is_crowd = self.dataset.labels[index], self.dataset.is_crowd[index]
            xyxy = self.dataset.boxes[index] * (width, height, width, height)
            targets.append(Boxes(xyxy=xyxy, labels=labels, scores=np.ones(len(labels)), is_crowd=is_crowd))
        if not predictions:
            raise self.unreadable_split("test")
        return predictions, targets

    def _load_batch(self, batch: FlipBatch) -> list[Sample | str]:
        return [
            self._load_sample(index, flip=flip)
            for index, flip in zip(batch.indices.tolist(), batch.flips.tolist(), strict=True)
        ]

    def _load_sample(self, index: int, *, flip: bool) -> Sample | str:
        """Return an image (3, h, w) in [0, 1] with its boxes in pixels, or why it cannot be read."""
        pixels = self.read_pixels(index)
        if isinstance(pixels, str):
            return pixels
        mask = ~self.dataset.is_crowd[index]
        boxes, labels = self.dataset.boxes[index][mask], self.dataset.labels[index][mask]
        if flip:
            pixels = pixels[:, ::-1]
            boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
        height, width = pixels.shape[:2]
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        xyxy = torch.from_numpy(boxes * (width, height, width, height)).float()
        return image, {"boxes": xyxy, "labels": torch.from_numpy(labels + 1)}


def _to_boxes(output: dict[str, Any]) -> Boxes:
    xyxy, labels, scores = (output[k].cpu().numpy() for k in ("boxes", "labels", "scores"))
    return Boxes(
        xyxy=xyxy.astype(np.float64),
        labels=labels - 1,
        scores=scores.astype(np.float64),
        is_crowd=np.zeros(len(labels), bool),
    )


class Detection(DenseProtocol):
    """Object detection with Faster R-CNN on the encoder."""

    name = "detection"
    title = "Detection"
    summary = "object detection with Faster R-CNN on the encoder's feature maps"
    requires = "boxes"
    config: DetectionConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Train on the train split and report AP, AP50 and AP75 on the test split."""
        dataset = context.dataset
        if not isinstance(dataset, DetectionDataset):
            raise InvalidInputError(f"{dataset.path} has no boxes", path=dataset.path)
        result = self.train_and_test(context, dataset, run_detection)
        details = {
            "per_class": result.per_class,
            "num_images": result.num_images,
            "skipped": result.skipped,
        }
        return [
            bootstrap_score(name, value, result.bootstrap_values[:, i], result.num_images, details)
            for i, (name, value) in enumerate(zip(("AP", "AP50", "AP75"), result.values, strict=True))
        ]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the detector and the metrics."""
        backbone = "fine-tuned" if row.config["finetune_backbone"] else "frozen"
        return (
            f"Faster R-CNN on the {backbone} encoder is trained for {row.config['epochs']} epochs. AP is "
            "COCO average precision over IoU thresholds from 0.5 to 0.95; AP50 and AP75 are those at 0.5 and "
            "0.75."
        )

    @classmethod
    def success_phrase(cls, row: ResultRow) -> str:
        """Return the phrase for one image."""
        return "detect the objects"
