"""What the training loop costs beside bare steps: same model, same batch, same thread count."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.timing import alternate, told
from likewise.artifacts import read_jsonl
from likewise.data.dataset import CaptionDataset
from likewise.data.image_cache import build_image_cache
from likewise.data.importing import import_dataset
from likewise.data.readers.base import ImportOptions
from likewise.demo import make_emoji_dataset
from likewise.distributed import DistributedContext
from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.pairs.build import build_pairs
from likewise.pairs.config import PairConfig
from likewise.progress import NULL_PROGRESS
from likewise.training import trainer as loop
from likewise.training.checkpoint import TrainState
from likewise.training.config import TrainConfig, build_schedule, build_view_specs
from likewise.training.loader import PairLoader
from likewise.training.methods.base import Batch
from likewise.training.methods.registry import build_method
from likewise.training.optim import build_optimizer
from likewise.training.run_dir import METRICS_FILE

# Backbone, side, batch, steps.
SHAPES = (("resnet18", 64, 64, 6), ("resnet50", 128, 16, 6))
CPU = torch.device("cpu")


def run() -> Iterator[str]:
    """Compare the whole loop with bare steps of the same method on one batch that lies ready."""
    with tempfile.TemporaryDirectory() as folder:
        table = make_emoji_dataset(Path(folder) / "emoji", subsample=6)
        collection = import_dataset(table, Path(folder) / "collection", ImportOptions())
        for shape in SHAPES:
            for views in ("crop", "simclr"):
                yield _compare(collection, Path(folder), views, *shape)


def _compare(
    collection: CaptionDataset, folder: Path, views: str, name: str, size: int, batch: int, steps: int
) -> str:
    trainer = make_trainer(collection, folder, views, name, size, batch, steps)
    ready = trainer.loader.batch_at(0).to_device(trainer.loader.augmentations, CPU)
    fresh = count()

    def ours() -> None:
        train(trainer, folder / f"{views}-{name}-{next(fresh)}")

    seconds = alternate(ours, lambda: bare_steps(trainer, ready, steps))
    return told(f"{name} {size} px, batch {batch}, views {views}: the loop", "bare steps", seconds)


def make_trainer(
    collection: CaptionDataset,
    folder: Path,
    views: str,
    name: str,
    size: int,
    batch: int,
    steps: int,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    workers: int = 1,
) -> TrainState:
    """Put together what `likewise train` would, for SimCLR on each image with itself."""
    settings = TrainConfig(
        backbone=name, image_size=size, batch_size=batch, max_steps=steps, augmentation=views
    )
    rule = PairConfig(source="self")
    images = build_image_cache(collection, size * 3 // 2)
    pairs = build_pairs(collection, rule, images.readable)
    spec = BackboneConfig(name=name, image_size=size, stem="cifar" if size <= 64 else "standard")
    backbone, width = build_backbone(spec)
    method = build_method(settings, backbone, width).to(device).to(memory_format=torch.channels_last).train()
    return TrainState(
        run_dir=folder,
        method=method,
        backbone_config=spec,
        ddp_method=method,
        optimizer=build_optimizer("adamw", method, lr=1e-4, weight_decay=0.01),
        loader=PairLoader(images, pairs, build_view_specs(settings, rule), batch_size=batch, seed=0),
        schedule=replace(build_schedule(settings, len(collection), collection.path), log_every=steps),
        device=device,
        dtype=dtype,
        seed=0,
        num_workers=workers,
        checkpoint_minutes=60.0,
        dist=DistributedContext(),
        evaluator=None,
        early_stopping_patience=None,
        image_id=str,
    )


def train(trainer: TrainState, out: Path) -> list[dict[str, int | float]]:
    """Run the loop into a new folder and return its metrics; the model goes on from where it stands.

    Without the one checkpoint at the end, which is that of any run, however long, and would be most of so
    short a one.
    """
    out.mkdir()
    with patch.object(loop, "save_checkpoint"):
        loop.fit(replace(trainer, run_dir=out), NULL_PROGRESS)
    return read_jsonl(out / METRICS_FILE)


def bare_steps(trainer: TrainState, ready: Batch, steps: int) -> None:
    """Take optimizer steps on one batch that lies ready: what the loop is measured against."""
    for _ in range(steps):
        with torch.autocast(trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
            loss = trainer.method(ready).loss
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()
