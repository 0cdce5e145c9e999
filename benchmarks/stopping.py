"""Does validation find the better encoder? The figures of docs/results/methods.md on early stopping.

    python -m benchmarks.stopping ITEMS.csv WORK --also FOLDER

Trains long on few product photos, so that the end need not be the best, and evaluates the encoder that was
kept beside the last one. Finished runs are reused.
"""

import argparse
from pathlib import Path

from benchmarks.methods import COMMON, figures
from likewise import PairConfig, TrainConfig, embed, find_neighbors, import_dataset, train
from likewise.data.config import ImportOptions

ARMS = {"self": PairConfig(source="self"), "language": PairConfig()}


def main() -> None:
    """Run both arms and print scores and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--size", type=int, default=32)
    told = parser.parse_args()
    options = ImportOptions(
        caption_column=("title",), label_column="articleType", where=("split=train",), limit=told.images
    )
    collection = import_dataset(told.items, told.work / "collection", options)
    embed(collection, "all-MiniLM-L6-v2")
    find_neighbors(collection)
    for name, rule in ARMS.items():
        settings = TrainConfig(**COMMON | {"size": told.size, "steps": told.steps, "held_out": 150})
        run = train(collection, told.work / name, settings, rule)
        for row in run.validation_metrics():
            print(f"{name} " + " ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
        kept = figures(run.path, told.items, told.also, run.path / "evaluation")
        last = figures(
            run.path / "encoder-last.safetensors", told.items, told.also, run.path / "evaluation-last"
        )
        print(f"| {name} | kept, step {run.best_step} | {' | '.join(kept)} |")
        print(f"| {name} | last, step {told.steps} | {' | '.join(last)} |", flush=True)


if __name__ == "__main__":
    main()
