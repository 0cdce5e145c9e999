"""Few-shot classification: tell n classes apart from k images each, many times over."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding, normalize

from likewise.evaluation.statistics import Estimate, normal_interval

# Query features held at a time: 4 MiB in float32, which stays near the processor.
_BLOCK_ELEMENTS = 2**20


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
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
    per_episode: Float[np.ndarray, " e"]
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


def evaluate_few_shot(
    config: FewShotConfig,
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
        config: see `draw_episodes` for the sampling.
        train_x: features the support is drawn from, any floating dtype.
        train_y: int64 labels.
        test_x: features the queries are drawn from.
        test_y: int64 labels.

    Raises:
        ValueError: fewer eligible classes than ways, fewer than two episodes, or a setting below one.
    """
    episodes = sample_episodes(config, train_y.cpu().numpy(), test_y.cpu().numpy())
    block_size = max(1, _BLOCK_ELEMENTS // (config.ways * config.queries * train_x.shape[1]))
    # Every episode is centred anyway; done once before, differences of large numbers lose no digits.
    mean = train_x.mean(dim=0)
    centered_train, centered_test = train_x - mean, test_x - mean
    squared_norms = centered_test.square().sum(dim=1)
    tensors = (
        torch.from_numpy(x).to(centered_test.device)
        for x in (episodes.support, episodes.query, episodes.valid)
    )
    accuracy = torch.cat(
        [
            # A gather of whole rows; plain indexing goes number by number, four times slower.
            _episode_accuracy(
                embedding(support, centered_train),
                embedding(query, centered_test),
                squared_norms[query],
                valid,
            )
            for support, query, valid in zip(*(x.split(block_size) for x in tensors), strict=True)
        ]
    )
    accuracy = accuracy.double().cpu().numpy()
    return FewShotResult(
        accuracy=normal_interval(accuracy),
        per_episode=accuracy,
        eligible_classes=episodes.eligible_classes,
        skipped_classes=episodes.skipped_classes,
    )


def sample_episodes(
    config: FewShotConfig, train_y: Int[np.ndarray, " n"], test_y: Int[np.ndarray, " m"]
) -> Episodes:
    """Draw the images of all episodes: a function of settings and labels alone, the same for every model.

    Classes, support images and queries are uniform subsets without repetition. A class takes part if it has
    `shots` train images and a test image; one with fewer than `queries` test images gives all it has.

    Raises:
        ValueError: fewer eligible classes than ways, or a setting below one.
    """
    if min(config.ways, config.shots, config.queries, config.episodes) < 1:
        raise ValueError(f"ways, shots, queries and episodes must be at least 1, got {config}")
    classes = np.union1d(train_y, test_y)
    train_counts, test_counts = _class_counts(train_y, classes), _class_counts(test_y, classes)
    eligible = np.flatnonzero((train_counts >= config.shots) & (test_counts >= 1))
    if len(eligible) < config.ways:
        raise ValueError(
            f"{config.ways}-way {config.shots}-shot episodes need {config.ways} classes with "
            f"{config.shots} train images and a test image, but only {len(eligible)} of {len(classes)} "
            "classes have them"
        )
    rng = np.random.default_rng(config.seed)
    pool_sizes = np.full(config.episodes, len(eligible))
    episode_classes = eligible[_sample_subsets(rng, pool_sizes, config.ways)]
    support = _sample_subsets(rng, train_counts[episode_classes], config.shots)
    query = _sample_subsets(rng, test_counts[episode_classes], config.queries)
    return Episodes(
        support=_to_indices(train_y, train_counts, episode_classes, support),
        query=_to_indices(test_y, test_counts, episode_classes, query.clip(min=0)),
        valid=query >= 0,
        eligible_classes=len(eligible),
        skipped_classes=len(classes) - len(eligible),
    )


def _class_counts(labels: Int[np.ndarray, " n"], classes: Int[np.ndarray, " c"]) -> Int[np.ndarray, " c"]:
    return np.bincount(np.searchsorted(classes, labels), minlength=len(classes))


def _sample_subsets(
    rng: np.random.Generator, sizes: Int[np.ndarray, "*p"], count: int
) -> Int[np.ndarray, "*p {count}"]:
    """Uniform subsets of `count` of the first `size` numbers, for every size at once.

    Floyd's algorithm (Bentley and Floyd 1987): work and memory do not grow with the sizes. Of a size below
    `count` all numbers are taken, and -1 fills the rest.
    """
    subsets = np.full((*sizes.shape, count), -1)
    for step in range(count):
        upper = sizes - count + step
        candidate = rng.integers(0, np.maximum(upper, 0) + 1)
        is_taken = (subsets == candidate[..., None]).any(axis=-1)
        subsets[..., step] = np.where(upper < 0, -1, np.where(is_taken, upper, candidate))
    return subsets


def _to_indices(
    labels: Int[np.ndarray, " n"],
    counts: Int[np.ndarray, " c"],
    episode_classes: Int[np.ndarray, "e w"],
    positions: Int[np.ndarray, "e w k"],
) -> Int[np.ndarray, "e w k"]:
    """Rows of the set, from positions inside the drawn classes."""
    class_starts = np.cumsum(counts) - counts
    return np.argsort(labels, kind="stable")[class_starts[episode_classes][..., None] + positions]


def _episode_accuracy(
    support: Float[Tensor, "e w s d"],
    query: Float[Tensor, "e w q d"],
    squared_norms: Float[Tensor, "e w q"],
    valid: Bool[Tensor, "e w q"],
) -> Float[Tensor, " e"]:
    """Return the accuracy of episodes from their images and the squared lengths of the queries."""
    center = support.mean(dim=(1, 2), keepdim=True)
    prototypes = normalize(support - center, dim=-1).mean(dim=2)
    center = center.flatten(1, 2)
    # |u - p|^2 with u = (x - c) / |x - c| is least where (x - c).p - |x - c| |p|^2 / 2 is greatest, and both
    # parts come from one product with x as it lies: no centred and scaled copy of the queries is made.
    dots = query.flatten(1, 2) @ torch.cat([prototypes, center], dim=1).mT
    squared_distances = (
        squared_norms.flatten(1)[..., None] + center.square().sum(dim=-1, keepdim=True) - 2 * dots[..., -1:]
    )
    half_squared_norms = prototypes.square().sum(dim=-1)[:, None] / 2
    logits = (
        dots[..., :-1] - center @ prototypes.mT - squared_distances.clamp_min(0).sqrt() * half_squared_norms
    )
    targets = torch.arange(valid.shape[1], device=valid.device)[:, None]
    correct = (logits.argmax(dim=-1).unflatten(1, valid.shape[1:]) == targets) & valid
    return correct.sum(dim=(1, 2)) / valid.sum(dim=(1, 2))
