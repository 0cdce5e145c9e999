"""Pairs and views compared on product photos, several seeds: the figures of docs/results/product-photos.md.

    python -m benchmarks.fashion ITEMS.csv WORK --also FOLDER --seeds 3 --arms self language

ITEMS.csv has columns file, split, title and articleType. Finished runs are reused, so it can be stopped and
run again; the table is printed after each seed.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy import stats

from likewise import PairConfig, TrainConfig, embed, find_neighbors, import_dataset, train
from likewise.data.config import ImportOptions
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.evaluation.evaluate import evaluate
from likewise.progress import RichProgress
from likewise.training.config import Augmentation
from likewise.training.initial import save_untrained_encoder

PROTOCOLS = ("linear", "fewshot", "knn")
Figures = dict[tuple[str, str, str], list[float]]


# What is shown with whom, and by which views; the first is what the others are compared with.
ARMS: dict[str, tuple[PairConfig, Augmentation]] = {
    "self": (PairConfig(source="self"), "simclr"),
    "language": (PairConfig(), "crop"),
    "language-simclr": (PairConfig(), "simclr"),
    "mix50-simclr": (PairConfig(k=3, self_pair_prob=0.5), "simclr"),
    "mix50-crop": (PairConfig(k=3, self_pair_prob=0.5), "crop"),
    "mix25-simclr": (PairConfig(k=3, self_pair_prob=0.25), "simclr"),
}


def settings(views: Augmentation, seed: int, epochs: int) -> TrainConfig:
    """Return the settings of one run: the same for all arms but for the views."""
    return TrainConfig(
        backbone="resnet10t",
        image_size=48,
        stem="default",
        batch_size=128,
        epochs=epochs,
        base_lr=4e-3,
        augmentation=views,
        seed=seed,
    )


def measure(target: Path, items: Path, also: list[Path], out: Path, figures: Figures, arm: str) -> None:
    """Evaluate one encoder on all sets and add its figures, in percent, to those of its arm."""
    sets = [open_labeled(items, label_column="articleType"), *(open_labeled(path) for path in also)]
    for result in evaluate(target, sets, PROTOCOLS, out=out).raw:
        for protocol, told in result["protocols"].items():
            key = (result["dataset"]["name"], protocol, arm)
            figures.setdefault(key, []).append(100 * told["scores"][0]["value"])


def interval(values: list[float]) -> str:
    """Return the mean over seeds with the 95 % interval of Student's t."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.1f} ± {half:.1f}"


def table(figures: Figures) -> str:
    """Lay the figures out as Markdown: each arm, and each but the first less the first, paired by seed."""
    arms = list(dict.fromkeys(key[2] for key in figures))
    others = [arm for arm in arms if arm not in ("untrained", "self")]
    lines = ["| set | protocol | " + " | ".join([*arms, *(f"{arm} − self" for arm in others)]) + " |"]
    lines.append("|---" * (2 + len(arms) + len(others)) + "|")
    for name, protocol in dict.fromkeys((key[0], key[1]) for key in figures):
        values = {arm: figures[name, protocol, arm] for arm in arms}
        gains = [[b - a for a, b in zip(values["self"], values[arm], strict=True)] for arm in others]
        cells = " | ".join(interval(each) for each in (*values.values(), *gains))
        lines.append(f"| {name} | {protocol} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Run everything and print the table."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["self", "language"])
    told = parser.parse_args()
    progress = RichProgress(Console(stderr=True))
    options = ImportOptions(caption_column=("title",), label_column="articleType", where=("split=train",))
    collection = import_dataset(told.items, told.work / "collection", options, progress=progress)
    embed(collection, "all-MiniLM-L6-v2", progress=progress)
    find_neighbors(collection, progress=progress)
    figures: Figures = {}
    for seed in range(told.seeds):
        start = save_untrained_encoder(
            settings("simclr", seed, told.epochs), told.work / f"untrained-{seed}.safetensors"
        )
        measure(start, told.items, told.also, told.work / f"untrained-{seed}", figures, "untrained")
        for arm in told.arms:
            rule, views = ARMS[arm]
            run = train(
                collection,
                told.work / f"{arm}-{seed}",
                settings(views, seed, told.epochs),
                rule,
                progress=progress,
            )
            measure(run.path, told.items, told.also, run.path / "evaluation", figures, arm)
        print(f"\nafter seed {seed}:\n{table(figures)}", flush=True)


if __name__ == "__main__":
    main()
