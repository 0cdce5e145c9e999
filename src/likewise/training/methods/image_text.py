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

from likewise.models.text_tower import TextTower, language_tensors
from likewise.training.losses import clip, info_nce, nt_xent, siglip
from likewise.training.methods.base import Judged, Method, Shown, encode
from likewise.training.methods.modules import Queue, projector

_SCALE, _MOST = 1 / 0.07, 100.0  # where CLIP's learned scale begins and where it is held
_SIGMOID_SCALE, _SIGMOID_BIAS = 10.0, -10.0  # where SigLIP's begin
_NEIGHBOR_WEIGHT = 0.2  # DeCLIP's, and the LGSSL code's


@final
class Texts(nn.Module):
    """Captions as vectors: by a tower that is trained, or frozen embeddings under a trained projection."""

    def __init__(
        self, tower: nn.Module | None, vector_width: int, width: int, *, of_partners: bool = True
    ) -> None:
        """Take a tower, tokens (b, t) -> (b, width); else project vectors of `vector_width`."""
        super().__init__()
        self.tower = tower
        self.of_partners = of_partners
        self.projection = nn.Linear(vector_width, width, bias=False) if tower is None else None

    def part(self, shown: Shown) -> tuple[Tensor, ...]:
        """Return the texts of this process's pairs if they are costly, (part, width); else nothing."""
        return () if self.tower is None else (self.tower(shown.tokens),)

    def whole(self, gathered: Sequence[Tensor], shown: Shown) -> Float[Tensor, "b d"]:
        """Return the texts of the whole batch, (b, width), from the gathered parts."""
        if self.projection is None:
            return gathered[0]
        if shown.captions is None:
            raise TypeError("frozen texts need the vectors of captions")
        own, partners = shown.captions
        there = partners.any(dim=1, keepdim=True) & self.of_partners
        return self.projection(torch.where(there, partners, own))


@final
class CLIP(Method):
    """CLIP (Radford et al. 2021, figure 3); the scale of similarities is learned, and held below 100.

    With `sigmoid`, SigLIP (Zhai et al. 2023, algorithm 1), with a learned bias. With frozen texts it is the
    baseline of El Banani et al. 2023 that contrasts images with a sentence encoder.
    """

    def __init__(
        self, backbone: nn.Module, width: int, texts: Texts, *, joint: int, sigmoid: bool = False
    ) -> None:
        """Project a backbone's `width` features to the `joint` width of the texts."""
        super().__init__()
        self.backbone, self.texts = backbone, texts
        self.projection = nn.Linear(width, joint, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(_SIGMOID_SCALE if sigmoid else _SCALE)))
        self.bias = nn.Parameter(torch.tensor(_SIGMOID_BIAS)) if sigmoid else None

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the anchors, their projections and their captions'."""
        (features,) = encode(self.backbone, shown.views)
        return features, (self.projection(features), *self.texts.part(shown))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the contrastive or the sigmoid loss."""
        images, texts = outputs[0], self.texts.whole(outputs[1:], shown)
        scale = held(self.scale)
        loss = clip(images, texts, scale) if self.bias is None else siglip(images, texts, scale, self.bias)
        return Judged(loss, {"scale": scale.detach(), "matched": matched(images, texts)})


@final
class DeCLIP(Method):
    """CLIP with nearest-neighbor supervision (Li et al. 2022, "Supervision Exists Everywhere", eq. 8).

    0.8 of CLIP's loss and 0.2 of the same loss with each caption's nearest neighbor in a queue of captions,
    as in the LGSSL code. Deviation from DeCLIP: its losses within one modality (SimSiam on images, masked
    language) and its several views are left out, as LGSSL does.
    """

    def __init__(self, backbone: nn.Module, width: int, texts: Texts, *, joint: int, queue: int) -> None:
        """Project a backbone's `width` features to the `joint` width of the texts."""
        super().__init__()
        self.backbone, self.texts = backbone, texts
        self.projection = nn.Linear(width, joint, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        self.queue = Queue(queue, joint)

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the anchors, their projections and their captions'."""
        (features,) = encode(self.backbone, shown.views)
        return features, (self.projection(features), *self.texts.part(shown))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the weighted loss, and put the captions into the queue."""
        images, texts = outputs[0], self.texts.whole(outputs[1:], shown)
        scale = held(self.scale)
        own = torch.arange(len(images), device=images.device)
        neighbors = info_nce(images, self.queue.nearest(texts), own, 1 / scale)
        loss = (1 - _NEIGHBOR_WEIGHT) * clip(images, texts, scale) + _NEIGHBOR_WEIGHT * neighbors
        if self.training:
            self.queue.push(normalize(texts, dim=1))
        return Judged(loss, {"scale": scale.detach(), "matched": matched(images, texts)})


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
        width: int,
        texts: Texts,
        *,
        joint: int,
        head: Sequence[int],
        temperature: float,
    ) -> None:
        """Put SimCLR's head and CLIP's projection on a backbone of `width` features."""
        super().__init__()
        self.backbone, self.texts = backbone, texts
        self.projector = projector(width, head)
        self.projection = nn.Linear(width, joint, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(_SCALE)))
        self.temperature = temperature

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, both views' projections, the plain crop's and the captions'."""
        views = encode(self.backbone, shown.views)
        pair = self.projector(torch.cat(views[:2])).chunk(2)
        plain = self.projection(views[2] if len(views) > 2 else views[0])
        return torch.cat(views), (*pair, plain, *self.texts.part(shown))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the sum of both losses."""
        first, second, images = outputs[:3]
        texts = self.texts.whole(outputs[3:], shown)
        scale = held(self.scale)
        told, alike = clip(images, texts, scale), nt_xent(first, second, self.temperature)
        logs = {
            "scale": scale.detach(),
            "matched": matched(images, texts),
            "clip": told.detach(),
            "simclr": alike.detach(),
        }
        return Judged(told + alike, logs)


def language_of(method: Method) -> tuple[dict[str, Tensor], dict[str, int]] | None:
    """Return what `save_encoder` keeps of a method's language side; None where it trains no text tower."""
    if not isinstance(method, CLIP | DeCLIP | SLIP) or not isinstance(method.texts.tower, TextTower):
        return None
    tower = method.texts.tower
    return language_tensors(tower, method.projection), tower.made_of


def held(logarithm: Tensor) -> Float[Tensor, ""]:
    """Return a scale that is learned as a logarithm, and grows no further than CLIP lets it."""
    return logarithm.clamp(max=math.log(_MOST)).exp()


@torch.no_grad()
def matched(images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Return the share of images that find their own caption among the batch's."""
    picked = (normalize(images, dim=1) @ normalize(texts, dim=1).T).argmax(dim=1)
    return (picked == torch.arange(len(images), device=images.device)).float().mean()
