"""Fine-tuning: the encoder and a linear classifier on it, trained together."""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from likewise.data.dataset import ImageRef
from likewise.data.images import decode, read_bytes
from likewise.evaluation.datasets.labeled import LabelledSet
from likewise.models.encoders import ImageEncoder
from likewise.models.transforms import Transform
from likewise.parallel import ordered_map
from likewise.rng import uniforms

_STREAM = 301  # keeps the draw of crops apart from all others
_LEAST = 0.35  # a crop's least share of the image; as timm's recipes for fine-tuning


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Settings of fine-tuning.

    Attributes:
        epochs: How often every training image is shown.
        batch_size: Images a step.
        rate: AdamW's peak rate for the encoder, after a tenth of the steps; it falls to zero as a cosine.
        head_rate: The same for the classifier, which starts from nothing.
        weight_decay: AdamW's, on matrices only.
        seed: Of the classifier's start, the order, crops and flips.
    """

    epochs: int = 10
    batch_size: int = 64
    rate: float = 1e-4
    head_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


def fine_tune(
    settings: FineTuning,
    encoder: ImageEncoder,
    images: LabelledSet,
    train: Int[np.ndarray, " n"],
    test: Int[np.ndarray, " m"],
    *,
    device: torch.device,
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Int[Tensor, " m"]:
    """Train a copy of the encoder with a classifier on some rows of a set, and classify others.

    The last weights are used: nothing is chosen by looking at the test images. Training images are shown as
    random crops, flipped half of the time; test images as the encoder is always fed.

    Args:
        settings: See `FineTuning`.
        encoder: It is not changed.
        images: The set.
        train: Rows to learn from, all readable.
        test: Rows to classify, all readable.
        device: Where to train.
        workers: Threads that read images.
        advance: Called with the number of images after every step.

    Raises:
        ValueError: no images to learn from, or a setting that is not above zero.
    """
    if not len(train) or min(settings.epochs, settings.batch_size, settings.rate, settings.head_rate) <= 0:
        raise ValueError(
            f"expected images to learn from and settings above zero, got {len(train)}, {settings}"
        )
    torch.manual_seed(settings.seed)
    model = nn.Sequential(deepcopy(encoder.model), nn.Linear(encoder.width, len(images.classes)))
    model.requires_grad_(True).to(device).to(memory_format=torch.channels_last)
    labels = torch.from_numpy(images.labels)
    steps = sum(1 for _ in _epochs(settings, len(train)))
    optimizer = torch.optim.AdamW(_groups(model, settings))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    model.train()
    batches = _epochs(settings, len(train))
    shown = ordered_map(
        lambda b: _crops(images, train[b[1]], encoder.transform, settings.seed, b[0]), batches, workers
    )
    for (_, rows), crops in zip(_epochs(settings, len(train)), shown, strict=True):
        inputs = encoder.transform.standardise(torch.from_numpy(crops).to(device))
        loss = cross_entropy(model(inputs), labels[train[rows]].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        advance(len(rows))
    return _classify(model, encoder.transform, images, test, settings.batch_size, device, workers)


def _groups(model: nn.Sequential, settings: FineTuning) -> list[dict[str, Any]]:
    """Return the parameters by rate, and by whether they decay: matrices do, biases and norms do not."""
    groups: list[dict[str, Any]] = []
    for part, rate in ((model[0], settings.rate), (model[1], settings.head_rate)):
        for decays in (True, False):
            chosen = [p for p in part.parameters() if (p.ndim > 1) == decays]
            groups.append({"params": chosen, "lr": rate, "weight_decay": settings.weight_decay * decays})
    return [group for group in groups if group["params"]]


def _share(step: int, steps: int) -> float:
    """Return which share of its peak the rate has: a tenth of the steps up, then down as a cosine."""
    warm = max(1, steps // 10)
    return (
        (step + 1) / warm if step < warm else 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm)))
    )


def _epochs(settings: FineTuning, count: int) -> Iterator[tuple[int, np.ndarray]]:
    for epoch in range(settings.epochs):
        order = np.random.default_rng((settings.seed, epoch)).permutation(count)
        for start in range(0, count, settings.batch_size):
            if 0 < start == count - 1:
                continue  # batch norm learns nothing from one image; another one is left next epoch
            yield epoch, order[start : start + settings.batch_size]


def _crops(images: LabelledSet, rows: np.ndarray, transform: Transform, seed: int, epoch: int) -> np.ndarray:
    """Return random crops of images, (b, size, size, 3) uint8: the same for the same seed and epoch."""
    chances = uniforms(rows, 4, seed=seed, epoch=epoch, stream=_STREAM)
    return np.stack([
        _crop(_read(images, row, transform.resize), transform, chance)
        for row, chance in zip(rows.tolist(), chances, strict=True)
    ])  # fmt: skip


def _crop(pixels: np.ndarray, transform: Transform, chance: Sequence[float] | np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    side = round((_LEAST + (1 - _LEAST) * chance[0]) ** 0.5 * min(image.size))
    left, top = round(chance[1] * (image.width - side)), round(chance[2] * (image.height - side))
    how = Image.Resampling[transform.interpolation.upper()]
    crop = image.resize((transform.size, transform.size), how, (left, top, left + side, top + side))
    return np.asarray(crop)[:, ::-1] if chance[3] < 0.5 else np.asarray(crop)


def _read(images: LabelledSet, row: int, short_side: int) -> np.ndarray:
    return decode(read_bytes(ImageRef(path=images.files[row]), images.root), short_side)


@torch.inference_mode()
def _classify(
    model: nn.Module,
    transform: Transform,
    images: LabelledSet,
    rows: np.ndarray,
    batch_size: int,
    device: torch.device,
    workers: int,
) -> Int[Tensor, " m"]:
    model.eval()
    parts = np.array_split(rows, range(batch_size, len(rows), batch_size))

    def crops(part: np.ndarray) -> np.ndarray:
        return np.stack([transform.crop(_read(images, row, transform.resize)) for row in part.tolist()])

    return torch.cat([
        model(transform.standardise(torch.from_numpy(each).to(device))).argmax(dim=1).cpu()
        for each in ordered_map(crops, parts, workers)
    ])  # fmt: skip
