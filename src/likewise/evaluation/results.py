"""Set results side by side: the same set, the same items, two encoders."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from likewise.artifacts import read_array, read_json
from likewise.errors import ArtifactError, InputError
from likewise.evaluation.evaluate import RESULTS
from likewise.evaluation.statistics import Difference, Estimate, drawn_difference, paired_difference


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured figure of one encoder."""

    set: str
    set_key: str
    encoder_key: str
    operations: int | None
    protocol: str
    metric: str
    estimate: Estimate
    n: int
    items: np.ndarray
    groups: np.ndarray | None
    paired: str
    settings: dict[str, Any]
    details: dict[str, Any]

    @property
    def name(self) -> tuple[str, str, str, str]:
        """What makes two rows comparable: set, protocol and its settings, and metric."""
        return (self.set_key, self.protocol, json.dumps(self.settings, sort_keys=True), self.metric)


def read_results(folder: str | Path) -> list[Row]:
    """Read everything measured under a run or an evaluation folder.

    Raises:
        ArtifactError: where nothing was measured, or more than one encoder.
    """
    base = Path(folder)
    files = sorted(base.glob(f"evaluation/*/{RESULTS}")) or sorted(base.glob(f"*/{RESULTS}"))
    if not files:
        raise ArtifactError(f"{base} holds no evaluation; run: likewise evaluate {base} --on SET")
    rows = [row for file in files for row in _rows(file)]
    if len({row.encoder_key for row in rows}) > 1:
        raise ArtifactError(
            f"{base} holds results of several weights or input sizes; "
            "measure each into a folder of its own (--out)"
        )
    return rows


def _rows(file: Path) -> list[Row]:
    result = read_json(file)
    return [
        Row(
            set=result["set"]["name"],
            set_key=result["set"]["key"],
            encoder_key=f"{result['encoder']['weights']} {result['encoder']['transform']}",
            operations=result["encoder"]["operations"],
            protocol=protocol,
            metric=score["metric"],
            estimate=Estimate(value=score["value"], low=score["low"], high=score["high"]),
            n=score["n"],
            items=read_array(file.parent / score["items"]),
            groups=None if score["groups"] is None else read_array(file.parent / score["groups"]),
            paired=score["paired"],
            settings=told["settings"],
            details=score["details"],
        )
        for protocol, told in result["protocols"].items()
        for score in told["scores"]
    ]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of several encoders, each but the first against the first, on the same items."""

    row: Row
    estimates: list[Estimate]
    differences: list[Difference | None]

    def told(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "set": self.row.set,
            "protocol": self.row.protocol,
            "metric": self.row.metric,
            "n": self.row.n,
            "values": [asdict(e) for e in self.estimates],
            "differences": [None if d is None else asdict(d) for d in self.differences],
        }


def compare(results: Sequence[Sequence[Row]]) -> list[Comparison]:
    """Line up what all encoders were measured on, and test each against the first on the same items.

    The difference is None where the items are others (another number of readable images), and for means over
    classes, whose items do not add up to them.
    """
    tables = [{row.name: row for row in rows} for rows in results]
    shared = [row for row in results[0] if all(row.name in table for table in tables[1:])]
    comparisons = []
    for first in shared:
        rows = [table[first.name] for table in tables]
        comparisons.append(
            Comparison(
                row=first,
                estimates=[row.estimate for row in rows],
                differences=[item_difference(first, other) for other in rows[1:]],
            )
        )
    return comparisons


def item_difference(first: Row, other: Row) -> Difference | None:
    """Test two encoders on the same items or draws; None where these are others, or do not give the value."""
    if first.paired == "no" or first.n != other.n or len(first.items) != len(other.items):
        return None
    if first.paired == "draws":
        change = other.estimate.value - first.estimate.value
        return drawn_difference(change, np.asarray(other.items) - np.asarray(first.items))
    return paired_difference(np.asarray(first.items), np.asarray(other.items), groups=first.groups)


LEVEL = 0.05
RowName = tuple[str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An encoder, or several that differ in nothing but their seed.

    Attributes:
        name: What to call it.
        seeds: What was measured of each, by what makes rows comparable.
    """

    name: str
    seeds: tuple[dict[RowName, Row], ...]

    def row(self, name: RowName) -> Row | None:
        """Return the first seed's row, if all seeds have one."""
        return self.seeds[0][name] if all(name in seed for seed in self.seeds) else None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure of an encoder, and how it differs from the first encoder's.

    Attributes:
        estimate: The value; over several seeds, their mean with the interval of Student's t.
        difference: From the first encoder; None for itself and where it cannot be tested.
        significant: Whether the difference holds among all tests of the table (Holm 1979).
        rank: Among all encoders that have this figure, 1 for the largest; None where one lacks it.
    """

    estimate: Estimate
    difference: Difference | None = None
    significant: bool = False
    rank: float | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure on one set, for each encoder; None where it was not measured."""

    set: str
    protocol: str
    metric: str
    n: int
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True, kw_only=True)
class Average:
    """A metric over all sets that every encoder was measured on.

    Attributes:
        protocol: The protocol.
        metric: Its metric.
        sets: How many sets.
        values: The mean over sets for each encoder.
        ranks: The mean rank over sets for each encoder.
        p_value: Of Friedman's test that all rank alike; None with fewer than three encoders or sets.
    """

    protocol: str
    metric: str
    sets: int
    values: tuple[float, ...]
    ranks: tuple[float, ...]
    p_value: float | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """All figures of some encoders."""

    names: tuple[str, ...]
    lines: tuple[Line, ...]
    averages: tuple[Average, ...]


def read_entries(asked: Sequence[str]) -> list[Entry]:
    """Read what was measured of encoders.

    Args:
        asked: Runs or evaluation folders; commas between those that differ only in their seed; `NAME=`
            before them to call them so.

    Raises:
        ArtifactError: where nothing was measured.
        InputError: where two have one name.
    """
    entries = []
    for each in asked:
        given, _, folders = each.rpartition("=")
        paths = [Path(folder) for folder in folders.split(",") if folder]
        found = tuple({row.name: row for row in read_results(path)} for path in paths)
        entries.append(Entry(name=given or _called(paths), seeds=found))
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"two encoders are called {twice[0]!r}; give them names: NAME={twice[0]}")
    return entries


def _called(paths: Sequence[Path]) -> str:
    name = paths[0].resolve().name
    return name if len(paths) == 1 else f"{name} and {len(paths) - 1} more"


def tabulate(entries: Sequence[Entry]) -> Table:
    """Lay out all figures, test each encoder against the first, and rank them.

    A difference is tested on the same items (see `paired_difference`); where both encoders have several
    seeds, by Welch's t-test over these, which also counts what another seed would change. Of all tests of
    the table together, the chance that any is marked without cause is at most 5 % (Holm 1979).
    """
    names = list(dict.fromkeys(name for entry in entries for name in entry.seeds[0] if entry.row(name)))
    plain = [_line(entries, name) for name in names]
    tested = [
        (i, j, cell.difference.p_value)
        for i, line in enumerate(plain)
        for j, cell in enumerate(line.cells)
        if cell is not None and cell.difference is not None
    ]
    sure = holm([p for _, _, p in tested], LEVEL)
    marked = {(i, j) for (i, j, _), holds in zip(tested, sure, strict=True) if holds}
    lines = tuple(_finish(line, {j for i, j in marked if i == row}) for row, line in enumerate(plain))
    return Table(names=tuple(entry.name for entry in entries), lines=lines, averages=tuple(_averages(lines)))


def _line(entries: Sequence[Entry], name: RowName) -> Line:
    found = [None if entry.row(name) is None else [seed[name] for seed in entry.seeds] for entry in entries]
    first = next(rows[0] for rows in found if rows is not None)
    cells = tuple(
        None
        if rows is None
        else Cell(estimate=_estimate(rows), difference=None if place == 0 else _difference(found[0], rows))
        for place, rows in enumerate(found)
    )
    return Line(set=first.set, protocol=first.protocol, metric=first.metric, n=first.n, cells=cells)


def _estimate(rows: Sequence[Row]) -> Estimate:
    if len(rows) == 1:
        return rows[0].estimate
    from scipy.stats import t

    values = np.array([row.estimate.value for row in rows])
    margin = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(value=mean, low=mean - float(margin), high=mean + float(margin))


def _difference(first: Sequence[Row] | None, other: Sequence[Row]) -> Difference | None:
    if first is None:
        return None
    if len(first) == len(other) == 1:
        return item_difference(first[0], other[0])
    if min(len(first), len(other)) < 2:
        return None
    return welch(*(np.array([row.estimate.value for row in rows]) for rows in (first, other)))


def welch(a: Float[np.ndarray, " s"], b: Float[np.ndarray, " t"]) -> Difference:
    """Estimate mean(b) - mean(a) of independent values, and test that it is zero (Welch 1947)."""
    from scipy.stats import ttest_ind

    change = float(b.mean() - a.mean())
    if not (a.std() or b.std()):
        return Difference(value=change, low=change, high=change, p_value=float(change == 0))
    found = ttest_ind(b, a, equal_var=False)
    interval = found.confidence_interval(0.95)
    return Difference(
        value=change, low=float(interval.low), high=float(interval.high), p_value=float(found.pvalue)
    )


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Say which of several tests hold together: Holm's step-down procedure (1979)."""
    held = [False] * len(p_values)
    for passed, place in enumerate(np.argsort(p_values, kind="stable").tolist()):
        if p_values[place] > level / (len(p_values) - passed):
            break
        held[place] = True
    return held


def _finish(line: Line, marked: set[int]) -> Line:
    """Add marks and ranks to a line."""
    from scipy.stats import rankdata

    values = [cell.estimate.value for cell in line.cells if cell is not None]
    ranks = rankdata([-value for value in values]) if len(values) == len(line.cells) else None
    cells = tuple(
        None
        if cell is None
        else Cell(
            estimate=cell.estimate,
            difference=cell.difference,
            significant=place in marked,
            rank=None if ranks is None else float(ranks[place]),
        )
        for place, cell in enumerate(line.cells)
    )
    return Line(set=line.set, protocol=line.protocol, metric=line.metric, n=line.n, cells=cells)


def _averages(lines: Sequence[Line]) -> list[Average]:
    from scipy.stats import friedmanchisquare

    groups: dict[tuple[str, str], list[list[Cell]]] = {}
    for line in lines:
        cells = [cell for cell in line.cells if cell is not None]
        if len(cells) == len(line.cells):
            groups.setdefault((line.protocol, line.metric), []).append(cells)
    found = []
    for (protocol, metric), rows in groups.items():
        values = np.array([[cell.estimate.value for cell in row] for row in rows])
        ranks = np.array([[cell.rank for cell in row] for row in rows], np.float64)
        enough = len(rows) >= 3 and values.shape[1] >= 3
        if len(rows) > 1:
            found.append(
                Average(
                    protocol=protocol,
                    metric=metric,
                    sets=len(rows),
                    values=tuple(values.mean(axis=0).tolist()),
                    ranks=tuple(ranks.mean(axis=0).tolist()),
                    p_value=float(friedmanchisquare(*values.T).pvalue) if enough else None,
                )
            )
    return found
