"""The threshold-and-classify method: are two images described alike or not?"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, relu

from likewise.training.methods.base import Judged, Method, Shown, encode

_ROUNDING = 1e-6  # equal unit vectors in float32 are this far from a cosine of 1


@final
class PairClassifier(Method):
    """A linear classifier on the concatenated features of two images, same or different by their captions.

    Positives are the pairs of the batch: a rule such as `--min-similarity 0.8 --fallback drop` makes them the
    pairs whose captions are that alike. Negatives are an image and the partner of another one of the batch
    whose captions are at most `unlike` similar. With `alike`, positives too come from within the batch: all
    images i < j whose captions are at least that similar, and negatives are images i < j as well. Of what
    there is more than `ratio` negatives a positive ask for, a part is drawn anew each step. The loss is the
    cross-entropy of `different` (0) against `same` (1); with `margin`, it is instead the cosine embedding
    loss (Hadsell et al. 2006, with cosine in place of distance): 1 - cos for positives, max(0, cos - margin)
    for negatives.

    A batch without a positive or without a negative teaches nothing: no weight moves, and it is counted in
    the log `skipped`.

    Deviation from the summary that this method follows: its listing makes a fresh linear layer for every
    batch; here the layer is trained.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        *,
        unlike: float,
        ratio: float,
        margin: float | None,
        alike: float | None = None,
    ) -> None:
        """Put a classifier on a backbone of `width` features; with `alike`, pairs come from the batch."""
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(2 * width, 2) if margin is None else None
        self.unlike, self.ratio, self.margin, self.alike = unlike, ratio, margin, alike

    def embed(self, shown: Shown) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of all views."""
        features = encode(self.backbone, shown.views)
        return torch.cat(features), features

    def judge(self, outputs: Sequence[Tensor], shown: Shown) -> Judged:
        """Return the mean loss over positives and negatives."""
        if shown.captions is None:
            raise TypeError("a pair classifier needs the vectors of captions")
        positive, negative = self._admissible(shown.captions)
        # How many there are stays on the device.
        positives, negatives = positive.sum(), negative.sum()
        positive = drawn(positive, torch.minimum(positives, negatives / self.ratio))
        negative = drawn(negative, torch.minimum(negatives, positives * self.ratio))
        counted = positive | negative
        each, said = self._judged(outputs[0], outputs[-1], positive)
        n = counted.sum().clamp(min=1)
        skip = 1 - counted.any().float()
        logs = {
            "positives": positive.sum().float(),
            "negatives": negative.sum().float(),
            "pair_accuracy": ((said == positive) & counted).sum() / n,
        }
        return Judged((each * counted).sum() / n, logs, skip)

    def _admissible(
        self, captions: Float[Tensor, "two b d"]
    ) -> tuple[Bool[Tensor, "b b"], Bool[Tensor, "b b"]]:
        """Return which pairs may be positives and which negatives."""
        anchors, partners = captions
        if self.alike is None:
            itself = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
            return itself, unlike_pairs(anchors, partners, self.unlike)
        once = torch.ones(len(anchors), len(anchors), dtype=torch.bool, device=anchors.device).triu(1)
        alike = (anchors @ anchors.T >= self.alike - _ROUNDING) & _known(anchors, anchors)
        return alike & once, unlike_pairs(anchors, anchors, self.unlike) & once

    def _judged(
        self, first: Float[Tensor, "b w"], second: Float[Tensor, "b w"], same: Bool[Tensor, "b b"]
    ) -> tuple[Float[Tensor, "b b"], Bool[Tensor, "b b"]]:
        """Return for every two images the loss, and whether they are said to be the same."""
        if self.classifier is None:
            margin = 0.0 if self.margin is None else self.margin
            cosine = normalize(first, dim=1) @ normalize(second, dim=1).T
            return torch.where(same, 1 - cosine, relu(cosine - margin)), cosine > (1 + margin) / 2
        # A linear layer on concatenated features is the sum of one on each: no pair is ever laid out.
        left, right = self.classifier.weight.chunk(2, dim=1)
        logits = (first @ left.T)[:, None] + second @ right.T + self.classifier.bias
        loss = cross_entropy(logits.flatten(0, 1), same.flatten().long(), reduction="none")
        return loss.view_as(same), logits[..., 1] > logits[..., 0]


def unlike_pairs(
    anchors: Float[Tensor, "b d"], partners: Float[Tensor, "b d"], threshold: float
) -> Bool[Tensor, "b b"]:
    """Tell whose partner is another's negative: captions at most so similar, and both there."""
    others = ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    return (anchors @ partners.T <= threshold) & _known(anchors, partners) & others


def drawn(allowed: Bool[Tensor, "b b"], count: Tensor) -> Bool[Tensor, "b b"]:
    """Draw `count` of the allowed pairs evenly, by torch's generator; one at least where it is above 0."""
    chance = torch.rand(allowed.shape, device=allowed.device).masked_fill(~allowed, -1)
    last = torch.where(count > 0, count.round().clamp(min=1), 0).long()
    # Gathered, because an index that is a tensor without dimensions would be sent to the host first.
    least = chance.flatten().sort(descending=True).values.gather(0, (last - 1).clamp(min=0).view(1))
    return allowed & (chance >= least) & (last > 0)


def _known(rows: Float[Tensor, "b d"], columns: Float[Tensor, "b d"]) -> Bool[Tensor, "b b"]:
    return rows.any(dim=1)[:, None] & columns.any(dim=1)
