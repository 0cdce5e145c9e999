"""Contrastive methods: pull partners together, push the rest of the batch apart."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from likewise.models.heads import projector
from likewise.pretraining.losses import alike_share, false_negative_weights, nt_xent
from likewise.pretraining.methods.base import Method, Step
from likewise.pretraining.settings import Negatives


@final
class SimCLR(Method):
    """SimCLR (Chen et al. 2020); with `language` pairs, LGSimCLR (El Banani et al. 2023, section 3).

    Deviation from the LGSSL code: both views pass through the network as one batch, so BatchNorm's
    statistics are those of both, as in the SimCLR paper; LGSSL passes them one after the other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        temperature: float,
        head: Sequence[int],
        negatives: Negatives = "all",
        alike: float = 0.8,
    ) -> None:
        """Put a projection head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)
        self.temperature = temperature
        self.negatives: Negatives = negatives
        self.alike = alike

    def step(self, views: Float[Tensor, "v b c h w"], captions: Float[Tensor, "v b d"] | None = None) -> Step:
        """Return NT-Xent over the two views."""
        features = self.backbone(views.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        first, second = self.projector(features).float().chunk(2)
        # Similarities decide who is alike and who is picked: too much for the 8 bits of mixed precision.
        with torch.autocast(views.device.type, enabled=False):
            weights, targets, logs = None, None, {}
            if captions is not None and self.negatives != "all":
                flat = captions.flatten(0, 1)
                similarity = flat @ flat.T
                weights, targets = false_negative_weights(similarity, self.alike, self.negatives)
                logs = {"alike": alike_share(similarity, self.alike)}
            loss = nt_xent(first, second, self.temperature, weights, targets)
        return Step(loss, features.detach(), logs)
