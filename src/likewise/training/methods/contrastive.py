"""Contrastive methods: pull partners together, push the rest of the batch or a queue apart."""

from collections.abc import Sequence
from typing import final

import torch
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
from likewise.training.methods.base import Batch, LossOutput, Method, forward_views
from likewise.training.methods.modules import (
    EMAModel,
    MemoryBank,
    cosine_momentum,
    prediction_head,
    projection_head,
)
from likewise.training.methods.options import FalseNegativeMode


@final
class SimCLR(Method):
    """SimCLR (Chen et al. 2020, eq. 1); with `language` pairs, LGSimCLR (El Banani et al. 2023, section 3).

    With `decoupled`, DCL (Yeh et al. 2022, eq. 6): the positive is no part of its own denominator.

    Deviation from the LGSSL code: both views pass through the network as one batch, so BatchNorm's
    statistics are those of both, as in the SimCLR paper; LGSSL passes them one after the other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        temperature: float,
        projector_dims: Sequence[int],
        false_negatives: FalseNegativeMode = "keep",
        false_negative_threshold: float = 0.8,
        decoupled: bool = False,
    ) -> None:
        """Put a projection head on a backbone of `feature_dim` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_dim, projector_dims)
        self.temperature, self.decoupled = temperature, decoupled
        self.false_negatives: FalseNegativeMode = false_negatives
        self.false_negative_threshold = false_negative_threshold

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of both views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        return features, self.projector(features).chunk(2)

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return NT-Xent or its decoupled form."""
        z1, z2 = outputs
        weights, targets, logs = None, None, {}
        if batch.caption_embeddings is not None and self.false_negatives != "keep":
            captions = batch.caption_embeddings.flatten(0, 1)
            similarity = captions @ captions.T
            weights, targets = false_negative_weights(
                similarity, self.false_negative_threshold, self.false_negatives
            )
            logs = {
                "false_negative_fraction": false_negative_fraction(similarity, self.false_negative_threshold)
            }
        if self.decoupled:
            return LossOutput(dcl_loss(z1, z2, self.temperature, weights), logs)
        return LossOutput(nt_xent_loss(z1, z2, self.temperature, weights, targets), logs)


@final
class SupCon(Method):
    """Supervised contrastive learning (Khosla et al. 2020, eq. 2) with partners, or labels, as the classes.

    With `--pairs label` all images of one label in the batch are positives of each other. With any other
    source the classes are the anchors: an image and all its partners that are shown at once.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, *, temperature: float, projector_dims: Sequence[int]
    ) -> None:
        """Put a projection head on a backbone of `feature_dim` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_dim, projector_dims)
        self.temperature = temperature

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of all views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        return features, self.projector(features).chunk(len(batch.views))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the loss over all views."""
        indices = torch.arange(len(outputs[0]), device=outputs[0].device)
        labels = indices
        if batch.labels is not None:
            # Images without label are alone with their partners: numbers that no label has.
            labels = torch.where(batch.labels >= 0, batch.labels, -1 - indices)
        loss = supcon_loss(torch.cat(list(outputs)), labels.repeat(len(outputs)), self.temperature)
        return LossOutput(loss)


@final
class NNCLR(Method):
    """NNCLR (Dwibedi et al. 2021, eq. 3 and 4): a view's nearest neighbor in a queue stands for the view.

    As in the LGSSL code only the partners' views enter the queue; the loss is symmetric in both views.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        temperature: float,
        projector_dims: Sequence[int],
        predictor_hidden_dim: int,
        memory_bank_size: int,
    ) -> None:
        """Put a projection and a prediction head on a backbone of `feature_dim` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_dim, projector_dims)
        self.predictor = prediction_head(projector_dims[-1], predictor_hidden_dim)
        self.memory_bank = MemoryBank(memory_bank_size, projector_dims[-1])
        self.temperature = temperature

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, and the projections and predictions of both views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        projections = self.projector(features)
        return features, (*projections.chunk(2), *self.predictor(projections).chunk(2))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the loss, and put the partners' projections into the queue."""
        z1, z2, pred_1, pred_2 = outputs
        labels = torch.arange(len(z1), device=z1.device)
        loss = (
            info_nce_loss(pred_2, self.memory_bank.nearest(z1), labels, self.temperature)
            + info_nce_loss(pred_1, self.memory_bank.nearest(z2), labels, self.temperature)
        ) / 2
        if self.training:
            self.memory_bank.enqueue(normalize(z2, dim=1))
        return LossOutput(loss)


@final
class MoCo(Method):
    """MoCo v2 (He et al. 2020, eq. 1 and 2; head and views of Chen et al. 2020, "Improved Baselines").

    The anchor's view is the query, the partner's the key. Deviation: the key encoder's batch norm sees the
    keys of all processes together instead of shuffled ones; the head has batch norm, as SimCLR's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        temperature: float,
        projector_dims: Sequence[int],
        ema_momentum: float,
        memory_bank_size: int,
    ) -> None:
        """Put a projection head on a backbone of `feature_dim` features, and make a slow copy of both."""
        super().__init__()
        self.backbone = backbone
        self.projector = projection_head(feature_dim, projector_dims)
        self.ema_model = EMAModel(self.backbone, self.projector)
        self.memory_bank = MemoryBank(memory_bank_size, projector_dims[-1])
        self.temperature, self.ema_momentum = temperature, ema_momentum

    def on_step_start(self, batch: Batch) -> None:
        """Let the slow copy follow."""
        if self.training:
            self.ema_model.update(self.backbone, self.projector, momentum=self.ema_momentum)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the anchors, queries and keys."""
        anchors, partners = batch.views
        (features,) = forward_views(self.backbone, [anchors])
        queries = self.projector(features)
        # Last, so that a chunk that is embedded once more for its gradients ends before it.
        ema_backbone, ema_projector = self.ema_model.ema_modules
        with torch.no_grad():
            keys = ema_projector(*forward_views(ema_backbone, [partners]))
        return features, (queries, keys)

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the loss against the queue, and put the keys into it."""
        queries, keys = outputs
        # A copy, because the queue changes before gradients are taken.
        loss = moco_loss(queries, keys, self.memory_bank.bank.clone(), self.temperature)
        if self.training:
            self.memory_bank.enqueue(normalize(keys, dim=1))
        return LossOutput(loss)


@final
class MoCoV3(Method):
    """MoCo v3 (Chen, Xie and He 2021, algorithm 1): queries are predictions, the batch gives the negatives.

    The loss is the sum over both directions, times 2 temperature; the momentum rises to 1 along a cosine.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        *,
        temperature: float,
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
        self.temperature, self.ema_momentum = temperature, ema_momentum

    def on_step_start(self, batch: Batch) -> None:
        """Let the slow copy follow."""
        if self.training:
            self.ema_model.update(
                self.backbone,
                self.projector,
                momentum=cosine_momentum(self.ema_momentum, batch.train_fraction),
            )

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, queries and keys of both views."""
        features = torch.cat(forward_views(self.backbone, batch.views))
        queries = self.predictor(self.projector(features))
        # Last, so that a chunk that is embedded once more for its gradients ends before it.
        ema_backbone, ema_projector = self.ema_model.ema_modules
        with torch.no_grad():
            keys = ema_projector(torch.cat(forward_views(ema_backbone, batch.views)))
        return features, (*queries.chunk(2), *keys.chunk(2))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the loss over both directions."""
        queries_1, queries_2, keys_1, keys_2 = outputs
        labels = torch.arange(len(keys_1), device=keys_1.device)
        loss = info_nce_loss(queries_1, keys_2, labels, self.temperature) + info_nce_loss(
            queries_2, keys_1, labels, self.temperature
        )
        return LossOutput(2 * self.temperature * loss)
