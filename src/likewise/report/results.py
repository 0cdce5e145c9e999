"""What was measured, as tables and in words: every figure with its interval, every run against a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from likewise.evaluation.protocols import PROTOCOLS
from likewise.evaluation.protocols.base import EvalContext, Protocol, Score
from likewise.evaluation.results import ResultRow, compare_metrics
from likewise.evaluation.statistics import Difference, Estimate
from likewise.pairs.config import PairConfig
from likewise.report.format import (
    count_noun,
    format_p_value,
    format_percent,
    format_percentage_points,
    format_value,
    join_words,
)
from likewise.report.load import ReportEntry


class UnknownProtocol(Protocol):
    """Fallback for results of a protocol that this version does not have."""

    name = title = "unknown"
    summary = ""
    item_nouns = ("item", "items")

    def run(self, context: EvalContext) -> list[Score]:
        """Raise, because only results exist."""
        raise NotImplementedError

    @classmethod
    def explain(cls, row: ResultRow) -> str:
        """Return nothing."""
        return ""


def find_protocol(row: ResultRow) -> type[Protocol]:
    """Return the protocol of a row."""
    return PROTOCOLS.get(row.protocol, UnknownProtocol)


def protocol_title(row: ResultRow) -> str:
    """Return the title of a row's protocol; that of an unknown one is its name."""
    return PROTOCOLS[row.protocol].title if row.protocol in PROTOCOLS else row.protocol


SIGNIFICANCE_LEVEL = 0.05
_PROTOCOL_ORDER = ("retrieval", "linear", "fewshot", "knn")


@dataclass(frozen=True, kw_only=True)
class BaselineDifference:
    """A paired difference from the baseline, in words and whether its interval excludes zero."""

    stats: Difference

    @property
    def text(self) -> str:
        """The difference with its interval and p-value."""
        stats = self.stats
        value, low, high = (format_percentage_points(x) for x in (stats.value, stats.low, stats.high))
        return f"{value} [{low}, {high}]"

    @property
    def p_value_text(self) -> str:
        """The p-value."""
        return format_p_value(self.stats.p_value)

    @property
    def direction(self) -> str:
        """`higher` or `lower` where the interval excludes zero, else nothing."""
        if self.stats.low > 0:
            return "higher"
        return "lower" if self.stats.high < 0 else ""

    @property
    def is_doubtful(self) -> bool:
        """Whether the interval excludes zero but the test of no difference does not agree."""
        return bool(self.direction) and self.stats.p_value >= SIGNIFICANCE_LEVEL

    @property
    def mark(self) -> str:
        """A triangle up or down, hollow where doubtful."""
        marks = {"higher": "△▲", "lower": "▽▼"}.get(self.direction)
        return marks[not self.is_doubtful] if marks else ""


@dataclass(frozen=True, kw_only=True)
class ResultCell:
    """One encoder's figure; `note` says why it has no difference although it is not the baseline."""

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
    """One figure of all encoders."""

    result: ResultRow
    name: str
    item_count: str
    cells: list[ResultCell]


@dataclass(frozen=True, kw_only=True)
class DatasetTable:
    """Everything measured on one labelled set."""

    name: str
    description: list[str]
    rows: list[TableRow]
    explanations: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class ResultTables:
    """The tables of all sets and what they come to."""

    columns: list[ReportEntry]
    baseline_index: int
    tables: list[DatasetTable]


def build_result_tables(entries: Sequence[ReportEntry]) -> ResultTables | None:
    """Line up what was measured; None where nothing was."""
    columns = [entry for entry in entries if entry.rows]
    if not columns:
        return None
    baseline_index = _baseline_index(columns)
    baseline_entry = columns[baseline_index]
    differences = [
        {}
        if entry is baseline_entry
        else {
            comparison.baseline.key: comparison.differences[0]
            for comparison in compare_metrics([baseline_entry.rows, entry.rows])
        }
        for entry in columns
    ]
    tables = [
        _build_table(key, columns, baseline_index, differences)
        for key in dict.fromkeys(_dataset_keys(columns))
    ]
    return ResultTables(columns=columns, baseline_index=baseline_index, tables=tables)


def _baseline_index(columns: Sequence[ReportEntry]) -> int:
    """Return the place of the first run with `self` pairs, or 0."""
    self_pair_indices = (
        i for i, entry in enumerate(columns) if entry.run and entry.run.pair_source == "self"
    )
    return next(self_pair_indices, 0)


def _dataset_keys(columns: Sequence[ReportEntry]) -> list[str]:
    return [row.dataset_key for entry in columns for row in entry.rows]


def _build_table(
    dataset_key: str,
    columns: Sequence[ReportEntry],
    baseline_index: int,
    differences: Sequence[dict[Any, Difference | None]],
) -> DatasetTable:
    rows_by_name = {
        row.key: row for entry in reversed(columns) for row in entry.rows if row.dataset_key == dataset_key
    }
    rows = sorted(rows_by_name.values(), key=_sort_key)
    table_rows = []
    for row in rows:
        protocol = find_protocol(row)
        cells = [
            _build_cell(row, entry, i == baseline_index, differences[i]) for i, entry in enumerate(columns)
        ]
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
    row: ResultRow, entry: ReportEntry, is_baseline: bool, differences: dict[Any, Difference | None]
) -> ResultCell:
    result = next((candidate for candidate in reversed(entry.rows) if candidate.key == row.key), None)
    if result is None:
        return ResultCell(estimate=None, note="not measured")
    if is_baseline:
        return ResultCell(estimate=result.estimate, note="baseline")
    difference = differences.get(row.key)
    if difference is None:
        note = "no difference given: other items or settings" if row.key in differences else ""
        return ResultCell(estimate=result.estimate, note=note)
    return ResultCell(estimate=result.estimate, difference=BaselineDifference(stats=difference))


def _describe_dataset(dataset_key: str, columns: Sequence[ReportEntry]) -> list[str]:
    """Say how large a set is, what was skipped, and which classes nobody can name."""
    entry_results = [
        (entry, result)
        for entry in columns
        for result in entry.results
        if result["dataset"]["key"] == dataset_key
    ]
    info = entry_results[0][1]["dataset"]
    split_counts = [f"{count_noun(count, 'image')} to {split}" for split, count in info["num_images"].items()]
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
            f"In test only: {count_noun(len(test_only_classes), 'class', 'classes')} "
            f"({class_names}), which linear and kNN can "
            "never name."
        )
    for entry, result in entry_results:
        skipped = [f"{count:,} {reason}" for reason, count in sorted(result["dataset"]["skipped"].items())]
        if skipped:
            lines.append(f"Skipped with {entry.name}: {', '.join(skipped)}.")
    return lines


# The figure that the first sentence is about is chosen by this order alone, never by how it came out.
_HEADLINE_METRICS = (
    ("retrieval", "recall@1"),
    ("linear", "accuracy"),
    ("linear", "mean per-class accuracy"),
    ("fewshot", "accuracy"),
    ("knn", "accuracy"),
    ("knn", "mean per-class accuracy"),
)
_SETTING_NAMES = {"augmentation": "the augmentation", "precision": "precision"}
_IGNORED_SETTINGS = {"seed"} | {field.name for field in fields(PairConfig)}


def summary_sentences(results: ResultTables) -> list[str]:
    """Return the result in words: of each run against the baseline, or of the only run."""
    columns, baseline_index = results.columns, results.baseline_index
    rows = [row for table in results.tables for row in table.rows]
    challengers = [i for i, entry in enumerate(columns) if i != baseline_index and entry.run]
    if not challengers:
        row = _headline_row([row for row in rows if row.cells[baseline_index].estimate])
        return [] if row is None else [_describe_single_run(columns, baseline_index, row)]
    sentences = []
    for i in challengers:
        compared_rows = [row for row in rows if row.cells[i].difference]
        row = _headline_row(compared_rows)
        if row is not None:
            sentences.append(
                _describe_difference(columns[i], columns[baseline_index], row, row.cells[i].difference)
            )
            sentences.append(_summarize_differences(columns[i], compared_rows, i))
    return [sentence for sentence in sentences if sentence]


def _headline_row(rows: Sequence[TableRow]) -> TableRow | None:
    by_name = {(row.result.protocol, row.result.metric): row for row in reversed(rows)}
    return next((by_name[name] for name in _HEADLINE_METRICS if name in by_name), rows[0] if rows else None)


def _describe_single_run(columns: Sequence[ReportEntry], baseline_index: int, row: TableRow) -> str:
    """Tell of the only run, and beside it of encoders that were only evaluated."""
    entry, cell = columns[baseline_index], row.cells[baseline_index]
    subject = f"an encoder trained on {entry.phrase}" if entry.run else entry.phrase
    comparisons = [
        f"; {other_entry.phrase} {other_cell.value} % {other_cell.interval}"
        for i, (other_entry, other_cell) in enumerate(zip(columns, row.cells, strict=True))
        if i != baseline_index and other_cell.estimate
    ]
    phrase = find_protocol(row.result).success_phrase(row.result)
    return (
        f"On held-out images, {subject} can {phrase} {cell.value} % of the time "
        f"{cell.interval}{''.join(comparisons)}."
    )


def _describe_difference(
    entry: ReportEntry, baseline: ReportEntry, row: TableRow, difference: BaselineDifference | None
) -> str:
    if difference is None:
        return ""
    phrase, stats = find_protocol(row.result).success_phrase(row.result), difference.stats
    if not difference.direction:
        return (
            f"On held-out images, {entry.phrase} and {baseline.phrase} {phrase} about equally often: "
            f"{format_percentage_points(stats.value)} percentage points "
            f"[{format_percentage_points(stats.low)}, {format_percentage_points(stats.high)}] "
            "is no difference that this test set can show."
        )
    magnitudes = [abs(100 * x) for x in (stats.value, stats.low, stats.high)]
    direction = "more" if difference.direction == "higher" else "less"
    caveat = (
        f"; the paired test is less sure ({difference.p_value_text}), so take it as a hint"
        if difference.is_doubtful
        else ""
    )
    return (
        f"On held-out images, {entry.phrase} {phrase} {magnitudes[0]:.1f} percentage points "
        f"[{min(magnitudes[1:]):.1f}, {max(magnitudes[1:]):.1f}] {direction} often than "
        f"{baseline.phrase}{caveat}."
    )


def _summarize_differences(entry: ReportEntry, rows: Sequence[TableRow], column: int) -> str:
    """Say how all figures came out, so that the first one is not taken for the whole."""
    if len(rows) < 2:
        return ""
    differences = [difference for row in rows if (difference := row.cells[column].difference)]
    directions = [difference.direction for difference in differences if not difference.is_doubtful]
    num_higher, num_lower, num_equal, num_doubtful = (
        directions.count("higher"),
        directions.count("lower"),
        directions.count(""),
        len(differences) - len(directions),
    )
    parts = [f"{num_higher} higher", f"{num_lower} lower", f"{num_equal} not to be told from the baseline"]
    if num_doubtful:
        parts.append(f"{num_doubtful} in doubt (interval without 0, but p above {SIGNIFICANCE_LEVEL})")
    return f"All {len(differences)} figures for {entry.phrase}: {join_words(parts)}."


def caveats(results: ResultTables) -> list[str]:
    """Name what else differs between a run and the baseline: it may explain a difference too."""
    columns, baseline_run = results.columns, results.columns[results.baseline_index].run
    if baseline_run is None:
        return []
    sentences = []
    for entry in columns:
        if entry.run is None or entry.run is baseline_run:
            continue
        config, baseline_config = (
            {**run.config, **_relevant_derived(run.derived)} for run in (entry.run, baseline_run)
        )
        changed = [
            f"{_setting_name(name)} ({format_value(config.get(name))}, not "
            f"{format_value(baseline_config.get(name))})"
            for name in sorted(config.keys() | baseline_config.keys())
            if config.get(name) != baseline_config.get(name) and name not in _IGNORED_SETTINGS
        ]
        if changed:
            sentences.append(
                f"Besides the pairs, {entry.name} differs from the baseline in {join_words(changed)}."
            )
    return sentences


def _relevant_derived(derived: dict[str, Any]) -> dict[str, Any]:
    return {name: derived[name] for name in ("augmentation", "steps", "precision") if name in derived}


def _setting_name(name: str) -> str:
    return _SETTING_NAMES.get(name, name.replace("_", " "))
