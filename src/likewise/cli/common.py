"""The application that every verb belongs to, and what verbs share."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App, Parameter

from likewise.progress import SILENT, Progress, Terminal

if TYPE_CHECKING:
    from likewise.evaluation.results import Comparison
    from likewise.evaluation.statistics import Difference, Estimate


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Common:
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
            return SILENT
        from rich.console import Console

        return Terminal(Console(stderr=True))

    def tell(self, result: dict[str, Any], sentence: str) -> None:
        """Print the result: as JSON, or as a sentence."""
        print(json.dumps(result, default=str) if self.json else sentence)  # noqa: T201  # the CLI's own output


def fail(sentence: str, code: int) -> int:
    """Print a fault on standard error and return the exit code."""
    print(sentence, file=sys.stderr)  # noqa: T201  # the CLI's own output
    return code


def import_lines(collection: Path, summary: dict[str, Any]) -> list[str]:
    """Say what an import found and left out."""
    lines = [
        f"{summary['images']:,} images, {summary['captions']:,} captions: {collection}",
        f"  without a caption: {summary['without_caption']:,}",
        f"  with several captions: {summary['with_several_captions']:,}",
    ]
    skipped = summary["skipped"]
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        lines.append(f"  skipped: {sum(skipped.values()):,} ({reasons}); see {collection}/skipped-*.jsonl")
    return lines


def result_lines(results: Sequence[dict[str, Any]]) -> list[str]:
    """Lay out what was measured on each set, in percent with 95 % intervals."""
    lines = []
    for result in results:
        about = result["set"]
        kind = f"{about['classes']} classes" if "classes" in about else f"{about['captions']:,} captions"
        lines.append(f"{about['name']}: {kind}, images {about['images']}")
        lines += [f"  skipped {count:,}: {reason}" for reason, count in about["skipped"].items()]
        unseen = about.get("classes_only_in_test", [])
        if unseen:
            lines.append(f"  classes only in test, which no classifier learns: {', '.join(unseen)}")
        for name, told in result["protocols"].items():
            for score in told["scores"]:
                value, low, high = (100 * score[part] for part in ("value", "low", "high"))
                figure = f"{value:5.1f}  [{low:.1f}, {high:.1f}]  n={score['n']:,}"
                lines.append(f"  {name:<12} {score['metric']:<24} {figure}")
    return lines


def comparison_lines(rows: "Sequence[Comparison]", names: Sequence[str]) -> list[str]:
    """Lay out encoders side by side, the last column the difference of the second from the first."""
    lines = [f"{'':<32}" + "".join(f"{name:>18}" for name in names) + f"   {names[1]} - {names[0]}"]
    for row in rows:
        cells = "".join(f"{_percent(estimate):>18}" for estimate in row.estimates)
        change = row.differences[0]
        gain = "" if change is None else _percent(change, sign="+")
        lines.append(f"{_short(row):<32}{cells}   {gain}")
    return lines


def table_lines(grid: Sequence[Sequence[str]]) -> list[str]:
    """Set cells of text in columns, the first three to the left and figures to the right."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in grid
    ]


def _percent(estimate: "Estimate | Difference", sign: str = "") -> str:
    value, low, high = (
        format(100 * part, f"{sign}.1f") for part in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def _short(row: "Comparison") -> str:
    metric = row.row.metric.replace("mean average precision", "mAP")
    return f"{row.row.protocol} {metric}"


app = App(
    name="likewise",
    help="Learn image encoders from captioned images: pictures that are described alike, learn alike.",
    help_epilogue="Start here: `likewise demo --quick`",
    help_format="markdown",
    default_parameter=Parameter(negative=()),
)

COMMON = Common()


def listed(text: str | None) -> tuple[str, ...]:
    """Split a list with commas between."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())
