"""Do features fall into groups by themselves: k-means, compared with the labels."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from likewise.evaluation.statistics import Estimate, normal_interval


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """Settings: how often k-means starts anew, and the seed of its starts."""

    starts: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ClusteringResult:
    """Agreement of clusters and labels, its mean over starts and that of each start.

    Attributes:
        nmi: Normalised mutual information (arithmetic mean of the entropies), 0..1.
        ari: Adjusted Rand index, at most 1, 0 for chance.
        nmi_starts: (starts,) the same of each start.
        ari_starts: (starts,) the same of each start.
    """

    nmi: Estimate
    ari: Estimate
    nmi_starts: Float[np.ndarray, " starts"]
    ari_starts: Float[np.ndarray, " starts"]


def cluster(
    settings: Clustering, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]
) -> ClusteringResult:
    """Cluster unit features by k-means into as many groups as there are labels, and compare with these.

    The interval is over starts of k-means on these images: it says how much hangs on the start.

    Raises:
        ValueError: fewer than two starts, or fewer than two labels.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    groups = len(np.unique(labels))
    if settings.starts < 2 or groups < 2:
        raise ValueError(f"expected two starts and two labels at least, got {settings.starts} and {groups}")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    found = [
        KMeans(groups, n_init=1, random_state=settings.seed + start).fit_predict(unit)
        for start in range(settings.starts)
    ]
    nmi = np.array([normalized_mutual_info_score(labels, each) for each in found])
    ari = np.array([adjusted_rand_score(labels, each) for each in found])
    return ClusteringResult(
        nmi=normal_interval(nmi), ari=normal_interval(ari), nmi_starts=nmi, ari_starts=ari
    )
