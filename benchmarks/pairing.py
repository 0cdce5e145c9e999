"""Pair statistics by encoder and pair config, without training: the tables of docs/results/pairs.md.

    python -m benchmarks.pairing fashion=fashion.likewise photos_en=photos_en.likewise --out pages

Each dataset is given as NAME=DATASET and has the embeddings to compare. Neighbors are searched once and
reused. With --out, an HTML report is written per dataset.
"""

import argparse
from pathlib import Path

from likewise.data.dataset import CaptionDataset
from likewise.pairs.analyze import AnalysisRow, PairAnalysis, analyze_pairs
from likewise.pairs.stats import Estimate
from likewise.progress import RichProgress
from likewise.report.pairs_report import write_pairs_report

COLUMNS = (
    "encoder",
    "pair config",
    "with partner",
    "median similarity",
    "identical captions",
    "hubness skew",
    "reciprocal",
    "coverage",
    "dHash bits (pairs / random)",
    "precision@1",
    "precision",
)


def percent(fraction: float | None) -> str:
    """Return a fraction in percent."""
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def interval(estimate: Estimate | None) -> str:
    """Return an estimate in percent with half of its 95 % interval."""
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} ± {50 * (estimate.high - estimate.low):.1f} %"


def format_row(row: AnalysisRow, analysis: PairAnalysis) -> list[str]:
    """Return the cells of one pair config with one encoder."""
    name = [row.encoder or "–", f"`{row.pair_config}`"]
    stats, random_distance = row.stats, analysis.random_baseline.hash_distance
    if stats is None:
        return [*name, row.error or "", *[""] * (len(COLUMNS) - 3)]
    bits = "" if stats.hash_distance is None else f"{stats.hash_distance:.1f} / {random_distance:.1f}"
    return [
        *name,
        percent(stats.paired_fraction),
        "" if stats.similarity is None else f"{stats.similarity[1]:.2f}",
        percent(stats.identical_caption_fraction),
        f"{stats.hubness_skew:.2f}",
        percent(stats.reciprocity),
        percent(stats.coverage),
        bits,
        interval(stats.top1_precision),
        interval(stats.label_precision),
    ]


def format_table(analysis: PairAnalysis) -> str:
    """Return the rows as Markdown, without columns of labels if the dataset has none."""
    rows = [list(COLUMNS), *(format_row(row, analysis) for row in analysis.rows)]
    num_columns = len(COLUMNS) if analysis.num_labeled else len(COLUMNS) - 2
    lines = ["| " + " | ".join(row[:num_columns]) + " |" for row in rows]
    lines.insert(1, "|---|---|" + "---:|" * (num_columns - 2))
    return "\n".join(lines)


def format_agreements(analysis: PairAnalysis) -> str:
    """Return the agreement of encoders as Markdown."""
    lines = ["| encoder | and | overlap of the ten nearest | rank correlation |", "|---|---|---:|---:|"]
    for agreement in analysis.agreements:
        correlation = "" if agreement.correlation is None else f"{agreement.correlation:.2f}"
        cells = (agreement.encoder_a, agreement.encoder_b, percent(agreement.overlap), correlation)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Analyze each dataset and print its tables."""
    from rich.console import Console

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("datasets", nargs="+", metavar="NAME=DATASET")
    parser.add_argument("--encoder", help="comma-separated; defaults to all of the dataset")
    parser.add_argument("--pair-config", action="append", help="as of `likewise analyze-pairs`")
    parser.add_argument("--out", type=Path, help="directory for HTML reports")
    args = parser.parse_args()
    progress = RichProgress(Console(stderr=True))
    encoders = args.encoder.split(",") if args.encoder else None
    for item in args.datasets:
        name, _, path = item.partition("=")
        dataset = CaptionDataset.open(path or name)
        analysis = analyze_pairs(dataset, encoders, args.pair_config, progress=progress)
        random = percent(analysis.random_baseline.label_precision)
        print(f"\n## {name}\n\n{analysis.num_images:,} images, {analysis.num_labeled:,} with a label", end="")
        print(f" (two random images share it in {random})" if random else "", end=".\n\n")
        print(f"{format_table(analysis)}\n\n{format_agreements(analysis)}", flush=True)
        if args.out is not None:
            print(f"\npage: {write_pairs_report(analysis, dataset, args.out / f'{name}.html')}")


if __name__ == "__main__":
    main()
