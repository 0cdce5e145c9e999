"""Image-text methods: images and captions in one embedding space.

With one view per pair (`clip`, `siglip`, `declip`) an image is compared with the caption of its partner: its
own with self pairs, that of the image with the most similar caption with language pairs. `slip` has views of
the partner too, and compares an image with its own caption.
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
from likewise.training.methods.base import (
    Batch,
    MemoryBank,
    Method,
    StepOutput,
    forward_views,
    projection_head,
)
from likewise.training.methods.options import DeCLIPOptions, SigLIPOptions, SLIPOptions, TextMethodOptions

_INIT_LOGIT_SCALE, _MAX_LOGIT_SCALE = 1 / 0.07, 100.0  # of CLIP
_SIGLIP_INIT_SCALE, _SIGLIP_INIT_BIAS = 10.0, -10.0  # of SigLIP
_NEIGHBOR_WEIGHT = 0.2  # of DeCLIP and the LGSSL code


@final
class TextBranch(nn.Module):
    """Text features: from a text tower that is trained, or from frozen embeddings and a linear projection."""

    def __init__(
        self,
        tower: nn.Module | None,
        caption_embedding_dim: int,
        embed_dim: int,
        *,
        use_partner_caption: bool = True,
    ) -> None:
        """Set the tower, tokens (b, t) -> (b, embed_dim), or a projection of caption embeddings."""
        super().__init__()
        self.tower = tower
        self.use_partner_caption = use_partner_caption
        self.projection = nn.Linear(caption_embedding_dim, embed_dim, bias=False) if tower is None else None

    def local_embeddings(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the local text features of the tower, (local, embed_dim); nothing without a tower."""
        return () if self.tower is None else (self.tower(batch.tokens),)

    def batch_embeddings(self, gathered: Sequence[Tensor], batch: Batch) -> Float[Tensor, "b d"]:
        """Return the text features of the whole batch: the gathered ones, or projected embeddings."""
        if self.projection is None:
            return gathered[0]
        if batch.caption_embeddings is None:
            raise TypeError("a frozen text tower needs `caption_embeddings` in the batch")
        captions, partner_captions = batch.caption_embeddings
        use_partner = partner_captions.any(dim=1, keepdim=True) & self.use_partner_caption
        return self.projection(torch.where(use_partner, partner_captions, captions))


class ImageTextMethod(Method):
    """A method with a linear projection of image features, a text branch and a learned logit scale."""

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        options: TextMethodOptions,
        caption_embedding_dim: int = 0,
    ) -> None:
        """Add the image projection and the text branch.

        Args:
            backbone: Images (b, 3, h, w) -> features (b, feature_dim).
            feature_dim: Features per image.
            options: The options of the method.
            caption_embedding_dim: Dimension of the caption embeddings, for a frozen text tower.
        """
        super().__init__(backbone, feature_dim, options)
        tower = None
        if options.uses_tokens:
            tower = TextTower(
                width=options.text_width, layers=options.text_layers, embed_dim=options.embed_dim
            )
        self.text_branch = TextBranch(
            tower,
            caption_embedding_dim,
            options.embed_dim,
            use_partner_caption=options.inputs == "anchor",
        )
        self.projection = nn.Linear(feature_dim, options.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(_INIT_LOGIT_SCALE)))

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the anchors, their projections and the text features of the tower."""
        (features,) = forward_views(self.backbone, batch.views)
        return features, (self.projection(features), *self.text_branch.local_embeddings(batch))


@final
class CLIP(ImageTextMethod):
    """CLIP (Radford et al. 2021, figure 3), with a learned logit scale of at most 100.

    With a frozen text tower it is the baseline of El Banani et al. 2023 that contrasts images with a sentence
    encoder.
    """

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the contrastive loss."""
        image_features, text_features = outputs[0], self.text_branch.batch_embeddings(outputs[1:], batch)
        logit_scale = clamped_logit_scale(self.logit_scale)
        loss = clip_loss(image_features, text_features, logit_scale)
        return StepOutput(loss=loss, logs=_image_text_logs(image_features, text_features, logit_scale))


@final
class SigLIP(ImageTextMethod):
    """SigLIP (Zhai et al. 2023, algorithm 1), with a learned logit scale (at most 100) and bias."""

    def __init__(
        self, backbone: nn.Module, feature_dim: int, options: SigLIPOptions, caption_embedding_dim: int = 0
    ) -> None:
        """Add the logit bias, and initialize the logit scale as SigLIP does."""
        super().__init__(backbone, feature_dim, options, caption_embedding_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(_SIGLIP_INIT_SCALE)))
        self.logit_bias = nn.Parameter(torch.tensor(_SIGLIP_INIT_BIAS))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the sigmoid loss."""
        image_features, text_features = outputs[0], self.text_branch.batch_embeddings(outputs[1:], batch)
        logit_scale = clamped_logit_scale(self.logit_scale)
        loss = siglip_loss(image_features, text_features, logit_scale, self.logit_bias)
        return StepOutput(loss=loss, logs=_image_text_logs(image_features, text_features, logit_scale))


@final
class DeCLIP(ImageTextMethod):
    """CLIP with nearest-neighbor supervision (Li et al. 2022, "Supervision Exists Everywhere", eq. 8).

    0.8 of CLIP's loss and 0.2 of the same loss with each caption's nearest neighbor in a memory bank of
    captions, as in the LGSSL code. Deviation from DeCLIP: its losses within one modality (SimSiam on images,
    masked language modeling) and its multiple views are left out, as in LGSSL.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, options: DeCLIPOptions, caption_embedding_dim: int = 0
    ) -> None:
        """Add the memory bank of text features."""
        super().__init__(backbone, feature_dim, options, caption_embedding_dim)
        self.memory_bank = MemoryBank(options.bank_size, options.embed_dim)

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the weighted loss, and enqueue the text features."""
        image_features, text_features = outputs[0], self.text_branch.batch_embeddings(outputs[1:], batch)
        logit_scale = clamped_logit_scale(self.logit_scale)
        labels = torch.arange(len(image_features), device=image_features.device)
        neighbors = self.memory_bank.nearest(text_features)
        neighbor_loss = info_nce_loss(image_features, neighbors, labels, 1 / logit_scale)
        loss = (1 - _NEIGHBOR_WEIGHT) * clip_loss(image_features, text_features, logit_scale)
        loss = loss + _NEIGHBOR_WEIGHT * neighbor_loss
        if self.training:
            self.memory_bank.enqueue(normalize(text_features, dim=1))
        return StepOutput(loss=loss, logs=_image_text_logs(image_features, text_features, logit_scale))


@final
class SLIP(ImageTextMethod):
    """SLIP (Mu et al. 2022, section 3): the sum of CLIP's and SimCLR's losses; with language pairs, LGSLIP.

    SimCLR's loss is on the two views of the pair, CLIP's on a plain crop of the anchor: its first view if
    the augmentation is `crop`, else a third one. Deviation from the LGSSL code: each loss has its own
    projection head, as in SLIP; LGSLIP shares one.
    """

    def __init__(
        self, backbone: nn.Module, feature_dim: int, options: SLIPOptions, caption_embedding_dim: int = 0
    ) -> None:
        """Add the projection head of SimCLR."""
        super().__init__(backbone, feature_dim, options, caption_embedding_dim)
        self.projector = projection_head(feature_dim, options.projector_dims)
        self.temperature = options.temperature

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features, both views' projections, and the image and text features of CLIP."""
        features = forward_views(self.backbone, batch.views)
        projections = self.projector(torch.cat(features[:2])).chunk(2)
        image_features = self.projection(features[2] if len(features) > 2 else features[0])
        return torch.cat(features), (*projections, image_features, *self.text_branch.local_embeddings(batch))

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the sum of both losses."""
        z1, z2, image_features = outputs[:3]
        text_features = self.text_branch.batch_embeddings(outputs[3:], batch)
        logit_scale = clamped_logit_scale(self.logit_scale)
        loss_clip = clip_loss(image_features, text_features, logit_scale)
        loss_simclr = nt_xent_loss(z1, z2, self.temperature)
        logs = _image_text_logs(image_features, text_features, logit_scale)
        logs |= {"clip": loss_clip.detach(), "simclr": loss_simclr.detach()}
        return StepOutput(loss=loss_clip + loss_simclr, logs=logs)


def text_state(method: Method) -> tuple[dict[str, Tensor], dict[str, int]] | None:
    """Return the weights and config of a method's text tower, for `save_encoder`; None without one."""
    if not isinstance(method, ImageTextMethod) or not isinstance(method.text_branch.tower, TextTower):
        return None
    tower = method.text_branch.tower
    return text_state_dict(tower, method.projection), tower.config


def clamped_logit_scale(log_scale: Tensor) -> Float[Tensor, ""]:
    """Return the logit scale from its learned logarithm, clamped to 100 as in CLIP."""
    return log_scale.clamp(max=math.log(_MAX_LOGIT_SCALE)).exp()


def _image_text_logs(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> dict[str, Tensor]:
    return {
        "logit_scale": logit_scale.detach(),
        "contrastive_accuracy": contrastive_accuracy(image_features, text_features),
    }


@torch.no_grad()
def contrastive_accuracy(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"]
) -> Float[Tensor, ""]:
    """Return the fraction of images whose nearest text of the batch is their own."""
    predictions = (normalize(image_features, dim=1) @ normalize(text_features, dim=1).T).argmax(dim=1)
    return (predictions == torch.arange(len(image_features), device=image_features.device)).float().mean()
