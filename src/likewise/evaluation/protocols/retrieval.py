"""Instance retrieval: recall at k and average precision per query, from frozen features."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import normalize

from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.base import EvalContext, Protocol, Score
from likewise.evaluation.results import ResultRow
from likewise.evaluation.statistics import bootstrap

# Similarities per block: 64 MiB in float32, independent of the number of images.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Options of instance retrieval."""

    recall_ks: tuple[int, ...] = (1, 5)
    """Values of k at which recall is reported."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_recall_ks(self.recall_ks)


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Scores of all queries with at least one relevant image in their gallery."""

    recall: dict[int, Bool[np.ndarray, " q"]]
    """For each k, whether a relevant image is among the top k (also called hit rate at k)."""
    average_precision: Float[np.ndarray, " q"]
    """Mean over the relevant images of the precision at their rank."""
    queries: Int[np.ndarray, " q"]
    """Ascending indices of the queries."""
    num_skipped: int
    """Images that are not used as queries because no image of their gallery is relevant."""


def retrieve(
    features: Float[Tensor, "n d"],
    instances: Shaped[np.ndarray, " n"],
    domains: Shaped[np.ndarray, " n"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalResult:
    """Rank the gallery of each image by cosine similarity and score the ranks of its instance.

    The gallery of a query is all images of other domains (say, catalog photos for a street photo), or all
    other images if there are no domains; never the query itself. Ties go to the smaller index. Average
    precision is AP = 1/|R| sum over r in R of |R up to rank(r)| / rank(r), without interpolation (Manning et
    al. 2008, section 8.4).

    Args:
        features: (n, d) of any floating dtype, in which the cosine similarity is computed.
        instances: (n,) instance of each image, any dtype; images of one instance are relevant to each other.
        domains: (n,) domain of each image, any dtype.
        ks: Values of k for recall; a k beyond the gallery takes all of it.

    Raises:
        InvalidInputError: A k is below 1.
        ValueError: The shapes differ.
    """
    if len(instances) != len(features) or (domains is not None and len(domains) != len(features)):
        raise ValueError("features, instances and domains must have the same number of rows")
    check_recall_ks(ks)
    instance_ids = _to_ids(instances, features.device)
    # Without domains every image is its own domain: the gallery is then all other images.
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
        num_skipped=len(unit_features) - len(queries),
    )


def _score_block(
    unit_features: Float[Tensor, "n d"],
    instance_ids: Int[Tensor, " n"],
    domain_ids: Int[Tensor, " n"],
    block: Int[Tensor, " b"],
    ks: Sequence[int],
) -> tuple[Int[Tensor, " q"], Float[Tensor, " q"], Bool[Tensor, "q k"]]:
    """Return index, average precision and hits at each k of the block's queries with a relevant image."""
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
    """Map values of any dtype to integers, so that equality can be tested on tensors."""
    return torch.from_numpy(np.unique(values, return_inverse=True)[1]).to(device)


def check_recall_ks(ks: Sequence[int]) -> None:
    """Raise InvalidInputError for a k below 1 or an empty sequence."""
    if min(ks, default=0) < 1:
        raise InvalidInputError(
            f"`recall_ks` must hold values of at least 1, got {tuple(ks)}", field="recall_ks"
        )


class Retrieval(Protocol):
    """Instance retrieval among the test images."""

    name = "retrieval"
    title = "Retrieval"
    summary = "find test images of the same instance"
    item_nouns = ("query", "queries")
    config: RetrievalConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Use every test image as a query; instances default to labels."""
        test, indices, dataset = context.split("test"), context.indices("test"), context.labeled_dataset
        instances = test.y.numpy() if dataset.instances is None else dataset.instances[indices]
        domains = None if dataset.domains is None else dataset.domains[indices]
        result = retrieve(test.x, instances, domains, self.config.recall_ks)
        if not len(result.queries):
            raise InvalidInputError(
                f"{dataset.root}: no two test images show the same instance", path=dataset.root
            )
        groups = instances[result.queries]
        details = {"num_queries": len(result.queries), "num_skipped_queries": result.num_skipped}
        metrics = {f"recall@{k}": hits.astype(np.float64) for k, hits in result.recall.items()}
        metrics["mean average precision"] = result.average_precision
        return [
            Score(
                metric=name,
                estimate=bootstrap(per_item, groups),
                per_item=per_item,
                groups=groups,
                details=details,
            )
            for name, per_item in metrics.items()
        ]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the ranking and the metrics."""
        return (
            "Every test image is a query that ranks the other test images (of other domains, if the dataset "
            "has domains) by similarity. Recall@k is the fraction of queries with an image of the same "
            "instance among the top k; mean average precision takes the ranks of all of them into account."
        )

    @classmethod
    def success_phrase(cls, row: ResultRow) -> str:
        """Return the phrase for one query."""
        k = row.metric.removeprefix("recall@")
        rank_phrase = {"1": " at rank 1"}.get(k, f" in the top {k}" if k.isdigit() else "")
        return f"retrieve another image of the same instance{rank_phrase}"
