"""Losses: tensors in, scalar out; no state and no communication."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, mse_loss, normalize, relu

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


def info_nce(
    queries: Float[Tensor, "b d"],
    keys: Float[Tensor, "n d"],
    partner: Int[Tensor, " b"],
    temperature: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Cross-entropy of picking each query's partner among all keys (van den Oord et al. 2018, eq. 4)."""
    return cross_entropy(_unit(queries) @ _unit(keys).T / temperature, partner)


def queue_contrast(
    queries: Float[Tensor, "b d"],
    keys: Float[Tensor, "b d"],
    queue: Float[Tensor, "q d"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross-entropy of picking one's own key among it and a queue of unit rows (He et al. 2020, eq. 1)."""
    queries = _unit(queries)
    positive = (queries * _unit(keys)).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ queue.T], dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


def decoupled(
    first: Float[Tensor, "b d"],
    second: Float[Tensor, "b d"],
    temperature: float,
    weights: Float[Tensor, "v v"] | None = None,
) -> Float[Tensor, ""]:
    """NT-Xent without the positive in the denominator (Yeh et al. 2022, eq. 6).

    Args:
        first: Projections of the anchors' views.
        second: Projections of the partners' views.
        temperature: What similarities are divided by.
        weights: How much each view counts as a negative of each other one, from 0 to 1, as for `nt_xent`. A
            view whose negatives all count nothing is left out of the mean.
    """
    b = len(first)
    views = _unit(torch.cat([first, second]))
    logits = views @ views.T / temperature
    itself = torch.eye(2 * b, dtype=torch.bool, device=logits.device)
    positive = itself.roll(b, dims=1)
    if weights is not None:
        logits = logits + weights.masked_fill(positive, 1).log()
    negatives = logits.masked_fill(itself | positive, -torch.inf)
    some = (negatives > -torch.inf).any(dim=1)
    # A row without negatives would have -inf here, and its gradient would be no number.
    beside = negatives.masked_fill(~some[:, None], 0).logsumexp(dim=1)
    each = beside - logits[positive]
    return torch.where(some, each, 0).sum() / some.sum().clamp(min=1)


def sup_con(views: Float[Tensor, "v d"], groups: Int[Tensor, " v"], temperature: float) -> Float[Tensor, ""]:
    """Supervised contrastive loss: every other view of one's group is a positive.

    Khosla et al. 2020, eq. 2 (the mean over positives outside of the logarithm), without the ratio of
    temperatures by which the authors' code multiplies it. Views that are alone in their group are left out of
    the mean.

    Args:
        views: Projections.
        groups: Which views belong together, by number.
        temperature: What similarities are divided by.
    """
    unit = _unit(views)
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    logits = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    positive = (groups[:, None] == groups) & ~itself
    counts = positive.sum(dim=1)
    said = log_softmax(logits, dim=1).masked_fill(~positive, 0).sum(dim=1) / counts.clamp(min=1)
    return -said.sum() / (counts > 0).sum().clamp(min=1)


def negative_cosine(first: Float[Tensor, "b d"], second: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """Minus the mean cosine of partners (Chen and He 2021, "Exploring Simple Siamese", eq. 1)."""
    return -(_unit(first) * _unit(second)).sum(dim=1).mean()


@torch.no_grad()
def sinkhorn(scores: Float[Tensor, "n p"], sharpness: float = 0.05, rounds: int = 3) -> Float[Tensor, "n p"]:
    """Assign samples to prototypes softly, all prototypes alike in use (Caron et al. 2020, eq. 3 to 5).

    Args:
        scores: Similarity of each of n samples to each of p prototypes.
        sharpness: The weight of entropy; the smaller, the harder the assignment.
        rounds: Rounds of the Sinkhorn-Knopp algorithm; rows sum to 1 after the last.
    """
    # In logarithms: the exponential of a score over 0.05 leaves the range of float32 from scores of 4.5 on.
    codes = scores / sharpness
    for _ in range(rounds):
        codes = codes - codes.logsumexp(dim=0, keepdim=True)
        codes = codes - codes.logsumexp(dim=1, keepdim=True)
    return codes.exp()


def swapped_prediction(
    scores: Sequence[Float[Tensor, "b p"]], codes: Sequence[Float[Tensor, "b p"]], temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of each view's prototypes to each other one's codes (Caron et al. 2020, eq. 2 and 6).

    Args:
        scores: Similarity to the prototypes, of each view; those that have codes come first.
        codes: Assignments, of the first views.
        temperature: What scores are divided by.
    """
    said = [log_softmax(each / temperature, dim=1) for each in scores]
    losses = [
        -(code * said[view]).sum(dim=1).mean()
        for which, code in enumerate(codes)
        for view in range(len(said))
        if view != which
    ]
    return torch.stack(losses).mean()


def vicreg(
    first: Float[Tensor, "b d"],
    second: Float[Tensor, "b d"],
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Float[Tensor, ""]:
    """Partners alike, each coordinate spread, coordinates uncorrelated (Bardes et al. 2022, eq. 6).

    The variance term is the mean of both views', as in the authors' code; equation 6 has their sum.
    """
    b, d = first.shape
    spread, together = [], []
    for each in (first, second):
        centred = each - each.mean(dim=0)
        spread.append(relu(1 - torch.sqrt(centred.var(dim=0) + 1e-4)).mean())
        products = (centred.T @ centred / (b - 1)).square()
        together.append((products.sum() - products.diagonal().sum()) / d)
    return (
        invariance * mse_loss(first, second)
        + variance * (spread[0] + spread[1]) / 2
        + covariance * (together[0] + together[1])
    )


def barlow_twins(
    first: Float[Tensor, "b d"], second: Float[Tensor, "b d"], redundancy: float = 5e-3
) -> Float[Tensor, ""]:
    """Bring the cross-correlation of both views' coordinates to the identity (Zbontar et al. 2021, eq. 1)."""
    one, two = ((each - each.mean(dim=0)) / torch.sqrt(each.var(dim=0, correction=0) + 1e-5)
                for each in (first, second))  # fmt: skip
    correlation = one.T @ two / len(first)
    own = (correlation.diagonal() - 1).square().sum()
    others = correlation.square().sum() - correlation.diagonal().square().sum()
    return own + redundancy * others


def clip(
    images: Float[Tensor, "b d"], texts: Float[Tensor, "b d"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Each image picks its text and each text its image (Radford et al. 2021, figure 3)."""
    own = torch.arange(len(images), device=images.device)
    return (info_nce(images, texts, own, 1 / scale) + info_nce(texts, images, own, 1 / scale)) / 2


def siglip(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Tell for each image and text by itself whether they belong together (Zhai et al. 2023, algorithm 1)."""
    logits = _unit(images) @ _unit(texts).T * scale + bias
    sign = 2 * torch.eye(len(images), device=logits.device) - 1
    return -logsigmoid(sign * logits).sum() / len(images)


def _unit(rows: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return normalize(rows, dim=1)
