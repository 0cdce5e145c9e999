"""What pairs are worth before anything is trained on them: figures of a choice of partners.

Every pair that may be drawn counts by how likely it is drawn, so that the figures are expectations over
epochs and no sample; pairs of one label, of which there may be too many, are drawn once an image.
"""

from dataclasses import dataclass

import numpy as np

from likewise.data.dataset import Collection
from likewise.embeddings.store import look_up_embeddings
from likewise.neighbors.config import SearchRule
from likewise.neighbors.index import obtain_neighbors
from likewise.neighbors.vectors import RecordVectors, block_rows
from likewise.pairs.candidates import Candidates, union
from likewise.pairs.sampling import FromTable, Pairs
from likewise.progress import SILENT, Progress
from likewise.rng import permutation, uniforms

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


HUBS = 5
_STREAM = 102
_STEP = 16_384
_NORMAL = 1.959964  # 97.5 % of a normal distribution lie below


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The pairs that may be drawn, anchor by anchor.

    Attributes:
        anchor: (e,) int64, ascending.
        partner: (e,) int64.
        weight: (e,) float64, how likely the anchor is shown this partner; sums to 1 an anchor.
        first: (e,) float64, the same if only the best candidate of every row were drawn.
        similarity: (e,) float32 as the rule sees it, or None where the rule knows none.
        chosen: (n,) float64, how many images are shown each image in an epoch, on average.
        returned: (e,) bool, whether the partner may draw the anchor as well.
    """

    anchor: np.ndarray
    partner: np.ndarray
    weight: np.ndarray
    first: np.ndarray
    similarity: np.ndarray | None
    chosen: np.ndarray
    returned: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a collection tells about its pairs.

    Attributes:
        captions: (n,) int64 codes of what captions say, -1 without.
        hashes: (n,) uint64 difference hashes.
        readable: (n,) bool, where there is a hash.
        copies: (n,) int64 codes of near-duplicate images, -1 for images without any.
        labels: (n,) int64, -1 without; None where no image has one.
        looks: Embeddings of the images, if there are any.
    """

    captions: np.ndarray
    hashes: np.ndarray
    readable: np.ndarray
    copies: np.ndarray
    labels: np.ndarray | None
    looks: RecordVectors | None


@dataclass(frozen=True, kw_only=True)
class Share:
    """A mean over images of a share of their partners, with its 95 % normal interval."""

    value: float
    low: float
    high: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Hub:
    """An image that many are paired with: how many an epoch, on average."""

    position: int
    id: str
    caption: str
    chosen: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a choice of partners is worth; shares are of 1, all means over draws.

    Attributes:
        with_partner: Share of the collection's images that have a partner.
        similarity: 10th, 50th and 90th percentile over draws of the similarity that the rule goes by (the
            smallest value that this share of draws does not exceed); None where the rule knows none.
        identical_captions: Share of draws whose captions read the same but for case, spaces and punctuation.
        hub_skew: Skewness of how often images are drawn, over all images of the collection (Radovanović,
            Nanopoulos and Ivanović 2010, eq. 1: S = E(N - mean)^3 / deviation^3, N being the k-occurrence,
            here the expected number of draws an epoch). 0 where all are drawn equally often.
        hubs: The images drawn most, those alone that are drawn more than once an epoch.
        reciprocal: Share of draws whose partner may draw the anchor as well.
        reach: Share of the collection's images that are ever a partner.
        hash_distance: Mean number of bits in which the 64-bit difference hashes of a pair differ (Krawetz
            2013), over draws whose both images can be read.
        near_duplicates: Share of draws whose images are near-duplicates of each other, as the rule
            `distinct_images` takes them.
        looks: Mean cosine of the pair's image embeddings, where both have one.
        precision_first: Share of partners of the anchor's label, if only the best candidate is drawn; a mean
            over the images that have a label and a partner with one.
        precision: The same over all draws, by their weight.
    """

    with_partner: float
    similarity: tuple[float, float, float] | None
    identical_captions: float
    hub_skew: float
    hubs: tuple[Hub, ...]
    reciprocal: float
    reach: float
    hash_distance: float | None
    near_duplicates: float
    looks: float | None
    precision_first: Share | None
    precision: Share | None


@dataclass(frozen=True, kw_only=True)
class Chance:
    """The same figures for two images picked blindly: exact means over all pairs of different images."""

    identical_captions: float
    hash_distance: float | None
    near_duplicates: float
    looks: float | None
    precision: float | None


def draws_of(pairs: Pairs, owner: np.ndarray) -> Draws:
    """List the pairs of a choice with their weights.

    Args:
        pairs: A rule that was applied.
        owner: The image of each row of candidates, (rows,) int64, ascending; the positions themselves where
            each image has one row.
    """
    n = len(pairs.with_partner)
    if isinstance(pairs.choice, FromTable):
        return _listed(pairs.choice, owner, pairs.with_partner)
    anchor = np.flatnonzero(pairs.with_partner)
    chance = uniforms(anchor, 2, seed=0, epoch=0, stream=_STREAM)
    each = np.ones(len(anchor))
    # In a group of s, everybody is drawn by s - 1 others with probability 1 / (s - 1), and draws them.
    return Draws(
        anchor=anchor,
        partner=pairs.choice.draw(anchor, chance),
        weight=each,
        first=each,
        similarity=None,
        chosen=np.bincount(anchor, minlength=n).astype(np.float64),
        returned=np.ones(len(anchor), bool),
    )


def _listed(choice: FromTable, owner: np.ndarray, with_partner: np.ndarray) -> Draws:
    found = choice.candidates.found & with_partner[owner][:, None]
    filled = found.any(axis=1)
    rows = np.bincount(owner[filled], minlength=len(with_partner))  # that an image's draw starts from
    row, place = np.nonzero(found)
    anchor, partner = owner[row], choice.candidates.positions[row, place]
    weight = likelihoods(choice.candidates, choice.temperature)[row, place] / rows[anchor]
    n = len(with_partner)
    return Draws(
        anchor=anchor,
        partner=partner,
        weight=weight,
        first=np.where(place == 0, 1 / rows[anchor], 0.0),
        similarity=choice.candidates.similarity[row, place],
        chosen=np.bincount(partner, weight, minlength=n),
        returned=_returned(anchor, partner, n),
    )


def _returned(anchor: np.ndarray, partner: np.ndarray, n: int) -> np.ndarray:
    """Tell of each directed pair (e,) whether the other direction is there too: (e,) bool."""
    low, forth = np.minimum(anchor, partner), anchor < partner
    either = low * n + np.maximum(anchor, partner)
    order = np.argsort(either)
    starts = np.flatnonzero(np.diff(either[order], prepend=-1))
    lengths = np.diff(starts, append=len(order))
    forward = np.add.reduceat(forth[order].astype(np.int64), starts) if len(starts) else starts
    both = np.empty(len(order), bool)
    both[order] = np.repeat((forward > 0) & (forward < lengths), lengths)
    return both


def likelihoods(candidates: Candidates, temperature: float | None) -> np.ndarray:
    """Return how likely each candidate is drawn from its row: (n, k) float64, 0 where there is none.

    Evenly, or in proportion to exp(similarity / temperature).
    """
    found = candidates.found
    if temperature is None:
        weights = found.astype(np.float64)
    else:
        exponent = np.where(found, candidates.similarity.astype(np.float64), -np.inf) / temperature
        highest = exponent.max(axis=1, keepdims=True, initial=-np.inf)
        weights = np.where(found, np.exp(exponent - np.where(np.isfinite(highest), highest, 0)), 0)
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)


def figures_of(draws: Draws, evidence: Evidence, collection: Collection) -> Figures:
    """Measure pairs; there must be at least one."""
    a, p, w = draws.anchor, draws.partner, draws.weight
    labels = evidence.labels
    return Figures(
        with_partner=len(np.unique(a)) / len(evidence.captions),
        similarity=_percentiles(draws),
        identical_captions=_equal(draws, evidence.captions),
        hub_skew=skewness(draws.chosen),
        hubs=_hubs(draws.chosen, collection),
        reciprocal=float(w[draws.returned].sum() / w.sum()),
        reach=float((draws.chosen > 0).mean()),
        hash_distance=_distance(draws, evidence),
        near_duplicates=_equal(draws, evidence.copies),
        looks=None if evidence.looks is None else _cosine(draws, evidence.looks),
        precision_first=None if labels is None else precision(a, p, draws.first, labels),
        precision=None if labels is None else precision(a, p, w, labels),
    )


def skewness(values: np.ndarray) -> float:
    """Return the third standardised moment of some values (n,), 0 where they are all equal."""
    apart = values - values.mean()
    deviation = np.sqrt((apart**2).mean())
    return float((apart**3).mean() / deviation**3) if deviation > 1e-12 else 0.0


def precision(
    anchor: np.ndarray, partner: np.ndarray, weight: np.ndarray, labels: np.ndarray
) -> Share | None:
    """Return the share of partners of the same label: a mean over images, each by its own weights.

    Pairs (e,) with weights (e,); labels (n,) int64. Pairs with an image without label (-1) do not count.
    None where nothing is left.
    """
    known = (labels[anchor] >= 0) & (labels[partner] >= 0)
    a, p, w = anchor[known], partner[known], weight[known]
    whole = np.bincount(a, w, minlength=len(labels))
    right = np.bincount(a, w * (labels[a] == labels[p]), minlength=len(labels))
    shares = right[whole > 0] / whole[whole > 0]
    if not len(shares):
        return None
    value = float(shares.mean())
    half = _NORMAL * float(shares.std(ddof=1)) / len(shares) ** 0.5 if len(shares) > 1 else 1.0
    return Share(value=value, low=max(0.0, value - half), high=min(1.0, value + half), images=len(shares))


def chance_of(evidence: Evidence) -> Chance:
    """Return what two different images have in common on average, exactly, from counts and sums alone."""
    hashes = evidence.hashes[evidence.readable]
    distance = None
    if len(hashes) > 1:
        bits = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1)
        ones, m = bits.sum(axis=0, dtype=np.float64), len(hashes)
        distance = float((2 * ones * (m - ones)).sum() / (m * (m - 1)))
    return Chance(
        identical_captions=_equal_pairs(evidence.captions, len(evidence.captions)),
        hash_distance=distance,
        near_duplicates=_equal_pairs(evidence.copies, len(evidence.copies)),
        looks=None if evidence.looks is None else _mean_cosine(evidence.looks),
        precision=None
        if evidence.labels is None
        else _equal_pairs(evidence.labels, int((evidence.labels >= 0).sum())),
    )


def _equal_pairs(codes: np.ndarray, n: int) -> float:
    """Return the share of pairs among n images whose codes are equal and not -1."""
    counts = np.unique(codes[codes >= 0], return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / max(1, n * (n - 1)))


def _mean_cosine(looks: RecordVectors) -> float | None:
    n = len(looks.count)
    total, m = np.zeros(looks.dimension), 0
    step = block_rows(looks.dimension)
    for start in range(0, n, step):
        vectors = looks.of(np.arange(start, min(start + step, n))).astype(np.float64)
        total += vectors.sum(axis=0)
        m += int(vectors.any(axis=1).sum())
    return float((total @ total - m) / (m * (m - 1))) if m > 1 else None


def _percentiles(draws: Draws) -> tuple[float, float, float] | None:
    if draws.similarity is None:
        return None
    low, middle, high = np.quantile(
        draws.similarity, (0.1, 0.5, 0.9), weights=draws.weight, method="inverted_cdf"
    )
    return float(low), float(middle), float(high)


def _hubs(chosen: np.ndarray, collection: Collection) -> tuple[Hub, ...]:
    most = np.argsort(-chosen, kind="stable")[:HUBS]
    return tuple(
        Hub(position=int(at), id=record.id, caption=" · ".join(record.captions), chosen=float(chosen[at]))
        for at in most[chosen[most] > 1 + 1e-9]
        for record in (collection[int(at)],)
    )


def _equal(draws: Draws, codes: np.ndarray) -> float:
    """Return the share of draws whose images have the same code, -1 being no code."""
    same = (codes[draws.anchor] >= 0) & (codes[draws.anchor] == codes[draws.partner])
    return float(draws.weight[same].sum() / draws.weight.sum())


def _distance(draws: Draws, evidence: Evidence) -> float | None:
    both = evidence.readable[draws.anchor] & evidence.readable[draws.partner]
    if not both.any():
        return None
    first, second = evidence.hashes[draws.anchor[both]], evidence.hashes[draws.partner[both]]
    return float(np.average(np.bitwise_count(first ^ second), weights=draws.weight[both]))


def _cosine(draws: Draws, looks: RecordVectors) -> float | None:
    total = counted = 0.0
    for start in range(0, len(draws.anchor), _STEP):
        part = slice(start, start + _STEP)
        first, second = looks.of(draws.anchor[part]), looks.of(draws.partner[part])
        weight = np.where(first.any(axis=1) & second.any(axis=1), draws.weight[part], 0)
        total += float(((first * second).sum(axis=1) * weight).sum())
        counted += float(weight.sum())
    return total / counted if counted > 0 else None
