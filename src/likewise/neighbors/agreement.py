"""How far encoders agree on who is like whom: their plain nearest neighbors, side by side."""

from dataclasses import dataclass

import numpy as np

from likewise.collection.records import Collection
from likewise.draws import permutation
from likewise.embeddings.embed import look_up_embeddings
from likewise.neighbors.candidates import union
from likewise.neighbors.neighbors import obtain_neighbors
from likewise.neighbors.rules import SearchRule
from likewise.neighbors.vectors import RecordVectors
from likewise.progress import SILENT, Progress

DEPTH = 10
SAMPLE = 2_000
_BINS = 60


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How alike images are to their nearest, by one encoder: a histogram.

    Attributes:
        encoder: Whose.
        edges: (b + 1,) bounds of the bins.
        images: (b,) how many images have their nearest in each.
        median: Their median, or None where no image has a neighbor.
    """

    encoder: str
    edges: tuple[float, ...]
    images: tuple[int, ...]
    median: float | None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two encoders agree; means over a sample of images that have neighbors by both.

    Attributes:
        first: An encoder.
        second: Another.
        overlap: Share of the ten nearest that are the same.
        correlation: Spearman's rank correlation of the two similarities, over all that are among the ten
            nearest by either; images where one of them does not vary are left out.
        images: How many images are in the sample.
    """

    first: str
    second: str
    overlap: float
    correlation: float | None
    images: int


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The plain nearest neighbors of a sample of images by one encoder.

    Attributes:
        encoder: Whose.
        spread: Over all images of the collection.
        sample: (s,) int64, the images.
        positions: (s, 10) int64, their neighbors, -1 where there is none.
        vectors: What they are compared by.
    """

    encoder: str
    spread: Spread
    sample: np.ndarray
    positions: np.ndarray
    vectors: RecordVectors


def sample_of(collection: Collection) -> np.ndarray:
    """Return up to 2,000 images picked by seed: (s,) int64, ascending."""
    return np.sort(permutation(len(collection), seed=0, epoch=0)[:SAMPLE])


def nearest_of(collection: Collection, encoder: str, *, images: bool, progress: Progress = SILENT) -> Nearest:
    """Look the plain nearest neighbors up, searching where there are none; one vector an image.

    Raises:
        ArtifactError: where the embeddings are missing.
        InputError: where fewer than two images can be compared.
    """
    found = obtain_neighbors(collection, encoder, SearchRule(), DEPTH, images=images, progress=progress)
    positions, similarity = found.table(min(DEPTH, found.k))
    closest = similarity[positions[:, 0] >= 0, 0]
    low = min(0.0, float(np.floor(closest.min(initial=0.0) * 10) / 10))
    counts, edges = np.histogram(np.clip(closest, low, 1), bins=_BINS, range=(low, 1))
    sample = sample_of(collection)
    modality = "images" if images else "captions"
    return Nearest(
        encoder=encoder,
        spread=Spread(
            encoder=encoder,
            edges=tuple(edges.tolist()),
            images=tuple(counts.tolist()),
            median=float(np.median(closest)) if len(closest) else None,
        ),
        sample=sample,
        positions=positions[sample],
        vectors=RecordVectors(look_up_embeddings(collection, encoder, modality=modality), len(collection)),
    )


def agreement(first: Nearest, second: Nearest) -> Agreement | None:
    """Compare two encoders on the images of the sample that have neighbors by both; None without any."""
    both = (first.positions >= 0).any(axis=1) & (second.positions >= 0).any(axis=1)
    if not both.any():
        return None
    a, b, rows = first.positions[both], second.positions[both], first.sample[both]
    shared = ((a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]).sum(axis=(1, 2))
    most = np.maximum((a >= 0).sum(axis=1), (b >= 0).sum(axis=1))
    either = union(a, b)
    correlation = rank_correlations(
        first.vectors.similarity(rows, either), second.vectors.similarity(rows, either), either >= 0
    )
    defined = correlation[np.isfinite(correlation)]
    return Agreement(
        first=first.encoder,
        second=second.encoder,
        overlap=float((shared / most).mean()),
        correlation=float(defined.mean()) if len(defined) else None,
        images=len(rows),
    )


def rank_correlations(first: np.ndarray, second: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each row, ties at their mean rank: (n, k), (n, k) -> (n,) float64.

    Only where `there` (n, k) holds; NaN for rows where either side does not vary.
    """
    ranks = []
    for values in (first, second):
        below = (values[:, None, :] < values[:, :, None]) & there[:, None, :]
        equal = (values[:, None, :] == values[:, :, None]) & there[:, None, :]
        rank = below.sum(axis=2) + equal.sum(axis=2) / 2
        mean = np.where(there, rank, 0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
        ranks.append(np.where(there, rank - mean[:, None], 0))
    x, y = ranks
    spread = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.divide((x * y).sum(axis=1), spread, out=np.full(len(x), np.nan), where=spread > 1e-9)
