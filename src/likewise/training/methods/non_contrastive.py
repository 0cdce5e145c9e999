"""Predictive methods: one view predicts the other, and nothing is pushed apart."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from likewise.training.losses import barlow_twins_loss, negative_cosine, sinkhorn, swav_loss, vicreg_loss
from likewise.training.methods.base import Batch, LossOutput, Method, forward_views
from likewise.training.methods.modules import (
    EMAModel,
    MemoryBank,
    cosine_momentum,
    prediction_head,
    projection_head,
)


@final
class VICReg(Method):
    """VICReg (Bardes et al. 2022, eq. 6)."""

    def __init__(self, backbone: nn.Module, feature_dim: int, *, projector_dims: Sequence[int]) -> None:
        """Put a projection head on a backbone of `feature_dim` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_dim, projector_dims)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of both views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        return features, self.projector(features).chunk(2)

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the loss with the paper's weights."""
        return LossOutput(vicreg_loss(outputs[0], outputs[1]))


@final
class BarlowTwins(Method):
    """Barlow Twins (Zbontar et al. 2021, eq. 1)."""

    def __init__(self, backbone: nn.Module, feature_dim: int, *, projector_dims: Sequence[int]) -> None:
        """Put a projection head on a backbone of `feature_dim` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_dim, projector_dims)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of both views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        return features, self.projector(features).chunk(2)

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the loss with the paper's weight of 0.005."""
        return LossOutput(barlow_twins_loss(outputs[0], outputs[1]))


# Shares of the run; of 250,000 steps, the LGSSL code has 2,503 with frozen prototypes, 37,500 without queue.
_FROZEN_PROTOTYPES_FRACTION, _MEMORY_BANK_START_FRACTION = 0.01, 0.15


@final
class SwAV(Method):
    """SwAV (Caron et al. 2020, eq. 2 to 6), with small views if asked for; codes come from the large ones.

    Deviation from the LGSSL code: the softmax of a prediction is over the prototypes, as in the paper; LGSSL
    takes it over the batch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        temperature: float,
        projector_dims: Sequence[int],
        num_prototypes: int,
        memory_bank_size: int,
    ) -> None:
        """Put a projection head and prototypes on a backbone; `memory_bank_size` rows a view, 0 for none."""
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_dim, projector_dims)
        self.prototypes = nn.Parameter(normalize(torch.randn(num_prototypes, projector_dims[-1]), dim=1))
        self.memory_bank_1 = MemoryBank(memory_bank_size, projector_dims[-1]) if memory_bank_size else None
        self.memory_bank_2 = MemoryBank(memory_bank_size, projector_dims[-1]) if memory_bank_size else None
        self.temperature = temperature

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the large views, and unit projections of all views."""
        features = forward_views(self.backbone, batch.views)
        projections = normalize(self.projector(torch.cat(features)).float(), dim=1)
        return torch.cat(features[:2]), projections.chunk(len(features))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the loss, and put the projections of the large views into their queues."""
        prototypes = normalize(self.prototypes, dim=1)
        if batch.train_fraction < _FROZEN_PROTOTYPES_FRACTION:
            # Kept in the graph, for processes that wait for every gradient.
            prototypes = prototypes.detach() + 0 * prototypes
        scores = [linear(z, prototypes) for z in outputs]
        codes = []
        for view, memory_bank in enumerate((self.memory_bank_1, self.memory_bank_2)):
            active_bank = None if batch.train_fraction < _MEMORY_BANK_START_FRACTION else memory_bank
            codes.append(self._assign_codes(scores[view], active_bank, prototypes))
            if self.training and memory_bank is not None:
                memory_bank.enqueue(outputs[view])
        return LossOutput(swav_loss(scores, codes, self.temperature))

    @torch.no_grad()
    def _assign_codes(self, scores: Tensor, memory_bank: MemoryBank | None, prototypes: Tensor) -> Tensor:
        """Assign a view's samples, together with the queue's where there is one."""
        if memory_bank is None:
            return sinkhorn(scores)
        return sinkhorn(torch.cat([scores, linear(memory_bank.bank, prototypes)]))[: len(scores)]


@final
class SimSiam(Method):
    """SimSiam (Chen and He 2021, eq. 2); with `language` pairs, LGSimSiam (El Banani et al. 2023).

    Deviation from the paper: the learning rate of the predictor follows the schedule like all others.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector_dims: Sequence[int],
        predictor_hidden_dim: int,
    ) -> None:
        """Put a projection and a prediction head on a backbone of `feature_dim` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_dim, projector_dims, final_norm=True)
        self.predictor = prediction_head(projector_dims[-1], predictor_hidden_dim)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, and the predictions and projections of both views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        projections = self.projector(features)
        return features, (*self.predictor(projections).chunk(2), *projections.detach().chunk(2))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return minus the cosine of each prediction and the other view, averaged."""
        pred_1, pred_2, z1, z2 = outputs
        return LossOutput((negative_cosine(pred_1, z2) + negative_cosine(pred_2, z1)) / 2)


@final
class BYOL(Method):
    """BYOL (Grill et al. 2020, eq. 2, symmetric): a view predicts what a slow copy makes of the other.

    The momentum of the copy rises to 1 along a cosine.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        projector_dims: Sequence[int],
        predictor_hidden_dim: int,
        ema_momentum: float,
    ) -> None:
        """Add both heads to a backbone of `feature_dim` features, and an EMA copy of both."""
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_dim, projector_dims)
        self.predictor = prediction_head(projector_dims[-1], predictor_hidden_dim)
        self.ema_model = EMAModel(self.backbone, self.projector)
        self.ema_momentum = ema_momentum

    def on_step_start(self, batch: Batch) -> None:
        """Let the slow copy follow."""
        if self.training:
            self.ema_model.update(
                self.backbone,
                self.projector,
                momentum=cosine_momentum(self.ema_momentum, batch.train_fraction),
            )

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, predictions and targets of both views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        predictions = self.predictor(self.projector(features))
        # Last, so that a chunk that is embedded once more for its gradients ends before it.
        ema_backbone, ema_projector = self.ema_model.ema_modules
        with torch.no_grad():
            targets = ema_projector(torch.cat(forward_views(ema_backbone, batch.views)))
        return features, (*predictions.chunk(2), *targets.chunk(2))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the squared distance of unit vectors, 2 - 2 cos, summed over both directions."""
        pred_1, pred_2, target_1, target_2 = outputs
        return LossOutput(4 + 2 * (negative_cosine(pred_1, target_2) + negative_cosine(pred_2, target_1)))
