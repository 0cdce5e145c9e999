"""Training-free statistics of pairs: coverage, hubness, reciprocity, label precision.

Each possible pair is weighted by its probability, so that the statistics are expectations over epochs. Pairs
by label, of which there may be too many, are sampled once per image.
"""

from dataclasses import dataclass

import numpy as np

from likewise.data.dataset import CaptionDataset
from likewise.data.filters import open_view
from likewise.embeddings.store import find_embeddings
from likewise.neighbors.config import SearchConfig
from likewise.neighbors.index import find_or_compute_neighbors
from likewise.neighbors.vectors import ImageVectors, rows_per_block
from likewise.pairs.candidates import Candidates, union
from likewise.pairs.sampling import CandidateSampler, Pairs
from likewise.progress import NULL_PROGRESS, Progress
from likewise.rng import Stream, epoch_permutation, uniform

AGREEMENT_K = 10
SAMPLE_SIZE = 2_000
_NUM_BINS = 60


@dataclass(frozen=True, kw_only=True)
class SimilarityHistogram:
    """Histogram of the similarity of images to their nearest neighbor, by one encoder.

    Attributes:
        encoder: Name of the encoder.
        bin_edges: (b + 1,) edges of the bins.
        counts: (b,) number of images per bin.
        median: Median similarity; None if no image has a neighbor.
    """

    encoder: str
    bin_edges: tuple[float, ...]
    counts: tuple[int, ...]
    median: float | None


@dataclass(frozen=True, kw_only=True)
class EncoderAgreement:
    """Agreement of two encoders: means over a sample of images that have neighbors by both.

    Attributes:
        encoder_a: Name of the first encoder.
        encoder_b: Name of the second encoder.
        overlap: Fraction of the ten nearest neighbors that both have in common.
        correlation: Spearman's rank correlation of the two similarities over the union of the ten nearest;
            images for which one of them is constant are excluded.
        num_images: Number of images in the sample.
    """

    encoder_a: str
    encoder_b: str
    overlap: float
    correlation: float | None
    num_images: int


@dataclass(frozen=True, kw_only=True)
class SampledNeighbors:
    """Unconstrained nearest neighbors of a sample of images by one encoder.

    Attributes:
        encoder: Name of the encoder.
        histogram: Similarity to the nearest neighbor, over all images of the dataset.
        anchors: (s,) int64, the images of the sample.
        neighbor_positions: (s, 10) int64, their neighbors, padded with -1.
        vectors: The embeddings, one vector per image.
    """

    encoder: str
    histogram: SimilarityHistogram
    anchors: np.ndarray
    neighbor_positions: np.ndarray
    vectors: ImageVectors


def sample_images(dataset: CaptionDataset) -> np.ndarray:
    """Return the positions of up to 2,000 random images: (s,) int64, ascending."""
    return np.sort(epoch_permutation(len(dataset), seed=0, epoch=0)[:SAMPLE_SIZE])


def sample_neighbors(
    dataset: CaptionDataset, encoder: str, *, use_image_embeddings: bool, progress: Progress = NULL_PROGRESS
) -> SampledNeighbors:
    """Return unconstrained nearest neighbors of a sample; missing neighbors are searched for.

    Raises:
        ArtifactError: if embeddings are missing.
        InvalidInputError: if fewer than two images can be compared.
    """
    embeddings = find_embeddings(dataset, encoder, modality="images" if use_image_embeddings else "captions")
    neighbors = find_or_compute_neighbors(
        open_view(dataset), embeddings, SearchConfig(), AGREEMENT_K, progress=progress
    )
    positions, similarity = neighbors.topk(min(AGREEMENT_K, neighbors.k))
    top1_similarity = similarity[positions[:, 0] >= 0, 0]
    low = min(0.0, float(np.floor(top1_similarity.min(initial=0.0) * 10) / 10))
    counts, edges = np.histogram(np.clip(top1_similarity, low, 1), bins=_NUM_BINS, range=(low, 1))
    sample = sample_images(dataset)
    return SampledNeighbors(
        encoder=encoder,
        histogram=SimilarityHistogram(
            encoder=encoder,
            bin_edges=tuple(edges.tolist()),
            counts=tuple(counts.tolist()),
            median=float(np.median(top1_similarity)) if len(top1_similarity) else None,
        ),
        anchors=sample,
        neighbor_positions=positions[sample],
        vectors=ImageVectors(embeddings, len(dataset)),
    )


def compute_agreement(
    neighbors_a: SampledNeighbors, neighbors_b: SampledNeighbors
) -> EncoderAgreement | None:
    """Return the agreement of two encoders; None if no image of the sample has neighbors by both."""
    has_neighbors = (neighbors_a.neighbor_positions >= 0).any(axis=1) & (
        neighbors_b.neighbor_positions >= 0
    ).any(axis=1)
    if not has_neighbors.any():
        return None
    a, b, anchors = (
        neighbors_a.neighbor_positions[has_neighbors],
        neighbors_b.neighbor_positions[has_neighbors],
        neighbors_a.anchors[has_neighbors],
    )
    num_shared = ((a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]).sum(axis=(1, 2))
    max_count = np.maximum((a >= 0).sum(axis=1), (b >= 0).sum(axis=1))
    union_positions = union(a, b)
    correlation = rank_correlations(
        neighbors_a.vectors.similarity(anchors, union_positions),
        neighbors_b.vectors.similarity(anchors, union_positions),
        union_positions >= 0,
    )
    valid = correlation[np.isfinite(correlation)]
    return EncoderAgreement(
        encoder_a=neighbors_a.encoder,
        encoder_b=neighbors_b.encoder,
        overlap=float((num_shared / max_count).mean()),
        correlation=float(valid.mean()) if len(valid) else None,
        num_images=len(anchors),
    )


def rank_correlations(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each row, with mean ranks for ties: (n, k), (n, k) -> (n,) float64.

    Only entries in `mask` (n, k) bool count. NaN for rows in which `a` or `b` is constant.
    """
    ranks = []
    for values in (a, b):
        num_below = (values[:, None, :] < values[:, :, None]) & mask[:, None, :]
        num_equal = (values[:, None, :] == values[:, :, None]) & mask[:, None, :]
        rank = num_below.sum(axis=2) + num_equal.sum(axis=2) / 2
        mean = np.where(mask, rank, 0).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
        ranks.append(np.where(mask, rank - mean[:, None], 0))
    x, y = ranks
    norm = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return np.divide((x * y).sum(axis=1), norm, out=np.full(len(x), np.nan), where=norm > 1e-9)


MAX_HUBS = 5
_CHUNK_PAIRS = 16_384
_Z_975 = 1.959964  # 97.5th percentile of the standard normal distribution


@dataclass(frozen=True, kw_only=True)
class PairDistribution:
    """All possible pairs with their probabilities.

    Attributes:
        anchors: (e,) int64, ascending.
        partners: (e,) int64.
        prob: (e,) float64, probability of the partner given the anchor.
        top1_prob: (e,) float64, the same if only the best candidate of each row is sampled.
        similarity: (e,) float32 cosine similarity of the search; None for pairs by label.
        expected_in_degree: (n,) float64, expected number of anchors per epoch that have the image as partner.
        is_mutual: (e,) bool, true if the anchor is also a possible partner of its partner.
    """

    anchors: np.ndarray
    partners: np.ndarray
    prob: np.ndarray
    top1_prob: np.ndarray
    similarity: np.ndarray | None
    expected_in_degree: np.ndarray
    is_mutual: np.ndarray


@dataclass(frozen=True, kw_only=True)
class PairSignals:
    """Properties of the images of a dataset that pairs are judged by.

    Attributes:
        caption_hashes: (n,) int64 hashes of captions, -1 without a caption.
        image_hashes: (n,) uint64 difference hashes.
        is_readable: (n,) bool, true if there is a hash.
        near_duplicate_ids: (n,) int64 cluster of near-duplicate images, -1 for images without any.
        labels: (n,) int64, -1 without a label; None if no image has one.
        image_vectors: Image embeddings, if there are any.
    """

    caption_hashes: np.ndarray
    image_hashes: np.ndarray
    is_readable: np.ndarray
    near_duplicate_ids: np.ndarray
    labels: np.ndarray | None
    image_vectors: ImageVectors | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean over images of a fraction of their partners, with its 95 % normal confidence interval."""

    value: float
    low: float
    high: float
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Hub:
    """An image that is the partner of many others, with their expected number per epoch."""

    position: int
    id: str
    caption: str
    expected_in_degree: float


@dataclass(frozen=True, kw_only=True)
class PairStats:
    """Statistics of pairs; fractions are from 0 to 1, and means are over sampled pairs.

    Attributes:
        paired_fraction: Fraction of the images of the dataset that have a partner.
        similarity: 10th, 50th and 90th percentile of the similarity (inverted distribution function); None
            for pairs by label.
        identical_caption_fraction: Fraction of pairs whose captions are equal except for case, spaces and
            punctuation.
        hubness_skew: Skewness of the k-occurrence N over all images of the dataset (Radovanović, Nanopoulos
            and Ivanović 2010, eq. 1: S = E(N - mean)^3 / std^3), with N the expected number of times that an
            image is a partner in an epoch. 0 if N is constant.
        hubs: The images with the greatest N, as far as it exceeds 1.
        reciprocity: Fraction of pairs whose anchor is also a possible partner of its partner.
        coverage: Fraction of the images of the dataset that are a possible partner.
        hash_distance: Mean Hamming distance of the 64-bit difference hashes of a pair (Krawetz 2013), over
            pairs of readable images.
        near_duplicate_fraction: Fraction of pairs that `exclude_near_duplicates` would exclude.
        image_similarity: Mean cosine similarity of the image embeddings, over pairs in which both have one.
        top1_precision: Fraction of partners with the label of the anchor if only the best candidate is
            sampled; a mean over the images with a label and a labeled partner.
        label_precision: The same over all partners, weighted by their probability.
    """

    paired_fraction: float
    similarity: tuple[float, float, float] | None
    identical_caption_fraction: float
    hubness_skew: float
    hubs: tuple[Hub, ...]
    reciprocity: float
    coverage: float
    hash_distance: float | None
    near_duplicate_fraction: float
    image_similarity: float | None
    top1_precision: Estimate | None
    label_precision: Estimate | None


@dataclass(frozen=True, kw_only=True)
class RandomBaseline:
    """The same statistics for random pairs: exact means over all pairs of different images."""

    identical_caption_fraction: float
    hash_distance: float | None
    near_duplicate_fraction: float
    image_similarity: float | None
    label_precision: float | None


def pair_distribution(pairs: Pairs, image_ids: np.ndarray) -> PairDistribution:
    """Return all possible pairs with their probabilities.

    Args:
        pairs: The pairs.
        image_ids: The image of each row of candidates, (num_rows,) int64, ascending; `np.arange(n)` if each
            image has one row.
    """
    num_images = len(pairs.has_partner)
    if isinstance(pairs.sampler, CandidateSampler):
        return _candidate_distribution(pairs.sampler, image_ids, pairs.has_partner)
    anchors = np.flatnonzero(pairs.has_partner)
    u = uniform(anchors, 2, seed=0, epoch=0, stream=Stream.PAIR_STATS)
    ones = np.ones(len(anchors))
    # Each of s images with a label is the partner of s - 1 others with probability 1 / (s - 1).
    return PairDistribution(
        anchors=anchors,
        partners=pairs.sampler.sample(anchors, u),
        prob=ones,
        top1_prob=ones,
        similarity=None,
        expected_in_degree=np.bincount(anchors, minlength=num_images).astype(np.float64),
        is_mutual=np.ones(len(anchors), bool),
    )


def _candidate_distribution(
    sampler: CandidateSampler, image_ids: np.ndarray, has_partner: np.ndarray
) -> PairDistribution:
    mask = sampler.candidates.mask & has_partner[image_ids][:, None]
    has_candidates = mask.any(axis=1)
    rows_per_image = np.bincount(image_ids[has_candidates], minlength=len(has_partner))
    row, rank = np.nonzero(mask)
    anchors, partners = image_ids[row], sampler.candidates.positions[row, rank]
    prob = sampling_probs(sampler.candidates, sampler.temperature)[row, rank] / rows_per_image[anchors]
    num_images = len(has_partner)
    return PairDistribution(
        anchors=anchors,
        partners=partners,
        prob=prob,
        top1_prob=np.where(rank == 0, 1 / rows_per_image[anchors], 0.0),
        similarity=sampler.candidates.similarity[row, rank],
        expected_in_degree=np.bincount(partners, prob, minlength=num_images),
        is_mutual=_mutual_mask(anchors, partners, num_images),
    )


def _mutual_mask(anchors: np.ndarray, partners: np.ndarray, num_images: int) -> np.ndarray:
    """Return which directed pairs (e,) also occur in the other direction: (e,) bool."""
    smaller, is_forward = np.minimum(anchors, partners), anchors < partners
    pair_ids = smaller * num_images + np.maximum(anchors, partners)
    order = np.argsort(pair_ids)
    starts = np.flatnonzero(np.diff(pair_ids[order], prepend=-1))
    lengths = np.diff(starts, append=len(order))
    num_forward = np.add.reduceat(is_forward[order].astype(np.int64), starts) if len(starts) else starts
    is_mutual = np.empty(len(order), bool)
    is_mutual[order] = np.repeat((num_forward > 0) & (num_forward < lengths), lengths)
    return is_mutual


def sampling_probs(candidates: Candidates, temperature: float | None) -> np.ndarray:
    """Return the probability of each candidate within its row: (n, k) float64, 0 for padding.

    Uniform, or in proportion to exp(similarity / temperature).
    """
    mask = candidates.mask
    if temperature is None:
        weights = mask.astype(np.float64)
    else:
        logits = np.where(mask, candidates.similarity.astype(np.float64), -np.inf) / temperature
        max_logit = logits.max(axis=1, keepdims=True, initial=-np.inf)
        weights = np.where(mask, np.exp(logits - np.where(np.isfinite(max_logit), max_logit, 0)), 0)
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)


def compute_pair_stats(
    distribution: PairDistribution, signals: PairSignals, dataset: CaptionDataset
) -> PairStats:
    """Return the statistics of at least one pair."""
    a, p, w = distribution.anchors, distribution.partners, distribution.prob
    labels = signals.labels
    return PairStats(
        paired_fraction=len(np.unique(a)) / len(signals.caption_hashes),
        similarity=_similarity_percentiles(distribution),
        identical_caption_fraction=_equal_fraction(distribution, signals.caption_hashes),
        hubness_skew=skewness(distribution.expected_in_degree),
        hubs=_top_hubs(distribution.expected_in_degree, dataset),
        reciprocity=float(w[distribution.is_mutual].sum() / w.sum()),
        coverage=float((distribution.expected_in_degree > 0).mean()),
        hash_distance=_mean_hash_distance(distribution, signals),
        near_duplicate_fraction=_equal_fraction(distribution, signals.near_duplicate_ids),
        image_similarity=None
        if signals.image_vectors is None
        else _mean_image_similarity(distribution, signals.image_vectors),
        top1_precision=None if labels is None else label_precision(a, p, distribution.top1_prob, labels),
        label_precision=None if labels is None else label_precision(a, p, w, labels),
    )


def skewness(values: np.ndarray) -> float:
    """Return the third standardized moment of values (n,), 0 if they are constant."""
    centered = values - values.mean()
    std = np.sqrt((centered**2).mean())
    return float((centered**3).mean() / std**3) if std > 1e-12 else 0.0


def label_precision(
    anchors: np.ndarray, partners: np.ndarray, weights: np.ndarray, labels: np.ndarray
) -> Estimate | None:
    """Return the fraction of partners with the same label: a mean over images of weighted means.

    Pairs (e,) with weights (e,); labels (n,) int64. Pairs with an unlabeled image (-1) are ignored. None if
    none remain.
    """
    is_labeled = (labels[anchors] >= 0) & (labels[partners] >= 0)
    a, p, w = anchors[is_labeled], partners[is_labeled], weights[is_labeled]
    total_weight = np.bincount(a, w, minlength=len(labels))
    correct_weight = np.bincount(a, w * (labels[a] == labels[p]), minlength=len(labels))
    image_precision = correct_weight[total_weight > 0] / total_weight[total_weight > 0]
    if not len(image_precision):
        return None
    value = float(image_precision.mean())
    half_width = (
        _Z_975 * float(image_precision.std(ddof=1)) / len(image_precision) ** 0.5
        if len(image_precision) > 1
        else 1.0
    )
    return Estimate(
        value=value,
        low=max(0.0, value - half_width),
        high=min(1.0, value + half_width),
        num_images=len(image_precision),
    )


def random_baseline(signals: PairSignals) -> RandomBaseline:
    """Return the statistics of random pairs, computed exactly from counts and sums."""
    hashes = signals.image_hashes[signals.is_readable]
    distance = None
    if len(hashes) > 1:
        bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1)
        ones, m = bits.sum(axis=0, dtype=np.float64), len(hashes)
        distance = float((2 * ones * (m - ones)).sum() / (m * (m - 1)))
    return RandomBaseline(
        identical_caption_fraction=_random_equal_fraction(
            signals.caption_hashes, len(signals.caption_hashes)
        ),
        hash_distance=distance,
        near_duplicate_fraction=_random_equal_fraction(
            signals.near_duplicate_ids, len(signals.near_duplicate_ids)
        ),
        image_similarity=None
        if signals.image_vectors is None
        else _random_image_similarity(signals.image_vectors),
        label_precision=None
        if signals.labels is None
        else _random_equal_fraction(signals.labels, int((signals.labels >= 0).sum())),
    )


def _random_equal_fraction(ids: np.ndarray, n: int) -> float:
    """Return the fraction of pairs of n images whose codes are equal and not -1."""
    counts = np.unique(ids[ids >= 0], return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / max(1, n * (n - 1)))


def _random_image_similarity(image_vectors: ImageVectors) -> float | None:
    n = len(image_vectors.captions_per_image)
    vector_sum, num_vectors = np.zeros(image_vectors.dim), 0
    block_size = rows_per_block(image_vectors.dim)
    for start in range(0, n, block_size):
        vectors = image_vectors.get(np.arange(start, min(start + block_size, n))).astype(np.float64)
        vector_sum += vectors.sum(axis=0)
        num_vectors += int(vectors.any(axis=1).sum())
    return (
        float((vector_sum @ vector_sum - num_vectors) / (num_vectors * (num_vectors - 1)))
        if num_vectors > 1
        else None
    )


def _similarity_percentiles(distribution: PairDistribution) -> tuple[float, float, float] | None:
    if distribution.similarity is None:
        return None
    low, median, high = np.quantile(
        distribution.similarity, (0.1, 0.5, 0.9), weights=distribution.prob, method="inverted_cdf"
    )
    return float(low), float(median), float(high)


def _top_hubs(expected_in_degree: np.ndarray, dataset: CaptionDataset) -> tuple[Hub, ...]:
    top = np.argsort(-expected_in_degree, kind="stable")[:MAX_HUBS]
    return tuple(
        Hub(
            position=int(position),
            id=sample.id,
            caption=" · ".join(sample.captions),
            expected_in_degree=float(expected_in_degree[position]),
        )
        for position in top[expected_in_degree[top] > 1 + 1e-9]
        for sample in (dataset[int(position)],)
    )


def _equal_fraction(distribution: PairDistribution, ids: np.ndarray) -> float:
    """Return the fraction of pairs whose codes are equal and not -1."""
    is_equal = (ids[distribution.anchors] >= 0) & (ids[distribution.anchors] == ids[distribution.partners])
    return float(distribution.prob[is_equal].sum() / distribution.prob.sum())


def _mean_hash_distance(distribution: PairDistribution, signals: PairSignals) -> float | None:
    is_readable = signals.is_readable[distribution.anchors] & signals.is_readable[distribution.partners]
    if not is_readable.any():
        return None
    hashes_a, hashes_b = (
        signals.image_hashes[distribution.anchors[is_readable]],
        signals.image_hashes[distribution.partners[is_readable]],
    )
    return float(np.average(np.bitwise_count(hashes_a ^ hashes_b), weights=distribution.prob[is_readable]))


def _mean_image_similarity(distribution: PairDistribution, image_vectors: ImageVectors) -> float | None:
    weighted_sum = weight_sum = 0.0
    for start in range(0, len(distribution.anchors), _CHUNK_PAIRS):
        chunk = slice(start, start + _CHUNK_PAIRS)
        a, b = image_vectors.get(distribution.anchors[chunk]), image_vectors.get(distribution.partners[chunk])
        weight = np.where(a.any(axis=1) & b.any(axis=1), distribution.prob[chunk], 0)
        weighted_sum += float(((a * b).sum(axis=1) * weight).sum())
        weight_sum += float(weight.sum())
    return weighted_sum / weight_sum if weight_sum > 0 else None
