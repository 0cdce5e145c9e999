"""Training throughput of likewise against the same SimCLR in lightly and solo-learn.

    python -m benchmarks.peers [--rounds R] [--steps S]

Self pairs with the same backbone, image size, batch size, augmentation, loss, optimizer and number of steps,
on the same image files. Peers are Lightning modules: lightly's with `LightlyDataset`, torchvision transforms
and `NTXentLoss`, which encodes one view after the other, as in its tutorial; solo-learn's with the online
linear classifier on detached features.
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
from benchmarks.timing import alternate, format_result
from likewise.data.config import IMAGENET_MEAN, IMAGENET_STD, ImportOptions
from likewise.data.importing import import_dataset
from likewise.demo import make_emoji_dataset
from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.training.config import TrainConfig
from likewise.training.methods.base import projection_head
from likewise.training.trainer import Trainer

BACKBONE, IMAGE_SIZE, BATCH_SIZE, PROJECTOR_DIMS = "resnet18", 64, 64, (2048, 2048, 128)


class LightlySimCLR(pl.LightningModule):
    """SimCLR as in lightly's tutorial, with likewise's optimizer and projection head."""

    def __init__(self) -> None:
        super().__init__()
        config = BackboneConfig(name=BACKBONE, image_size=IMAGE_SIZE, stem="cifar")
        self.backbone, self.feature_dim = build_backbone(config)
        self.projection_head = projection_head(self.feature_dim, PROJECTOR_DIMS)
        self.criterion = NTXentLoss(temperature=0.1)

    def training_step(self, batch: list[Any], _: int) -> Tensor:
        """Return the loss of two views, encoded one after the other."""
        z1, z2 = (self.projection_head(self.backbone(view)) for view in batch[0])
        return self.criterion(z1, z2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.01)


class SoloLearnSimCLR(LightlySimCLR):
    """The same with solo-learn's online linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(self.feature_dim, 10)

    def training_step(self, batch: list[Any], _: int) -> Tensor:
        """Return the loss of the views and of the classifier on their features."""
        views, labels = batch[:2]
        features = [self.backbone(view) for view in views]
        z1, z2 = (self.projection_head(z) for z in features)
        class_losses = [nn.functional.cross_entropy(self.classifier(z.detach()), labels) for z in features]
        return self.criterion(z1, z2) + sum(class_losses) / len(class_losses)


def _simclr_transform() -> MultiViewTransform:
    """Return the augmentation `simclr` as torchvision transforms of Pillow images."""
    view = v2.Compose([
        v2.RandomResizedCrop(IMAGE_SIZE, scale=(0.2, 1.0)),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(5, (0.1 * IMAGE_SIZE / 224, 2 * IMAGE_SIZE / 224))], 0.5),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
    ])  # fmt: skip
    return MultiViewTransform([view, view])


def run(rounds: int = 3, steps: int = 6) -> Iterator[str]:
    """Yield one line per peer and precision; peers have two persistent worker processes."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = make_emoji_dataset(folder / "emoji", subsample=6)
        dataset = import_dataset(table, folder / "dataset", ImportOptions())
        transform: Any = _simclr_transform()  # the annotations of lightly and torch differ
        images: Any = LightlyDataset(str(dataset.root), transform=transform)
        for dtype in (torch.float32, torch.bfloat16):
            config = TrainConfig(
                backbone=BACKBONE,
                image_size=IMAGE_SIZE,
                batch_size=BATCH_SIZE,
                max_steps=steps,
                augmentation="simclr",
                precision="fp32" if dtype == torch.float32 else "bf16",
            )
            trainer = make_trainer(dataset, folder / f"run-{config.precision}", config)
            for peer, module in (("lightly", LightlySimCLR), ("solo-learn", SoloLearnSimCLR)):
                model = module().train()

                def likewise_fit(trainer: Trainer = trainer) -> object:
                    return train(trainer)

                def peer_fit(model: pl.LightningModule = model, dtype: torch.dtype = dtype) -> None:
                    loader = DataLoader(
                        images, BATCH_SIZE, shuffle=True, drop_last=True, num_workers=2,
                        persistent_workers=True,
                    )  # fmt: skip
                    pl.Trainer(
                        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False,
                        precision="32-true" if dtype == torch.float32 else "bf16-mixed",
                    ).fit(model, loader)  # fmt: skip

                yield format_result(
                    f"{steps} steps, {BACKBONE} {IMAGE_SIZE} px, batch {BATCH_SIZE}, {config.precision}",
                    f"{peer} on Lightning",
                    alternate(likewise_fit, peer_fit, rounds),
                )
            row = train(trainer)[-1]
            yield f"likewise, {config.precision}: data wait {row['data_time_fraction']:.4f}"


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    for line in run(args.rounds, args.steps):
        print(line, flush=True)


if __name__ == "__main__":
    main()
