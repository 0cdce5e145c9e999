"""Image and text: an image and its caption find each other.

Where one image is shown, its caption is its partner's: its own with `--pairs self`, with `--pairs language`
that of the image described most like it. Where partners are shown as well (`slip`), it is always its own.
"""

import math
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from likewise.models.text_tower import TextTower, text_state_dict
from likewise.training.losses import clip_loss, info_nce_loss, nt_xent_loss, siglip_loss
from likewise.training.methods.base import Batch, LossOutput, Method, forward_views
from likewise.training.methods.modules import MemoryBank, projection_head

_INIT_LOGIT_SCALE, _MAX_LOGIT_SCALE = (
    1 / 0.07,
    100.0,
)  # where CLIP's learned scale begins and where it is held
_SIGLIP_INIT_SCALE, _SIGLIP_INIT_BIAS = 10.0, -10.0  # where SigLIP's begin
_NEIGHBOR_WEIGHT = 0.2  # DeCLIP's, and the LGSSL code's


@final
class TextBranch(nn.Module):
    """Captions as vectors: by a tower that is trained, or frozen embeddings under a trained projection."""

    def __init__(
        self,
        tower: nn.Module | None,
        caption_embedding_dim: int,
        embed_dim: int,
        *,
        use_partner_caption: bool = True,
    ) -> None:
        """Take a tower, tokens (b, t) -> (b, width); else project vectors of `caption_embedding_dim`."""
        super().__init__()
        self.tower = tower
        self.use_partner_caption = use_partner_caption
        self.projection = nn.Linear(caption_embedding_dim, embed_dim, bias=False) if tower is None else None

    def local_embeddings(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the texts of this process's pairs if they are costly, (part, width); else nothing."""
        return () if self.tower is None else (self.tower(batch.tokens),)

    def batch_embeddings(self, gathered: Sequence[Tensor], batch: Batch) -> Float[Tensor, "b d"]:
        """Return the texts of the whole batch, (b, width), from the gathered parts."""
        if self.projection is None:
            return gathered[0]
        if batch.caption_embeddings is None:
            raise TypeError("frozen texts need the vectors of captions")
        captions, partner_captions = batch.caption_embeddings
        use_partner = partner_captions.any(dim=1, keepdim=True) & self.use_partner_caption
        return self.projection(torch.where(use_partner, partner_captions, captions))


@final
class CLIP(Method):
    """CLIP (Radford et al. 2021, figure 3); the scale of similarities is learned, and held below 100.

    With `sigmoid`, SigLIP (Zhai et al. 2023, algorithm 1), with a learned bias. With frozen texts it is the
    baseline of El Banani et al. 2023 that contrasts images with a sentence encoder.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        text_branch: TextBranch,
        *,
        embed_dim: int,
        sigmoid: bool = False,
    ) -> None:
        """Project a backbone's `feature_dim` features to the `embed_dim` width of the texts."""
        super().__init__()
        self.backbone, self.text_branch = backbone, text_branch
        self.projection = nn.Linear(feature_dim, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(
            torch.tensor(math.log(_SIGLIP_INIT_SCALE if sigmoid else _INIT_LOGIT_SCALE))
        )
        self.logit_bias = nn.Parameter(torch.tensor(_SIGLIP_INIT_BIAS)) if sigmoid else None

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the anchors, their projections and their captions'."""
        (features,) = forward_views(self.backbone, batch.views)
        return features, (self.projection(features), *self.text_branch.local_embeddings(batch))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the contrastive or the sigmoid loss."""
        image_features, text_features = outputs[0], self.text_branch.batch_embeddings(outputs[1:], batch)
        logit_scale = clamped_logit_scale(self.logit_scale)
        loss = (
            clip_loss(image_features, text_features, logit_scale)
            if self.logit_bias is None
            else siglip_loss(image_features, text_features, logit_scale, self.logit_bias)
        )
        return LossOutput(
            loss,
            {
                "logit_scale": logit_scale.detach(),
                "contrastive_accuracy": contrastive_accuracy(image_features, text_features),
            },
        )


@final
class DeCLIP(Method):
    """CLIP with nearest-neighbor supervision (Li et al. 2022, "Supervision Exists Everywhere", eq. 8).

    0.8 of CLIP's loss and 0.2 of the same loss with each caption's nearest neighbor in a queue of captions,
    as in the LGSSL code. Deviation from DeCLIP: its losses within one modality (SimSiam on images, masked
    language) and its several views are left out, as LGSSL does.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        text_branch: TextBranch,
        *,
        embed_dim: int,
        memory_bank_size: int,
    ) -> None:
        """Project a backbone's `feature_dim` features to the `embed_dim` width of the texts."""
        super().__init__()
        self.backbone, self.text_branch = backbone, text_branch
        self.projection = nn.Linear(feature_dim, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(_INIT_LOGIT_SCALE)))
        self.memory_bank = MemoryBank(memory_bank_size, embed_dim)

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the anchors, their projections and their captions'."""
        (features,) = forward_views(self.backbone, batch.views)
        return features, (self.projection(features), *self.text_branch.local_embeddings(batch))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the weighted loss, and put the captions into the queue."""
        image_features, text_features = outputs[0], self.text_branch.batch_embeddings(outputs[1:], batch)
        logit_scale = clamped_logit_scale(self.logit_scale)
        labels = torch.arange(len(image_features), device=image_features.device)
        neighbor_loss = info_nce_loss(
            image_features, self.memory_bank.nearest(text_features), labels, 1 / logit_scale
        )
        loss = (1 - _NEIGHBOR_WEIGHT) * clip_loss(
            image_features, text_features, logit_scale
        ) + _NEIGHBOR_WEIGHT * neighbor_loss
        if self.training:
            self.memory_bank.enqueue(normalize(text_features, dim=1))
        return LossOutput(
            loss,
            {
                "logit_scale": logit_scale.detach(),
                "contrastive_accuracy": contrastive_accuracy(image_features, text_features),
            },
        )


@final
class SLIP(Method):
    """SLIP (Mu et al. 2022, section 3): CLIP's loss plus SimCLR's; with `language` pairs, LGSLIP.

    SimCLR's loss is on the two views of the pair, CLIP's on a plain crop of the anchor: its first view where
    the views are crops, else a third one. Deviation from the LGSSL code: each loss has a projection head of
    its own, as in SLIP; LGSLIP shares one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        text_branch: TextBranch,
        *,
        embed_dim: int,
        projector_dims: Sequence[int],
        temperature: float,
    ) -> None:
        """Put SimCLR's head and CLIP's projection on a backbone of `feature_dim` features."""
        super().__init__()
        self.backbone, self.text_branch = backbone, text_branch
        self.projector = projection_head(feature_dim, projector_dims)
        self.projection = nn.Linear(feature_dim, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(_INIT_LOGIT_SCALE)))
        self.temperature = temperature

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, both views' projections, the plain crop's and the captions'."""
        features = forward_views(self.backbone, batch.views)
        projections = self.projector(torch.cat(features[:2])).chunk(2)
        image_features = self.projection(features[2] if len(features) > 2 else features[0])
        return torch.cat(features), (*projections, image_features, *self.text_branch.local_embeddings(batch))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the sum of both losses."""
        z1, z2, image_features = outputs[:3]
        text_features = self.text_branch.batch_embeddings(outputs[3:], batch)
        logit_scale = clamped_logit_scale(self.logit_scale)
        loss_clip, loss_simclr = (
            clip_loss(image_features, text_features, logit_scale),
            nt_xent_loss(z1, z2, self.temperature),
        )
        logs = {
            "logit_scale": logit_scale.detach(),
            "contrastive_accuracy": contrastive_accuracy(image_features, text_features),
            "clip": loss_clip.detach(),
            "simclr": loss_simclr.detach(),
        }
        return LossOutput(loss_clip + loss_simclr, logs)


def text_state(method: Method) -> tuple[dict[str, Tensor], dict[str, int]] | None:
    """Return what `save_encoder` keeps of a method's language side; None where it trains no text tower."""
    if not isinstance(method, CLIP | DeCLIP | SLIP) or not isinstance(method.text_branch.tower, TextTower):
        return None
    tower = method.text_branch.tower
    return text_state_dict(tower, method.projection), tower.config


def clamped_logit_scale(log_scale: Tensor) -> Float[Tensor, ""]:
    """Return a scale that is learned as a logarithm, and grows no further than CLIP lets it."""
    return log_scale.clamp(max=math.log(_MAX_LOGIT_SCALE)).exp()


@torch.no_grad()
def contrastive_accuracy(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"]
) -> Float[Tensor, ""]:
    """Return the share of images that find their own caption among the batch's."""
    predictions = (normalize(image_features, dim=1) @ normalize(text_features, dim=1).T).argmax(dim=1)
    return (predictions == torch.arange(len(image_features), device=image_features.device)).float().mean()
