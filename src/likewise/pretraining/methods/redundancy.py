"""Redundancy reduction: partners alike, coordinates each of their own worth."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from likewise.models.heads import projector
from likewise.pretraining.losses import barlow_twins, vicreg
from likewise.pretraining.methods.base import Judged, Method, Shown, encode


@final
class VICReg(Method):
    """VICReg (Bardes et al. 2022, eq. 6)."""

    def __init__(self, backbone: nn.Module, width: int, *, head: Sequence[int]) -> None:
        """Put a projection head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        return features, self.projector(features).chunk(2)

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss with the paper's weights."""
        return Judged(vicreg(outputs[0], outputs[1]))


@final
class BarlowTwins(Method):
    """Barlow Twins (Zbontar et al. 2021, eq. 1)."""

    def __init__(self, backbone: nn.Module, width: int, *, head: Sequence[int]) -> None:
        """Put a projection head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        return features, self.projector(features).chunk(2)

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss with the paper's weight of 0.005."""
        return Judged(barlow_twins(outputs[0], outputs[1]))
