"""Contrastive methods: positives attract; the rest of the batch, or a memory bank, repels."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from likewise.training.losses import (
    dcl_loss,
    false_negative_fraction,
    false_negative_weights,
    info_nce_loss,
    moco_loss,
    nt_xent_loss,
    supcon_loss,
)
from likewise.training.methods.base import (
    Batch,
    EMAModel,
    EMAPredictorMethod,
    MemoryBank,
    SiameseMethod,
    StepOutput,
    forward_views,
    prediction_head,
)
from likewise.training.methods.options import (
    DCLOptions,
    MoCoOptions,
    MoCoV3Options,
    NNCLROptions,
    SimCLROptions,
    SupConOptions,
)


@final
class SimCLR(SiameseMethod):
    """SimCLR (Chen et al. 2020, eq. 1); with language pairs, LGSimCLR (El Banani et al. 2023, section 3).

    Deviation from the LGSSL code: both views pass through the network as one batch, so the statistics of
    batch norm are those of both, as in the SimCLR paper; LGSSL passes them one after the other.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, options: SimCLROptions) -> None:
        """Add a projection head."""
        super().__init__(backbone, feature_dim, options)
        self.options = options

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return NT-Xent."""
        z1, z2 = outputs
        similarity = _caption_similarity(batch, self.options)
        if similarity is None:
            return StepOutput(loss=nt_xent_loss(z1, z2, self.options.temperature))
        threshold = self.options.false_negative_threshold
        weights, targets = false_negative_weights(similarity, threshold, self.options.false_negatives)
        return StepOutput(
            loss=nt_xent_loss(z1, z2, self.options.temperature, weights, targets),
            logs={"false_negative_fraction": false_negative_fraction(similarity, threshold)},
        )


@final
class DCL(SiameseMethod):
    """Decoupled contrastive learning (Yeh et al. 2022, eq. 6): no positive in its own denominator."""

    def __init__(self, backbone: nn.Module, feature_dim: int, options: DCLOptions) -> None:
        """Add a projection head."""
        super().__init__(backbone, feature_dim, options)
        self.options = options

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the decoupled loss."""
        z1, z2 = outputs
        similarity = _caption_similarity(batch, self.options)
        if similarity is None:
            return StepOutput(loss=dcl_loss(z1, z2, self.options.temperature))
        threshold = self.options.false_negative_threshold
        weights, _ = false_negative_weights(similarity, threshold, self.options.false_negatives)
        return StepOutput(
            loss=dcl_loss(z1, z2, self.options.temperature, weights),
            logs={"false_negative_fraction": false_negative_fraction(similarity, threshold)},
        )


def _caption_similarity(batch: Batch, options: SimCLROptions | DCLOptions) -> Float[Tensor, "v v"] | None:
    """Return the caption similarity of all views, or None if all negatives are kept."""
    if options.false_negatives == "keep" or batch.caption_embeddings is None:
        return None
    captions = batch.caption_embeddings.flatten(0, 1)
    return captions @ captions.T


@final
class SupCon(SiameseMethod):
    """Supervised contrastive learning (Khosla et al. 2020, eq. 2) with partners, or labels, as the classes.

    With pairs sampled by label, all images of one label in the batch are positives of each other. With any
    other source, the positives of an anchor are its partners.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, options: SupConOptions) -> None:
        """Add a projection head."""
        super().__init__(backbone, feature_dim, options)
        self.temperature = options.temperature

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the loss over all views."""
        indices = torch.arange(len(outputs[0]), device=outputs[0].device)
        labels = indices
        if batch.labels is not None:
            # Images without a label get a unique negative one: only their partners are positives.
            labels = torch.where(batch.labels >= 0, batch.labels, -1 - indices)
        loss = supcon_loss(torch.cat(list(outputs)), labels.repeat(len(outputs)), self.temperature)
        return StepOutput(loss=loss)


@final
class NNCLR(SiameseMethod):
    """NNCLR (Dwibedi et al. 2021, eq. 3 and 4): the nearest neighbor of a view replaces it as the positive.

    As in the LGSSL code, only the partners' projections enter the memory bank; the loss is symmetric.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, options: NNCLROptions) -> None:
        """Add a projection head, a prediction head and a memory bank."""
        super().__init__(backbone, feature_dim, options)
        self.predictor = prediction_head(options.projector_dims[-1], options.predictor_hidden_dim)
        self.memory_bank = MemoryBank(options.bank_size, options.projector_dims[-1])
        self.temperature = options.temperature

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features, and the projections and predictions of both views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        projections = self.projector(features)
        return features, (*projections.chunk(2), *self.predictor(projections).chunk(2))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the loss, and enqueue the partners' projections."""
        z1, z2, pred_1, pred_2 = outputs
        labels = torch.arange(len(z1), device=z1.device)
        loss = (
            info_nce_loss(pred_2, self.memory_bank.nearest(z1), labels, self.temperature)
            + info_nce_loss(pred_1, self.memory_bank.nearest(z2), labels, self.temperature)
        ) / 2
        if self.training:
            self.memory_bank.enqueue(normalize(z2, dim=1))
        return StepOutput(loss=loss)


@final
class MoCo(SiameseMethod):
    """MoCo v2 (He et al. 2020, eq. 1 and 2; head and views of Chen et al. 2020, "Improved Baselines").

    The anchor's view is the query, the partner's the key. Deviation: the batch norm of the key encoder sees
    the keys of all processes together instead of shuffled ones; the head has batch norm, as in SimCLR.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, options: MoCoOptions) -> None:
        """Add a projection head, an EMA copy of backbone and head, and a memory bank."""
        super().__init__(backbone, feature_dim, options)
        self.ema_model = EMAModel(self.backbone, self.projector)
        self.memory_bank = MemoryBank(options.bank_size, options.projector_dims[-1])
        self.temperature, self.ema_momentum = options.temperature, options.ema_momentum

    def on_step_start(self, batch: Batch) -> None:
        """Update the EMA copy."""
        if self.training:
            self.ema_model.update(self.backbone, self.projector, momentum=self.ema_momentum)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the anchors, queries and keys."""
        anchors, partners = batch.views
        (features,) = forward_views(self.backbone, [anchors])
        queries = self.projector(features)
        # Last: the second forward pass of gradient caching stops before it.
        ema_backbone, ema_projector = self.ema_model.ema_modules
        with torch.no_grad():
            keys = ema_projector(*forward_views(ema_backbone, [partners]))
        return features, (queries, keys)

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the loss against the memory bank, and enqueue the keys."""
        queries, keys = outputs
        # A copy, because the bank changes before the backward pass.
        loss = moco_loss(queries, keys, self.memory_bank.bank.clone(), self.temperature)
        if self.training:
            self.memory_bank.enqueue(normalize(keys, dim=1))
        return StepOutput(loss=loss)


@final
class MoCoV3(EMAPredictorMethod):
    """MoCo v3 (Chen, Xie and He 2021, algorithm 1): queries are predictions; negatives come from the batch.

    The loss is the sum over both directions, times 2 temperature.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, options: MoCoV3Options) -> None:
        """Set the temperature."""
        super().__init__(backbone, feature_dim, options)
        self.temperature = options.temperature

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the loss over both directions."""
        queries_1, queries_2, keys_1, keys_2 = outputs
        labels = torch.arange(len(keys_1), device=keys_1.device)
        loss = info_nce_loss(queries_1, keys_2, labels, self.temperature) + info_nce_loss(
            queries_2, keys_1, labels, self.temperature
        )
        return StepOutput(loss=2 * self.temperature * loss)
