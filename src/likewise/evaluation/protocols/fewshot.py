"""Few-shot classification: many n-way k-shot episodes with a nearest-class-mean classifier."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding, normalize

from likewise.errors import InvalidInputError
from likewise.evaluation.protocols.base import (
    EvalContext,
    Protocol,
    Score,
    Split,
    check_positive,
)
from likewise.evaluation.results import ResultRow
from likewise.evaluation.statistics import Estimate, normal_interval

# Query features per block: 4 MiB in float32, which fits the CPU caches.
_BLOCK_ELEMENTS = 2**20


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """Options of few-shot classification."""

    ways: int = 5
    """Classes per episode."""
    shots: int = 5
    """Support images per class, drawn from train."""
    queries: int = 15
    """Query images per class, drawn from test."""
    episodes: int = 5000
    """Number of episodes."""
    seed: int = 0
    """Seed of the episodes."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(self, "ways", "shots", "queries")
        if self.episodes < 2:
            raise InvalidInputError(
                f"`episodes` must be at least 2 for a confidence interval, got {self.episodes}",
                field="episodes",
            )


@dataclass(frozen=True, kw_only=True)
class FewShotResult:
    """Accuracy over all episodes."""

    accuracy: Estimate
    """Mean over the episodes with its confidence interval."""
    per_episode: Float[np.ndarray, " e"]
    """(episodes,) accuracy of each episode."""
    num_eligible_classes: int
    """Classes that episodes are drawn from."""
    num_skipped_classes: int
    """Classes with too few train images or no test image."""


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """Image indices of all episodes."""

    support: Int[np.ndarray, "e w s"]
    """(episodes, ways, shots) indices into the train split."""
    query: Int[np.ndarray, "e w q"]
    """(episodes, ways, queries) indices into the test split."""
    valid: Bool[np.ndarray, "e w q"]
    """False for the padding of classes with fewer test images than `queries`."""
    num_eligible_classes: int
    """Classes that episodes are drawn from."""
    num_skipped_classes: int
    """Classes with too few train images or no test image."""


def evaluate_few_shot(config: FewShotConfig, train: Split, test: Split) -> FewShotResult:
    """Classify queries by the nearest class mean of centered, normalized support images (SimpleShot, CL2N).

    Per episode: subtract the mean of the support images from support and query images, scale all to unit
    length, average the support images of each class, and assign each query to the class of the nearest mean
    in Euclidean distance (Wang et al. 2019; El Banani et al. 2023, section 4.2). The confidence interval is
    that of the mean over episodes on these images; it does not cover another test set.

    Deviation from LGSSL's code: LGSSL reports the standard deviation over episodes instead of an interval.

    Args:
        config: See `sample_episodes` for the sampling.
        train: Features (n, d) of any floating dtype and labels (n,) of the support images.
        test: Features and labels of the query images.

    Raises:
        InvalidInputError: There are fewer eligible classes than `ways`.
    """
    episodes = sample_episodes(config, train.y.cpu().numpy(), test.y.cpu().numpy())
    block_size = max(1, _BLOCK_ELEMENTS // (config.ways * config.queries * train.x.shape[1]))
    # Every episode is centered anyway; centering once before avoids cancellation between large numbers.
    mean = train.x.mean(dim=0)
    centered_train, centered_test = train.x - mean, test.x - mean
    squared_norms = centered_test.square().sum(dim=1)
    tensors = (
        torch.from_numpy(x).to(centered_test.device)
        for x in (episodes.support, episodes.query, episodes.valid)
    )
    accuracy = torch.cat(
        [
            # Gathers whole rows; plain indexing gathers element by element and is four times slower.
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
        num_eligible_classes=episodes.num_eligible_classes,
        num_skipped_classes=episodes.num_skipped_classes,
    )


def sample_episodes(
    config: FewShotConfig, train_y: Int[np.ndarray, " n"], test_y: Int[np.ndarray, " m"]
) -> Episodes:
    """Sample the images of all episodes from config and labels alone, so that all encoders get the same.

    Classes, support and query images are uniform subsets without replacement. A class is eligible if it has
    at least `shots` train images and one test image; a class with fewer than `queries` test images gives all
    of them.

    Raises:
        InvalidInputError: There are fewer eligible classes than `ways`.
    """
    classes = np.union1d(train_y, test_y)
    train_counts, test_counts = _class_counts(train_y, classes), _class_counts(test_y, classes)
    eligible = np.flatnonzero((train_counts >= config.shots) & (test_counts >= 1))
    if len(eligible) < config.ways:
        raise InvalidInputError(
            f"{config.ways}-way {config.shots}-shot episodes need {config.ways} classes with at least "
            f"{config.shots} train images and one test image, but only {len(eligible)} of {len(classes)} "
            "classes have them; lower `ways` or `shots`",
            field="ways",
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
        num_eligible_classes=len(eligible),
        num_skipped_classes=len(classes) - len(eligible),
    )


def _class_counts(labels: Int[np.ndarray, " n"], classes: Int[np.ndarray, " c"]) -> Int[np.ndarray, " c"]:
    return np.bincount(np.searchsorted(classes, labels), minlength=len(classes))


def _sample_subsets(
    rng: np.random.Generator, sizes: Int[np.ndarray, "*p"], count: int
) -> Int[np.ndarray, "*p {count}"]:
    """Sample uniform subsets of `count` numbers from range(size), for every size at once.

    Floyd's algorithm (Bentley and Floyd 1987): time and memory do not depend on the sizes. For a size below
    `count` the subset is the whole range, padded with -1.
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
    """Convert positions within the sampled classes to indices into the split."""
    class_starts = np.cumsum(counts) - counts
    return np.argsort(labels, kind="stable")[class_starts[episode_classes][..., None] + positions]


def _episode_accuracy(
    support: Float[Tensor, "e w s d"],
    query: Float[Tensor, "e w q d"],
    squared_norms: Float[Tensor, "e w q"],
    valid: Bool[Tensor, "e w q"],
) -> Float[Tensor, " e"]:
    """Return the accuracy of each episode from its features and the squared norms of the queries."""
    center = support.mean(dim=(1, 2), keepdim=True)
    prototypes = normalize(support - center, dim=-1).mean(dim=2)
    center = center.flatten(1, 2)
    # |u - p|^2 with u = (x - c) / |x - c| is smallest where (x - c).p - |x - c| |p|^2 / 2 is largest; both
    # terms come from one matrix product with x, without a centered and scaled copy of the queries.
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


class FewShot(Protocol):
    """Few-shot classification over episodes."""

    name = "fewshot"
    title = "Few-shot"
    summary = "many n-way k-shot episodes with a nearest-class-mean classifier"
    item_nouns = ("episode", "episodes")
    config: FewShotConfig

    def run(self, context: EvalContext) -> list[Score]:
        """Draw support images from train and val, and queries from test."""
        result = evaluate_few_shot(self.config, context.split("train", "val"), context.split("test"))
        details = {
            "num_eligible_classes": result.num_eligible_classes,
            "num_skipped_classes": result.num_skipped_classes,
        }
        return [
            Score(metric="accuracy", estimate=result.accuracy, per_item=result.per_episode, details=details)
        ]

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Describe the episodes and the meaning of the interval."""
        ways, shots = row.config["ways"], row.config["shots"]
        return (
            f"{row.n:,} episodes: each draws {ways} classes with {shots} labeled training images per class "
            "and assigns test images to the class with the nearest mean. Chance level is "
            f"{100 / ways:.0f} %. The interval covers the sampling of episodes from these images, not "
            "another test set, so it is narrower than the others."
        )
