"""Predictive methods: one view predicts the other, and nothing is pushed apart."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from likewise.training.losses import barlow_twins, negative_cosine, sinkhorn, swapped_prediction, vicreg
from likewise.training.methods.base import Judged, Method, Shown, encode
from likewise.training.methods.modules import Queue, Slow, predictor, projector, rising


@final
class VICReg(Method):
    """VICReg (Bardes et al. 2022, eq. 6)."""

    def __init__(self, backbone: nn.Module, width: int, *, head: Sequence[int]) -> None:
        """Put a projection head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        return features, self.projector(features).chunk(2)

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss with the paper's weights."""
        return Judged(vicreg(outputs[0], outputs[1]))


@final
class BarlowTwins(Method):
    """Barlow Twins (Zbontar et al. 2021, eq. 1)."""

    def __init__(self, backbone: nn.Module, width: int, *, head: Sequence[int]) -> None:
        """Put a projection head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features and the projections of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        return features, self.projector(features).chunk(2)

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss with the paper's weight of 0.005."""
        return Judged(barlow_twins(outputs[0], outputs[1]))


# Shares of the run; of 250,000 steps, the LGSSL code has 2,503 with frozen prototypes, 37,500 without queue.
_FROZEN, _WITHOUT_QUEUE = 0.01, 0.15


@final
class SwAV(Method):
    """SwAV (Caron et al. 2020, eq. 2 to 6), with small views if asked for; codes come from the large ones.

    Deviation from the LGSSL code: the softmax of a prediction is over the prototypes, as in the paper; LGSSL
    takes it over the batch.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        temperature: float,
        head: Sequence[int],
        prototypes: int,
        queue: int,
    ) -> None:
        """Put a projection head and prototypes on a backbone; `queue` rows a view, 0 for none."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)
        self.prototypes = nn.Parameter(normalize(torch.randn(prototypes, head[-1]), dim=1))
        self.queue_first = Queue(queue, head[-1]) if queue else None
        self.queue_second = Queue(queue, head[-1]) if queue else None
        self.temperature = temperature

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of the large views, and unit projections of all views."""
        features = encode(self.backbone, shown.views)
        projected = normalize(self.projector(torch.cat(features)).float(), dim=1)
        return torch.cat(features[:2]), projected.chunk(len(features))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the loss, and put the projections of the large views into their queues."""
        prototypes = normalize(self.prototypes, dim=1)
        if shown.progress < _FROZEN:
            # Kept in the graph, for processes that wait for every gradient.
            prototypes = prototypes.detach() + 0 * prototypes
        scores = [linear(each, prototypes) for each in outputs]
        codes = []
        for view, queue in enumerate((self.queue_first, self.queue_second)):
            used = None if shown.progress < _WITHOUT_QUEUE else queue
            codes.append(self._codes(scores[view], used, prototypes))
            if self.training and queue is not None:
                queue.push(outputs[view])
        return Judged(swapped_prediction(scores, codes, self.temperature))

    @torch.no_grad()
    def _codes(self, scores: Tensor, queue: Queue | None, prototypes: Tensor) -> Tensor:
        """Assign a view's samples, together with the queue's where there is one."""
        if queue is None:
            return sinkhorn(scores)
        return sinkhorn(torch.cat([scores, linear(queue.rows, prototypes)]))[: len(scores)]


@final
class SimSiam(Method):
    """SimSiam (Chen and He 2021, eq. 2); with `language` pairs, LGSimSiam (El Banani et al. 2023).

    Deviation from the paper: the learning rate of the predictor follows the schedule like all others.
    """

    def __init__(self, backbone: nn.Module, width: int, *, head: Sequence[int], hidden: int) -> None:
        """Put a projection and a prediction head on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head, final_norm=True)
        self.predictor = predictor(head[-1], hidden)

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, and the predictions and projections of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        projected = self.projector(features)
        return features, (*self.predictor(projected).chunk(2), *projected.detach().chunk(2))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return minus the cosine of each prediction and the other view, averaged."""
        said_first, said_second, first, second = outputs
        return Judged((negative_cosine(said_first, second) + negative_cosine(said_second, first)) / 2)


@final
class BYOL(Method):
    """BYOL (Grill et al. 2020, eq. 2, symmetric): a view predicts what a slow copy makes of the other.

    The momentum of the copy rises to 1 along a cosine.
    """

    def __init__(
        self, backbone: nn.Module, width: int, *, head: Sequence[int], hidden: int, momentum: float
    ) -> None:
        """Put both heads on a backbone of `width` features, and make a slow copy of it and the first."""
        super().__init__()
        self.backbone = backbone
        self.projector = projector(width, head)
        self.predictor = predictor(head[-1], hidden)
        self.slow = Slow(self.backbone, self.projector)
        self.momentum = momentum

    def begin(self, shown: Shown) -> None:
        """Let the slow copy follow."""
        if self.training:
            self.slow.follow(self.backbone, self.projector, keep=rising(self.momentum, shown.progress))

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return features, predictions and targets of both views."""
        features = torch.cat(encode(self.backbone, shown.views))
        said = self.predictor(self.projector(features))
        # Last, so that a chunk that is embedded once more for its gradients ends before it.
        backbone, head = self.slow.copies
        with torch.no_grad():
            targets = head(torch.cat(encode(backbone, shown.views)))
        return features, (*said.chunk(2), *targets.chunk(2))

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the squared distance of unit vectors, 2 - 2 cos, summed over both directions."""
        said_first, said_second, first, second = outputs
        return Judged(4 + 2 * (negative_cosine(said_first, second) + negative_cosine(said_second, first)))
