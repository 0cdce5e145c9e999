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
from likewise.data.images import BadImageError, decode, read_bytes
from likewise.errors import InputError, ModelError
from likewise.evaluation.datasets.dense import BoxedSet
from likewise.evaluation.protocols.average_precision import Boxes, bootstrap_precision, match, precision
from likewise.models.encoders import ImageEncoder
from likewise.parallel import ordered_map
from likewise.rng import uniforms

# A side that every usual stride divides, so that strides can be read off the maps.
_SIDE = 224


class FeatureMaps(nn.Module):
    """The maps of an encoder's stages, from fine to coarse, a map for each stride.

    Attributes:
        widths: Channels of each map.
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
        self._kept: list[int] = []
        try:
            with torch.no_grad():
                shown = self.every(torch.zeros(1, 3, _SIDE, _SIDE))
        except Exception as fault:  # shape faults deep in somebody else's forward
            raise ModelError(f"{name} gives no feature maps of {_SIDE} px images: {fault}") from fault
        # Of maps at one stride the last has seen the most.
        last = {_SIDE // each.shape[-1]: place for place, each in enumerate(shown)}
        self.strides = tuple(sorted(last))
        self._kept = [last[stride] for stride in self.strides]
        self.widths = tuple(shown[place].shape[1] for place in self._kept)

    def every(self, images: Tensor) -> list[Tensor]:
        """Return the maps of all stages, (b, c, h, w) each."""
        return self.model.forward_intermediates(images, intermediates_only=True)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (b, 3, h, w) -> maps (b, width, h / stride, w / stride)."""
        found = self.every(images)
        return [found[place] for place in self._kept]


_STREAM = 302  # keeps the draw of flips apart from all others
# Anchors of each level: three sizes an octave, from four times its stride, in three shapes.
_OCTAVES, _SHAPES = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)), (0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Settings of detection.

    Attributes:
        backbone: `frozen`, or `tuned` together with the rest.
        size: The short side that images are shown at.
        epochs: How often every training image is shown.
        batch_size: Images a step.
        rate: SGD's peak rate, after a tenth of the steps; it falls to zero as a cosine.
        width: Channels of the pyramid.
        resamples: Drawn test sets for the interval.
        seed: Of the start, the order, flips and draws.
    """

    backbone: Literal["frozen", "tuned"] = "frozen"
    size: int = 224
    epochs: int = 12
    batch_size: int = 8
    rate: float = 0.02
    width: int = 256
    resamples: int = 200
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class DetectionResult:
    """Average precision on the test images.

    Attributes:
        values: AP over overlaps of 0.5 to 0.95, AP at 0.5 and at 0.75.
        drawn: (resamples, 3) the same of drawn test sets.
        per_class: AP of each class that occurs in test.
        images: How many test images were read.
        skipped: Images that could not be read, by reason.
    """

    values: tuple[float, float, float]
    drawn: Float[np.ndarray, "r 3"]
    per_class: dict[str, float]
    images: int
    skipped: dict[str, int]


class _Pyramid(nn.Module):
    """The encoder's maps, and a pyramid of one width on them."""

    def __init__(self, maps: FeatureMaps, width: int, *, frozen: bool) -> None:
        super().__init__()
        # Maps finer than a quarter of the image cost the most and tell the least.
        self.used = [i for i, stride in enumerate(maps.strides) if stride >= 4] or [len(maps.strides) - 1]
        self.maps, self.frozen, self.out_channels = maps, frozen, width
        widths = [maps.widths[i] for i in self.used]
        self.pyramid = FeaturePyramidNetwork(widths, width, extra_blocks=LastLevelMaxPool())
        strides = [maps.strides[i] for i in self.used]
        self.strides = [*strides, 2 * strides[-1]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            shown = self.maps(images)
        return self.pyramid(OrderedDict((str(k), shown[i]) for k, i in enumerate(self.used)))

    def train(self, mode: bool = True) -> "_Pyramid":  # torch's signature
        """Keep batch norms at what the encoder learned: a few images tell too little to learn them anew."""
        super().train(mode)
        self.maps.eval()
        return self


def build_detector(settings: Detection, encoder: ImageEncoder, classes: int) -> nn.Module:
    """Build Faster R-CNN (Ren et al. 2015, Lin et al. 2017) on a copy of the encoder.

    Raises:
        ModelError: where the encoder gives no feature maps.
    """
    torch.manual_seed(settings.seed)
    frozen = settings.backbone == "frozen"
    maps = FeatureMaps(deepcopy(encoder.model).requires_grad_(not frozen), encoder.name)
    body = _Pyramid(maps, settings.width, frozen=frozen)
    sizes = tuple(tuple(round(stride * part) for part in _OCTAVES) for stride in body.strides)
    pooled = [str(k) for k in range(len(body.used))]
    return FasterRCNN(
        body,
        num_classes=classes + 1,
        min_size=settings.size,
        max_size=4 * settings.size,
        image_mean=list(encoder.transform.mean),
        image_std=list(encoder.transform.std),
        rpn_anchor_generator=AnchorGenerator(sizes, (_SHAPES,) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(pooled, output_size=7, sampling_ratio=2),
        # A quarter of the usual: most of the time goes into these, and small sets have few boxes.
        box_batch_size_per_image=128,
    )


def detect(
    settings: Detection,
    encoder: ImageEncoder,
    images: BoxedSet,
    *,
    device: torch.device,
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> DetectionResult:
    """Train a detector on the train images of a set and score it on the test images.

    The last weights are used: nothing is chosen by looking at the test images. Batch norms of the encoder
    stay as they are, also where it is tuned. Training images are flipped half of the time; images without a
    box count as background.

    Args:
        settings: See `Detection`.
        encoder: It is not changed.
        images: The set.
        device: Where to train.
        workers: Threads that read images.
        advance: Called with the number of images after every step of training and test.

    Raises:
        InputError: where no image of a split can be read.
        ModelError: where the encoder gives no feature maps.
    """
    model = build_detector(settings, encoder, len(images.classes)).to(device)
    skipped: Counter[str] = Counter()
    rows = {split: np.flatnonzero(images.splits == split) for split in ("train", "test")}
    _train(settings, model, images, rows["train"], device, workers, skipped, advance)
    found, true = _find(model, images, rows["test"], device, workers, skipped, advance)
    matched = match(found, true, len(images.classes))
    got = precision(matched)
    with np.errstate(all="ignore"):
        each = got.each.mean(axis=1)
    named = zip(images.classes, each.tolist(), strict=True)
    return DetectionResult(
        values=(got.ap, got.ap50, got.ap75),
        drawn=bootstrap_precision(matched, settings.resamples, settings.seed),
        per_class={name: value for name, value in named if np.isfinite(value)},
        images=len(found),
        skipped=dict(skipped),
    )


def _train(
    settings: Detection,
    model: nn.Module,
    images: BoxedSet,
    rows: np.ndarray,
    device: torch.device,
    workers: int,
    skipped: Counter[str],
    advance: Callable[[int], None],
) -> None:
    batches = list(_batches(settings, rows))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=settings.rate, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=len(batches) + 1, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    taught = 0
    for epoch, shown in ordered_map(lambda b: (b[0], _load(settings, images, *b)), batches, workers):
        kept = [each for each in shown if not isinstance(each, str)]
        if epoch == 0:
            skipped.update(each for each in shown if isinstance(each, str))
        if kept:
            taught += 1
            targets = [{k: v.to(device) for k, v in target.items()} for _, target in kept]
            losses: dict[str, Tensor] = model([image.to(device) for image, _ in kept], targets)
            optimizer.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(learned, 10.0)
            optimizer.step()
            scheduler.step()
        advance(len(shown))
    if not taught:
        raise InputError(f"no train image of {images.root} can be read: {dict(skipped)}")


def _batches(settings: Detection, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for epoch in range(settings.epochs):
        order = np.random.default_rng((settings.seed, epoch)).permutation(rows)
        for start in range(0, len(order), settings.batch_size):
            yield epoch, order[start : start + settings.batch_size]


def _load(
    settings: Detection, images: BoxedSet, epoch: int, rows: np.ndarray
) -> list[tuple[Tensor, dict[str, Tensor]] | str]:
    """Return images with their boxes in pixels, flipped half of the time, or why one cannot be read."""
    flips = uniforms(rows, 1, seed=settings.seed, epoch=epoch, stream=_STREAM)[:, 0] < 0.5
    return [_one(images, row, flip=bool(f)) for row, f in zip(rows.tolist(), flips, strict=True)]


def _one(images: BoxedSet, row: int, *, flip: bool) -> tuple[Tensor, dict[str, Tensor]] | str:
    try:
        pixels = decode(read_bytes(ImageRef(path=images.files[row]), images.root))
    except BadImageError as fault:
        return str(fault)
    kept = ~images.crowds[row]
    boxes, labels = images.boxes[row][kept], images.labels[row][kept]
    if flip:
        pixels = pixels[:, ::-1]
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], axis=1)
    height, width = pixels.shape[:2]
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    corners = torch.from_numpy(boxes * (width, height, width, height)).float()
    return image, {"boxes": corners, "labels": torch.from_numpy(labels + 1)}


@torch.inference_mode()
def _find(
    model: nn.Module,
    images: BoxedSet,
    rows: np.ndarray,
    device: torch.device,
    workers: int,
    skipped: Counter[str],
    advance: Callable[[int], None],
) -> tuple[list[Boxes], list[Boxes]]:
    """Return what the detector finds in each readable image, and what is there, in pixels."""
    model.eval()
    found, true = [], []
    shown = ordered_map(lambda row: _one(images, row, flip=False), rows.tolist(), workers)
    for row, each in zip(rows.tolist(), shown, strict=True):
        advance(1)
        if isinstance(each, str):
            skipped[each] += 1
            continue
        (got,) = model([each[0].to(device)])
        found.append(_found(got))
        height, width = each[0].shape[1:]
        labels = images.labels[row]
        corners, crowd = images.boxes[row] * (width, height, width, height), images.crowds[row]
        true.append(Boxes(corners=corners, labels=labels, scores=np.ones(len(labels)), crowd=crowd))
    if not found:
        raise InputError(f"no test image of {images.root} can be read: {dict(skipped)}")
    return found, true


def _found(got: dict[str, Any]) -> Boxes:
    corners, labels, scores = (got[k].cpu().numpy() for k in ("boxes", "labels", "scores"))
    return Boxes(
        corners=corners.astype(np.float64),
        labels=labels - 1,
        scores=scores.astype(np.float64),
        crowd=np.zeros(len(labels), bool),
    )
