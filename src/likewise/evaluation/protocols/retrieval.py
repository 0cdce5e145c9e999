"""Find the other pictures of the same thing: recall at k and average precision, one value a query."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import normalize

# Similarities held at a time: 64 MiB in float32, whatever the number of images.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Scores of the queries that have something to find.

    Attributes:
        recall: for each k, whether a relevant item is among the first k (also called hit rate at k).
        average_precision: mean over the relevant items of the precision at their rank.
        queries: indices of these queries in the features, ascending.
        skipped: number of items left out as queries because nothing in their gallery is relevant.
    """

    recall: dict[int, Bool[np.ndarray, " q"]]
    average_precision: Float[np.ndarray, " q"]
    queries: Int[np.ndarray, " q"]
    skipped: int


def retrieve(
    features: Float[Tensor, "n d"],
    instances: Shaped[np.ndarray, " n"],
    domains: Shaped[np.ndarray, " n"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalResult:
    """Rank, for each item as a query, its gallery by cosine similarity and score where its instance comes.

    The gallery of a query is all items of other domains (say catalog pictures for a street picture), or all
    other items where no domains are given; never the query itself. Of equal similarities the smaller index
    comes first. Average precision is AP = 1/|R| sum over r in R of |R up to rank(r)| / rank(r), without
    interpolation (Manning et al. 2008, section 8.4).

    Args:
        features: features of any floating dtype; cosine similarity is computed in it.
        instances: what each item shows, any dtype; items of equal instance are relevant to each other.
        domains: where each item comes from, any dtype.
        ks: the depths of recall; a depth beyond the gallery takes all of it.

    Raises:
        ValueError: shapes that differ, or a depth below one.
    """
    if len(instances) != len(features) or (domains is not None and len(domains) != len(features)):
        raise ValueError("features, instances and domains must have the same number of rows")
    if min(ks, default=1) < 1:
        raise ValueError(f"recall depths must be at least 1, got {tuple(ks)}")
    instance_ids = _to_ids(instances, features.device)
    # Without domains every item is its own: the gallery is then all others.
    domain_ids = _to_ids(np.arange(len(features)) if domains is None else domains, features.device)
    unit_features = normalize(features, dim=1)
    blocks = torch.arange(len(unit_features), device=unit_features.device).split(
        max(1, _BLOCK_ELEMENTS // max(1, len(unit_features)))
    )
    block_results = [_score_block(unit_features, instance_ids, domain_ids, block, ks) for block in blocks]
    queries, average_precision, hits = (
        torch.cat(column).cpu().numpy() for column in zip(*block_results, strict=True)
    )
    return RetrievalResult(
        recall={k: hits[:, column] for column, k in enumerate(ks)},
        average_precision=average_precision,
        queries=queries,
        skipped=len(unit_features) - len(queries),
    )


def _score_block(
    unit_features: Float[Tensor, "n d"],
    instance_ids: Int[Tensor, " n"],
    domain_ids: Int[Tensor, " n"],
    block: Int[Tensor, " b"],
    ks: Sequence[int],
) -> tuple[Int[Tensor, " q"], Float[Tensor, " q"], Bool[Tensor, "q k"]]:
    """Index, average precision and hits at each depth of the queries of a block that can be answered."""
    gallery = domain_ids[block, None] != domain_ids
    relevant = (instance_ids[block, None] == instance_ids) & gallery
    has_relevant = relevant.any(dim=1)
    similarity = (unit_features[block] @ unit_features.T).masked_fill(~gallery, -torch.inf)[has_relevant]
    order = similarity.argsort(dim=1, descending=True, stable=True)
    ranked_relevant = relevant[has_relevant].gather(1, order)
    ranks = torch.arange(1, len(unit_features) + 1, device=unit_features.device, dtype=torch.float64)
    average_precision = (ranked_relevant.cumsum(dim=1) / ranks * ranked_relevant).sum(
        dim=1
    ) / ranked_relevant.sum(dim=1)
    hits = torch.stack([ranked_relevant[:, :k].any(dim=1) for k in ks], dim=1)
    return block[has_relevant], average_precision, hits


def _to_ids(values: Shaped[np.ndarray, " n"], device: torch.device) -> Int[Tensor, " n"]:
    """Small integers in place of names, so that equality can be compared as tensors."""
    return torch.from_numpy(np.unique(values, return_inverse=True)[1]).to(device)
