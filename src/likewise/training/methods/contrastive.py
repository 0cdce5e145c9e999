"""Contrastive methods: pull partners together, push the rest of the batch or a queue apart."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from likewise.training.losses import (
    alike_share,
    decoupled,
    false_negative_weights,
    info_nce,
    nt_xent,
    queue_contrast,
    sup_con,
)
from likewise.training.methods.base import Judged, Method, Shown, encode
from likewise.training.methods.modules import Queue, Slow, predictor, projector, rising
from likewise.training.methods.options import Negatives


@final
class SimCLR(Method):
    """SimCLR (Chen et al. 2020, eq. 1); with `language` pairs, LGSimCLR (El Banani et al. 2023, section 3).

    With `decoupling`, DCL (Yeh et al. 2022, eq. 6): the positive is no part of its own denominator.

    Deviation from the LGSSL code: both views pass through the network as one batch, so BatchNorm's
    statistics are those of both, as in the SimCLR paper; LGSSL passes them one after the other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        temperature: float,
        head: Sequence[int],
        negatives: Negatives = "all",
        alike: float = 0.8,
        decoupling: bool = False,
    ) -> None:
        """Put a projection head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)
        self.temperature, self.decoupling = temperature, decoupling
        self.negatives: Negatives = negatives
        self.alike = alike

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        return features, self.projector(features).chunk(2)

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return NT-Xent or its decoupled form."""
        first, second = outputs
        weights, targets, logs = None, None, {}
        if shown.captions is not None and self.negatives != "all":
            flat = shown.captions.flatten(0, 1)
            similarity = flat @ flat.T
            weights, targets = false_negative_weights(similarity, self.alike, self.negatives)
            logs = {"alike": alike_share(similarity, self.alike)}
        if self.decoupling:
            return Judged(decoupled(first, second, self.temperature, weights), logs)
        return Judged(nt_xent(first, second, self.temperature, weights, targets), logs)


@final
class SupCon(Method):
    """Supervised contrastive learning (Khosla et al. 2020, eq. 2) with partners, or labels, as the classes.

    With `--pairs label` all images of one label in the batch are positives of each other. With any other
    source the classes are the anchors: an image and all its partners that are shown at once.
    """

    def __init__(self, backbone: nn.Module, width: int, *, temperature: float, head: Sequence[int]) -> None:
        """Put a projection head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)
        self.temperature = temperature

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of all views."""
        features = torch.cat(encode(self.backbone, shown.views))
        return features, self.projector(features).chunk(len(shown.views))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss over all views."""
        own = torch.arange(len(outputs[0]), device=outputs[0].device)
        groups = own
        if shown.groups is not None:
            # Images without label are alone with their partners: numbers that no label has.
            groups = torch.where(shown.groups >= 0, shown.groups, -1 - own)
        loss = sup_con(torch.cat(list(outputs)), groups.repeat(len(outputs)), self.temperature)
        return Judged(loss)


@final
class NNCLR(Method):
    """NNCLR (Dwibedi et al. 2021, eq. 3 and 4): a view's nearest neighbor in a queue stands for the view.

    As in the LGSSL code only the partners' views enter the queue; the loss is symmetric in both views.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        temperature: float,
        head: Sequence[int],
        hidden: int,
        queue: int,
    ) -> None:
        """Put a projection and a prediction head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)
        self.predictor = predictor(head[-1], hidden)
        self.queue = Queue(queue, head[-1])
        self.temperature = temperature

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, and the projections and predictions of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        projected = self.projector(features)
        return features, (*projected.chunk(2), *self.predictor(projected).chunk(2))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss, and put the partners' projections into the queue."""
        first, second, said_first, said_second = outputs
        own = torch.arange(len(first), device=first.device)
        loss = (
            info_nce(said_second, self.queue.nearest(first), own, self.temperature)
            + info_nce(said_first, self.queue.nearest(second), own, self.temperature)
        ) / 2
        if self.training:
            self.queue.push(normalize(second, dim=1))
        return Judged(loss)


@final
class MoCo(Method):
    """MoCo v2 (He et al. 2020, eq. 1 and 2; head and views of Chen et al. 2020, "Improved Baselines").

    The anchor's view is the query, the partner's the key. Deviation: the key encoder's batch norm sees the
    keys of all processes together instead of shuffled ones; the head has batch norm, as SimCLR's.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        temperature: float,
        head: Sequence[int],
        momentum: float,
        queue: int,
    ) -> None:
        """Put a projection head on a backbone of `width` features, and make a slow copy of both."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)
        self.slow = Slow(self.backbone, self.projector)
        self.queue = Queue(queue, head[-1])
        self.temperature, self.momentum = temperature, momentum

    def begin(self, shown: Shown) -> None:
        """Let the slow copy follow."""
        if self.training:
            self.slow.follow(self.backbone, self.projector, keep=self.momentum)

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the anchors, queries and keys."""
        anchors, partners = shown.views
        (features,) = encode(self.backbone, [anchors])
        queries = self.projector(features)
        # Last, so that a chunk that is embedded once more for its gradients ends before it.
        backbone, head = self.slow.copies
        with torch.no_grad():
            keys = head(*encode(backbone, [partners]))
        return features, (queries, keys)

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss against the queue, and put the keys into it."""
        queries, keys = outputs
        # A copy, because the queue changes before gradients are taken.
        loss = queue_contrast(queries, keys, self.queue.rows.clone(), self.temperature)
        if self.training:
            self.queue.push(normalize(keys, dim=1))
        return Judged(loss)


@final
class MoCoV3(Method):
    """MoCo v3 (Chen, Xie and He 2021, algorithm 1): queries are predictions, the batch gives the negatives.

    The loss is the sum over both directions, times 2 temperature; the momentum rises to 1 along a cosine.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        temperature: float,
        head: Sequence[int],
        hidden: int,
        momentum: float,
    ) -> None:
        """Put both heads on a backbone of `width` features, and make a slow copy of it and the first."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)
        self.predictor = predictor(head[-1], hidden)
        self.slow = Slow(self.backbone, self.projector)
        self.temperature, self.momentum = temperature, momentum

    def begin(self, shown: Shown) -> None:
        """Let the slow copy follow."""
        if self.training:
            self.slow.follow(self.backbone, self.projector, keep=rising(self.momentum, shown.progress))

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, queries and keys of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        queries = self.predictor(self.projector(features))
        # Last, so that a chunk that is embedded once more for its gradients ends before it.
        backbone, head = self.slow.copies
        with torch.no_grad():
            keys = head(torch.cat(encode(backbone, shown.views)))
        return features, (*queries.chunk(2), *keys.chunk(2))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss over both directions."""
        queries_1, queries_2, keys_1, keys_2 = outputs
        own = torch.arange(len(keys_1), device=keys_1.device)
        both = info_nce(queries_1, keys_2, own, self.temperature) + info_nce(
            queries_2, keys_1, own, self.temperature
        )
        return Judged(2 * self.temperature * both)
