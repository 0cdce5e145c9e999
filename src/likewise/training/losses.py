"""Losses as pure functions: tensors in, a scalar out, without state or communication.

::

    from likewise.training.losses import nt_xent_loss
    loss = nt_xent_loss(z1, z2, temperature=0.1)

In every signature b is the batch size, d the dimension of the projections and v = 2b the number of views.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, mse_loss, normalize, relu

_COSINE_TOLERANCE = 1e-6  # float32 error of the cosine of equal unit vectors


def nt_xent_loss(
    z1: Float[Tensor, "b d"],
    z2: Float[Tensor, "b d"],
    temperature: float,
    weights: Float[Tensor, "v v"] | None = None,
    targets: Float[Tensor, "v v"] | None = None,
) -> Float[Tensor, ""]:
    """Normalized temperature-scaled cross-entropy over both views of a batch (Chen et al. 2020, eq. 1).

    Each of the v = 2b projections classifies the other view of its pair among the 2b - 1 other projections;
    the loss is the mean over all 2b.

    Args:
        z1: Projections of the anchors' views.
        z2: Projections of the partners' views.
        temperature: Softmax temperature.
        weights: Weight of each view as a negative of each other view, from 0 (ignored) to 1; rows and columns
            in the order anchors, partners. The positive always has weight 1.
        targets: Soft targets, not negative; the positive is set to 1, and rows are normalized to sum to 1.
    """
    b = len(z1)
    z = normalize(torch.cat([z1, z2]), dim=1)
    logits = z @ z.T / temperature
    self_mask = torch.eye(2 * b, dtype=torch.bool, device=logits.device)
    labels = torch.arange(2 * b, device=logits.device).roll(b)
    if weights is not None:
        positive_mask = self_mask.roll(b, dims=1)
        logits = logits + weights.masked_fill(positive_mask, 1).log()
    logits = logits.masked_fill(self_mask, -torch.inf)
    if targets is None:
        return cross_entropy(logits, labels)
    target_probs = targets.scatter(1, labels[:, None], 1.0).masked_fill(self_mask, 0)
    target_probs = target_probs / target_probs.sum(dim=1, keepdim=True)
    # The product of 0 and -inf on the diagonal must be 0.
    return -(target_probs * log_softmax(logits, dim=1).masked_fill(self_mask, 0)).sum(dim=1).mean()


def false_negative_weights(
    similarity: Float[Tensor, "v v"], threshold: float, mode: str
) -> tuple[Float[Tensor, "v v"] | None, Float[Tensor, "v v"] | None]:
    """Return the weights and targets of likely false negatives for `nt_xent_loss` and `dcl_loss`.

    Args:
        similarity: Caption cosine similarity s of all views; 0 for images without a caption.
        threshold: Similarity from which a negative counts as false.
        mode: `mask` ignores false negatives, `reweight` gives them the weight (1 - s) / (1 - threshold), and
            `soft_targets` makes them targets in proportion to s (as in supervised contrastive learning,
            Khosla et al. 2020, with similarity in place of labels).

    Returns:
        Weights and targets; None for the one that the mode does not use.
    """
    is_similar = similarity >= threshold - _COSINE_TOLERANCE
    if mode == "mask":
        return (~is_similar).to(similarity.dtype), None
    if mode == "reweight":
        dissimilarity = ((1 - similarity) / max(1 - threshold, 1e-6)).clamp(0, 1)
        return torch.where(is_similar, dissimilarity, torch.ones_like(dissimilarity)), None
    return None, torch.where(is_similar, similarity, torch.zeros_like(similarity))


def false_negative_fraction(similarity: Float[Tensor, "v v"], threshold: float) -> Float[Tensor, ""]:
    """Return the fraction of the v (v - 2) negatives with a caption similarity of at least `threshold`."""
    v = len(similarity)
    false_negatives = (similarity >= threshold - _COSINE_TOLERANCE).float()
    false_negatives = false_negatives.masked_fill(
        torch.eye(v, dtype=torch.bool, device=false_negatives.device), 0
    )
    false_negatives = false_negatives.masked_fill(
        torch.eye(v, dtype=torch.bool, device=false_negatives.device).roll(v // 2, dims=1), 0
    )
    return false_negatives.sum() / max(1, v * (v - 2))


def info_nce_loss(
    queries: Float[Tensor, "b d"],
    keys: Float[Tensor, "n d"],
    labels: Int[Tensor, " b"],
    temperature: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Cross-entropy of classifying each query's key among all keys (van den Oord et al. 2018, eq. 4)."""
    return cross_entropy(_l2_normalize(queries) @ _l2_normalize(keys).T / temperature, labels)


def soft_target_loss(
    queries: Float[Tensor, "b d"],
    keys: Float[Tensor, "b d"],
    temperature: float,
    target_temperature: float,
) -> Float[Tensor, ""]:
    """Cross-entropy of each query's similarities to all keys against the similarities of the keys themselves.

    The target of query i is softmax(k_i . k_j / target_temperature) over j, so that queries match the keys of
    all similar samples instead of their own alone (X-CLR, Sobal et al. 2024, arXiv 2407.18134).

    Args:
        queries: Projections of the images.
        keys: Embeddings of their captions; they receive no gradient.
        temperature: Softmax temperature of the similarities of queries and keys.
        target_temperature: Softmax temperature of the similarities of the keys.
    """
    keys = _l2_normalize(keys.detach())
    target_probs = (keys @ keys.T / target_temperature).softmax(dim=1)
    return cross_entropy(_l2_normalize(queries) @ keys.T / temperature, target_probs)


def moco_loss(
    queries: Float[Tensor, "b d"],
    keys: Float[Tensor, "b d"],
    memory_bank: Float[Tensor, "q d"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross-entropy of each query's key against a memory bank of unit vectors (He et al. 2020, eq. 1)."""
    queries = _l2_normalize(queries)
    positive_sim = (queries * _l2_normalize(keys)).sum(dim=1, keepdim=True)
    logits = torch.cat([positive_sim, queries @ memory_bank.T], dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


def dcl_loss(
    z1: Float[Tensor, "b d"],
    z2: Float[Tensor, "b d"],
    temperature: float,
    weights: Float[Tensor, "v v"] | None = None,
) -> Float[Tensor, ""]:
    """NT-Xent without the positive in the denominator (Yeh et al. 2022, eq. 6).

    Args:
        z1: Projections of the anchors' views.
        z2: Projections of the partners' views.
        temperature: Softmax temperature.
        weights: Weight of each view as a negative of each other view, from 0 to 1, as for `nt_xent_loss`.
            Views whose negatives all have weight 0 are excluded from the mean.
    """
    b = len(z1)
    z = _l2_normalize(torch.cat([z1, z2]))
    logits = z @ z.T / temperature
    self_mask = torch.eye(2 * b, dtype=torch.bool, device=logits.device)
    positive_mask = self_mask.roll(b, dims=1)
    if weights is not None:
        logits = logits + weights.masked_fill(positive_mask, 1).log()
    negatives = logits.masked_fill(self_mask | positive_mask, -torch.inf)
    has_negatives = (negatives > -torch.inf).any(dim=1)
    # A row without negatives would be -inf here, with a NaN gradient.
    log_denominator = negatives.masked_fill(~has_negatives[:, None], 0).logsumexp(dim=1)
    losses = log_denominator - logits[positive_mask]
    return torch.where(has_negatives, losses, 0).sum() / has_negatives.sum().clamp(min=1)


def supcon_loss(z: Float[Tensor, "v d"], labels: Int[Tensor, " v"], temperature: float) -> Float[Tensor, ""]:
    """Supervised contrastive loss: all other views of the same label are positives.

    Khosla et al. 2020, eq. 2 (the mean over positives outside of the logarithm), without the ratio of
    temperatures by which the authors' code multiplies it. Views without a positive are excluded from the
    mean.

    Args:
        z: Projections.
        labels: The label of each view.
        temperature: Softmax temperature.
    """
    z_norm = _l2_normalize(z)
    self_mask = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z_norm @ z_norm.T / temperature).masked_fill(self_mask, -torch.inf)
    positive_mask = (labels[:, None] == labels) & ~self_mask
    num_positives = positive_mask.sum(dim=1)
    mean_log_prob = log_softmax(logits, dim=1).masked_fill(~positive_mask, 0).sum(
        dim=1
    ) / num_positives.clamp(min=1)
    return -mean_log_prob.sum() / (num_positives > 0).sum().clamp(min=1)


def negative_cosine_loss(
    predictions: Float[Tensor, "b d"], targets: Float[Tensor, "b d"]
) -> Float[Tensor, ""]:
    """Negative mean cosine similarity (Chen and He 2021, "Exploring Simple Siamese", eq. 1)."""
    return -(_l2_normalize(predictions) * _l2_normalize(targets)).sum(dim=1).mean()


@torch.no_grad()
def sinkhorn(
    scores: Float[Tensor, "n p"], epsilon: float = 0.05, iterations: int = 3
) -> Float[Tensor, "n p"]:
    """Assign samples to equally used prototypes by Sinkhorn-Knopp (Caron et al. 2020, eq. 3 to 5).

    Args:
        scores: Similarity of each of n samples to each of p prototypes.
        epsilon: Weight of the entropy; smaller values give harder assignments.
        iterations: Iterations of the algorithm; rows sum to 1 after the last.

    Returns:
        The assignments (codes).
    """
    # In logarithms: the exponential of a score over 0.05 overflows float32 from scores of 4.5 on.
    codes = scores / epsilon
    for _ in range(iterations):
        codes = codes - codes.logsumexp(dim=0, keepdim=True)
        codes = codes - codes.logsumexp(dim=1, keepdim=True)
    return codes.exp()


def swav_loss(
    scores: Sequence[Float[Tensor, "b p"]], codes: Sequence[Float[Tensor, "b p"]], temperature: float
) -> Float[Tensor, ""]:
    """Cross-entropy of each view's scores to the codes of each other view (Caron et al. 2020, eq. 2 and 6).

    Args:
        scores: Similarity to the prototypes per view; views with codes come first.
        codes: Assignments of the first views.
        temperature: Softmax temperature.
    """
    log_probs = [log_softmax(view_scores / temperature, dim=1) for view_scores in scores]
    losses = [
        -(code * log_probs[view]).sum(dim=1).mean()
        for code_view, code in enumerate(codes)
        for view in range(len(log_probs))
        if view != code_view
    ]
    return torch.stack(losses).mean()


def vicreg_loss(
    z1: Float[Tensor, "b d"],
    z2: Float[Tensor, "b d"],
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Invariance, variance and covariance terms (Bardes et al. 2022, eq. 6).

    The variance term is the mean over both views, as in the authors' code; equation 6 has their sum.
    """
    b, d = z1.shape
    variance_losses, covariance_losses = [], []
    for z in (z1, z2):
        centered = z - z.mean(dim=0)
        variance_losses.append(relu(1 - torch.sqrt(centered.var(dim=0) + 1e-4)).mean())
        cov_squared = (centered.T @ centered / (b - 1)).square()
        covariance_losses.append((cov_squared.sum() - cov_squared.diagonal().sum()) / d)
    return (
        invariance_weight * mse_loss(z1, z2)
        + variance_weight * (variance_losses[0] + variance_losses[1]) / 2
        + covariance_weight * (covariance_losses[0] + covariance_losses[1])
    )


def barlow_twins_loss(
    z1: Float[Tensor, "b d"], z2: Float[Tensor, "b d"], redundancy_weight: float = 5e-3
) -> Float[Tensor, ""]:
    """Distance of the cross-correlation of both views from the identity (Zbontar et al. 2021, eq. 1)."""
    z1_norm, z2_norm = ((z - z.mean(dim=0)) / torch.sqrt(z.var(dim=0, correction=0) + 1e-5)
                for z in (z1, z2))  # fmt: skip
    correlation = z1_norm.T @ z2_norm / len(z1)
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    off_diagonal = correlation.square().sum() - correlation.diagonal().square().sum()
    return on_diagonal + redundancy_weight * off_diagonal


def clip_loss(
    image_features: Float[Tensor, "b d"], text_features: Float[Tensor, "b d"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Symmetric cross-entropy of images and texts (Radford et al. 2021, figure 3)."""
    labels = torch.arange(len(image_features), device=image_features.device)
    return (
        info_nce_loss(image_features, text_features, labels, 1 / logit_scale)
        + info_nce_loss(text_features, image_features, labels, 1 / logit_scale)
    ) / 2


def siglip_loss(
    image_features: Float[Tensor, "b d"],
    text_features: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Binary cross-entropy of every image-text pair of the batch (Zhai et al. 2023, algorithm 1)."""
    logits = _l2_normalize(image_features) @ _l2_normalize(text_features).T * logit_scale + logit_bias
    labels = 2 * torch.eye(len(image_features), device=logits.device) - 1
    return -logsigmoid(labels * logits).sum() / len(image_features)


def _l2_normalize(x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    return normalize(x, dim=1)
