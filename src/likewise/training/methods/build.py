"""`build_method`: from the options of a method to its module."""

from collections.abc import Callable

from torch import nn

from likewise.training.methods.base import Method
from likewise.training.methods.contrastive import DCL, NNCLR, MoCo, MoCoV3, SimCLR, SupCon
from likewise.training.methods.image_text import CLIP, SLIP, DeCLIP, SigLIP
from likewise.training.methods.non_contrastive import BYOL, BarlowTwins, SimSiam, SwAV, VICReg
from likewise.training.methods.options import MethodOptions
from likewise.training.methods.pair_classifier import PairClassifier

METHOD_CLASSES: dict[str, Callable[..., Method]] = {
    "simclr": SimCLR,
    "dcl": DCL,
    "supcon": SupCon,
    "nnclr": NNCLR,
    "moco": MoCo,
    "moco-v3": MoCoV3,
    "simsiam": SimSiam,
    "byol": BYOL,
    "swav": SwAV,
    "vicreg": VICReg,
    "barlow-twins": BarlowTwins,
    "clip": CLIP,
    "siglip": SigLIP,
    "declip": DeCLIP,
    "slip": SLIP,
    "pair-classifier": PairClassifier,
}


def build_method(
    options: MethodOptions, backbone: nn.Module, feature_dim: int, *, caption_embedding_dim: int = 0
) -> Method:
    """Build a method around a backbone; its heads are initialized from torch's global generator.

    Args:
        options: The options of the method, such as `SimCLROptions()`.
        backbone: Images (b, 3, h, w) -> features (b, feature_dim).
        feature_dim: Features per image.
        caption_embedding_dim: Dimension of the caption embeddings, for a frozen text tower.
    """
    build = METHOD_CLASSES[options.name]
    if options.needs_text:
        return build(backbone, feature_dim, options, caption_embedding_dim)
    return build(backbone, feature_dim, options)
