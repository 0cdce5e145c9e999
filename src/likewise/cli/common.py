"""The application that every verb belongs to, and what verbs share."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App, Parameter

from likewise.progress import NULL_PROGRESS, Progress, RichProgress

if TYPE_CHECKING:
    from likewise.evaluation.results import MetricComparison
    from likewise.evaluation.statistics import Difference, Estimate


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every verb takes.

    Attributes:
        json: Print the result as JSON for machines.
        quiet: Show no progress.
        debug: Show the stack trace of an error.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False

    def progress(self) -> Progress:
        """Return where to report: bars on standard error, unless told to be quiet."""
        if self.quiet:
            return NULL_PROGRESS
        from rich.console import Console

        return RichProgress(Console(stderr=True))

    def print_result(self, result: dict[str, Any], text: str) -> None:
        """Print the result: as JSON, or as a sentence."""
        print(json.dumps(result, default=str) if self.json else text)  # noqa: T201  # the CLI's own output


def print_error(message: str, exit_code: int) -> int:
    """Print a fault on standard error and return the exit code."""
    print(message, file=sys.stderr)  # noqa: T201  # the CLI's own output
    return exit_code


def import_summary(dataset: Path, summary: dict[str, Any]) -> list[str]:
    """Say what an import found and left out."""
    lines = [
        f"{summary['images']:,} images, {summary['captions']:,} captions: {dataset}",
        f"  without a caption: {summary['without_caption']:,}",
        f"  with several captions: {summary['with_several_captions']:,}",
    ]
    skipped = summary["skipped"]
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        lines.append(f"  skipped: {sum(skipped.values()):,} ({reasons}); see {dataset}/skipped-*.jsonl")
    return lines


def results_table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lay out what was measured on each set, in percent with 95 % intervals."""
    lines = []
    for result in results:
        dataset_info = result["dataset"]
        description = (
            f"{dataset_info['num_classes']} classes"
            if "num_classes" in dataset_info
            else f"{dataset_info['num_captions']:,} captions"
        )
        lines.append(f"{dataset_info['name']}: {description}, images {dataset_info['num_images']}")
        lines += [f"  skipped {count:,}: {reason}" for reason, count in dataset_info["skipped"].items()]
        test_only_classes = dataset_info.get("test_only_classes", [])
        if test_only_classes:
            lines.append(
                f"  classes only in test, which no classifier learns: {', '.join(test_only_classes)}"
            )
        for name, protocol_result in result["protocols"].items():
            for score in protocol_result["scores"]:
                value, low, high = (100 * score[key] for key in ("value", "low", "high"))
                cell = f"{value:5.1f}  [{low:.1f}, {high:.1f}]  n={score['n']:,}"
                lines.append(f"  {name:<12} {score['metric']:<24} {cell}")
    return lines


def comparison_table(rows: "Sequence[MetricComparison]", names: Sequence[str]) -> list[str]:
    """Lay out encoders side by side, the last column the difference of the second from the first."""
    lines = [f"{'':<32}" + "".join(f"{name:>18}" for name in names) + f"   {names[1]} - {names[0]}"]
    for row in rows:
        cells = "".join(f"{_format_interval(estimate):>18}" for estimate in row.estimates)
        difference = row.differences[0]
        difference_text = "" if difference is None else _format_interval(difference, sign="+")
        lines.append(f"{_row_label(row):<32}{cells}   {difference_text}")
    return lines


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Set cells of text in columns, the first three to the left and figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _format_interval(estimate: "Estimate | Difference", sign: str = "") -> str:
    value, low, high = (
        format(100 * fraction, f"{sign}.1f") for fraction in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def _row_label(row: "MetricComparison") -> str:
    metric = row.baseline.metric.replace("mean average precision", "mAP")
    return f"{row.baseline.protocol} {metric}"


app = App(
    name="likewise",
    help="Learn image encoders from captioned images: pictures that are described alike, learn alike.",
    help_epilogue="Start here: `likewise demo --quick`",
    help_format="markdown",
    default_parameter=Parameter(negative=()),
)

COMMON_OPTIONS = CommonOptions()


def parse_list(text: str | None) -> tuple[str, ...]:
    """Split a list with commas between."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
