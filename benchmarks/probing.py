"""The linear probe's whole protocol and few-shot episodes, against what one would write with other tools.

    python -m benchmarks.probing [--rounds R] [--episodes N]

Features are synthetic, 10,000 x 512 for training and 5,000 for testing, of 100 classes, with the decaying
spectrum of pooled ReLU features. The peer is scikit-learn's `LogisticRegression` (L-BFGS, its default
tolerance, 1,000 iterations at most as in CLIP's evaluation) on the same search over costs: the same images
held out, the same costs visited as long as its accuracies agree, its own choice of the best.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import normalize

from benchmarks.timing import alternate, told
from likewise.evaluation.protocols.base import Split
from likewise.evaluation.protocols.fewshot import FewShotConfig, evaluate_few_shot, sample_episodes
from likewise.evaluation.protocols.linear import (
    LinearProbe,
    search_grid,
    stratified_split,
)

CLASSES, WIDTH, TRAIN, TEST = 100, 512, 10_000, 5_000


def features(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (count, 512) float32 and labels (count,) int64 of 100 overlapping classes."""
    world = np.random.default_rng(0)
    spectrum = 1 / np.sqrt(1 + np.arange(WIDTH))
    turn = np.linalg.qr(world.standard_normal((WIDTH, WIDTH)))[0]
    centres = world.standard_normal((CLASSES, WIDTH)) * spectrum
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    noise = rng.standard_normal((count, WIDTH)) * spectrum
    mixed = (0.28 * centres[labels] + noise) @ turn
    # A tenth is labelled at random, as real sets are a little: with clean labels no cost would be too large.
    wrong = rng.random(count) < 0.1
    labels[wrong] = rng.integers(CLASSES, size=wrong.sum())
    return torch.from_numpy(np.maximum(mixed * 4 + 0.2, 0)).float(), torch.from_numpy(labels)


def scikit_learn(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor
) -> tuple[float, float]:
    """Run the protocol with scikit-learn and return the chosen cost and the test accuracy."""
    kept, held = (part.numpy() for part in stratified_split(train_y, 0.2, 0))
    x, y = train_x.numpy(), train_y.numpy()

    def fit(step: int, rows: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=10.0 ** (step / 8), max_iter=1000).fit(x[rows], y[rows])

    scores = search_grid(lambda step: float(fit(step, kept).score(x[held], y[held])))
    best = max(scores, key=lambda step: (scores[step], -step))
    final = fit(best, np.arange(len(y)))
    return 10.0 ** (best / 8), float(final.score(test_x.numpy(), test_y.numpy()))


def as_lgssl(
    settings: FewShotConfig, train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Return the mean accuracy by what LGSSL's `evaluate_fewshot` does: draw and classify one by one."""
    places = [[np.flatnonzero(labels.numpy() == c) for c in range(CLASSES)] for labels in (train[1], test[1])]
    found = []
    for _ in range(settings.episodes):
        rows: list[list[np.ndarray]] = [[], []]
        for c in torch.randperm(CLASSES)[: settings.ways].tolist():
            for part, count in ((0, settings.shots), (1, settings.queries)):
                own = places[part][c]
                rows[part].append(own[torch.multinomial(torch.ones(len(own)), count).numpy()])
        support, query = (np.concatenate(each) for each in rows)
        found.append(
            _classify(train[0][support], test[0][query], train[1][support], test[1][query], settings)
        )
    return float(torch.stack(found).mean())


def _classify(
    support: torch.Tensor,
    query: torch.Tensor,
    named: torch.Tensor,
    truth: torch.Tensor,
    settings: FewShotConfig,
) -> torch.Tensor:
    centre = support.mean(dim=0, keepdim=True)
    support, query = (normalize(part - centre, dim=-1) for part in (support, query))
    prototypes = support.view(settings.ways, settings.shots, -1).mean(dim=1)
    distance = (query[:, None] - prototypes[None]).norm(dim=-1)
    return (named.view(settings.ways, -1)[:, 0][distance.argmin(dim=1)] == truth).double().mean()


def ready_episodes(
    settings: FewShotConfig, train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Return the mean accuracy by the leanest loop: all episodes drawn at once, then one after the other."""
    drawn = sample_episodes(settings, train[1].numpy(), test[1].numpy())
    truth = torch.arange(settings.ways).repeat_interleave(settings.queries)
    found = []
    for support_rows, query_rows, valid in zip(drawn.support, drawn.query, drawn.valid, strict=True):
        support, query = train[0][torch.from_numpy(support_rows)], test[0][torch.from_numpy(query_rows)]
        centre = support.mean(dim=(0, 1))
        support, query = (normalize(part - centre, dim=-1) for part in (support, query))
        answer = torch.cdist(query.flatten(0, 1), support.mean(dim=1)).argmin(dim=1)
        found.append((answer == truth)[torch.from_numpy(valid).flatten()].double().mean())
    return float(torch.stack(found).mean())


def run(rounds: int = 3, episodes: int = 5000) -> Iterator[str]:
    """Yield a line of results for each comparison."""
    train, test = features(TRAIN, 1), features(TEST, 2)
    start = time.perf_counter()
    cost, accuracy = scikit_learn(*train, *test)
    yield f"scikit-learn: cost {cost:.4g}, test accuracy {accuracy:.4f}, {time.perf_counter() - start:.0f} s"
    train_split, test_split = Split(*train), Split(*test)
    ours = LinearProbe.fit(train_split, num_classes=CLASSES)
    own_accuracy = float((ours.predict(test_split.x) == test_split.y).double().mean())
    yield f"ours:         cost {ours.C:.4g}, test accuracy {own_accuracy:.4f}, converged {ours.converged}"
    yield told(
        "linear probe, sweep and refit",
        "scikit-learn LogisticRegression",
        alternate(
            lambda: LinearProbe.fit(train_split, num_classes=CLASSES).predict(test_split.x),
            lambda: scikit_learn(*train, *test),
            rounds,
        ),
    )
    settings = FewShotConfig(episodes=episodes)
    batched = evaluate_few_shot(settings, train_split, test_split).accuracy
    yield (
        f"few-shot accuracy: {batched.value:.6f} ours, {ready_episodes(settings, train, test):.6f} the same "
        f"episodes one by one, {as_lgssl(settings, train, test):.6f} LGSSL's own draw"
    )
    for peer, loop in (
        ("LGSSL's way: draw and classify one by one", as_lgssl),
        ("drawn at once, one by one", ready_episodes),
    ):
        seconds = alternate(
            lambda: evaluate_few_shot(settings, train_split, test_split),
            partial(loop, settings, train, test),
            rounds,
        )
        yield told(f"few-shot, {episodes:,} episodes", peer, seconds)


def main() -> None:
    """Print the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=5000)
    asked = parser.parse_args()
    for line in run(asked.rounds, asked.episodes):
        print(line, flush=True)


if __name__ == "__main__":
    main()
