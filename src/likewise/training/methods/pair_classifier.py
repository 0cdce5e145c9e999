"""The pair classifier: do two images have similar captions?"""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, relu

from likewise.training.methods.base import Batch, Method, StepOutput, forward_views
from likewise.training.methods.options import PairClassifierOptions

_COSINE_TOLERANCE = 1e-6  # float32 error of the cosine of equal unit vectors


@final
class PairClassifier(Method):
    """A linear classifier on the concatenated features of two images: similar captions or not.

    Positives are the pairs of the batch; a pair config with `min_similarity=0.8` and `fallback="drop"` limits
    them to similar captions. Negatives are an anchor and the partner of another anchor with a caption
    similarity of at most `negative_threshold`. With `mine_in_batch`, positives are all images i < j of the
    batch with a caption similarity of at least `positive_threshold`, and negatives are images i < j as well.
    If the batch has more of either than `negatives_per_positive` allows, a random subset is drawn each step.
    The loss is the cross-entropy of `different` (0) against `same` (1); with `margin`, it is the cosine
    embedding loss (Hadsell et al. 2006, with cosine in place of distance): 1 - cos for positives,
    max(0, cos - margin) for negatives.

    A batch without a positive or without a negative skips the optimizer update and is counted in `skipped`.

    Deviation from the summary that this method follows: its listing creates a new linear layer for every
    batch; here the layer is trained.
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, options: PairClassifierOptions) -> None:
        """Add the classifier, unless a margin replaces it."""
        super().__init__(backbone, feature_dim, options)
        self.options = options
        self.classifier = nn.Linear(2 * feature_dim, 2) if options.margin is None else None

    def encode(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features, of all views and of each view."""
        features = forward_views(self.backbone, batch.views)
        return torch.cat(features), features

    def compute_loss(self, outputs: Sequence[Tensor], batch: Batch) -> StepOutput:
        """Return the mean loss over positives and negatives."""
        if batch.caption_embeddings is None:
            raise TypeError("the pair classifier needs `caption_embeddings` in the batch")
        pos_mask, neg_mask = self._positive_negative_masks(batch.caption_embeddings)
        # The counts stay on the device.
        num_positives, num_negatives = pos_mask.sum(), neg_mask.sum()
        negatives_per_positive = self.options.negatives_per_positive
        pos_mask = subsample_mask(
            pos_mask, torch.minimum(num_positives, num_negatives / negatives_per_positive)
        )
        neg_mask = subsample_mask(
            neg_mask, torch.minimum(num_negatives, num_positives * negatives_per_positive)
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
        return StepOutput(loss=(losses * mask).sum() / num_pairs, logs=logs, skip_update=skip_update)

    def _positive_negative_masks(
        self, caption_embeddings: Float[Tensor, "two b d"]
    ) -> tuple[Bool[Tensor, "b b"], Bool[Tensor, "b b"]]:
        """Return the masks of admissible positives and negatives."""
        anchors, partners = caption_embeddings
        options = self.options
        if not options.mine_in_batch:
            identity = torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
            return identity, negative_mask(anchors, partners, options.negative_threshold)
        upper = torch.ones(len(anchors), len(anchors), dtype=torch.bool, device=anchors.device).triu(1)
        similar = (anchors @ anchors.T >= options.positive_threshold - _COSINE_TOLERANCE) & _both_captioned(
            anchors, anchors
        )
        return similar & upper, negative_mask(anchors, anchors, options.negative_threshold) & upper

    def _pairwise_loss(
        self,
        features_1: Float[Tensor, "b w"],
        features_2: Float[Tensor, "b w"],
        is_positive: Bool[Tensor, "b b"],
    ) -> tuple[Float[Tensor, "b b"], Bool[Tensor, "b b"]]:
        """Return the loss and the prediction (`same` or not) of every pair of images."""
        if self.classifier is None:
            margin = 0.0 if self.options.margin is None else self.options.margin
            cosine = normalize(features_1, dim=1) @ normalize(features_2, dim=1).T
            return torch.where(is_positive, 1 - cosine, relu(cosine - margin)), cosine > (1 + margin) / 2
        # A linear layer on concatenated features is the sum of a layer on each: no pair is materialized.
        weight_1, weight_2 = self.classifier.weight.chunk(2, dim=1)
        logits = (features_1 @ weight_1.T)[:, None] + features_2 @ weight_2.T + self.classifier.bias
        loss = cross_entropy(logits.flatten(0, 1), is_positive.flatten().long(), reduction="none")
        return loss.view_as(is_positive), logits[..., 1] > logits[..., 0]


def negative_mask(
    anchors: Float[Tensor, "b d"], partners: Float[Tensor, "b d"], threshold: float
) -> Bool[Tensor, "b b"]:
    """Return which anchors and partners of other anchors are negatives: both captioned, and dissimilar."""
    off_diagonal = ~torch.eye(len(anchors), dtype=torch.bool, device=anchors.device)
    return (anchors @ partners.T <= threshold) & _both_captioned(anchors, partners) & off_diagonal


def subsample_mask(mask: Bool[Tensor, "b b"], count: Tensor) -> Bool[Tensor, "b b"]:
    """Return a uniform random subset of `count` pairs of a mask, by torch's generator; 1 if it is below 1."""
    u = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1)
    k = torch.where(count > 0, count.round().clamp(min=1), 0).long()
    # By `gather`, because indexing by a zero-dimensional tensor synchronizes with the host.
    threshold = u.flatten().sort(descending=True).values.gather(0, (k - 1).clamp(min=0).view(1))
    return mask & (u >= threshold) & (k > 0)


def _both_captioned(anchors: Float[Tensor, "b d"], partners: Float[Tensor, "b d"]) -> Bool[Tensor, "b b"]:
    return anchors.any(dim=1)[:, None] & partners.any(dim=1)
