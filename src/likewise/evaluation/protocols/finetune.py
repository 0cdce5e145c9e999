"""Fine-tuning: the encoder is trained together with a linear classifier."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from likewise.data.dataset import ImageRef
from likewise.data.images import read_image
from likewise.evaluation.datasets.labeled import LabeledDataset
from likewise.evaluation.protocols.base import (
    ClassificationConfig,
    EvalContext,
    Protocol,
    Score,
    accuracy_score,
    check_positive,
    seeded_rng,
)
from likewise.evaluation.results import ResultRow
from likewise.models.encoders import ImageEncoder
from likewise.models.transforms import EvalTransform
from likewise.parallel import prefetch_map
from likewise.rng import Stream, uniform

_MIN_CROP_AREA = 0.35  # smallest crop as a fraction of the image area, as in timm's recipes for fine-tuning


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(ClassificationConfig):
    """Options of fine-tuning."""

    epochs: int = 10
    """Number of epochs."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-4
    """Peak learning rate of the encoder (AdamW), with warmup over 10 % of the steps and cosine decay."""
    head_lr: float = 1e-3
    """Peak learning rate of the classifier, which is randomly initialized."""
    weight_decay: float = 0.05
    """Weight decay; biases and norms are excluded."""
    seed: int = 0
    """Seed of the classifier, the order, crops and flips."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(self, "epochs", "batch_size", "lr", "head_lr")


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
    """Train a copy of the encoder with a linear classifier, and classify the test images.

    The last checkpoint is evaluated; nothing is selected on the test images. Training uses random crops and
    horizontal flips, testing the encoder's own transform.

    Args:
        config: The options.
        encoder: Not modified.
        dataset: The dataset.
        train_indices: (n,) indices of readable training images.
        test_indices: (m,) indices of readable test images.
        device: Device of the training.
        num_workers: Threads that decode images.
        update_progress: Called with the number of images after every step.

    Returns:
        (m,) int64 predicted classes.

    Raises:
        ValueError: There are no training images.
    """
    if not len(train_indices):
        raise ValueError("fine-tuning needs at least one training image")
    with seeded_rng(config.seed):
        model = nn.Sequential(deepcopy(encoder.model), nn.Linear(encoder.feature_dim, len(dataset.classes)))
        model.requires_grad_(True).to(device).to(memory_format=torch.channels_last)
        train_loader = _CropLoader(config, encoder.transform, dataset, train_indices, num_workers)
        _train(config, model, train_loader, device, update_progress)
    return _classify(model, encoder.transform, dataset, test_indices, config.batch_size, device, num_workers)


@dataclass(frozen=True)
class _CropLoader:
    """Random crops of the training images in batches; the order and crops depend on the seed alone."""

    config: FineTuningConfig
    transform: EvalTransform
    dataset: LabeledDataset
    indices: Int[np.ndarray, " n"]
    num_workers: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield crops (b, size, size, 3) uint8 and labels (b,) int64, on the CPU."""
        labels = torch.from_numpy(self.dataset.labels)
        batches = list(self._batches())
        crops = prefetch_map(self._random_crops, batches, self.num_workers)
        for (_, indices), crop_batch in zip(batches, crops, strict=True):
            yield torch.from_numpy(crop_batch), labels[indices]

    def __len__(self) -> int:
        """Return the number of steps in all epochs."""
        return sum(1 for _ in self._batches())

    def _batches(self) -> Iterator[tuple[int, Int[np.ndarray, " b"]]]:
        """Yield the epoch and the image indices of each batch."""
        n, batch_size = len(self.indices), self.config.batch_size
        for epoch in range(self.config.epochs):
            order = np.random.default_rng((self.config.seed, epoch)).permutation(n)
            for start in range(0, n, batch_size):
                if 0 < start == n - 1:
                    continue  # batch norm needs two images; another image is excluded in the next epoch
                yield epoch, self.indices[order[start : start + batch_size]]

    def _random_crops(self, batch: tuple[int, Int[np.ndarray, " b"]]) -> np.ndarray:
        """Return crops (b, size, size, 3) uint8."""
        epoch, indices = batch
        u = uniform(indices, 4, seed=self.config.seed, epoch=epoch, stream=Stream.FINETUNE)
        return np.stack([
            _random_crop(_read_image(self.dataset, index, self.transform), self.transform, u_i)
            for index, u_i in zip(indices.tolist(), u, strict=True)
        ])  # fmt: skip


def _train(
    config: FineTuningConfig,
    model: nn.Sequential,
    loader: _CropLoader,
    device: torch.device,
    update_progress: Callable[[int], None],
) -> None:
    param_groups = [
        group | {"lr": lr}
        for module, lr in ((model[0], config.lr), (model[1], config.head_lr))
        for group in param_groups_weight_decay(module, config.weight_decay)
    ]
    optimizer = torch.optim.AdamW(param_groups)
    total_steps = len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, total_steps))
    model.train()
    for crops, labels in loader:
        loss = cross_entropy(model(loader.transform.normalize(crops.to(device))), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        update_progress(len(labels))


def _lr_factor(step: int, total_steps: int) -> float:
    """Return the fraction of the peak learning rate: warmup over 10 % of the steps, then cosine decay."""
    warmup_steps = max(1, total_steps // 10)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def _random_crop(pixels: np.ndarray, transform: EvalTransform, u: Sequence[float] | np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    crop_size = round((_MIN_CROP_AREA + (1 - _MIN_CROP_AREA) * u[0]) ** 0.5 * min(image.size))
    left, top = round(u[1] * (image.width - crop_size)), round(u[2] * (image.height - crop_size))
    resample = Image.Resampling[transform.interpolation.upper()]
    crop = image.resize(
        (transform.image_size, transform.image_size), resample, (left, top, left + crop_size, top + crop_size)
    )
    return np.asarray(crop)[:, ::-1] if u[3] < 0.5 else np.asarray(crop)


def _read_image(dataset: LabeledDataset, index: int, transform: EvalTransform) -> np.ndarray:
    ref = ImageRef(path=dataset.files[index], bands=transform.bands)
    return read_image(ref, dataset.root, transform.resize_size)


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
            [transform.center_crop(_read_image(dataset, index, transform)) for index in batch.tolist()]
        )

    return torch.cat([
        model(transform.normalize(torch.from_numpy(crop_batch).to(device))).argmax(dim=1).cpu()
        for crop_batch in prefetch_map(load_crops, batches, num_workers)
    ])  # fmt: skip


class FineTuning(Protocol):
    """Fine-tuning of the encoder on train and val."""

    name = "finetune"
    title = "Fine-tuned"
    summary = "train the encoder together with a linear classifier"
    config: FineTuningConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Train on train and val, and classify the test images."""
        train_indices, test_indices = context.indices("train", "val"), context.indices("test")
        with context.progress.task(
            f"fine-tuning on {context.dataset.name}", len(train_indices) * self.config.epochs, "images"
        ) as bar:
            predictions = fine_tune(
                self.config,
                context.encoder,
                context.labeled_dataset,
                train_indices,
                test_indices,
                device=context.device,
                num_workers=context.num_workers,
                update_progress=bar.update,
            )
        labels = torch.from_numpy(context.labeled_dataset.labels[test_indices])
        return [accuracy_score(predictions, labels, self.config)]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the training."""
        return (
            "The encoder and a linear classifier are trained together on the labeled training images for "
            f"{row.config['epochs']} epochs, then classify the test images."
        )
