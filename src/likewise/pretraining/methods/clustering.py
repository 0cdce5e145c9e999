"""Clustering: views predict each other's cluster."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from likewise.models.heads import projector
from likewise.pretraining.losses import sinkhorn, swapped_prediction
from likewise.pretraining.methods.base import Judged, Method, Shown, encode
from likewise.pretraining.methods.memory import Queue

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
