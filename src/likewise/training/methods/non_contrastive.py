"""Non-contrastive methods: one view predicts the other, without negatives."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from likewise.training.losses import (
    barlow_twins_loss,
    negative_cosine_loss,
    sinkhorn,
    swav_loss,
    vicreg_loss,
)
from likewise.training.methods.base import (
    Batch,
    EMAPredictorMethod,
    MemoryBank,
    SiameseMethod,
    StepOutput,
    forward_views,
    prediction_head,
)
from likewise.training.methods.options import SimSiamOptions, SwAVOptions

# Fractions of the run; of 250,000 steps, the LGSSL code has 2,503 with frozen prototypes and 37,500 without a
# memory bank.
_FROZEN_PROTOTYPES_FRACTION, _MEMORY_BANK_START_FRACTION = 0.01, 0.15


@final
class VICReg(SiameseMethod):
    """VICReg (Bardes et al. 2022, eq. 6)."""

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the loss with the paper's weights."""
        return StepOutput(loss=vicreg_loss(outputs[0], outputs[1]))


@final
class BarlowTwins(SiameseMethod):
    """Barlow Twins (Zbontar et al. 2021, eq. 1)."""

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the loss with the paper's weight of 0.005."""
        return StepOutput(loss=barlow_twins_loss(outputs[0], outputs[1]))


@final
class SwAV(SiameseMethod):
    """SwAV (Caron et al. 2020, eq. 2 to 6), with optional local crops; codes come from the two large views.

    Deviation from the LGSSL code: the softmax of a prediction is over the prototypes, as in the paper; LGSSL
    takes it over the batch.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, options: SwAVOptions) -> None:
        """Add a projection head, prototypes and, if `bank_size` is above 0, a memory bank per view."""
        super().__init__(backbone, feature_dim, options)
        dim, bank_size = options.projector_dims[-1], options.bank_size
        self.prototypes = nn.Parameter(normalize(torch.randn(options.num_prototypes, dim), dim=1))
        self.memory_bank_1 = MemoryBank(bank_size, dim) if bank_size else None
        self.memory_bank_2 = MemoryBank(bank_size, dim) if bank_size else None
        self.temperature = options.temperature

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the large views, and the projections of all views, of unit length."""
        features = forward_views(self.backbone, batch.views)
        projections = normalize(self.projector(torch.cat(features)).float(), dim=1)
        return torch.cat(features[:2]), projections.chunk(len(features))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the loss, and enqueue the projections of the large views."""
        prototypes = normalize(self.prototypes, dim=1)
        if batch.train_fraction < _FROZEN_PROTOTYPES_FRACTION:
            # Still part of the graph, because DDP waits for the gradient of every parameter.
            prototypes = prototypes.detach() + 0 * prototypes
        scores = [linear(z, prototypes) for z in outputs]
        codes = []
        for view, memory_bank in enumerate((self.memory_bank_1, self.memory_bank_2)):
            active_bank = None if batch.train_fraction < _MEMORY_BANK_START_FRACTION else memory_bank
            codes.append(self._assign_codes(scores[view], active_bank, prototypes))
            if self.training and memory_bank is not None:
                memory_bank.enqueue(outputs[view])
        return StepOutput(loss=swav_loss(scores, codes, self.temperature))

    @torch.no_grad()
    def _assign_codes(self, scores: Tensor, memory_bank: MemoryBank | None, prototypes: Tensor) -> Tensor:
        """Assign the samples of a view to prototypes, together with those of the memory bank."""
        if memory_bank is None:
            return sinkhorn(scores)
        return sinkhorn(torch.cat([scores, linear(memory_bank.bank, prototypes)]))[: len(scores)]


@final
class SimSiam(SiameseMethod):
    """SimSiam (Chen and He 2021, eq. 2); with language pairs, LGSimSiam (El Banani et al. 2023).

    Deviation from the paper: the learning rate of the prediction head follows the schedule.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, options: SimSiamOptions) -> None:
        """Add a projection head that ends in batch norm, and a prediction head."""
        super().__init__(backbone, feature_dim, options, final_norm=True)
        self.predictor = prediction_head(options.projector_dims[-1], options.predictor_hidden_dim)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features, and the predictions and detached projections of both views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        projections = self.projector(features)
        return features, (*self.predictor(projections).chunk(2), *projections.detach().chunk(2))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the negative cosine similarity of predictions and projections, averaged over both views."""
        pred_1, pred_2, z1, z2 = outputs
        return StepOutput(loss=(negative_cosine_loss(pred_1, z2) + negative_cosine_loss(pred_2, z1)) / 2)


@final
class BYOL(EMAPredictorMethod):
    """BYOL (Grill et al. 2020, eq. 2, symmetric): predict the projection of the partner by the EMA copy."""

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the squared distance of unit vectors, 2 - 2 cos, summed over both directions."""
        pred_1, pred_2, target_1, target_2 = outputs
        loss = 4 + 2 * (negative_cosine_loss(pred_1, target_2) + negative_cosine_loss(pred_2, target_1))
        return StepOutput(loss=loss)
