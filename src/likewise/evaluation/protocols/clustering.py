"""Clustering: k-means on frozen features, compared with the labels."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.base import EvalContext, Protocol, Score
from likewise.evaluation.results import ResultRow
from likewise.evaluation.statistics import Estimate, normal_interval


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig:
    """Options of clustering."""

    num_restarts: int = 10
    """Number of k-means runs from different initializations."""
    seed: int = 0
    """Seed of the initializations."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.num_restarts < 2:
            raise InvalidInputError(
                f"`num_restarts` must be at least 2 for a confidence interval, got {self.num_restarts}",
                field="num_restarts",
            )


@dataclass(frozen=True, kw_only=True)
class ClusteringResult:
    """Agreement of clusters and labels over all restarts."""

    nmi: Estimate
    """Mean normalized mutual information (arithmetic mean of the entropies), in [0, 1]."""
    ari: Estimate
    """Mean adjusted Rand index, at most 1, 0 at chance level."""
    nmi_per_restart: Float[np.ndarray, " restarts"]
    """(restarts,) normalized mutual information."""
    ari_per_restart: Float[np.ndarray, " restarts"]
    """(restarts,) adjusted Rand index."""


def evaluate_clustering(
    config: ClusteringConfig, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]
) -> ClusteringResult:
    """Cluster L2-normalized features by k-means, one cluster per class, and compare with the labels.

    The confidence interval is over restarts on these images: it measures the effect of the initialization.

    Raises:
        ValueError: There are fewer than two classes.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    num_clusters = len(np.unique(labels))
    if num_clusters < 2:
        raise ValueError(f"clustering needs at least two classes, got {num_clusters}")
    unit_features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    assignments = [
        KMeans(num_clusters, n_init=1, random_state=config.seed + restart).fit_predict(unit_features)
        for restart in range(config.num_restarts)
    ]
    nmi = np.array([normalized_mutual_info_score(labels, assignment) for assignment in assignments])
    ari = np.array([adjusted_rand_score(labels, assignment) for assignment in assignments])
    return ClusteringResult(
        nmi=normal_interval(nmi), ari=normal_interval(ari), nmi_per_restart=nmi, ari_per_restart=ari
    )


class Clustering(Protocol):
    """k-means on the features of the test images."""

    name = "clustering"
    title = "Clustering"
    summary = "agreement of k-means clusters with the labels"
    item_nouns = ("restart", "restarts")
    config: ClusteringConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Cluster the test images."""
        test = context.split("test")
        result = evaluate_clustering(self.config, test.x.numpy(), test.y.numpy())
        return [
            Score(metric="NMI", estimate=result.nmi, per_item=result.nmi_per_restart, pairing="no"),
            Score(metric="ARI", estimate=result.ari, per_item=result.ari_per_restart, pairing="no"),
        ]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the clustering and the meaning of the interval."""
        return (
            f"k-means groups the test images into as many clusters as there are classes, in {row.n} "
            "restarts. 100 % is full agreement with the labels; for ARI, 0 % is chance level. The interval "
            "covers the initialization, not another test set."
        )

    @classmethod
    def success_phrase(cls, row: ResultRow) -> str:
        """Return the phrase for one image."""
        return "cluster by class"
