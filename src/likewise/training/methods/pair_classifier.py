"""The threshold-and-classify method: are two images described alike or not?"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, relu

from likewise.training.methods.base import Batch, LossOutput, Method, forward_views

_COSINE_TOLERANCE = 1e-6  # equal unit vectors in float32 are this far from a cosine of 1


@final
class PairClassifier(Method):
    """A linear classifier on the concatenated features of two images, same or different by their captions.

    Positives are the pairs of the batch: a rule such as `--min-similarity 0.8 --fallback drop` makes them the
    pairs whose captions are that alike. Negatives are an image and the partner of another one of the batch
    whose captions are at most `negative_threshold` similar. With `positive_threshold`, positives too come
    from within the batch: all
    images i < j whose captions are at least that similar, and negatives are images i < j as well. Of what
    there is more than `negatives_per_positive` negatives a positive ask for, a part is drawn anew each
    step. The loss is the
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
        feature_dim: int,
        *,
        negative_threshold: float,
        negatives_per_positive: float,
        margin: float | None,
        positive_threshold: float | None = None,
    ) -> None:
        """Add a classifier to a backbone of `feature_dim` features; `positive_threshold` mines the batch."""
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(2 * feature_dim, 2) if margin is None else None
        self.negative_threshold, self.negatives_per_positive, self.margin, self.positive_threshold = (
            negative_threshold,
            negatives_per_positive,
            margin,
            positive_threshold,
        )

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features of all views."""
        features = forward_views(self.backbone, batch.views)
        return torch.cat(features), features

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> LossOutput:
        """Return the mean loss over positives and negatives."""
        if batch.caption_embeddings is None:
            raise TypeError("a pair classifier needs the vectors of captions")
        pos_mask, neg_mask = self._positive_negative_masks(batch.caption_embeddings)
        # How many there are stays on the device.
        num_positives, num_negatives = pos_mask.sum(), neg_mask.sum()
        pos_mask = subsample_mask(
            pos_mask, torch.minimum(num_positives, num_negatives / self.negatives_per_positive)
        )
        neg_mask = subsample_mask(
            neg_mask, torch.minimum(num_negatives, num_positives * self.negatives_per_positive)
        )
        mask = pos_mask | neg_mask
        losses, predictions = self._pairwise_loss(outputs[0], outputs[-1], pos_mask)
        num_pairs = mask.sum().clamp(min=1)
        skip_update = 1 - mask.any().float()
        logs = {
            "positives": pos_mask.sum().float(),
            "negatives": neg_mask.sum().float(),
            "pair_accuracy": ((predictions == pos_mask) & mask).sum() / num_pairs,
        }
        return LossOutput((losses * mask).sum() / num_pairs, logs, skip_update)

    def _positive_negative_masks(
        self, caption_embeddings: Float[Tensor, "two b d"]
    ) -> tuple[Bool[Tensor, "b b"], Bool[Tensor, "b b"]]:
        """Return which pairs may be positives and which negatives."""
        anchors, partners = caption_embeddings
        if self.positive_threshold is None:
            identity = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
            return identity, negative_mask(anchors, partners, self.negative_threshold)
        upper = torch.ones(len(anchors), len(anchors), dtype=torch.bool, device=anchors.device).triu(1)
        similar = (anchors @ anchors.T >= self.positive_threshold - _COSINE_TOLERANCE) & _both_captioned(
            anchors, anchors
        )
        return similar & upper, negative_mask(anchors, anchors, self.negative_threshold) & upper

    def _pairwise_loss(
        self,
        features_1: Float[Tensor, "b w"],
        features_2: Float[Tensor, "b w"],
        is_positive: Bool[Tensor, "b b"],
    ) -> tuple[Float[Tensor, "b b"], Bool[Tensor, "b b"]]:
        """Return for every two images the loss, and whether they are said to be the same."""
        if self.classifier is None:
            margin = 0.0 if self.margin is None else self.margin
            cosine = normalize(features_1, dim=1) @ normalize(features_2, dim=1).T
            return torch.where(is_positive, 1 - cosine, relu(cosine - margin)), cosine > (1 + margin) / 2
        # A linear layer on concatenated features is the sum of one on each: no pair is ever laid out.
        weight_1, weight_2 = self.classifier.weight.chunk(2, dim=1)
        logits = (features_1 @ weight_1.T)[:, None] + features_2 @ weight_2.T + self.classifier.bias
        loss = cross_entropy(logits.flatten(0, 1), is_positive.flatten().long(), reduction="none")
        return loss.view_as(is_positive), logits[..., 1] > logits[..., 0]


def negative_mask(
    anchors: Float[Tensor, "b d"], partners: Float[Tensor, "b d"], threshold: float
) -> Bool[Tensor, "b b"]:
    """Tell whose partner is another's negative: captions at most so similar, and both there."""
    off_diagonal = ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    return (anchors @ partners.T <= threshold) & _both_captioned(anchors, partners) & off_diagonal


def subsample_mask(mask: Bool[Tensor, "b b"], count: Tensor) -> Bool[Tensor, "b b"]:
    """Draw `count` of the allowed pairs evenly, by torch's generator; one at least where it is above 0."""
    u = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1)
    k = torch.where(count > 0, count.round().clamp(min=1), 0).long()
    # Gathered, because an index that is a tensor without dimensions would be sent to the host first.
    threshold = u.flatten().sort(descending=True).values.gather(0, (k - 1).clamp(min=0).view(1))
    return mask & (u >= threshold) & (k > 0)


def _both_captioned(anchors: Float[Tensor, "b d"], partners: Float[Tensor, "b d"]) -> Bool[Tensor, "b b"]:
    return anchors.any(dim=1)[:, None] & partners.any(dim=1)
