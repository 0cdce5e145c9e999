"""Linear probe and few-shot protocols against scikit-learn and simple loops.

    python -m benchmarks.probing [--rounds R] [--episodes N]

Features are synthetic, 10,000 x 512 for training and 5,000 for testing, of 100 classes, with the decaying
spectrum of pooled ReLU features. The peer is scikit-learn's `LogisticRegression` (L-BFGS, default tolerance,
at most 1,000 iterations as in CLIP's evaluation) with the same search over C and the same validation images.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from benchmarks.timing import alternate, format_result
from likewise.evaluation.protocols.base import Split
from likewise.evaluation.protocols.fewshot import FewShotConfig, evaluate_few_shot, sample_episodes
from likewise.evaluation.protocols.linear import (
    LinearProbe,
    search_grid,
    stratified_split,
)

NUM_CLASSES, FEATURE_DIM, NUM_TRAIN, NUM_TEST = 100, 512, 10_000, 5_000


def make_features(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (count, 512) float32 and labels (count,) int64 of 100 overlapping classes."""
    shared_rng = np.random.default_rng(0)
    spectrum = 1 / np.sqrt(1 + np.arange(FEATURE_DIM))
    rotation = np.linalg.qr(shared_rng.standard_normal((FEATURE_DIM, FEATURE_DIM)))[0]
    centers = shared_rng.standard_normal((NUM_CLASSES, FEATURE_DIM)) * spectrum
    rng = np.random.default_rng(seed)
    labels = rng.integers(NUM_CLASSES, size=count)
    noise = rng.standard_normal((count, FEATURE_DIM)) * spectrum
    mixed = (0.28 * centers[labels] + noise) @ rotation
    # Label noise, as in real datasets: with clean labels no C would be too large.
    is_noisy = rng.random(count) < 0.1
    labels[is_noisy] = rng.integers(NUM_CLASSES, size=is_noisy.sum())
    return torch.from_numpy(np.maximum(mixed * 4 + 0.2, 0)).float(), torch.from_numpy(labels)


def scikit_learn(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor
) -> tuple[float, float]:
    """Run the protocol with scikit-learn and return the selected C and the test accuracy."""
    train_indices, val_indices = (part.numpy() for part in stratified_split(train_y, 0.2, 0))
    x, y = train_x.numpy(), train_y.numpy()

    def fit(step: int, indices: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=10.0 ** (step / 8), max_iter=1000).fit(x[indices], y[indices])

    scores = search_grid(lambda step: float(fit(step, train_indices).score(x[val_indices], y[val_indices])))
    best = max(scores, key=lambda step: (scores[step], -step))
    final = fit(best, np.arange(len(y)))
    return 10.0 ** (best / 8), float(final.score(test_x.numpy(), test_y.numpy()))


def few_shot_as_lgssl(
    config: FewShotConfig, train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Return the mean accuracy of LGSSL's `evaluate_fewshot`: one episode at a time."""
    class_indices = [
        [np.flatnonzero(labels.numpy() == c) for c in range(NUM_CLASSES)] for labels in (train[1], test[1])
    ]
    accuracies = []
    for _ in range(config.episodes):
        indices: list[list[np.ndarray]] = [[], []]
        for c in torch.randperm(NUM_CLASSES)[: config.ways].tolist():
            for part, count in ((0, config.shots), (1, config.queries)):
                members = class_indices[part][c]
                sampled = torch.multinomial(torch.ones(len(members)), count).numpy()
                indices[part].append(members[sampled])
        support, query = (np.concatenate(part) for part in indices)
        accuracies.append(
            _classify(train[0][support], test[0][query], train[1][support], test[1][query], config)
        )
    return float(torch.stack(accuracies).mean())


def _classify(
    support: torch.Tensor,
    query: torch.Tensor,
    support_labels: torch.Tensor,
    query_labels: torch.Tensor,
    config: FewShotConfig,
) -> torch.Tensor:
    center = support.mean(dim=0, keepdim=True)
    support, query = (normalize(part - center, dim=-1) for part in (support, query))
    prototypes = support.view(config.ways, config.shots, -1).mean(dim=1)
    distance = (query[:, None] - prototypes[None]).norm(dim=-1)
    predicted = support_labels.view(config.ways, -1)[:, 0][distance.argmin(dim=1)]
    return (predicted == query_labels).double().mean()


def few_shot_loop(
    config: FewShotConfig, train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Return the mean accuracy by a loop over episodes that are sampled at once."""
    episodes = sample_episodes(config, train[1].numpy(), test[1].numpy())
    labels = torch.arange(config.ways).repeat_interleave(config.queries)
    accuracies = []
    for support_indices, query_indices, valid in zip(
        episodes.support, episodes.query, episodes.valid, strict=True
    ):
        support, query = train[0][torch.from_numpy(support_indices)], test[0][torch.from_numpy(query_indices)]
        center = support.mean(dim=(0, 1))
        support, query = (normalize(part - center, dim=-1) for part in (support, query))
        predicted = torch.cdist(query.flatten(0, 1), support.mean(dim=1)).argmin(dim=1)
        accuracies.append((predicted == labels)[torch.from_numpy(valid).flatten()].double().mean())
    return float(torch.stack(accuracies).mean())


def run(rounds: int = 3, episodes: int = 5000) -> Iterator[str]:
    """Yield one line per comparison."""
    train, test = make_features(NUM_TRAIN, 1), make_features(NUM_TEST, 2)
    start = time.perf_counter()
    C, accuracy = scikit_learn(*train, *test)
    yield f"scikit-learn: C {C:.4g}, test accuracy {accuracy:.4f}, {time.perf_counter() - start:.0f} s"
    train_split, test_split = Split(*train), Split(*test)
    probe = LinearProbe.fit(train_split, num_classes=NUM_CLASSES)
    probe_accuracy = float((probe.predict(test_split.x) == test_split.y).double().mean())
    yield f"likewise:     C {probe.C:.4g}, test accuracy {probe_accuracy:.4f}, converged {probe.converged}"
    yield format_result(
        "linear probe, sweep and refit",
        "scikit-learn LogisticRegression",
        alternate(
            lambda: LinearProbe.fit(train_split, num_classes=NUM_CLASSES).predict(test_split.x),
            lambda: scikit_learn(*train, *test),
            rounds,
        ),
    )
    config = FewShotConfig(episodes=episodes)
    batched = evaluate_few_shot(config, train_split, test_split).accuracy
    yield (
        f"few-shot accuracy: {batched.value:.6f} likewise, {few_shot_loop(config, train, test):.6f} the same "
        f"episodes in a loop, {few_shot_as_lgssl(config, train, test):.6f} LGSSL's episodes"
    )
    for peer, loop in (
        ("LGSSL: one episode at a time", few_shot_as_lgssl),
        ("episodes sampled at once, in a loop", few_shot_loop),
    ):
        seconds = alternate(
            lambda: evaluate_few_shot(config, train_split, test_split),
            partial(loop, config, train, test),
            rounds,
        )
        yield format_result(f"few-shot, {episodes:,} episodes", peer, seconds)


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=5000)
    args = parser.parse_args()
    for line in run(args.rounds, args.episodes):
        print(line, flush=True)


if __name__ == "__main__":
    main()
