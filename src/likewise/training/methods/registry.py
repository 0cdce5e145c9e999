"""What a loss asks of a pair: one final class a method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from likewise.models.text_tower import TextTower
from likewise.training.config import TrainConfig
from likewise.training.methods.base import Method
from likewise.training.methods.contrastive import NNCLR, MoCo, MoCoV3, SimCLR, SupCon
from likewise.training.methods.image_text import CLIP, SLIP, DeCLIP, TextBranch
from likewise.training.methods.non_contrastive import BYOL, BarlowTwins, SimSiam, SwAV, VICReg
from likewise.training.methods.pair_classifier import PairClassifier

_CLIP_EMBED_DIM = 512  # where images and texts meet, as in CLIP and the LGSSL code


@dataclass(frozen=True)
class BuildArgs:
    """What a method is built from: settings, with what the catalog says where they are silent.

    Attributes:
        config: The settings.
        backbone: Images (b, 3, h, w) -> features (b, width).
        feature_dim: Features an image.
        memory_bank_size: How long a queue is; 0 for none.
        caption_embedding_dim: The width of the embeddings of captions; 0 where they are not used.
    """

    config: TrainConfig
    backbone: nn.Module
    feature_dim: int
    memory_bank_size: int
    caption_embedding_dim: int

    @property
    def projector_dims(self) -> Sequence[int]:
        """Widths of the projection head."""
        return (
            self.config.method_options.projector_dims
            if self.config.projector_dims is None
            else self.config.projector_dims
        )

    @property
    def predictor_hidden_dim(self) -> int:
        """Width of the prediction head."""
        return self.config.method_options.predictor_hidden_dim or 0

    @property
    def temperature(self) -> float:
        """What similarities are divided by."""
        override = self.config.temperature
        return (self.config.method_options.temperature or 0.0) if override is None else override

    @property
    def ema_momentum(self) -> float:
        """The share of the slow copy that is kept."""
        override = self.config.ema_momentum
        return (self.config.method_options.ema_momentum or 0.0) if override is None else override

    @property
    def embed_dim(self) -> int:
        """Where images and texts meet: the width of the head, but for heads of images alone."""
        return (
            _CLIP_EMBED_DIM
            if self.config.method_options.inputs == "pair and caption"
            else self.projector_dims[-1]
        )

    def build_text_branch(self) -> TextBranch:
        """Build what embeds captions."""
        config, tower = self.config, None
        if config.uses_tokens:
            tower = TextTower(width=config.text_width, layers=config.text_layers, embed_dim=self.embed_dim)
        return TextBranch(
            tower,
            self.caption_embedding_dim,
            self.embed_dim,
            use_partner_caption=config.method_options.inputs == "anchor",
        )


def _simclr(p: BuildArgs) -> Method:
    return SimCLR(
        p.backbone,
        p.feature_dim,
        temperature=p.temperature,
        projector_dims=p.projector_dims,
        false_negatives=p.config.false_negatives,
        false_negative_threshold=p.config.positive_threshold,
        decoupled=p.config.method == "dcl",
    )


def _pair_classifier(p: BuildArgs) -> Method:
    return PairClassifier(
        p.backbone,
        p.feature_dim,
        negative_threshold=p.config.negative_threshold,
        negatives_per_positive=p.config.negatives_per_positive,
        margin=p.config.margin,
        positive_threshold=p.config.positive_threshold if p.config.mine_in_batch else None,
    )


def _clip(p: BuildArgs) -> Method:
    return CLIP(
        p.backbone,
        p.feature_dim,
        p.build_text_branch(),
        embed_dim=p.embed_dim,
        sigmoid=p.config.method == "siglip",
    )


# In the order of the catalog, which says what each needs.
_BUILDERS: dict[str, Callable[[BuildArgs], Method]] = {
    "simclr": _simclr,
    "dcl": _simclr,
    "supcon": lambda p: SupCon(
        p.backbone, p.feature_dim, temperature=p.temperature, projector_dims=p.projector_dims
    ),
    "nnclr": lambda p: NNCLR(
        p.backbone,
        p.feature_dim,
        temperature=p.temperature,
        projector_dims=p.projector_dims,
        predictor_hidden_dim=p.predictor_hidden_dim,
        memory_bank_size=p.memory_bank_size,
    ),
    "moco": lambda p: MoCo(
        p.backbone,
        p.feature_dim,
        temperature=p.temperature,
        projector_dims=p.projector_dims,
        ema_momentum=p.ema_momentum,
        memory_bank_size=p.memory_bank_size,
    ),
    "moco-v3": lambda p: MoCoV3(
        p.backbone,
        p.feature_dim,
        temperature=p.temperature,
        projector_dims=p.projector_dims,
        predictor_hidden_dim=p.predictor_hidden_dim,
        ema_momentum=p.ema_momentum,
    ),
    "simsiam": lambda p: SimSiam(
        p.backbone,
        p.feature_dim,
        projector_dims=p.projector_dims,
        predictor_hidden_dim=p.predictor_hidden_dim,
    ),
    "byol": lambda p: BYOL(
        p.backbone,
        p.feature_dim,
        projector_dims=p.projector_dims,
        predictor_hidden_dim=p.predictor_hidden_dim,
        ema_momentum=p.ema_momentum,
    ),
    "swav": lambda p: SwAV(
        p.backbone,
        p.feature_dim,
        temperature=p.temperature,
        projector_dims=p.projector_dims,
        num_prototypes=p.config.num_prototypes,
        memory_bank_size=p.memory_bank_size,
    ),
    "vicreg": lambda p: VICReg(p.backbone, p.feature_dim, projector_dims=p.projector_dims),
    "barlow-twins": lambda p: BarlowTwins(p.backbone, p.feature_dim, projector_dims=p.projector_dims),
    "clip": _clip,
    "siglip": _clip,
    "declip": lambda p: DeCLIP(
        p.backbone,
        p.feature_dim,
        p.build_text_branch(),
        embed_dim=p.embed_dim,
        memory_bank_size=p.memory_bank_size,
    ),
    "slip": lambda p: SLIP(
        p.backbone,
        p.feature_dim,
        p.build_text_branch(),
        embed_dim=p.embed_dim,
        projector_dims=p.projector_dims,
        temperature=p.temperature,
    ),
    "pair-classifier": _pair_classifier,
}


def build_method(
    config: TrainConfig,
    backbone: nn.Module,
    feature_dim: int,
    *,
    memory_bank_size: int = 0,
    caption_embedding_dim: int = 0,
) -> Method:
    """Put the settings' method on a backbone of `feature_dim` features.

    Args:
        config: The method and its settings.
        backbone: Images (b, 3, h, w) -> features (b, width).
        feature_dim: Features an image.
        memory_bank_size: How long a queue is, where the method has one.
        caption_embedding_dim: The width of the embeddings of captions, where the method uses them.
    """
    method = _BUILDERS[config.method](
        BuildArgs(config, backbone, feature_dim, memory_bank_size, caption_embedding_dim)
    )
    method.grad_cache_chunk_size = config.grad_cache_chunk_size
    return method
