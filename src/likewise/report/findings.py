"""What the tables come to, in sentences: by the figures alone, and honest where they show nothing."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from likewise.neighbors.rules import PairRule
from likewise.report.figures import listed, plain, points
from likewise.report.protocols import protocol
from likewise.report.results import LEVEL, Change, Line, Results
from likewise.report.sources import Entry

# The figure that the first sentence is about is chosen by this order alone, never by how it came out.
_FIRST = (
    ("retrieval", "recall@1"),
    ("linear", "accuracy"),
    ("linear", "mean per-class accuracy"),
    ("fewshot", "accuracy"),
    ("knn", "accuracy"),
    ("knn", "mean per-class accuracy"),
)
_NAMES = {"views": "the recipe of views", "precision": "precision"}
_UNCOMPARED = {"seed"} | {field.name for field in fields(PairRule)}


def sentences(results: Results) -> list[str]:
    """Return the result in words: of each run against the baseline, or of the only run."""
    columns, baseline = results.columns, results.baseline
    lines = [line for table in results.tables for line in table.lines]
    challengers = [i for i, entry in enumerate(columns) if i != baseline and entry.trained]
    if not challengers:
        line = _first_line([line for line in lines if line.cells[baseline].estimate])
        return [] if line is None else [_alone(columns, baseline, line)]
    told = []
    for i in challengers:
        compared = [line for line in lines if line.cells[i].change]
        line = _first_line(compared)
        if line is not None:
            told.append(_versus(columns[i], columns[baseline], line, line.cells[i].change))
            told.append(_tally(columns[i], compared, i))
    return [sentence for sentence in told if sentence]


def _first_line(lines: Sequence[Line]) -> Line | None:
    by_name = {(line.row.protocol, line.row.metric): line for line in reversed(lines)}
    return next((by_name[name] for name in _FIRST if name in by_name), lines[0] if lines else None)


def _alone(columns: Sequence[Entry], baseline: int, line: Line) -> str:
    """Tell of the only run, and beside it of encoders that were only evaluated."""
    entry, cell = columns[baseline], line.cells[baseline]
    whom = f"an encoder trained on {entry.phrase}" if entry.trained else entry.phrase
    others = [
        f"; {other.phrase} {there.value} % {there.interval}"
        for i, (other, there) in enumerate(zip(columns, line.cells, strict=True))
        if i != baseline and there.estimate
    ]
    doing = protocol(line.row).doing(line.row)
    return (
        f"On held-out images, {whom} can {doing} {cell.value} % of the time {cell.interval}{''.join(others)}."
    )


def _versus(entry: Entry, baseline: Entry, line: Line, change: Change | None) -> str:
    if change is None:
        return ""
    doing, told = protocol(line.row).doing(line.row), change.told
    if not change.direction:
        return (
            f"On held-out images, {entry.phrase} and {baseline.phrase} {doing} about equally often: "
            f"{points(told.value)} percentage points [{points(told.low)}, {points(told.high)}] "
            "is no difference that this test set can show."
        )
    sizes = [abs(100 * size) for size in (told.value, told.low, told.high)]
    more = "more" if change.direction == "higher" else "less"
    doubt = (
        f"; the paired test is less sure ({change.p_text}), so take it as a hint" if change.doubtful else ""
    )
    return (
        f"On held-out images, {entry.phrase} {doing} {sizes[0]:.1f} percentage points "
        f"[{min(sizes[1:]):.1f}, {max(sizes[1:]):.1f}] {more} often than {baseline.phrase}{doubt}."
    )


def _tally(entry: Entry, lines: Sequence[Line], column: int) -> str:
    """Say how all figures came out, so that the first one is not taken for the whole."""
    if len(lines) < 2:
        return ""
    found = [change for line in lines if (change := line.cells[column].change)]
    sure = [change.direction for change in found if not change.doubtful]
    up, down, none, hints = sure.count("higher"), sure.count("lower"), sure.count(""), len(found) - len(sure)
    parts = [f"{up} higher", f"{down} lower", f"{none} not to be told from the baseline"]
    if hints:
        parts.append(f"{hints} in doubt (interval without 0, but p above {LEVEL})")
    return f"All {len(found)} figures for {entry.phrase}: {listed(parts)}."


def caveats(results: Results) -> list[str]:
    """Name what else differs between a run and the baseline: it may explain a difference too."""
    columns, first = results.columns, results.columns[results.baseline].trained
    if first is None:
        return []
    told = []
    for entry in columns:
        if entry.trained is None or entry.trained is first:
            continue
        ours, theirs = ({**t.settings, **_telling(t.derived)} for t in (entry.trained, first))
        other = [
            f"{_called(name)} ({plain(ours.get(name))}, not {plain(theirs.get(name))})"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name) and name not in _UNCOMPARED
        ]
        if other:
            told.append(f"Besides the pairs, {entry.name} differs from the baseline in {listed(other)}.")
    return told


def _telling(derived: dict[str, Any]) -> dict[str, Any]:
    return {name: derived[name] for name in ("views", "steps", "precision") if name in derived}


def _called(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))
