"""What the training step costs beside the bare backbone: same model, same batch, same thread count."""

import tempfile
from pathlib import Path

import torch

from benchmarks.timing import alternate, told
from likewise.collection.emoji import make_emoji
from likewise.collection.importing import import_collection
from likewise.collection.packed import pack_images
from likewise.collection.sources.candidates import ImportOptions
from likewise.models.backbones import BackboneSpec, build_backbone
from likewise.neighbors.rules import PairRule
from likewise.neighbors.sources import make_pairs
from likewise.pretraining.batches import PairBatches
from likewise.pretraining.methods import build_method
from likewise.pretraining.optim import adamw
from likewise.pretraining.settings import TrainSettings
from likewise.pretraining.views import view_recipe

SIZE, BATCH, STEPS = 64, 64, 4


def run() -> list[str]:
    """Compare steps on real batches with bare steps on one batch that lies ready."""
    with tempfile.TemporaryDirectory() as folder:
        return [_compare(Path(folder), recipe) for recipe in ("crop", "simclr")]


def _compare(folder: Path, recipe_name: str) -> str:
    table = make_emoji(folder / "emoji", every=6)
    collection = import_collection(table, folder / "collection", ImportOptions())
    images = pack_images(collection, SIZE * 3 // 2)
    pairs = make_pairs(collection, PairRule(pairs="self"), images.usable)
    recipe = view_recipe(recipe_name)
    batches = PairBatches(images, pairs, recipe, batch_size=BATCH, size=SIZE, seed=0)
    settings = TrainSettings(backbone="resnet18", size=SIZE, batch_size=BATCH)
    backbone, width = build_backbone(BackboneSpec(name="resnet18", size=SIZE))
    method = build_method(settings, backbone, width).to(memory_format=torch.channels_last)
    optimizer = adamw(method, rate=1e-4, weight_decay=0.01)
    cpu = torch.device("cpu")
    ready = batches.batch(0).views(recipe, cpu)

    def step(views: torch.Tensor) -> None:
        loss = method.step(views).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def ours() -> None:
        for batch in batches.stream(0, STEPS, 1):
            step(batch.views(recipe, cpu))

    def bare() -> None:
        for _ in range(STEPS):
            step(ready)

    seconds = alternate(ours, bare)
    return told(
        f"resnet18 {SIZE} px, batch {BATCH}, views {recipe_name}", "the same steps without data", seconds
    )
