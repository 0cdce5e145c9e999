"""Result tables and summary sentences of the run report: intervals, and paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from likewise.evaluation.protocols import PROTOCOLS
from likewise.evaluation.protocols.base import EvalContext, Protocol, Score
from likewise.evaluation.results import ResultRow, compare_metrics
from likewise.evaluation.statistics import Difference, Estimate
from likewise.pairs.config import PairConfig
from likewise.report.load import ReportEntry
from likewise.report.page import (
    format_p_value,
    format_percent,
    format_percentage_points,
    format_value,
    join_words,
)
from likewise.strings import count_noun


class UnknownProtocol(Protocol):
    """Fallback for results of a protocol that this version does not know."""

    name = title = "unknown"
    summary = ""
    item_nouns = ("item", "items")

    def run(self, context: EvalContext) -> list[Score]:
        """Raise: only the results exist."""
        raise NotImplementedError

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Return an empty explanation."""
        return ""


def find_protocol(row: ResultRow) -> type[Protocol]:
    """Return the protocol of a row, or the fallback."""
    return PROTOCOLS.get(row.protocol, UnknownProtocol)


def protocol_title(row: ResultRow) -> str:
    """Return the title of the protocol of a row, or the name of an unknown protocol."""
    return PROTOCOLS[row.protocol].title if row.protocol in PROTOCOLS else row.protocol


SIGNIFICANCE_LEVEL = 0.05
_PROTOCOL_ORDER = ("retrieval", "linear", "fewshot", "knn")


@dataclass(frozen=True, kw_only=True)
class BaselineDifference:
    """A paired difference from the baseline, formatted for a cell of the table."""

    stats: Difference

    @property
    def text(self) -> str:
        """The difference with its interval, in percentage points."""
        stats = self.stats
        value, low, high = (format_percentage_points(x) for x in (stats.value, stats.low, stats.high))
        return f"{value} [{low}, {high}]"

    @property
    def p_value_text(self) -> str:
        """The p-value."""
        return format_p_value(self.stats.p_value)

    @property
    def direction(self) -> str:
        """`higher` or `lower` if the interval excludes zero, else empty."""
        if self.stats.low > 0:
            return "higher"
        return "lower" if self.stats.high < 0 else ""

    @property
    def is_uncertain(self) -> bool:
        """Whether the interval excludes zero although the test of no difference is not significant."""
        return bool(self.direction) and self.stats.p_value >= SIGNIFICANCE_LEVEL

    @property
    def mark(self) -> str:
        """A triangle up or down, hollow if uncertain; empty if the interval includes zero."""
        marks = {"higher": "△▲", "lower": "▽▼"}.get(self.direction)
        return marks[not self.is_uncertain] if marks else ""


@dataclass(frozen=True, kw_only=True)
class ResultCell:
    """One metric of one encoder.

    Attributes:
        estimate: The value; None if it was not evaluated.
        difference: Difference from the baseline.
        note: Reason if there is no difference.
    """

    estimate: Estimate | None
    difference: BaselineDifference | None = None
    note: str = ""

    @property
    def value(self) -> str:
        """The value in percent."""
        return format_percent(self.estimate.value) if self.estimate else ""

    @property
    def interval(self) -> str:
        """The interval in percent."""
        return (
            f"[{format_percent(self.estimate.low)}, {format_percent(self.estimate.high)}]"
            if self.estimate
            else ""
        )


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One metric of all encoders."""

    result: ResultRow
    name: str
    item_count: str
    cells: list[ResultCell]


@dataclass(frozen=True, kw_only=True)
class DatasetTable:
    """All results on one dataset."""

    name: str
    description: list[str]
    rows: list[TableRow]
    explanations: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class ResultTables:
    """The tables of all datasets; the columns are the entries that have results."""

    columns: list[ReportEntry]
    baseline_index: int
    """Column of the common baseline."""
    baseline_indices: list[int]
    """Column of the baseline of each column: the common one, or the start of an adapted encoder."""
    tables: list[DatasetTable]

    def baseline_of(self, column: int) -> ReportEntry:
        """Return the baseline of a column."""
        return self.columns[self.baseline_indices[column]]

    def has_start(self, column: int) -> bool:
        """Return whether the baseline of a column is the start that it was adapted from."""
        return self.baseline_indices[column] == _start_index(self.columns, column)


def build_result_tables(entries: Sequence[ReportEntry]) -> ResultTables | None:
    """Return the results of all entries as tables; None without results."""
    columns = [entry for entry in entries if entry.rows]
    if not columns:
        return None
    baseline_index = _baseline_index(columns)
    start_indices = [_start_index(columns, i) for i in range(len(columns))]
    baseline_indices = [baseline_index if start is None else start for start in start_indices]
    differences = [
        None
        if i == baseline
        else {
            comparison.baseline.key: comparison.differences[0]
            for comparison in compare_metrics([columns[baseline].rows, columns[i].rows])
        }
        for i, baseline in enumerate(baseline_indices)
    ]
    tables = [_build_table(key, columns, differences) for key in dict.fromkeys(_dataset_keys(columns))]
    return ResultTables(
        columns=columns, baseline_index=baseline_index, baseline_indices=baseline_indices, tables=tables
    )


def _baseline_index(columns: Sequence[ReportEntry]) -> int:
    """Return the index of the first training with `self` pairs, else 0; of an adapted encoder, its start."""
    self_pair_indices = (
        i
        for i, entry in enumerate(columns)
        if entry.run and entry.run.pair_source == "self" and not entry.run.is_adapted
    )
    index = next(self_pair_indices, 0)
    start_index = _start_index(columns, index)
    return index if start_index is None else start_index


def _start_index(columns: Sequence[ReportEntry], index: int) -> int | None:
    """Return the column of the encoder that a run has adapted; None if there is none."""
    run = columns[index].run
    if run is None or not run.is_adapted:
        return None
    start = (run.manifest.inputs.get("encoder"), run.config.get("image_size"))
    return next(
        (
            i
            for i, entry in enumerate(columns)
            for encoder in [entry.results[0]["encoder"]]
            if i != index and (encoder["fingerprint"], encoder["transform"]["image_size"]) == start
        ),
        None,
    )


def _dataset_keys(columns: Sequence[ReportEntry]) -> list[str]:
    return [row.dataset_key for entry in columns for row in entry.rows]


def _build_table(
    dataset_key: str,
    columns: Sequence[ReportEntry],
    differences: Sequence[dict[Any, Difference | None] | None],
) -> DatasetTable:
    rows_by_name = {
        row.key: row for entry in reversed(columns) for row in entry.rows if row.dataset_key == dataset_key
    }
    rows = sorted(rows_by_name.values(), key=_sort_key)
    table_rows = []
    for row in rows:
        protocol = find_protocol(row)
        cells = [_build_cell(row, entry, differences[i]) for i, entry in enumerate(columns)]
        item_count = count_noun(row.n, *protocol.item_nouns)
        table_rows.append(
            TableRow(
                result=row, name=f"{protocol_title(row)} {row.metric}", item_count=item_count, cells=cells
            )
        )
    explanations = {protocol_title(row): find_protocol(row).explain(row) for row in rows}
    return DatasetTable(
        name=rows[0].dataset,
        description=_describe_dataset(dataset_key, columns),
        rows=table_rows,
        explanations=list(explanations.items()),
    )


def _sort_key(row: ResultRow) -> tuple[int, str]:
    return (
        _PROTOCOL_ORDER.index(row.protocol) if row.protocol in _PROTOCOL_ORDER else len(_PROTOCOL_ORDER),
        row.protocol,
    )


def _build_cell(
    row: ResultRow, entry: ReportEntry, differences: dict[Any, Difference | None] | None
) -> ResultCell:
    """Return a cell; `differences` from the baseline are None for the baseline itself."""
    result = next((candidate for candidate in reversed(entry.rows) if candidate.key == row.key), None)
    if result is None:
        return ResultCell(estimate=None, note="not evaluated")
    if differences is None:
        return ResultCell(estimate=result.estimate, note="baseline")
    difference = differences.get(row.key)
    if difference is None:
        note = "not tested: different items or settings" if row.key in differences else ""
        return ResultCell(estimate=result.estimate, note=note)
    return ResultCell(estimate=result.estimate, difference=BaselineDifference(stats=difference))


def _describe_dataset(dataset_key: str, columns: Sequence[ReportEntry]) -> list[str]:
    """Return the size of a dataset, its classes without training images, and the skipped images."""
    entry_results = [
        (entry, result)
        for entry in columns
        for result in entry.results
        if result["dataset"]["key"] == dataset_key
    ]
    info = entry_results[0][1]["dataset"]
    split_counts = [f"{count_noun(count, 'image')} in {split}" for split, count in info["num_images"].items()]
    size_text = (
        count_noun(info["num_classes"], "class", "classes")
        if "num_classes" in info
        else count_noun(info["num_captions"], "caption", "captions")
    )
    lines = [f"{size_text}; {join_words(split_counts)}."]
    test_only_classes = info.get("test_only_classes") or []
    if test_only_classes:
        class_names = ", ".join(test_only_classes[:8]) + (", …" if test_only_classes[8:] else "")
        lines.append(
            f"{count_noun(len(test_only_classes), 'class has', 'classes have')} no training images "
            f"({class_names}); linear probe and kNN cannot predict them."
        )
    for entry, result in entry_results:
        skipped = [f"{count:,} {reason}" for reason, count in sorted(result["dataset"]["skipped"].items())]
        if skipped:
            lines.append(f"Skipped images, {entry.name}: {', '.join(skipped)}.")
        lines += [f"{entry.name}: {message}." for message in result.get("failures", {}).values()]
    ignored = [f"{count:,} {reason}" for reason, count in sorted(info.get("ignored", {}).items())]
    if ignored:
        lines.append(f"Ignored files: {', '.join(ignored)}.")
    return lines


# The metric of the first sentence: selected by this order alone, never by its value.
_HEADLINE_METRICS = (
    ("retrieval", "recall@1"),
    ("linear", "accuracy"),
    ("linear", "mean per-class accuracy"),
    ("fewshot", "accuracy"),
    ("knn", "accuracy"),
    ("knn", "mean per-class accuracy"),
)
_IGNORED_SETTINGS = {"seed"} | {field.name for field in fields(PairConfig)}


def summary_sentences(results: ResultTables) -> list[str]:
    """Return the main result of each run against the baseline, or of the only run."""
    columns, baseline_index = results.columns, results.baseline_index
    rows = [row for table in results.tables for row in table.rows]
    challengers = [i for i, entry in enumerate(columns) if i != baseline_index and entry.run]
    if not challengers:
        row = _headline_row([row for row in rows if row.cells[baseline_index].estimate])
        return [] if row is None else [_describe_values(columns, baseline_index, row)]
    sentences = [
        f"The adaptation kept the start, because it was not better on held-out pairs: {entry.phrase} has the "
        "features of its start."
        for entry in columns
        if entry.run and entry.run.blend == 0
    ]
    for i in challengers:
        compared_rows = [row for row in rows if row.cells[i].difference]
        row = _headline_row(compared_rows)
        if row is not None and (difference := row.cells[i].difference) is not None:
            baseline = results.baseline_of(i)
            sentences.append(_describe_difference(columns[i], baseline, row, difference))
            noun = "start" if results.has_start(i) else "baseline"
            sentences.append(_summarize_differences(columns[i], compared_rows, i, noun))
    return [sentence for sentence in sentences if sentence]


def _headline_row(rows: Sequence[TableRow]) -> TableRow | None:
    by_name = {(row.result.protocol, row.result.metric): row for row in reversed(rows)}
    return next((by_name[name] for name in _HEADLINE_METRICS if name in by_name), rows[0] if rows else None)


def _metric_phrase(row: TableRow) -> str:
    """Return a metric with its meaning, such as `Linear probe accuracy on test images (...)`."""
    return f"{row.name} on test images ({find_protocol(row.result).success_phrase(row.result)})"


def _describe_values(columns: Sequence[ReportEntry], baseline_index: int, row: TableRow) -> str:
    """Return the values of the baseline and of the encoders without a run."""
    order = [baseline_index, *(i for i in range(len(columns)) if i != baseline_index)]
    values = [
        f"{cell.value} % {cell.interval} for "
        f"{f'an encoder trained on {entry.phrase}' if _is_training(entry) else entry.phrase}"
        for entry, cell in ((columns[i], row.cells[i]) for i in order)
        if cell.estimate
    ]
    return f"{_metric_phrase(row)}: {'; '.join(values)}."


def _is_training(entry: ReportEntry) -> bool:
    return entry.run is not None and not entry.run.is_adapted


def _describe_difference(
    entry: ReportEntry, baseline: ReportEntry, row: TableRow, difference: BaselineDifference
) -> str:
    stats = difference.stats
    if not difference.direction:
        return (
            f"{_metric_phrase(row)} shows no significant difference between {entry.phrase} and "
            f"{baseline.phrase}: {difference.text} percentage points, {difference.p_value_text}."
        )
    value, *interval = (abs(100 * x) for x in (stats.value, stats.low, stats.high))
    caveat = (
        f"; this is weak evidence, because the paired test is not significant ({difference.p_value_text})"
        if difference.is_uncertain
        else ""
    )
    return (
        f"{_metric_phrase(row)} is {value:.1f} percentage points "
        f"[{min(interval):.1f}, {max(interval):.1f}] {difference.direction} with {entry.phrase} than with "
        f"{baseline.phrase}{caveat}."
    )


def _summarize_differences(
    entry: ReportEntry, rows: Sequence[TableRow], column: int, baseline_noun: str
) -> str:
    """Return the number of higher and lower metrics, because the first sentence has only one metric."""
    if len(rows) < 2:
        return ""
    differences = [difference for row in rows if (difference := row.cells[column].difference)]
    directions = [difference.direction for difference in differences if not difference.is_uncertain]
    num_uncertain = len(differences) - len(directions)
    parts = [
        f"{directions.count('higher')} higher than the {baseline_noun}",
        f"{directions.count('lower')} lower",
        f"{directions.count('')} without a significant difference",
    ]
    if num_uncertain:
        parts.append(f"{num_uncertain} uncertain (interval without 0, but p ≥ {SIGNIFICANCE_LEVEL})")
    return f"Of {len(differences)} tested metrics with {entry.phrase}: {join_words(parts)}."


def caveats(results: ResultTables) -> list[str]:
    """Return the other settings in which a run differs from the baseline: they may explain a difference."""
    sentences = []
    for i, entry in enumerate(results.columns):
        baseline_run = results.baseline_of(i).run
        if entry.run is None or baseline_run is None or entry.run is baseline_run:
            continue
        config, baseline_config = (
            {**run.config, **_relevant_derived(run.derived)} for run in (entry.run, baseline_run)
        )
        changed = [
            f"{name.replace('_', ' ')} ({format_value(config.get(name))}, not "
            f"{format_value(baseline_config.get(name))})"
            for name in sorted(config.keys() | baseline_config.keys())
            if config.get(name) != baseline_config.get(name) and name not in _IGNORED_SETTINGS
        ]
        if changed:
            sentences.append(
                f"Other settings of {entry.name} also differ from the baseline and may explain differences "
                f"in the results: {join_words(changed)}."
            )
    return sentences


def _relevant_derived(derived: dict[str, Any]) -> dict[str, Any]:
    return {name: derived[name] for name in ("augmentation", "steps", "precision") if name in derived}
