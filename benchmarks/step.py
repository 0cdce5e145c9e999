"""What the training loop costs beside bare steps: same model, same batch, same thread count."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.timing import alternate, told
from likewise.artifacts import read_lines
from likewise.data.dataset import Collection
from likewise.data.image_cache import pack_images
from likewise.data.importing import import_collection
from likewise.data.readers.base import ImportOptions
from likewise.demo import make_emoji
from likewise.distributed import Processes
from likewise.models.backbones import BackboneSpec, build_backbone
from likewise.pairs.build import make_pairs
from likewise.pairs.config import PairRule
from likewise.progress import SILENT
from likewise.training import trainer as loop
from likewise.training.checkpoint import Trainer
from likewise.training.config import TrainSettings, plan, showings
from likewise.training.loader import PairBatches
from likewise.training.methods.base import Shown
from likewise.training.methods.registry import build_method
from likewise.training.optim import build_optimizer
from likewise.training.run_dir import METRICS

# Backbone, side, batch, steps.
SHAPES = (("resnet18", 64, 64, 6), ("resnet50", 128, 16, 6))
CPU = torch.device("cpu")


def run() -> Iterator[str]:
    """Compare the whole loop with bare steps of the same method on one batch that lies ready."""
    with tempfile.TemporaryDirectory() as folder:
        table = make_emoji(Path(folder) / "emoji", every=6)
        collection = import_collection(table, Path(folder) / "collection", ImportOptions())
        for shape in SHAPES:
            for views in ("crop", "simclr"):
                yield _compare(collection, Path(folder), views, *shape)


def _compare(
    collection: Collection, folder: Path, views: str, name: str, size: int, batch: int, steps: int
) -> str:
    trainer = make_trainer(collection, folder, views, name, size, batch, steps)
    ready = trainer.batches.batch(0).shown(trainer.batches.recipes, CPU)
    fresh = count()

    def ours() -> None:
        train(trainer, folder / f"{views}-{name}-{next(fresh)}")

    seconds = alternate(ours, lambda: bare_steps(trainer, ready, steps))
    return told(f"{name} {size} px, batch {batch}, views {views}: the loop", "bare steps", seconds)


def make_trainer(
    collection: Collection,
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
) -> Trainer:
    """Put together what `likewise train` would, for SimCLR on each image with itself."""
    settings = TrainSettings(backbone=name, size=size, batch_size=batch, steps=steps, views=views)
    rule = PairRule(pairs="self")
    images = pack_images(collection, size * 3 // 2)
    pairs = make_pairs(collection, rule, images.usable)
    spec = BackboneSpec(name=name, size=size, stem="small" if size <= 64 else "standard")
    backbone, width = build_backbone(spec)
    method = build_method(settings, backbone, width).to(device).to(memory_format=torch.channels_last).train()
    return Trainer(
        run=folder,
        method=method,
        spec=spec,
        stepper=method,
        optimizer=build_optimizer("adamw", method, rate=1e-4, weight_decay=0.01),
        batches=PairBatches(images, pairs, showings(settings, rule), batch_size=batch, seed=0),
        plan=replace(plan(settings, len(collection), collection.path), log_every=steps),
        device=device,
        dtype=dtype,
        seed=0,
        workers=workers,
        checkpoint_minutes=60.0,
        among=Processes(),
        scorer=None,
        patience=None,
        name=str,
    )


def train(trainer: Trainer, out: Path) -> list[dict[str, int | float]]:
    """Run the loop into a new folder and return its metrics; the model goes on from where it stands.

    Without the one checkpoint at the end, which is that of any run, however long, and would be most of so
    short a one.
    """
    out.mkdir()
    with patch.object(loop, "save_checkpoint"):
        loop.run_training(replace(trainer, run=out), SILENT)
    return read_lines(out / METRICS)


def bare_steps(trainer: Trainer, ready: Shown, steps: int) -> None:
    """Take optimizer steps on one batch that lies ready: what the loop is measured against."""
    for _ in range(steps):
        with torch.autocast(trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
            loss = trainer.method(ready).loss
        trainer.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.optimizer.step()
