"""Utilization of each stage relative to the measured rate of matrix products.

    python -m benchmarks.rates

The rate is that of a float32 product of 2048 x 2048 matrices, measured before and after. On CPUs with
bfloat16 products, the neighbor search uses them and may exceed it. FLOPs are counted by torch's counter
(without attention on a CPU) or, for neighbors, as 2 n^2 d.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.probing import NUM_CLASSES, NUM_TEST, NUM_TRAIN, make_features
from benchmarks.search import K, normalize_rows
from benchmarks.timing import matmul_flops
from likewise.demo import load_emoji
from likewise.embeddings.registry import resolve_encoder
from likewise.embeddings.text_encoders import SentenceTransformerEncoder
from likewise.evaluation.protocols.base import Split
from likewise.evaluation.protocols.fewshot import FewShotConfig, evaluate_few_shot
from likewise.evaluation.protocols.linear import LinearProbe
from likewise.neighbors.search import ExactIndex

CPU = torch.device("cpu")


def run(rounds: int = 3) -> Iterator[str]:
    """Yield one line per stage, of the fastest round."""
    before = matmul_flops(CPU, torch.float32)
    results = [(name, *_measure(stage, flops, rounds)) for name, stage, flops in stages()]
    rate = max(before, matmul_flops(CPU, torch.float32))
    yield f"a float32 product of 2048 x 2048: {rate / 1e9:,.0f} GFLOP/s on {torch.get_num_threads()} threads"
    for name, seconds, flops in results:
        stage_rate = flops / seconds
        gflops, utilization = stage_rate / 1e9, stage_rate / rate
        yield f"{name:<44} {seconds:8.3f} s {flops / 1e9:9,.1f} GFLOP {gflops:7,.0f}/s {utilization:6.0%}"


def stages() -> Iterator[tuple[str, Callable[[], object], float | None]]:
    """Yield name, function and FLOPs of each stage; None if torch counts them."""
    n, d = 20_000, 384
    index = ExactIndex(normalize_rows(np.random.default_rng(0).standard_normal((n, d), np.float32)))
    yield f"neighbors, {n:,} x {d}, top-{K}", lambda: index.search(np.arange(n), K), 2.0 * n * n * d
    train, test = Split(*make_features(NUM_TRAIN, 1)), Split(*make_features(NUM_TEST, 2))
    episodes = FewShotConfig(episodes=5000)
    yield (
        "linear probe, sweep and refit",
        lambda: LinearProbe.fit(train, num_classes=NUM_CLASSES).predict(test.x),
        None,
    )
    yield "few-shot, 5,000 episodes", lambda: evaluate_few_shot(episodes, train, test), None
    encoder = SentenceTransformerEncoder(resolve_encoder("all-MiniLM-L6-v2"), "cpu")
    captions = [emoji.name for emoji in load_emoji()]
    yield f"embed, {len(captions):,} captions, MiniLM", lambda: encoder.encode(captions, 64), None


def _measure(stage: Callable[[], object], flops: float | None, rounds: int) -> tuple[float, float]:
    """Return the seconds of the fastest round, and the FLOPs."""
    with FlopCounterMode(display=False) as counter:
        stage()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        stage()
        best = min(best, time.perf_counter() - start)
    return best, counter.get_total_flops() if flops is None else flops


def main() -> None:
    """Print the results."""
    for line in run():
        print(line)


if __name__ == "__main__":
    main()
