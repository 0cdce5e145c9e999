"""Predictive methods: one view predicts the other, and nothing is pushed apart."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from likewise.models.heads import predictor, projector
from likewise.pretraining.losses import negative_cosine
from likewise.pretraining.methods.base import Judged, Method, Shown, encode
from likewise.pretraining.methods.memory import Slow, rising


@final
class SimSiam(Method):
    """SimSiam (Chen and He 2021, eq. 2); with `language` pairs, LGSimSiam (El Banani et al. 2023).

    Deviation from the paper: the learning rate of the predictor follows the schedule like all others.
    """

    def __init__(self, backbone: nn.Module, width: int, *, head: Sequence[int], hidden: int) -> None:
        """Put a projection and a prediction head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head, final_norm=True)
        self.predictor = predictor(head[-1], hidden)

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, and the predictions and projections of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        projected = self.projector(features)
        return features, (*self.predictor(projected).chunk(2), *projected.detach().chunk(2))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return minus the cosine of each prediction and the other view, averaged."""
        said_first, said_second, first, second = outputs
        return Judged((negative_cosine(said_first, second) + negative_cosine(said_second, first)) / 2)


@final
class BYOL(Method):
    """BYOL (Grill et al. 2020, eq. 2, symmetric): a view predicts what a slow copy makes of the other.

    The momentum of the copy rises to 1 along a cosine.
    """

    def __init__(
        self, backbone: nn.Module, width: int, *, head: Sequence[int], hidden: int, momentum: float
    ) -> None:
        """Put both heads on a backbone of `width` features, and make a slow copy of it and the first."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)
        self.predictor = predictor(head[-1], hidden)
        self.slow = Slow(self.backbone, self.projector)
        self.momentum = momentum

    def begin(self, shown: Shown) -> None:
        """Let the slow copy follow."""
        if self.training:
            self.slow.follow(self.backbone, self.projector, keep=rising(self.momentum, shown.progress))

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, predictions and targets of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        said = self.predictor(self.projector(features))
        # Last, so that a chunk that is embedded once more for its gradients ends before it.
        backbone, head = self.slow.copies
        with torch.no_grad():
            targets = head(torch.cat(encode(backbone, shown.views)))
        return features, (*said.chunk(2), *targets.chunk(2))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the squared distance of unit vectors, 2 - 2 cos, summed over both directions."""
        said_first, said_second, first, second = outputs
        return Judged(4 + 2 * (negative_cosine(said_first, second) + negative_cosine(said_second, first)))
