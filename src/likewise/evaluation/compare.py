"""Set results side by side: the same set, the same items, two encoders."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import read_array, read_json
from likewise.errors import ArtifactError
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
