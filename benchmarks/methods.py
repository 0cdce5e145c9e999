"""All methods with their sources of pairs, at the same budget: the results of docs/results/methods.md.

    python -m benchmarks.methods ITEMS.csv WORK --also FOLDER --seeds 2

ITEMS.csv has columns file, split, title and articleType; FOLDER is a labeled dataset. Finished runs are
reused. Each run prints a row of the table.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from likewise import ImportOptions, PairConfig, TrainConfig, embed, find_neighbors, import_dataset, train
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.evaluation.evaluate import evaluate
from likewise.training.config import parse_train_config
from likewise.training.initial import save_untrained_encoder
from likewise.training.methods.options import METHODS

PROTOCOLS = ("linear", "fewshot")
# Smaller values where the defaults are for millions of images at 224 pixels.
SMALL: dict[str, dict[str, Any]] = {
    "vicreg": {"projector_dims": (2048, 2048, 2048)},
    "barlow-twins": {"projector_dims": (2048, 2048, 2048)},
    "moco-v3": {"projector_dims": (2048, 2048, 256)},
    "swav": {"num_prototypes": 300},
    **{name: {"text_width": 128, "text_layers": 2} for name in ("clip", "siglip", "declip", "slip")},
}
# Variants: a frozen sentence encoder, several positives per anchor, label pairs, and pairs from the batch.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, PairConfig]]] = {
    "clip, frozen text": (
        {"method": "clip", "text_tower": "frozen"},
        {"self": PairConfig(source="self"), "language": PairConfig()},
    ),
    "supcon, 3 partners": ({"method": "supcon", "num_positives": 3}, {"language": PairConfig(k=3)}),
    "supcon, labels": ({"method": "supcon"}, {"label": PairConfig(source="label")}),
    "pair-classifier, in batch": (
        {"method": "pair-classifier", "mine_in_batch": True},
        {"self": PairConfig(source="self")},
    ),
}
COMMON: dict[str, Any] = {
    "backbone": "resnet10t",
    "image_size": 48,
    "stem": "default",
    "batch_size": 128,
    "base_lr": 4e-3,
}


def arms() -> list[tuple[str, str, dict[str, Any], PairConfig]]:
    """Return name, source of pairs, settings and pair config of every run."""
    sources = {"self": PairConfig(source="self"), "language": PairConfig()}
    runs = [
        (method, pairs, {"method": method, **SMALL.get(method, {})}, pair_config)
        for method in METHODS
        for pairs, pair_config in sources.items()
    ]
    for name, (settings, pair_configs) in VARIANTS.items():
        runs += [(name, pairs, settings, pair_config) for pairs, pair_config in pair_configs.items()]
    return runs


def measure(encoder: Path, items: Path, also: list[Path], out: Path) -> list[str]:
    """Evaluate one encoder and return its results in percent, with 95 % intervals over test items."""
    datasets = [open_labeled(items, label_column="articleType"), *map(open_labeled, also)]
    cells = []
    for result in evaluate(encoder, datasets, PROTOCOLS, out=out).raw:
        for protocol in PROTOCOLS:
            score = result["protocols"][protocol]["scores"][0]
            half = (score["high"] - score["low"]) / 2
            cells.append(f"{100 * score['value']:.1f} ± {100 * half:.1f}")
    return cells


def main() -> None:
    """Train and evaluate each arm, and print its row of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    options = ImportOptions(caption_column=("title",), label_column="articleType", where=("split=train",))
    dataset = import_dataset(args.items, args.work / "dataset", options)
    embed(dataset, "all-MiniLM-L6-v2")
    find_neighbors(dataset)
    for seed in range(args.seeds):
        common = COMMON | {"max_steps": args.steps, "seed": seed}
        untrained = save_untrained_encoder(TrainConfig(**common), args.work / f"untrained-{seed}.safetensors")
        cells = measure(untrained, args.items, args.also, args.work / f"untrained-{seed}")
        print(f"| untrained | | {seed} | {' | '.join(cells)} | | |", flush=True)
        for name, pairs, settings, pair_config in arms():
            if args.only and name not in args.only:
                continue
            run = args.work / f"{name.replace(', ', '-').replace(' ', '-')}-{pairs}-{seed}"
            start = time.monotonic()
            finished = train(dataset, run, parse_train_config(common | settings), pair_config)
            minutes = (time.monotonic() - start) / 60
            cells = measure(run, args.items, args.also, run / "evaluation")
            rank = finished.metrics()[-1]["effective_rank"]
            print(
                f"| {name} | {pairs} | {seed} | {' | '.join(cells)} | {rank:.0f} | {minutes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
