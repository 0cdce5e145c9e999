"""Pairs a second of `likewise train` against lightly's and solo-learn's way of writing the same training.

    python -m benchmarks.peers [--rounds R] [--steps S]

SimCLR on each image with itself: the same backbone, side, batch, views, loss, optimizer and number of steps
on the same picture files. Peers are Lightning modules: lightly's with its `LightlyDataset`, `SimCLR` views
written in torchvision and `NTXentLoss`, both views passed through the network one after the other, as its
tutorial does; solo-learn's the same with the linear classifier that it trains along on detached features.
"""

import argparse
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.transforms.multi_view_transform import MultiViewTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.step import make_trainer, train
from benchmarks.timing import alternate, told
from likewise.data.config import ImportOptions
from likewise.data.importing import import_dataset
from likewise.demo import make_emoji_dataset
from likewise.models.backbones import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig, build_backbone
from likewise.training.config import TrainConfig
from likewise.training.methods.modules import projection_head
from likewise.training.trainer import Trainer

NAME, SIZE, BATCH, HEAD = "resnet18", 64, 64, (2048, 2048, 128)


class LikeLightly(pl.LightningModule):
    """SimCLR as in lightly's tutorial, with our optimizer and widths of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.width = build_backbone(BackboneConfig(name=NAME, image_size=SIZE, stem="cifar"))
        self.head = projection_head(self.width, HEAD)
        self.criterion = NTXentLoss(temperature=0.1)

    def training_step(self, batch: list[Any], _: int) -> Tensor:
        """Return the loss of two views, each passed by itself."""
        first, second = batch[0]
        return self.criterion(self.head(self.backbone(first)), self.head(self.backbone(second)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW as torch makes it where nothing else is asked for."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.01)


class LikeSoloLearn(LikeLightly):
    """The same with solo-learn's linear classifier beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(self.width, 10)

    def training_step(self, batch: list[Any], _: int) -> Tensor:
        """Return the loss of the views and of the classifier on their features."""
        views, labels = batch[:2]
        features = [self.backbone(view) for view in views]
        said = [nn.functional.cross_entropy(self.classifier(each.detach()), labels) for each in features]
        first, second = (self.head(each) for each in features)
        return self.criterion(first, second) + sum(said) / len(said)


def _views() -> MultiViewTransform:
    """Return our recipe `simclr` in torchvision's own transforms, on Pillow images as lightly reads them."""
    one = v2.Compose([
        v2.RandomResizedCrop(SIZE, scale=(0.2, 1.0)),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(5, (0.1 * SIZE / 224, 2 * SIZE / 224))], 0.5),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
    ])  # fmt: skip
    return MultiViewTransform([one, one])


def run(rounds: int = 3, steps: int = 6) -> Iterator[str]:
    """Yield a line for each peer and precision; peers have two worker processes, kept from epoch to epoch."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = make_emoji_dataset(folder / "emoji", subsample=6)
        collection = import_dataset(table, folder / "c", ImportOptions())
        transform: Any = _views()  # lightly and torch each expect another type of what they take
        pictures: Any = LightlyDataset(str(collection.root), transform=transform)
        for dtype in (torch.float32, torch.bfloat16):
            config = TrainConfig(
                backbone=NAME,
                image_size=SIZE,
                batch_size=BATCH,
                max_steps=steps,
                augmentation="simclr",
                precision="fp32" if dtype == torch.float32 else "bf16",
            )
            trainer = make_trainer(collection, folder / f"run-{config.precision}", config)
            for peer, made in (("lightly", LikeLightly), ("solo-learn", LikeSoloLearn)):
                model = made().train()

                def ours(trainer: Trainer = trainer) -> object:
                    return train(trainer)

                def theirs(model: pl.LightningModule = model, dtype: torch.dtype = dtype) -> None:
                    loader = DataLoader(
                        pictures, BATCH, shuffle=True, drop_last=True, num_workers=2,
                        persistent_workers=True,
                    )  # fmt: skip
                    pl.Trainer(
                        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False,
                        precision="32-true" if dtype == torch.float32 else "bf16-mixed",
                    ).fit(model, loader)  # fmt: skip

                yield told(
                    f"{steps} steps, {NAME} {SIZE} px, batch {BATCH}, {str(dtype).removeprefix('torch.')}",
                    f"{peer}, on Lightning",
                    alternate(ours, theirs, rounds),
                )
            row = train(trainer)[-1]
            yield f"ours, {dtype}: share of time waited for data {row['data_time_fraction']:.4f}"


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    asked = parser.parse_args()
    for line in run(asked.rounds, asked.steps):
        print(line, flush=True)


if __name__ == "__main__":
    main()
