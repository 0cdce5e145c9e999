"""Do features fall into groups by themselves: k-means, compared with the labels."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from likewise.evaluation.statistics import Estimate, normal_interval


@dataclass(frozen=True, kw_only=True)
class ClusteringConfig:
    """Settings: how often k-means starts anew, and the seed of its starts."""

    num_restarts: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ClusteringResult:
    """Agreement of clusters and labels, its mean over starts and that of each start.

    Attributes:
        nmi: Normalised mutual information (arithmetic mean of the entropies), 0..1.
        ari: Adjusted Rand index, at most 1, 0 for chance.
        nmi_per_restart: (starts,) the same of each start.
        ari_per_restart: (starts,) the same of each start.
    """

    nmi: Estimate
    ari: Estimate
    nmi_per_restart: Float[np.ndarray, " starts"]
    ari_per_restart: Float[np.ndarray, " starts"]


def evaluate_clustering(
    config: ClusteringConfig, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]
) -> ClusteringResult:
    """Cluster unit features by k-means into as many groups as there are labels, and compare with these.

    The interval is over starts of k-means on these images: it says how much hangs on the start.

    Raises:
        ValueError: fewer than two starts, or fewer than two labels.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    num_clusters = len(np.unique(labels))
    if config.num_restarts < 2 or num_clusters < 2:
        raise ValueError(
            f"expected two starts and two labels at least, got {config.num_restarts} and {num_clusters}"
        )
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
