"""Best against last encoder of long runs: the results of docs/results/methods.md on early stopping.

    python -m benchmarks.stopping ITEMS.csv WORK --also FOLDER

Trains many steps on few product photos, so that the last encoder may overfit, and evaluates the encoder with
the best validation metric and the last one. Finished runs are reused.
"""

import argparse
from pathlib import Path

from benchmarks.methods import COMMON, measure
from likewise import ImportOptions, PairConfig, embed, find_neighbors, import_dataset, train
from likewise.training.config import parse_train_config

ARMS = {"self": PairConfig(source="self"), "language": PairConfig()}


def main() -> None:
    """Train with both sources of pairs and print validation metrics and results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--also", type=Path, nargs="*", default=[])
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--image-size", type=int, default=32)
    args = parser.parse_args()
    options = ImportOptions(
        caption_column=("title",), label_column="articleType", where=("split=train",), limit=args.images
    )
    dataset = import_dataset(args.items, args.work / "dataset", options)
    embed(dataset, "all-MiniLM-L6-v2")
    find_neighbors(dataset)
    for name, pair_config in ARMS.items():
        overrides = {"image_size": args.image_size, "max_steps": args.steps, "num_val_pairs": 150}
        run = train(dataset, args.work / name, parse_train_config(COMMON | overrides), pair_config)
        for row in run.validation_metrics():
            print(f"{name} " + " ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)
        best = measure(run.path, args.items, args.also, run.path / "evaluation")
        last = measure(
            run.path / "encoder-last.safetensors", args.items, args.also, run.path / "evaluation-last"
        )
        print(f"| {name} | best, step {run.best_step} | {' | '.join(best)} |")
        print(f"| {name} | last, step {args.steps} | {' | '.join(last)} |", flush=True)


if __name__ == "__main__":
    main()
