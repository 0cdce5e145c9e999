"""What was measured, as tables and in words: every figure with its interval, every run against a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from likewise.evaluation.compare import Row, compare
from likewise.evaluation.statistics import Difference, Estimate
from likewise.report.figures import chance, counted, listed, percent, points
from likewise.report.protocols import protocol
from likewise.report.sources import Entry

LEVEL = 0.05
_ORDER = ("retrieval", "linear", "fewshot", "knn")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A paired difference from the baseline, in words and whether its interval excludes zero."""

    told: Difference

    @property
    def text(self) -> str:
        """The difference with its interval and p-value."""
        told = self.told
        return f"{points(told.value)} [{points(told.low)}, {points(told.high)}]"

    @property
    def p_text(self) -> str:
        """The p-value."""
        return chance(self.told.p_value)

    @property
    def direction(self) -> str:
        """`higher` or `lower` where the interval excludes zero, else nothing."""
        if self.told.low > 0:
            return "higher"
        return "lower" if self.told.high < 0 else ""

    @property
    def doubtful(self) -> bool:
        """Whether the interval excludes zero but the test of no difference does not agree."""
        return bool(self.direction) and self.told.p_value >= LEVEL

    @property
    def mark(self) -> str:
        """A triangle up or down, hollow where doubtful."""
        marks = {"higher": "△▲", "lower": "▽▼"}.get(self.direction)
        return marks[not self.doubtful] if marks else ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One encoder's figure; `note` says why it has no difference although it is not the baseline."""

    estimate: Estimate | None
    change: Change | None = None
    note: str = ""

    @property
    def value(self) -> str:
        """The value in percent."""
        return percent(self.estimate.value) if self.estimate else ""

    @property
    def interval(self) -> str:
        """The interval in percent."""
        return f"[{percent(self.estimate.low)}, {percent(self.estimate.high)}]" if self.estimate else ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of all encoders."""

    row: Row
    name: str
    items: str
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class SetTable:
    """Everything measured on one labelled set."""

    name: str
    about: list[str]
    lines: list[Line]
    explained: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The tables of all sets and what they come to."""

    columns: list[Entry]
    baseline: int
    tables: list[SetTable]


def tabulate(entries: Sequence[Entry]) -> Results | None:
    """Line up what was measured; None where nothing was."""
    columns = [entry for entry in entries if entry.rows]
    if not columns:
        return None
    baseline = _baseline(columns)
    first = columns[baseline]
    changes = [
        {} if entry is first else {c.row.name: c.differences[0] for c in compare([first.rows, entry.rows])}
        for entry in columns
    ]
    tables = [_table(key, columns, baseline, changes) for key in dict.fromkeys(_keys(columns))]
    return Results(columns=columns, baseline=baseline, tables=tables)


def _baseline(columns: Sequence[Entry]) -> int:
    """Return the place of the first run with `self` pairs, or 0."""
    own = (i for i, entry in enumerate(columns) if entry.trained and entry.trained.pairs == "self")
    return next(own, 0)


def _keys(columns: Sequence[Entry]) -> list[str]:
    return [row.set_key for entry in columns for row in entry.rows]


def _table(
    key: str,
    columns: Sequence[Entry],
    baseline: int,
    changes: Sequence[dict[Any, Difference | None]],
) -> SetTable:
    found = {row.name: row for entry in reversed(columns) for row in entry.rows if row.set_key == key}
    rows = sorted(found.values(), key=_order)
    lines = []
    for row in rows:
        how = protocol(row)
        cells = [_cell(row, entry, i == baseline, changes[i]) for i, entry in enumerate(columns)]
        items = counted(row.n, *how.items)
        lines.append(Line(row=row, name=how.metric(row), items=items, cells=cells))
    explained = {protocol(row).title: protocol(row).explain(row) for row in rows}
    return SetTable(
        name=rows[0].set, about=_about(key, columns), lines=lines, explained=list(explained.items())
    )


def _order(row: Row) -> tuple[int, str]:
    return (_ORDER.index(row.protocol) if row.protocol in _ORDER else len(_ORDER), row.protocol)


def _cell(row: Row, entry: Entry, is_baseline: bool, changes: dict[Any, Difference | None]) -> Cell:
    own = next((other for other in reversed(entry.rows) if other.name == row.name), None)
    if own is None:
        return Cell(estimate=None, note="not measured")
    if is_baseline:
        return Cell(estimate=own.estimate, note="baseline")
    change = changes.get(row.name)
    if change is None:
        why = "no difference given: other items or settings" if row.name in changes else ""
        return Cell(estimate=own.estimate, note=why)
    return Cell(estimate=own.estimate, change=Change(told=change))


def _about(key: str, columns: Sequence[Entry]) -> list[str]:
    """Say how large a set is, what was skipped, and which classes nobody can name."""
    results = [(entry, r) for entry in columns for r in entry.results if r["set"]["key"] == key]
    told = results[0][1]["set"]
    images = [f"{counted(count, 'image')} to {split}" for split, count in told["images"].items()]
    kind = (
        counted(told["classes"], "class", "classes")
        if "classes" in told
        else counted(told["captions"], "caption", "captions")
    )
    lines = [f"{kind}; {listed(images)}."]
    unseen = told.get("classes_only_in_test") or []
    if unseen:
        named = ", ".join(unseen[:8]) + (", …" if unseen[8:] else "")
        lines.append(
            f"In test only: {counted(len(unseen), 'class', 'classes')} ({named}), which linear and kNN can "
            "never name."
        )
    for entry, result in results:
        skipped = [f"{count:,} {reason}" for reason, count in sorted(result["set"]["skipped"].items())]
        if skipped:
            lines.append(f"Skipped with {entry.name}: {', '.join(skipped)}.")
    return lines
