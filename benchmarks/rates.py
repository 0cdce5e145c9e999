"""Which share of the machine's rate of matrix products each stage reaches.

    python -m benchmarks.rates

The rate is that of a float32 product of 2048 x 2048 matrices, measured before and after; where the processor
multiplies bfloat16, neighbors use that and may exceed it. Only products are counted, by torch's counter of
FLOPs (which leaves attention on a processor out) or, for neighbors, as 2 n^2 d; all else is lost time.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.probing import CLASSES, TEST, TRAIN, features
from benchmarks.search import K, unit
from benchmarks.timing import product_rate
from likewise.demo import load_emoji
from likewise.embeddings.registry import resolve_encoder
from likewise.embeddings.text_encoders import SentenceTransformerEncoder
from likewise.evaluation.protocols.base import Split
from likewise.evaluation.protocols.fewshot import FewShotConfig, evaluate_few_shot
from likewise.evaluation.protocols.linear import LinearProbe
from likewise.neighbors.search import ExactIndex

CPU = torch.device("cpu")


def run(rounds: int = 3) -> Iterator[str]:
    """Yield a line for each stage, of the quickest of some rounds."""
    before = product_rate(CPU, torch.float32)
    found = [(name, *_measured(stage, flops, rounds)) for name, stage, flops in stages()]
    rate = max(before, product_rate(CPU, torch.float32))
    yield f"a float32 product of 2048 x 2048: {rate / 1e9:,.0f} GFLOP/s on {torch.get_num_threads()} threads"
    for name, seconds, flops in found:
        own = flops / seconds
        yield f"{name:<44} {seconds:8.3f} s {flops / 1e9:9,.1f} GFLOP {own / 1e9:7,.0f}/s {own / rate:6.0%}"


def stages() -> Iterator[tuple[str, Callable[[], object], float | None]]:
    """Yield what is measured with its FLOPs, or None where torch can count them."""
    n, d = 20_000, 384
    index = ExactIndex(unit(np.random.default_rng(0).standard_normal((n, d), np.float32)))
    yield f"neighbors, {n:,} x {d}, top-{K}", lambda: index.search(np.arange(n), K), 2.0 * n * n * d
    train, test = Split(*features(TRAIN, 1)), Split(*features(TEST, 2))
    episodes = FewShotConfig(episodes=5000)
    yield (
        "linear probe, sweep and refit",
        lambda: LinearProbe.fit(train, num_classes=CLASSES).predict(test.x),
        None,
    )
    yield "few-shot, 5,000 episodes", lambda: evaluate_few_shot(episodes, train, test), None
    encoder = SentenceTransformerEncoder(resolve_encoder("all-MiniLM-L6-v2"), "cpu")
    captions = [emoji.name for emoji in load_emoji()]
    yield f"embed, {len(captions):,} captions, MiniLM", lambda: encoder.encode(captions, 64), None


def _measured(stage: Callable[[], object], flops: float | None, rounds: int) -> tuple[float, float]:
    """Return the seconds of the quickest round, and the FLOPs."""
    with FlopCounterMode(display=False) as counter:
        stage()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        stage()
        best = min(best, time.perf_counter() - start)
    return best, counter.get_total_flops() if flops is None else flops


def main() -> None:
    """Print the shares."""
    for line in run():
        print(line)


if __name__ == "__main__":
    main()
