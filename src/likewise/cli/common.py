"""The application object and what all commands share: options, output, messages."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App, Group, Parameter

from likewise.errors import InvalidInputError
from likewise.progress import NULL_PROGRESS, Progress, RichProgress
from likewise.strings import count_noun

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from likewise.evaluation.results import MetricComparison
    from likewise.evaluation.statistics import Difference, Estimate

_PIPE_WIDTH = 200  # characters per line where the output is not a terminal

app = App(
    name="likewise",
    help="Language-guided contrastive pre-training: images with similar captions become positive pairs.",
    help_epilogue="Example: `likewise demo --quick`",
    help_format="markdown",
    default_parameter=Parameter(negative=()),
)


# Groups of flags, in the order of `--help`.
HELP_GROUPS = {
    name: Group(name, sort_key=10 + i)
    for i, name in enumerate((
        "Columns",
        "Selection",
        "Thresholds",
        "Pair sampling",
        "Neighbor search",
        "Method options",
        "Level options",
        "Model and augmentation",
        "Optimization",
        "Validation",
        "Protocol options",
        "Encoder options",
        "Output",
    ))
}  # fmt: skip


@Parameter(name="*", group=HELP_GROUPS["Output"])
@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options shared by all commands."""

    json: bool = False
    """Print the result as JSON."""
    quiet: bool = False
    """Print no progress and no messages except warnings."""
    debug: bool = False
    """Print the stack trace of an error."""

    def progress(self) -> Progress:
        """Return progress bars on standard error, or none with `--quiet`."""
        return NULL_PROGRESS if self.quiet else RichProgress(error_console())

    def print_result(self, result: Mapping[str, Any], *output: "str | Table") -> None:
        """Print the result to standard output: as JSON, or as lines and tables."""
        if self.json:
            print(json.dumps(result, default=str))  # noqa: T201  # the output of the command
        else:
            self.print_text(*output)

    def print_text(self, *output: "str | Table") -> None:
        """Print lines and tables to standard output, except with `--json`."""
        if self.json:
            return
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
        for item in output:
            console.print(item, markup=False, highlight=False, soft_wrap=isinstance(item, str))


COMMON_OPTIONS = CommonOptions()


@cache
def error_console() -> "Console":
    """Return the console on standard error that progress bars and messages share."""
    from rich.console import Console

    return Console(stderr=True)


class _ConsoleHandler(logging.Handler):
    """Prints messages above the progress bars, warnings with a prefix."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        is_warning = record.levelno >= logging.WARNING
        message = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
        style = "yellow" if is_warning else "dim"
        error_console().print(message, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def log_to_console(*, quiet: bool) -> Iterator[None]:
    """Print the messages of the library to standard error for the duration of a command."""
    logger, handler = logging.getLogger("likewise"), _ConsoleHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def print_error(message: str, exit_code: int) -> int:
    """Print a message to standard error and return the exit code."""
    print(message, file=sys.stderr)  # noqa: T201  # the output of the command
    return exit_code


def make_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, num_labels: int = 1) -> "Table":
    """Return a table; the first `num_labels` columns are text, the others right-aligned numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i < num_labels else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def import_summary(dataset: Path, summary: dict[str, Any]) -> str:
    """Return the counts of an import as text, with what was skipped or ignored and why."""
    from likewise.data.readers.files import format_ignored  # the package of readers imports pyarrow

    lines = [
        f"{count_noun(summary['images'], 'image')}, {count_noun(summary['captions'], 'caption')}: {dataset}"
    ]
    lines += [
        f"  {title}: {summary[name]:,}"
        for name, title in (
            ("without_caption", "without a caption"),
            ("with_several_captions", "with several captions"),
            ("empty_captions", "empty captions"),
            ("rows_excluded_by_where", "rows excluded by `where`"),
        )
        if summary.get(name)
    ]
    skipped, ignored = summary["skipped"], summary["ignored"]
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        captions = ""
        if "skipped_captions" in summary:
            captions = f", with {count_noun(summary['skipped_captions'], 'caption')}"
        lines.append(
            f"  skipped: {sum(skipped.values()):,} ({reasons}){captions}; see {dataset}/skipped-*.jsonl"
        )
    if ignored:
        files = f" of {summary['files']:,} files" if "files" in summary else ""
        reasons = format_ignored(ignored, summary["ignored_examples"])
        lines.append(f"  ignored: {sum(ignored.values()):,}{files}: {reasons}")
    return "\n".join(lines)


def check_skipped(skipped: Mapping[str, int], result: str, *, strict: bool) -> None:
    """Check that nothing was skipped, if `strict`; call it after the result is complete and printed.

    Args:
        skipped: Number of skipped entries by reason.
        result: What is complete nevertheless, such as `the dataset photos.likewise`.
        strict: Whether skipped entries are an error.

    Raises:
        InvalidInputError: if an entry was skipped.
    """
    if strict and skipped:
        raise InvalidInputError(
            f"`strict`: {sum(skipped.values()):,} entries were skipped ({', '.join(skipped)}); "
            f"{result} is complete without them",
            field="strict",
        )


def comparison_table(rows: "Sequence[MetricComparison]", names: Sequence[str]) -> "Table":
    """Return a table of encoders side by side; the last column is the second minus the first."""
    cells = [
        [
            f"{row.baseline.protocol} {row.baseline.metric.replace('mean average precision', 'mAP')}",
            *(_format_interval(estimate) for estimate in row.estimates),
            "" if row.differences[0] is None else _format_interval(row.differences[0], sign="+"),
        ]
        for row in rows
    ]
    return make_table(["", *names, f"{names[1]} - {names[0]}"], cells)


def _format_interval(estimate: "Estimate | Difference", sign: str = "") -> str:
    value, low, high = (
        format(100 * fraction, f"{sign}.1f") for fraction in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"
