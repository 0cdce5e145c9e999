"""What a loss asks of a pair: one final class a method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from likewise.models.text_tower import TextTower
from likewise.training.config import TrainSettings
from likewise.training.methods.base import Method
from likewise.training.methods.contrastive import NNCLR, MoCo, MoCoV3, SimCLR, SupCon
from likewise.training.methods.image_text import CLIP, SLIP, DeCLIP, Texts
from likewise.training.methods.non_contrastive import BYOL, BarlowTwins, SimSiam, SwAV, VICReg
from likewise.training.methods.pair_classifier import PairClassifier

_JOINT = 512  # where images and texts meet, as in CLIP and the LGSSL code


@dataclass(frozen=True)
class Parts:
    """What a method is built from: settings, with what the catalog says where they are silent.

    Attributes:
        settings: The settings.
        backbone: Images (b, 3, h, w) -> features (b, width).
        width: Features an image.
        queue: How long a queue is; 0 for none.
        vector_width: The width of the embeddings of captions; 0 where they are not used.
    """

    settings: TrainSettings
    backbone: nn.Module
    width: int
    queue: int
    vector_width: int

    @property
    def head(self) -> Sequence[int]:
        """Widths of the projection head."""
        return self.settings.needs.head if self.settings.head is None else self.settings.head

    @property
    def hidden(self) -> int:
        """Width of the prediction head."""
        return self.settings.needs.predictor or 0

    @property
    def temperature(self) -> float:
        """What similarities are divided by."""
        given = self.settings.temperature
        return (self.settings.needs.temperature or 0.0) if given is None else given

    @property
    def momentum(self) -> float:
        """The share of the slow copy that is kept."""
        given = self.settings.momentum
        return (self.settings.needs.momentum or 0.0) if given is None else given

    @property
    def joint(self) -> int:
        """Where images and texts meet: the width of the head, but for heads of images alone."""
        return _JOINT if self.settings.needs.shown == "pair and caption" else self.head[-1]

    def texts(self) -> Texts:
        """Build what embeds captions."""
        chosen, tower = self.settings, None
        if chosen.uses_tokens:
            tower = TextTower(width=chosen.text_width, layers=chosen.text_layers, joint=self.joint)
        return Texts(tower, self.vector_width, self.joint, of_partners=chosen.needs.shown == "anchor")


def _simclr(p: Parts) -> Method:
    return SimCLR(
        p.backbone,
        p.width,
        temperature=p.temperature,
        head=p.head,
        negatives=p.settings.negatives,
        alike=p.settings.alike,
        decoupling=p.settings.method == "dcl",
    )


def _pair_classifier(p: Parts) -> Method:
    return PairClassifier(
        p.backbone,
        p.width,
        unlike=p.settings.unlike,
        ratio=p.settings.negative_ratio,
        margin=p.settings.margin,
        alike=p.settings.alike if p.settings.in_batch else None,
    )


def _clip(p: Parts) -> Method:
    return CLIP(p.backbone, p.width, p.texts(), joint=p.joint, sigmoid=p.settings.method == "siglip")


# In the order of the catalog, which says what each needs.
_BUILDERS: dict[str, Callable[[Parts], Method]] = {
    "simclr": _simclr,
    "dcl": _simclr,
    "supcon": lambda p: SupCon(p.backbone, p.width, temperature=p.temperature, head=p.head),
    "nnclr": lambda p: NNCLR(
        p.backbone, p.width, temperature=p.temperature, head=p.head, hidden=p.hidden, queue=p.queue
    ),
    "moco": lambda p: MoCo(
        p.backbone, p.width, temperature=p.temperature, head=p.head, momentum=p.momentum, queue=p.queue
    ),
    "moco-v3": lambda p: MoCoV3(
        p.backbone, p.width, temperature=p.temperature, head=p.head, hidden=p.hidden, momentum=p.momentum
    ),
    "simsiam": lambda p: SimSiam(p.backbone, p.width, head=p.head, hidden=p.hidden),
    "byol": lambda p: BYOL(p.backbone, p.width, head=p.head, hidden=p.hidden, momentum=p.momentum),
    "swav": lambda p: SwAV(
        p.backbone,
        p.width,
        temperature=p.temperature,
        head=p.head,
        prototypes=p.settings.prototypes,
        queue=p.queue,
    ),
    "vicreg": lambda p: VICReg(p.backbone, p.width, head=p.head),
    "barlow-twins": lambda p: BarlowTwins(p.backbone, p.width, head=p.head),
    "clip": _clip,
    "siglip": _clip,
    "declip": lambda p: DeCLIP(p.backbone, p.width, p.texts(), joint=p.joint, queue=p.queue),
    "slip": lambda p: SLIP(
        p.backbone, p.width, p.texts(), joint=p.joint, head=p.head, temperature=p.temperature
    ),
    "pair-classifier": _pair_classifier,
}


def build_method(
    settings: TrainSettings, backbone: nn.Module, width: int, *, queue: int = 0, vector_width: int = 0
) -> Method:
    """Put the settings' method on a backbone of `width` features.

    Args:
        settings: The method and its settings.
        backbone: Images (b, 3, h, w) -> features (b, width).
        width: Features an image.
        queue: How long a queue is, where the method has one.
        vector_width: The width of the embeddings of captions, where the method uses them.
    """
    method = _BUILDERS[settings.method](Parts(settings, backbone, width, queue, vector_width))
    method.chunk_size = settings.chunk_size
    return method
