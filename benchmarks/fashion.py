"""Sources of pairs and augmentations on product photos: the results of docs/results/product-photos.md.

    python -m benchmarks.fashion ITEMS.csv WORK --also FOLDER --seeds 3 --arms self language

ITEMS.csv has columns file, split, title and articleType; FOLDER is a labeled dataset. Finished runs are
reused. The table is printed after each seed.
"""

import argparse
from pathlib import Path

import numpy as np
from scipy import stats

from likewise import ImportOptions, PairConfig, TrainConfig, embed, find_neighbors, import_dataset, train
from likewise.evaluation.datasets.labeled import LabeledDataset, open_labeled
from likewise.evaluation.evaluate import evaluate
from likewise.progress import RichProgress
from likewise.training.config import Augmentation
from likewise.training.initial import save_untrained_encoder

PROTOCOLS = ("linear", "fewshot", "knn")
Results = dict[tuple[str, str, str], list[float]]


# Pairs and augmentation; the first is the baseline.
ARMS: dict[str, tuple[PairConfig, Augmentation]] = {
    "self": (PairConfig(source="self"), "simclr"),
    "language": (PairConfig(), "crop"),
    "language-simclr": (PairConfig(), "simclr"),
    "mix50-simclr": (PairConfig(k=3, self_pair_prob=0.5), "simclr"),
    "mix50-crop": (PairConfig(k=3, self_pair_prob=0.5), "crop"),
    "mix25-simclr": (PairConfig(k=3, self_pair_prob=0.25), "simclr"),
}


def make_config(augmentation: Augmentation, seed: int, epochs: int) -> TrainConfig:
    """Return the config of one run; arms differ in the augmentation only."""
    return TrainConfig(
        backbone="resnet10t",
        image_size=48,
        stem="default",
        batch_size=128,
        epochs=epochs,
        base_lr=4e-3,
        augmentation=augmentation,
        seed=seed,
    )


def measure(encoder: Path, datasets: list[LabeledDataset], out: Path, results: Results, arm: str) -> None:
    """Evaluate one encoder on all datasets and add the main metric of each protocol, in percent."""
    for result in evaluate(encoder, datasets, PROTOCOLS, out=out).raw:
        for protocol, protocol_result in result["protocols"].items():
            key = (result["dataset"]["name"], protocol, arm)
            results.setdefault(key, []).append(100 * protocol_result["scores"][0]["value"])


def interval(values: list[float]) -> str:
    """Return the mean over seeds with the 95 % interval of Student's t."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.1f} ± {half:.1f}"


def format_table(results: Results) -> str:
    """Return Markdown: each arm, and its difference from the baseline, paired by seed."""
    arms = list(dict.fromkeys(key[2] for key in results))
    others = [arm for arm in arms if arm not in ("untrained", "self")]
    lines = ["| dataset | protocol | " + " | ".join([*arms, *(f"{arm} − self" for arm in others)]) + " |"]
    lines.append("|---" * (2 + len(arms) + len(others)) + "|")
    for name, protocol in dict.fromkeys((key[0], key[1]) for key in results):
        values = {arm: results[name, protocol, arm] for arm in arms}
        gains = [[b - a for a, b in zip(values["self"], values[arm], strict=True)] for arm in others]
        cells = " | ".join(interval(cell) for cell in (*values.values(), *gains))
        lines.append(f"| {name} | {protocol} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Train and evaluate each arm, and print the table after each seed."""
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["self", "language"])
    args = parser.parse_args()
    progress = RichProgress(Console(stderr=True))
    options = ImportOptions(caption_column=("title",), label_column="articleType", where=("split=train",))
    dataset = import_dataset(args.items, args.work / "dataset", options, progress=progress)
    embed(dataset, "all-MiniLM-L6-v2", progress=progress)
    find_neighbors(dataset, progress=progress)
    datasets = [open_labeled(args.items, label_column="articleType"), *map(open_labeled, args.also)]
    results: Results = {}
    for seed in range(args.seeds):
        untrained = save_untrained_encoder(
            make_config("simclr", seed, args.epochs), args.work / f"untrained-{seed}.safetensors"
        )
        measure(untrained, datasets, args.work / f"untrained-{seed}", results, "untrained")
        for arm in args.arms:
            pair_config, augmentation = ARMS[arm]
            run = train(
                dataset,
                args.work / f"{arm}-{seed}",
                make_config(augmentation, seed, args.epochs),
                pair_config,
                progress=progress,
            )
            measure(run.path, datasets, run.path / "evaluation", results, arm)
        print(f"\nafter seed {seed}:\n{format_table(results)}", flush=True)


if __name__ == "__main__":
    main()
