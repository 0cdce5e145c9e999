"""Losses: tensors in, scalar out; no state and no communication."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize

_ROUNDING = 1e-6  # equal unit vectors in float32 are this far from a cosine of 1


def nt_xent(
    first: Float[Tensor, "b d"],
    second: Float[Tensor, "b d"],
    temperature: float,
    weights: Float[Tensor, "v v"] | None = None,
    targets: Float[Tensor, "v v"] | None = None,
) -> Float[Tensor, ""]:
    """Normalised temperature-scaled cross-entropy over both views of a batch (Chen et al. 2020, eq. 1).

    Each of the v = 2b projections picks the other view of its pair among the 2b - 1 that are not itself; the
    loss is the mean over all 2b.

    Args:
        first: Projections of the anchors' views.
        second: Projections of the partners' views.
        temperature: What similarities are divided by.
        weights: How much each view counts as a negative of each other one, from 0 (not at all) to 1; rows and
            columns in the order anchors, partners. The positive always counts in full.
        targets: How likely each view should be picked for each other one, not negative; the positive has 1,
            rows are brought to a sum of 1. The loss is then the cross-entropy to these soft targets.
    """
    b = len(first)
    views = normalize(torch.cat([first, second]), dim=1)
    logits = views @ views.T / temperature
    itself = torch.eye(2 * b, dtype=torch.bool, device=logits.device)
    partner = torch.arange(2 * b, device=logits.device).roll(b)
    if weights is not None:
        positive = itself.roll(b, dims=1)
        logits = logits + weights.masked_fill(positive, 1).log()
    logits = logits.masked_fill(itself, -torch.inf)
    if targets is None:
        return cross_entropy(logits, partner)
    wanted = targets.scatter(1, partner[:, None], 1.0).masked_fill(itself, 0)
    wanted = wanted / wanted.sum(dim=1, keepdim=True)
    # 0 times -inf, on the diagonal, is meant to be 0.
    return -(wanted * log_softmax(logits, dim=1).masked_fill(itself, 0)).sum(dim=1).mean()


def false_negative_weights(
    similarity: Float[Tensor, "v v"], threshold: float, mode: str
) -> tuple[Float[Tensor, "v v"] | None, Float[Tensor, "v v"] | None]:
    """Treat views whose captions are alike as less of a negative: weights and targets for `nt_xent`.

    Args:
        similarity: Cosine similarity of the captions of all views; 0 where an image has none.
        threshold: From which cosine similarity s on captions count as alike.
        mode: `mask`: they are no negatives at all. `weight`: they count (1 - s) / (1 - threshold).
            `soften`: they are negatives no more but targets, in proportion to s (as in supervised contrastive
            learning, Khosla et al. 2020, with similarity in place of labels).

    Returns:
        Weights, targets; None where the mode leaves them as they are.
    """
    alike = similarity >= threshold - _ROUNDING
    if mode == "mask":
        return (~alike).to(similarity.dtype), None
    if mode == "weight":
        faded = ((1 - similarity) / max(1 - threshold, 1e-6)).clamp(0, 1)
        return torch.where(alike, faded, torch.ones_like(faded)), None
    return None, torch.where(alike, similarity, torch.zeros_like(similarity))


def alike_share(similarity: Float[Tensor, "v v"], threshold: float) -> Float[Tensor, ""]:
    """Return the share of the v (v - 2) negatives of a batch whose captions are alike, pairs left out."""
    v = len(similarity)
    alike = (similarity >= threshold - _ROUNDING).float()
    alike = alike.masked_fill(torch.eye(v, dtype=torch.bool, device=alike.device), 0)
    alike = alike.masked_fill(torch.eye(v, dtype=torch.bool, device=alike.device).roll(v // 2, dims=1), 0)
    return alike.sum() / max(1, v * (v - 2))
