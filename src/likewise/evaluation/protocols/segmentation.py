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
from likewise.data.images import BadImageError, decode, read_bytes
from likewise.errors import InputError
from likewise.evaluation.datasets.dense import MaskedSet
from likewise.evaluation.protocols.detection import FeatureMaps
from likewise.models.encoders import ImageEncoder
from likewise.parallel import ordered_map
from likewise.rng import uniforms

_STREAM = 303  # keeps the draw of flips apart from all others
_LEVELS = 2  # the coarsest maps, which know most; the coarser is enlarged to the finer


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Settings of segmentation.

    Attributes:
        backbone: `frozen`, with batch norm and one linear layer on the maps; or `tuned`, with the head of a
            fully convolutional network (Long et al. 2015).
        size: The side of the square that images are squeezed into.
        epochs: How often every training image is shown.
        batch_size: Images a step.
        rate: AdamW's peak rate for the head, after a tenth of the steps; it falls to zero as a cosine.
        backbone_rate: The same for a tuned encoder.
        resamples: Drawn test sets for the interval.
        seed: Of the start, the order, flips and draws.
    """

    backbone: Literal["frozen", "tuned"] = "frozen"
    size: int = 224
    epochs: int = 20
    batch_size: int = 8
    rate: float = 1e-3
    backbone_rate: float = 1e-4
    resamples: int = 1000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class SegmentationResult:
    """How well pixels were named.

    Attributes:
        confusion: (n, c, c) pixels of each test image, by true class and by the class given.
        images: Its rows in the set.
        skipped: Images that could not be read, by reason.
    """

    confusion: Int[np.ndarray, "n c c"]
    images: Int[np.ndarray, " n"]
    skipped: dict[str, int]


def class_overlap(confusion: Float[np.ndarray, "*r c c"]) -> Float[np.ndarray, "*r c"]:
    """Return the intersection over union of each class, NaN for one that is neither there nor given."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    union = confusion.sum(axis=-1) + confusion.sum(axis=-2) - right
    return np.where(union > 0, right / np.maximum(union, 1), np.nan)


def measures(confusion: Float[np.ndarray, "*r c c"]) -> dict[str, Float[np.ndarray, "*r"]]:
    """Return mean IoU and pixel accuracy of confusion matrices."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1).sum(axis=-1)
    whole = confusion.sum(axis=(-2, -1))
    mean = np.nanmean(class_overlap(confusion), axis=-1)
    return {"mean IoU": np.asarray(mean), "pixel accuracy": np.asarray(right / np.maximum(whole, 1))}


def drawn_measures(
    confusion: Int[np.ndarray, "n c c"], resamples: int, seed: int
) -> dict[str, Float[np.ndarray, " r"]]:
    """Return the same of test sets drawn with replacement from the images.

    For the same number of images and seed the same images are drawn, so that two encoders can be compared
    draw by draw.
    """
    images = len(confusion)
    counts = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    return measures(np.tensordot(counts.astype(np.float64), confusion.astype(np.float64), axes=1))


class _Head(nn.Module):
    """Maps of an encoder -> class scores at the finer map's resolution."""

    def __init__(self, widths: tuple[int, ...], classes: int, *, tuned: bool) -> None:
        super().__init__()
        width = sum(widths)
        linear = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))
        self.layers = FCNHead(width, classes) if tuned else linear

    def forward(self, joined: Tensor) -> Tensor:
        return self.layers(joined)


def segment(
    settings: Segmentation,
    encoder: ImageEncoder,
    images: MaskedSet,
    *,
    device: torch.device,
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> SegmentationResult:
    """Train a head on the train images of a set and name the pixels of the test images, at their own size.

    The last weights are used: nothing is chosen by looking at the test images. Images are flipped half of the
    time while training. With a frozen encoder its maps are computed once, of each image and its mirror image.

    Args:
        settings: See `Segmentation`.
        encoder: It is not changed.
        images: The set.
        device: Where to train.
        workers: Threads that read images.
        advance: Called with the number of images after every step.

    Raises:
        InputError: where no image of a split can be read.
        ModelError: where the encoder gives no feature maps.
    """
    torch.manual_seed(settings.seed)
    tuned = settings.backbone == "tuned"
    maps = FeatureMaps(deepcopy(encoder.model).requires_grad_(tuned), encoder.name).to(device)
    head = _Head(maps.widths[-_LEVELS:], len(images.classes), tuned=tuned).to(device)
    run = _Run(settings, encoder, images, maps, head, device, workers, advance)
    run.train(np.flatnonzero(images.splits == "train"))
    confusion, rows = run.judge(np.flatnonzero(images.splits == "test"))
    return SegmentationResult(confusion=confusion, images=rows, skipped=dict(run.skipped))


@dataclass
class _Run:
    """A head in training."""

    settings: Segmentation
    encoder: ImageEncoder
    images: MaskedSet
    maps: FeatureMaps
    head: _Head
    device: torch.device
    workers: int
    advance: Callable[[int], None]

    def __post_init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self.tuned = self.settings.backbone == "tuned"
        self.kept: dict[tuple[int, bool], Tensor] = {}

    def train(self, rows: np.ndarray) -> None:
        """Train on rows of the set."""
        readable = np.array([row for row, shown in self._shown(rows) if shown is not None], np.int64)
        if not len(readable):
            raise InputError(f"no train image of {self.images.root} can be read: {dict(self.skipped)}")
        settings = self.settings
        groups = [{"params": list(self.head.parameters()), "lr": settings.rate}]
        if self.tuned:
            groups.append({"params": list(self.maps.parameters()), "lr": settings.backbone_rate})
        batches = list(self._batches(readable))
        optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
        rates = [float(group["lr"]) for group in groups]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, total_steps=len(batches) + 1, pct_start=0.1, cycle_momentum=False
        )
        self.head.train()
        self.maps.train(self.tuned)
        for part, flips, shown in ordered_map(self._load, batches, self.workers):
            joined = self._features(part, flips, shown)
            targets = torch.stack([self._target(*each) for each in zip(part.tolist(), flips, strict=True)])
            scores = interpolate(self.head(joined), targets.shape[1:], mode="bilinear", align_corners=False)
            optimizer.zero_grad()
            cross_entropy(scores, targets.to(self.device), ignore_index=-1).backward()
            optimizer.step()
            scheduler.step()
            self.advance(len(part))

    @torch.inference_mode()
    def judge(self, rows: np.ndarray) -> tuple[Int[np.ndarray, "n c c"], Int[np.ndarray, " n"]]:
        """Return each readable image's confusion matrix, and the rows of these images."""
        self.head.eval()
        self.maps.eval()
        found, read = [], []
        for row, shown in self._shown(rows):
            self.advance(1)
            if shown is not None:
                mask = self.images.mask(row)
                scores = self.head(self._join(self._standard([shown])))
                large = interpolate(scores, mask.shape, mode="bilinear", align_corners=False)
                found.append(confuse(mask, large[0].argmax(dim=0).cpu().numpy(), len(self.images.classes)))
                read.append(row)
        if not found:
            raise InputError(f"no test image of {self.images.root} can be read: {dict(self.skipped)}")
        return np.stack(found), np.array(read)

    def _shown(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray | None]]:
        """Yield rows with their pixels; None, counted, where they cannot be read."""
        for row, shown in zip(
            rows.tolist(), ordered_map(self._read, rows.tolist(), self.workers), strict=True
        ):
            if isinstance(shown, str):
                self.skipped[shown] += 1
            yield row, None if isinstance(shown, str) else shown

    def _read(self, row: int) -> np.ndarray | str:
        """Return an image squeezed into the square, (size, size, 3) uint8, or why it cannot be read."""
        try:
            pixels = decode(read_bytes(ImageRef(path=self.images.files[row]), self.images.root))
        except BadImageError as fault:
            return str(fault)
        size = (self.settings.size, self.settings.size)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
        small = interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
        return small[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()

    def _load(self, batch: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        rows, flips = batch
        if not self.tuned and all(
            key in self.kept for key in zip(rows.tolist(), flips.tolist(), strict=True)
        ):
            return rows, flips, []
        read = (self._read(row) for row in rows.tolist())
        shown = [each for each in read if not isinstance(each, str)]
        return rows, flips, [each[:, ::-1] if flip else each for each, flip in zip(shown, flips, strict=True)]

    def _features(self, rows: np.ndarray, flips: np.ndarray, shown: list[np.ndarray]) -> Tensor:
        """Return joined maps; of a frozen encoder they are computed once and kept in half precision."""
        if self.tuned:
            return self._join(self._standard(shown))
        keys = list(zip(rows.tolist(), flips.tolist(), strict=True))
        if shown:
            with torch.inference_mode():
                joined = self._join(self._standard(shown)).half().cpu()
            self.kept |= dict(zip(keys, joined, strict=True))
        return torch.stack([self.kept[key] for key in keys]).to(self.device).float()

    def _standard(self, shown: list[np.ndarray]) -> Tensor:
        return self.encoder.transform.standardise(torch.from_numpy(np.stack(shown)).to(self.device))

    def _join(self, images: Tensor) -> Tensor:
        shown = self.maps(images)[-_LEVELS:]
        size = shown[0].shape[-2:]
        return torch.cat(
            [interpolate(each, size, mode="bilinear", align_corners=False) for each in shown], dim=1
        )

    def _target(self, row: int, flip: Any) -> Tensor:
        """Return a mask at the size of the square, by its nearest pixels."""
        mask = torch.from_numpy(self.images.mask(row))
        small = interpolate(mask[None, None].float(), (self.settings.size,) * 2, mode="nearest")[0, 0].long()
        return small.flip(1) if flip else small

    def _batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        settings = self.settings
        for epoch in range(settings.epochs):
            order = np.random.default_rng((settings.seed, epoch)).permutation(rows)
            for start in range(0, len(order), settings.batch_size):
                part = order[start : start + settings.batch_size]
                chance = uniforms(part, 1, seed=settings.seed, epoch=epoch, stream=_STREAM)[:, 0]
                yield part, chance < 0.5


def confuse(
    true: Int[np.ndarray, "h w"], given: Int[np.ndarray, "h w"], classes: int
) -> Int[np.ndarray, "c c"]:
    """Count pixels by true class and by the class given; a true class below zero counts neither way."""
    kept = true >= 0
    return np.bincount(true[kept] * classes + given[kept], minlength=classes**2).reshape(classes, classes)
