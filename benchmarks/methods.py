"""Every method with its sources of pairs, at one budget: the figures of docs/results/methods.md.

    python -m benchmarks.methods ITEMS.csv WORK --also FOLDER --seeds 2

ITEMS.csv has columns file, split, title and articleType; FOLDER is a labelled set. Finished runs are reused,
so it can be stopped and run again; the table is printed after each run.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from likewise import PairConfig, TrainConfig, embed, find_neighbors, import_dataset, train
from likewise.data.config import ImportOptions
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.evaluation.evaluate import evaluate
from likewise.progress import NULL_PROGRESS
from likewise.training.config import parse_train_config
from likewise.training.initial import save_untrained_encoder
from likewise.training.methods.options import METHODS

PROTOCOLS = ("linear", "fewshot")
# What a method's own defaults, made for millions of images at 224 pixels, are too large for.
SMALL: dict[str, dict[str, Any]] = {
    "vicreg": {"projector_dims": (2048, 2048, 2048)},
    "barlow-twins": {"projector_dims": (2048, 2048, 2048)},
    "moco-v3": {"projector_dims": (2048, 2048, 256)},
    "swav": {"num_prototypes": 300},
    **{name: {"text_width": 128, "text_layers": 2} for name in ("clip", "siglip", "declip", "slip")},
}
# Beside each method by itself: the baseline with a frozen sentence encoder, several partners at once, labels
# as the classes, and pairs from within the batch.
MORE: dict[str, tuple[dict[str, Any], dict[str, PairConfig]]] = {
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
    """Return name, pairs, settings and rule of every run, those that most is compared with first."""
    sources = {"self": PairConfig(source="self"), "language": PairConfig()}
    found = [
        (method, pairs, {"method": method, **SMALL.get(method, {})}, rule)
        for method in METHODS
        for pairs, rule in sources.items()
    ]
    for name, (settings, rules) in MORE.items():
        found += [(name, pairs, settings, rule) for pairs, rule in rules.items()]
    return found


def figures(target: Path, items: Path, also: list[Path], out: Path) -> list[str]:
    """Evaluate one encoder and return its figures in percent, with 95 % intervals over test items."""
    sets = [open_labeled(items, label_column="articleType"), *(open_labeled(path) for path in also)]
    cells = []
    for result in evaluate(target, sets, PROTOCOLS, out=out).raw:
        for protocol in PROTOCOLS:
            told = result["protocols"][protocol]["scores"][0]
            half = (told["high"] - told["low"]) / 2
            cells.append(f"{100 * told['value']:.1f} ± {100 * half:.1f}")
    return cells


def main() -> None:
    """Run everything and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--only", nargs="*", default=[])
    told = parser.parse_args()
    options = ImportOptions(caption_column=("title",), label_column="articleType", where=("split=train",))
    collection = import_dataset(told.items, told.work / "collection", options)
    embed(collection, "all-MiniLM-L6-v2")
    find_neighbors(collection)
    for seed in range(told.seeds):
        common = COMMON | {"steps": told.steps, "seed": seed}
        start = save_untrained_encoder(TrainConfig(**common), told.work / f"untrained-{seed}.safetensors")
        cells = figures(start, told.items, told.also, told.work / f"untrained-{seed}")
        print(f"| untrained | | {seed} | {' | '.join(cells)} | | |", flush=True)
        for name, pairs, settings, rule in arms():
            if told.only and name not in told.only:
                continue
            run = told.work / f"{name.replace(', ', '-').replace(' ', '-')}-{pairs}-{seed}"
            began = time.monotonic()
            done = train(collection, run, parse_train_config(common | settings), rule, progress=NULL_PROGRESS)
            minutes = (time.monotonic() - began) / 60
            cells = figures(run, told.items, told.also, run / "evaluation")
            rank = done.metrics()[-1]["effective_rank"]
            print(
                f"| {name} | {pairs} | {seed} | {' | '.join(cells)} | {rank:.0f} | {minutes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
