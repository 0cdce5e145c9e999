"""Losses: tensors in, scalar out; no state and no communication."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def nt_xent(
    first: Float[Tensor, "b d"], second: Float[Tensor, "b d"], temperature: float
) -> Float[Tensor, ""]:
    """Normalised temperature-scaled cross-entropy over both views of a batch (Chen et al. 2020, eq. 1).

    Each of the 2b projections picks the other view of its pair among the 2b - 1 that are not itself; the
    loss is the mean over all 2b.
    """
    b = len(first)
    views = normalize(torch.cat([first, second]), dim=1)
    logits = views @ views.T / temperature
    logits = logits.masked_fill(torch.eye(2 * b, dtype=torch.bool, device=logits.device), -torch.inf)
    partner = torch.arange(2 * b, device=logits.device).roll(b)
    return cross_entropy(logits, partner)
