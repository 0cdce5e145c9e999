"""Train SimCLR with self pairs and with language pairs, and compare the two encoders.

python examples/train_simclr.py photos/ labeled/ out/
"""

import argparse
from pathlib import Path

import likewise


def main() -> None:
    """Import, embed, train twice, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", help="images with captions, in any format that likewise imports")
    parser.add_argument("labeled", help="a labeled dataset: split/class/image, or a table")
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()

    dataset = likewise.import_dataset(args.photos, args.out / "dataset")
    likewise.embed(dataset, encoder="all-MiniLM-L6-v2")
    config = likewise.TrainConfig(
        method="simclr",
        backbone=args.backbone,
        image_size=args.image_size,
        batch_size=args.batch_size,
        epochs=args.epochs,
    )
    runs = []
    for source in ("self", "language"):
        run = likewise.train(dataset, args.out / source, config, likewise.PairConfig(source=source))
        results = likewise.evaluate(run, datasets=[args.labeled], protocols=["knn"])
        print(f"{source} pairs\n{results.table()}")
        runs.append(run.path)
    likewise.write_report(runs, args.out / "report.html")


if __name__ == "__main__":
    main()
