"""Few-shot classification: tell n classes apart from k images each, many times over."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding, normalize

from likewise.evaluation.statistics import Estimate, normal_interval

# Query features held at a time: 4 MiB in float32, which stays near the processor.
_CELLS = 2**20


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """Settings of the episodes: classes, support images a class, query images a class, repetitions."""

    ways: int = 5
    shots: int = 5
    queries: int = 15
    episodes: int = 5000
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class FewShotResult:
    """Accuracy over all episodes, each episode's accuracy, and how many classes could take part."""

    accuracy: Estimate
    episodes: Float[np.ndarray, " e"]
    eligible_classes: int
    skipped_classes: int


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Indices of the images of each episode.

    Attributes:
        support: (episodes, ways, shots) rows of the train split.
        query: (episodes, ways, queries) rows of the test split.
        valid: False where a class has fewer test images than queries asked for.
        eligible_classes: classes that could be drawn.
        skipped_classes: classes with too few train images or no test image.
    """

    support: Int[np.ndarray, "e w s"]
    query: Int[np.ndarray, "e w q"]
    valid: Bool[np.ndarray, "e w q"]
    eligible_classes: int
    skipped_classes: int


def few_shot(
    settings: FewShot,
    train_x: Float[Tensor, "n d"],
    train_y: Int[Tensor, " n"],
    test_x: Float[Tensor, "m d"],
    test_y: Int[Tensor, " m"],
) -> FewShotResult:
    """Classify queries by the nearest class mean of centred, normalised support images (SimpleShot, CL2N).

    Per episode: subtract the mean of the support from support and queries, scale all to unit length, average
    the support of each class, and give a query the class of the nearest average in Euclidean distance (Wang
    et al. 2019; El Banani et al. 2023, section 4.2). The interval is that of the mean over episodes on these
    images: it says how well 5,000 episodes stand for all episodes, not how another test set would score.

    Known deviation: LGSSL reports the standard deviation over episodes in place of an interval.

    Args:
        settings: see `draw_episodes` for the sampling.
        train_x: features the support is drawn from, any floating dtype.
        train_y: int64 labels.
        test_x: features the queries are drawn from.
        test_y: int64 labels.

    Raises:
        ValueError: fewer eligible classes than ways, fewer than two episodes, or a setting below one.
    """
    drawn = draw_episodes(settings, train_y.cpu().numpy(), test_y.cpu().numpy())
    block = max(1, _CELLS // (settings.ways * settings.queries * train_x.shape[1]))
    # Every episode is centred anyway; done once before, differences of large numbers lose no digits.
    middle = train_x.mean(dim=0)
    train, test = train_x - middle, test_x - middle
    squares = test.square().sum(dim=1)
    rows = (torch.from_numpy(part).to(test.device) for part in (drawn.support, drawn.query, drawn.valid))
    accuracy = torch.cat(
        [
            # A gather of whole rows; plain indexing goes number by number, four times slower.
            _accuracy(embedding(support, train), embedding(query, test), squares[query], valid)
            for support, query, valid in zip(*(part.split(block) for part in rows), strict=True)
        ]
    )
    accuracy = accuracy.double().cpu().numpy()
    return FewShotResult(
        accuracy=normal_interval(accuracy),
        episodes=accuracy,
        eligible_classes=drawn.eligible_classes,
        skipped_classes=drawn.skipped_classes,
    )


def draw_episodes(
    settings: FewShot, train_y: Int[np.ndarray, " n"], test_y: Int[np.ndarray, " m"]
) -> Episodes:
    """Draw the images of all episodes: a function of settings and labels alone, the same for every model.

    Classes, support images and queries are uniform subsets without repetition. A class takes part if it has
    `shots` train images and a test image; one with fewer than `queries` test images gives all it has.

    Raises:
        ValueError: fewer eligible classes than ways, or a setting below one.
    """
    if min(settings.ways, settings.shots, settings.queries, settings.episodes) < 1:
        raise ValueError(f"ways, shots, queries and episodes must be at least 1, got {settings}")
    classes = np.union1d(train_y, test_y)
    train_counts, test_counts = _counts(train_y, classes), _counts(test_y, classes)
    eligible = np.flatnonzero((train_counts >= settings.shots) & (test_counts >= 1))
    if len(eligible) < settings.ways:
        raise ValueError(
            f"{settings.ways}-way {settings.shots}-shot episodes need {settings.ways} classes with "
            f"{settings.shots} train images and a test image, but only {len(eligible)} of {len(classes)} "
            "classes have them"
        )
    rng = np.random.default_rng(settings.seed)
    pool = np.full(settings.episodes, len(eligible))
    drawn = eligible[_subsets(rng, pool, settings.ways)]
    support = _subsets(rng, train_counts[drawn], settings.shots)
    query = _subsets(rng, test_counts[drawn], settings.queries)
    return Episodes(
        support=_rows(train_y, train_counts, drawn, support),
        query=_rows(test_y, test_counts, drawn, query.clip(min=0)),
        valid=query >= 0,
        eligible_classes=len(eligible),
        skipped_classes=len(classes) - len(eligible),
    )


def _counts(labels: Int[np.ndarray, " n"], classes: Int[np.ndarray, " c"]) -> Int[np.ndarray, " c"]:
    return np.bincount(np.searchsorted(classes, labels), minlength=len(classes))


def _subsets(
    rng: np.random.Generator, sizes: Int[np.ndarray, "*p"], count: int
) -> Int[np.ndarray, "*p {count}"]:
    """Uniform subsets of `count` of the first `size` numbers, for every size at once.

    Floyd's algorithm (Bentley and Floyd 1987): work and memory do not grow with the sizes. Of a size below
    `count` all numbers are taken, and -1 fills the rest.
    """
    chosen = np.full((*sizes.shape, count), -1)
    for step in range(count):
        top = sizes - count + step
        candidate = rng.integers(0, np.maximum(top, 0) + 1)
        taken = (chosen == candidate[..., None]).any(axis=-1)
        chosen[..., step] = np.where(top < 0, -1, np.where(taken, top, candidate))
    return chosen


def _rows(
    labels: Int[np.ndarray, " n"],
    counts: Int[np.ndarray, " c"],
    drawn: Int[np.ndarray, "e w"],
    position: Int[np.ndarray, "e w k"],
) -> Int[np.ndarray, "e w k"]:
    """Rows of the set, from positions inside the drawn classes."""
    first = np.cumsum(counts) - counts
    return np.argsort(labels, kind="stable")[first[drawn][..., None] + position]


def _accuracy(
    support: Float[Tensor, "e w s d"],
    query: Float[Tensor, "e w q d"],
    squares: Float[Tensor, "e w q"],
    valid: Bool[Tensor, "e w q"],
) -> Float[Tensor, " e"]:
    """Return the accuracy of episodes from their images and the squared lengths of the queries."""
    centre = support.mean(dim=(1, 2), keepdim=True)
    prototypes = normalize(support - centre, dim=-1).mean(dim=2)
    centre = centre.flatten(1, 2)
    # |u - p|^2 with u = (x - c) / |x - c| is least where (x - c).p - |x - c| |p|^2 / 2 is greatest, and both
    # parts come from one product with x as it lies: no centred and scaled copy of the queries is made.
    dots = query.flatten(1, 2) @ torch.cat([prototypes, centre], dim=1).mT
    lengths = squares.flatten(1)[..., None] + centre.square().sum(dim=-1, keepdim=True) - 2 * dots[..., -1:]
    halves = prototypes.square().sum(dim=-1)[:, None] / 2
    closeness = dots[..., :-1] - centre @ prototypes.mT - lengths.clamp_min(0).sqrt() * halves
    truth = torch.arange(valid.shape[1], device=valid.device)[:, None]
    correct = (closeness.argmax(dim=-1).unflatten(1, valid.shape[1:]) == truth) & valid
    return correct.sum(dim=(1, 2)) / valid.sum(dim=(1, 2))
