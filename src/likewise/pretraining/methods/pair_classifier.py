"""The threshold-and-classify method: are two images described alike or not?"""

from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_embedding_loss, cross_entropy

from likewise.pretraining.methods.base import Method, Step


@final
class PairClassifier(Method):
    """A linear classifier on the concatenated features of two images, same or different by their captions.

    Positives are the pairs of the batch: a rule such as `--min-similarity 0.8 --fallback drop` makes them the
    pairs whose captions are that alike. Negatives are an image and the partner of another one of the batch
    whose captions are at most `unlike` similar, `ratio` of them a positive, drawn anew each step. The loss is
    the cross-entropy of `different` (0) against `same` (1); with `margin`, it is instead the cosine embedding
    loss (Hadsell et al. 2006, with cosine in place of distance): 1 - cos for positives, max(0, cos - margin)
    for negatives.

    Deviation from the summary that this method follows: its listing makes a fresh linear layer for every
    batch; here the layer is trained.
    """

    def __init__(
        self, backbone: nn.Module, width: int, *, unlike: float, ratio: float, margin: float | None
    ) -> None:
        """Put a classifier on a backbone of `width` features."""
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(2 * width, 2)
        self.unlike, self.ratio, self.margin = unlike, ratio, margin

    def step(self, views: Float[Tensor, "v b c h w"], captions: Float[Tensor, "v b d"] | None = None) -> Step:
        """Return the loss over the pairs of a batch and as many negatives as its captions allow.

        A batch without a negative teaches nothing: its loss is 0 and it is counted in the log `skipped`.
        """
        if captions is None:
            raise TypeError("a pair classifier needs the vectors of captions")
        features = self.backbone(views.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        first, second = features.float().chunk(2)
        with torch.autocast(views.device.type, enabled=False):
            unlike = unlike_pairs(captions[0], captions[1], self.unlike)
        left, right = draw_pairs(unlike, max(1, round(self.ratio * len(first))))
        everybody = torch.arange(len(first), device=left.device)
        a, b = first[torch.cat([everybody, left])], second[torch.cat([everybody, right])]
        same = (torch.arange(len(a), device=a.device) < len(first)).long()
        loss, said = self._judged(a, b, same)
        logs = {
            "negatives": torch.full_like(loss.detach(), len(left)),
            "pair_accuracy": (said == same).float().mean(),
            "skipped": torch.full_like(loss.detach(), float(len(left) == 0)),
        }
        return Step(loss * float(len(left) > 0), features.detach(), logs)

    def _judged(
        self, a: Float[Tensor, "n w"], b: Float[Tensor, "n w"], same: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, ""], Int[Tensor, " n"]]:
        """Return the loss and what is said of each pair."""
        if self.margin is None:
            logits = self.classifier(torch.cat([a, b], dim=1)).float()
            return cross_entropy(logits, same), logits.argmax(dim=1)
        loss = cosine_embedding_loss(a, b, 2 * same - 1, margin=self.margin)
        alike = torch.cosine_similarity(a, b) > (1 + self.margin) / 2
        return loss, alike.long()


def unlike_pairs(
    anchors: Float[Tensor, "b d"], partners: Float[Tensor, "b d"], threshold: float
) -> Bool[Tensor, "b b"]:
    """Tell whose partner is another's negative: captions at most so similar, and both there."""
    known = (anchors.abs().sum(dim=1) > 0)[:, None] & (partners.abs().sum(dim=1) > 0)
    others = ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    return (anchors @ partners.T <= threshold) & known & others


def draw_pairs(allowed: Bool[Tensor, "b b"], count: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Draw up to `count` of the allowed pairs evenly and without repetition, by torch's generator."""
    rows, columns = allowed.nonzero(as_tuple=True)
    drawn = torch.randperm(len(rows), device=rows.device)[:count]
    return rows[drawn], columns[drawn]
