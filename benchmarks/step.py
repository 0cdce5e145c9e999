"""Overhead of the training loop over bare optimizer steps: same model, same batch, same thread count."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.timing import alternate, format_result
from likewise.artifacts import read_jsonl
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.demo import make_emoji_dataset
from likewise.distributed import DistributedContext
from likewise.pairs.config import PairConfig
from likewise.training.config import Augmentation, TrainConfig
from likewise.training.methods.base import Batch
from likewise.training.trainer import Trainer

# Backbone, image size, batch size, steps.
SHAPES = (("resnet18", 64, 64, 6), ("resnet50", 128, 16, 6))
AUGMENTATIONS: tuple[Augmentation, ...] = ("crop", "simclr")
CPU = torch.device("cpu")


def run() -> Iterator[str]:
    """Compare the training loop with bare steps of the same method on one batch."""
    with tempfile.TemporaryDirectory() as folder:
        table = make_emoji_dataset(Path(folder) / "emoji", subsample=6)
        dataset = import_dataset(table, Path(folder) / "dataset", ImportOptions())
        for backbone, image_size, batch_size, steps in SHAPES:
            for augmentation in AUGMENTATIONS:
                config = TrainConfig(
                    backbone=backbone,
                    image_size=image_size,
                    batch_size=batch_size,
                    max_steps=steps,
                    augmentation=augmentation,
                    precision="fp32",
                )
                yield _compare(make_trainer(dataset, Path(folder) / f"{backbone}-{augmentation}", config))


def _compare(trainer: Trainer) -> str:
    config, steps = trainer.config, trainer.schedule.steps
    batch = trainer.loader.batch_at(0).to_device(trainer.loader.dataset.augmentations, CPU)
    seconds = alternate(lambda: train(trainer), lambda: bare_steps(trainer, batch, steps))
    name = f"{config.backbone} {config.image_size} px, batch {config.batch_size}, {config.augmentation}"
    return format_result(f"{name}: training loop", "bare steps", seconds)


def make_trainer(
    dataset: CaptionDataset,
    out: Path,
    config: TrainConfig,
    *,
    device: torch.device = CPU,
    num_workers: int = 1,
) -> Trainer:
    """Set up a training run on self pairs that logs only after its last step."""
    trainer = Trainer.setup(
        dataset,
        out,
        config,
        PairConfig(source="self"),
        dist_context=DistributedContext(),
        device=device,
        num_workers=num_workers,
    )
    trainer.schedule = replace(trainer.schedule, log_every=trainer.schedule.steps)
    return trainer


def train(trainer: Trainer) -> list[dict[str, int | float]]:
    """Run all steps and return the metrics; training continues from the weights of the previous call.

    Checkpoints are disabled: the one after the last step would dominate a short run.
    """
    trainer.fit(checkpoint_minutes=None)
    return read_jsonl(trainer.run_dir.metrics_path)


def bare_steps(trainer: Trainer, batch: Batch, steps: int) -> None:
    """Take optimizer steps on one batch that is on the device."""
    for _ in range(steps):
        with torch.autocast(trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
            loss = trainer.method(batch).loss
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()
