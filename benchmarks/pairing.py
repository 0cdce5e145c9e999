"""What pairs are worth by encoder and rule, without training: the tables of docs/results/pairs.md.

    python -m benchmarks.pairing fashion=fashion.likewise photos_en=photos_en.likewise --out pages

Each collection is given as NAME=COLLECTION, with the embeddings to compare. Neighbors are searched for once,
so it can be stopped and run again. With --out, a page with pictures is written for each collection.
"""

import argparse
from pathlib import Path

from likewise.data.dataset import CaptionDataset
from likewise.pairs.analyze import AnalysisRow, PairAnalysis, analyze_pairs
from likewise.pairs.stats import Estimate
from likewise.progress import RichProgress
from likewise.report.pairs_report import write_pairs_report

HEADS = (
    "encoder",
    "rule",
    "with partner",
    "median similarity",
    "identical captions",
    "hub skew",
    "reciprocal",
    "reach",
    "dHash bits (pairs / random)",
    "precision@1",
    "precision",
)


def percent(share: float | None) -> str:
    """Return a share of one in percent."""
    return "" if share is None else f"{100 * share:.1f} %"


def interval(share: Estimate | None) -> str:
    """Return a share in percent with half of its 95 % interval."""
    if share is None:
        return ""
    return f"{100 * share.value:.1f} ± {50 * (share.high - share.low):.1f} %"


def line(row: AnalysisRow, diagnosis: PairAnalysis) -> list[str]:
    """Return the cells of one rule with one encoder."""
    name = [row.encoder or "–", f"`{row.pair_config}`"]
    figures, chance = row.stats, diagnosis.random_baseline.hash_distance
    if figures is None:
        return [*name, row.error or "", *[""] * (len(HEADS) - 3)]
    bits = "" if figures.hash_distance is None else f"{figures.hash_distance:.1f} / {chance:.1f}"
    return [
        *name,
        percent(figures.paired_fraction),
        "" if figures.similarity is None else f"{figures.similarity[1]:.2f}",
        percent(figures.identical_caption_fraction),
        f"{figures.hubness_skew:.2f}",
        percent(figures.reciprocity),
        percent(figures.coverage),
        bits,
        interval(figures.top1_precision),
        interval(figures.label_precision),
    ]


def table(diagnosis: PairAnalysis) -> str:
    """Lay the rows out as Markdown; columns for labels only where there are any."""
    rows = [list(HEADS), *(line(row, diagnosis) for row in diagnosis.rows)]
    kept = len(HEADS) if diagnosis.num_labeled else len(HEADS) - 2
    lines = ["| " + " | ".join(row[:kept]) + " |" for row in rows]
    lines.insert(1, "|---|---|" + "---:|" * (kept - 2))
    return "\n".join(lines)


def agreements(diagnosis: PairAnalysis) -> str:
    """Lay out how far encoders agree as Markdown."""
    lines = ["| encoder | and | same of the ten nearest | rank correlation |", "|---|---|---:|---:|"]
    for each in diagnosis.agreements:
        correlation = "" if each.correlation is None else f"{each.correlation:.2f}"
        lines.append(f"| {each.encoder_a} | {each.encoder_b} | {percent(each.overlap)} | {correlation} |")
    return "\n".join(lines)


def main() -> None:
    """Diagnose each collection and print its tables."""
    from rich.console import Console

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collections", nargs="+", metavar="NAME=COLLECTION")
    parser.add_argument("--encoder", help="with commas between; all that the collection has by default")
    parser.add_argument("--rule", action="append", help="as of likewise diagnose; its usual ones by default")
    parser.add_argument("--out", type=Path, help="a folder for pages with pictures")
    told = parser.parse_args()
    progress = RichProgress(Console(stderr=True))
    encoders = told.encoder.split(",") if told.encoder else None
    for given in told.collections:
        name, _, path = given.partition("=")
        collection = CaptionDataset(Path(path or name))
        found = analyze_pairs(collection, encoders, told.rule, progress=progress)
        random = percent(found.random_baseline.label_precision)
        print(f"\n## {name}\n\n{found.num_images:,} images, {found.num_labeled:,} with a label", end="")
        print(f" (two at random share it in {random})" if random else "", end=".\n\n")
        print(f"{table(found)}\n\n{agreements(found)}", flush=True)
        if told.out is not None:
            print(f"\npage: {write_pairs_report(found, collection, told.out / f'{name}.html')}")


if __name__ == "__main__":
    main()
