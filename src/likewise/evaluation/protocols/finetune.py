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
from likewise.data.images import decode_image, read_image_bytes
from likewise.evaluation.datasets.labeled import LabeledDataset
from likewise.models.encoders import ImageEncoder
from likewise.models.transforms import EvalTransform
from likewise.parallel import prefetch_map
from likewise.rng import Stream, uniform

_MIN_CROP_AREA = 0.35  # a crop's least share of the image; as timm's recipes for fine-tuning


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """Settings of fine-tuning.

    Attributes:
        epochs: How often every training image is shown.
        batch_size: Images a step.
        lr: AdamW's peak rate for the encoder, after a tenth of the steps; it falls to zero as a cosine.
        head_lr: The same for the classifier, which starts from nothing.
        weight_decay: AdamW's, on matrices only.
        seed: Of the classifier's start, the order, crops and flips.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-4
    head_lr: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


def fine_tune(
    config: FineTuningConfig,
    encoder: ImageEncoder,
    dataset: LabeledDataset,
    train_indices: Int[np.ndarray, " n"],
    test_indices: Int[np.ndarray, " m"],
    *,
    device: torch.device,
    num_workers: int,
    update_progress: Callable[[int], None] = lambda _: None,
) -> Int[Tensor, " m"]:
    """Train a copy of the encoder with a classifier on some rows of a set, and classify others.

    The last weights are used: nothing is chosen by looking at the test images. Training images are shown as
    random crops, flipped half of the time; test images as the encoder is always fed.

    Args:
        config: See `FineTuning`.
        encoder: It is not changed.
        dataset: The set.
        train_indices: Rows to learn from, all readable.
        test_indices: Rows to classify, all readable.
        device: Where to train.
        num_workers: Threads that read images.
        update_progress: Called with the number of images after every step.

    Raises:
        ValueError: no images to learn from, or a setting that is not above zero.
    """
    if not len(train_indices) or min(config.epochs, config.batch_size, config.lr, config.head_lr) <= 0:
        raise ValueError(
            f"expected images to learn from and settings above zero, got {len(train_indices)}, {config}"
        )
    torch.manual_seed(config.seed)
    model = nn.Sequential(deepcopy(encoder.model), nn.Linear(encoder.feature_dim, len(dataset.classes)))
    model.requires_grad_(True).to(device).to(memory_format=torch.channels_last)
    labels = torch.from_numpy(dataset.labels)
    total_steps = sum(1 for _ in _iter_batches(config, len(train_indices)))
    optimizer = torch.optim.AdamW(_param_groups(model, config))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, total_steps))
    model.train()
    batches = _iter_batches(config, len(train_indices))
    crop_batches = prefetch_map(
        lambda batch: _random_crops(
            dataset, train_indices[batch[1]], encoder.transform, config.seed, batch[0]
        ),
        batches,
        num_workers,
    )
    for (_, positions), crops in zip(_iter_batches(config, len(train_indices)), crop_batches, strict=True):
        inputs = encoder.transform.normalize(torch.from_numpy(crops).to(device))
        loss = cross_entropy(model(inputs), labels[train_indices[positions]].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        update_progress(len(positions))
    return _classify(model, encoder.transform, dataset, test_indices, config.batch_size, device, num_workers)


def _param_groups(model: nn.Sequential, config: FineTuningConfig) -> list[dict[str, Any]]:
    """Return the parameters by rate, and by whether they decay: matrices do, biases and norms do not."""
    groups: list[dict[str, Any]] = []
    for module, lr in ((model[0], config.lr), (model[1], config.head_lr)):
        for has_decay in (True, False):
            params = [p for p in module.parameters() if (p.ndim > 1) == has_decay]
            groups.append({"params": params, "lr": lr, "weight_decay": config.weight_decay * has_decay})
    return [group for group in groups if group["params"]]


def _lr_factor(step: int, total_steps: int) -> float:
    """Return which share of its peak the rate has: a tenth of the steps up, then down as a cosine."""
    warmup_steps = max(1, total_steps // 10)
    return (
        (step + 1) / warmup_steps
        if step < warmup_steps
        else 0.5 * (1 + np.cos(np.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    )


def _iter_batches(config: FineTuningConfig, n: int) -> Iterator[tuple[int, np.ndarray]]:
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(n)
        for start in range(0, n, config.batch_size):
            if 0 < start == n - 1:
                continue  # batch norm learns nothing from one image; another one is left next epoch
            yield epoch, order[start : start + config.batch_size]


def _random_crops(
    dataset: LabeledDataset, indices: np.ndarray, transform: EvalTransform, seed: int, epoch: int
) -> np.ndarray:
    """Return random crops of images, (b, size, size, 3) uint8: the same for the same seed and epoch."""
    u = uniform(indices, 4, seed=seed, epoch=epoch, stream=Stream.FINETUNE)
    return np.stack([
        _random_crop(_read_image(dataset, index, transform.resize_size), transform, u_i)
        for index, u_i in zip(indices.tolist(), u, strict=True)
    ])  # fmt: skip


def _random_crop(pixels: np.ndarray, transform: EvalTransform, u: Sequence[float] | np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    crop_size = round((_MIN_CROP_AREA + (1 - _MIN_CROP_AREA) * u[0]) ** 0.5 * min(image.size))
    left, top = round(u[1] * (image.width - crop_size)), round(u[2] * (image.height - crop_size))
    resample = Image.Resampling[transform.interpolation.upper()]
    crop = image.resize(
        (transform.image_size, transform.image_size), resample, (left, top, left + crop_size, top + crop_size)
    )
    return np.asarray(crop)[:, ::-1] if u[3] < 0.5 else np.asarray(crop)


def _read_image(dataset: LabeledDataset, index: int, short_side: int) -> np.ndarray:
    return decode_image(read_image_bytes(ImageRef(path=dataset.files[index]), dataset.root), short_side)


@torch.inference_mode()
def _classify(
    model: nn.Module,
    transform: EvalTransform,
    dataset: LabeledDataset,
    indices: np.ndarray,
    batch_size: int,
    device: torch.device,
    num_workers: int,
) -> Int[Tensor, " m"]:
    model.eval()
    batches = np.array_split(indices, range(batch_size, len(indices), batch_size))

    def load_crops(batch: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                transform.center_crop(_read_image(dataset, index, transform.resize_size))
                for index in batch.tolist()
            ]
        )

    return torch.cat([
        model(transform.normalize(torch.from_numpy(crop_batch).to(device))).argmax(dim=1).cpu()
        for crop_batch in prefetch_map(load_crops, batches, num_workers)
    ])  # fmt: skip
