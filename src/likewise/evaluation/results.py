"""Set results side by side: the same set, the same items, two encoders."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from likewise.artifacts import mmap_array, read_json
from likewise.errors import ArtifactError, InvalidInputError
from likewise.evaluation.evaluate import RESULTS_FILE
from likewise.evaluation.statistics import Difference, Estimate, bootstrap_difference, paired_difference


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One measured figure of one encoder."""

    dataset: str
    dataset_key: str
    encoder_key: str
    flops: int | None
    protocol: str
    metric: str
    estimate: Estimate
    n: int
    per_item: np.ndarray
    groups: np.ndarray | None
    pairing: str
    config: dict[str, Any]
    details: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes two rows comparable: set, protocol and its settings, and metric."""
        return (self.dataset_key, self.protocol, json.dumps(self.config, sort_keys=True), self.metric)


def read_results(path: str | Path) -> list[ResultRow]:
    """Read everything measured under a run or an evaluation folder.

    Raises:
        ArtifactError: where nothing was measured, or more than one encoder.
    """
    path = Path(path)
    result_files = sorted(path.glob(f"evaluation/*/{RESULTS_FILE}")) or sorted(path.glob(f"*/{RESULTS_FILE}"))
    if not result_files:
        raise ArtifactError(f"{path} holds no evaluation; run: likewise evaluate {path} --on SET")
    rows = [row for result_file in result_files for row in _read_rows(result_file)]
    if len({row.encoder_key for row in rows}) > 1:
        raise ArtifactError(
            f"{path} holds results of several weights or input sizes; "
            "measure each into a folder of its own (--out)"
        )
    return rows


def _read_rows(path: Path) -> list[ResultRow]:
    result = read_json(path)
    return [
        ResultRow(
            dataset=result["dataset"]["name"],
            dataset_key=result["dataset"]["key"],
            encoder_key=f"{result['encoder']['fingerprint']} {result['encoder']['transform']}",
            flops=result["encoder"]["flops"],
            protocol=protocol,
            metric=score["metric"],
            estimate=Estimate(value=score["value"], low=score["low"], high=score["high"]),
            n=score["n"],
            per_item=mmap_array(path.parent / score["per_item"]),
            groups=None if score["groups"] is None else mmap_array(path.parent / score["groups"]),
            pairing=score["pairing"],
            config=protocol_result["config"],
            details=score["details"],
        )
        for protocol, protocol_result in result["protocols"].items()
        for score in protocol_result["scores"]
    ]


@dataclass(frozen=True, kw_only=True)
class MetricComparison:
    """One figure of several encoders, each but the first against the first, on the same items."""

    baseline: ResultRow
    estimates: list[Estimate]
    differences: list[Difference | None]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "dataset": self.baseline.dataset,
            "protocol": self.baseline.protocol,
            "metric": self.baseline.metric,
            "n": self.baseline.n,
            "values": [asdict(estimate) for estimate in self.estimates],
            "differences": [
                None if difference is None else asdict(difference) for difference in self.differences
            ],
        }


def compare(results: Sequence[Sequence[ResultRow]]) -> list[MetricComparison]:
    """Line up what all encoders were measured on, and test each against the first on the same items.

    The difference is None where the items are others (another number of readable images), and for means over
    classes, whose items do not add up to them.
    """
    rows_by_encoder = [{row.key: row for row in rows} for rows in results]
    shared = [
        row for row in results[0] if all(row.key in encoder_rows for encoder_rows in rows_by_encoder[1:])
    ]
    comparisons = []
    for baseline in shared:
        rows = [encoder_rows[baseline.key] for encoder_rows in rows_by_encoder]
        comparisons.append(
            MetricComparison(
                baseline=baseline,
                estimates=[row.estimate for row in rows],
                differences=[test_difference(baseline, row) for row in rows[1:]],
            )
        )
    return comparisons


def test_difference(a: ResultRow, b: ResultRow) -> Difference | None:
    """Test two encoders on the same items or draws; None where these are others, or do not give the value."""
    if a.pairing == "no" or a.n != b.n or len(a.per_item) != len(b.per_item):
        return None
    if a.pairing == "draws":
        difference = b.estimate.value - a.estimate.value
        return bootstrap_difference(difference, np.asarray(b.per_item) - np.asarray(a.per_item))
    return paired_difference(np.asarray(a.per_item), np.asarray(b.per_item), groups=a.groups)


SIGNIFICANCE_LEVEL = 0.05
RowKey = tuple[str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class EncoderResults:
    """An encoder, or several that differ in nothing but their seed.

    Attributes:
        name: What to call it.
        rows_by_seed: What was measured of each, by what makes rows comparable.
    """

    name: str
    rows_by_seed: tuple[dict[RowKey, ResultRow], ...]

    def first_row(self, key: RowKey) -> ResultRow | None:
        """Return the first seed's row, if all seeds have one."""
        return self.rows_by_seed[0][key] if all(key in rows for rows in self.rows_by_seed) else None


@dataclass(frozen=True, kw_only=True)
class ComparisonCell:
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
class ComparisonRow:
    """One figure on one set, for each encoder; None where it was not measured."""

    dataset: str
    protocol: str
    metric: str
    n: int
    cells: tuple[ComparisonCell | None, ...]


@dataclass(frozen=True, kw_only=True)
class MeanRow:
    """A metric over all sets that every encoder was measured on.

    Attributes:
        protocol: The protocol.
        metric: Its metric.
        num_datasets: How many sets.
        values: The mean over sets for each encoder.
        ranks: The mean rank over sets for each encoder.
        p_value: Of Friedman's test that all rank alike; None with fewer than three encoders or sets.
    """

    protocol: str
    metric: str
    num_datasets: int
    values: tuple[float, ...]
    ranks: tuple[float, ...]
    p_value: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All figures of some encoders."""

    encoder_names: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    mean_rows: tuple[MeanRow, ...]


def read_encoder_results(encoders: Sequence[str]) -> list[EncoderResults]:
    """Read what was measured of encoders.

    Args:
        encoders: Runs or evaluation folders; commas between those that differ only in their seed; `NAME=`
            before them to call them so.

    Raises:
        ArtifactError: where nothing was measured.
        InputError: where two have one name.
    """
    encoder_results = []
    for encoder in encoders:
        name, _, folder_list = encoder.rpartition("=")
        paths = [Path(folder) for folder in folder_list.split(",") if folder]
        rows_by_seed = tuple({row.key: row for row in read_results(path)} for path in paths)
        encoder_results.append(EncoderResults(name=name or _default_name(paths), rows_by_seed=rows_by_seed))
    names = [result.name for result in encoder_results]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise InvalidInputError(
            f"two encoders are called {duplicates[0]!r}; give them names: NAME={duplicates[0]}"
        )
    return encoder_results


def _default_name(paths: Sequence[Path]) -> str:
    name = paths[0].resolve().name
    return name if len(paths) == 1 else f"{name} and {len(paths) - 1} more"


def compare_encoders(encoder_results: Sequence[EncoderResults]) -> Comparison:
    """Lay out all figures, test each encoder against the first, and rank them.

    A difference is tested on the same items (see `paired_difference`); where both encoders have several
    seeds, by Welch's t-test over these, which also counts what another seed would change. Of all tests of
    the table together, the chance that any is marked without cause is at most 5 % (Holm 1979).
    """
    row_keys = list(
        dict.fromkeys(
            key for result in encoder_results for key in result.rows_by_seed[0] if result.first_row(key)
        )
    )
    untested_rows = [_build_row(encoder_results, key) for key in row_keys]
    p_values = [
        (i, j, cell.difference.p_value)
        for i, row in enumerate(untested_rows)
        for j, cell in enumerate(row.cells)
        if cell is not None and cell.difference is not None
    ]
    is_significant = holm_bonferroni([p for _, _, p in p_values], SIGNIFICANCE_LEVEL)
    significant_cells = {
        (i, j) for (i, j, _), significant in zip(p_values, is_significant, strict=True) if significant
    }
    rows = tuple(
        _add_significance(row, {j for i, j in significant_cells if i == row_index})
        for row_index, row in enumerate(untested_rows)
    )
    return Comparison(
        encoder_names=tuple(result.name for result in encoder_results),
        rows=rows,
        mean_rows=tuple(_mean_rows(rows)),
    )


def _build_row(encoder_results: Sequence[EncoderResults], key: RowKey) -> ComparisonRow:
    rows_by_encoder = [
        None if result.first_row(key) is None else [seed_rows[key] for seed_rows in result.rows_by_seed]
        for result in encoder_results
    ]
    template = next(seed_results[0] for seed_results in rows_by_encoder if seed_results is not None)
    cells = tuple(
        None
        if seed_results is None
        else ComparisonCell(
            estimate=_estimate(seed_results),
            difference=None if column == 0 else _seed_difference(rows_by_encoder[0], seed_results),
        )
        for column, seed_results in enumerate(rows_by_encoder)
    )
    return ComparisonRow(
        dataset=template.dataset,
        protocol=template.protocol,
        metric=template.metric,
        n=template.n,
        cells=cells,
    )


def _estimate(rows: Sequence[ResultRow]) -> Estimate:
    if len(rows) == 1:
        return rows[0].estimate
    from scipy.stats import t

    values = np.array([row.estimate.value for row in rows])
    half_width = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    mean = float(values.mean())
    return Estimate(value=mean, low=mean - float(half_width), high=mean + float(half_width))


def _seed_difference(
    baseline_rows: Sequence[ResultRow] | None, rows: Sequence[ResultRow]
) -> Difference | None:
    if baseline_rows is None:
        return None
    if len(baseline_rows) == len(rows) == 1:
        return test_difference(baseline_rows[0], rows[0])
    if min(len(baseline_rows), len(rows)) < 2:
        return None
    return welch_difference(
        *(np.array([row.estimate.value for row in seed_rows]) for seed_rows in (baseline_rows, rows))
    )


def welch_difference(a: Float[np.ndarray, " s"], b: Float[np.ndarray, " t"]) -> Difference:
    """Estimate mean(b) - mean(a) of independent values, and test that it is zero (Welch 1947)."""
    from scipy.stats import ttest_ind

    difference = float(b.mean() - a.mean())
    if not (a.std() or b.std()):
        return Difference(value=difference, low=difference, high=difference, p_value=float(difference == 0))
    test_result = ttest_ind(b, a, equal_var=False)
    interval = test_result.confidence_interval(0.95)
    return Difference(
        value=difference,
        low=float(interval.low),
        high=float(interval.high),
        p_value=float(test_result.pvalue),
    )


def holm_bonferroni(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Say which of several tests hold together: Holm's step-down procedure (1979)."""
    is_rejected = [False] * len(p_values)
    for num_rejected, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        if p_values[index] > alpha / (len(p_values) - num_rejected):
            break
        is_rejected[index] = True
    return is_rejected


def _add_significance(row: ComparisonRow, significant_columns: set[int]) -> ComparisonRow:
    """Add marks and ranks to a line."""
    from scipy.stats import rankdata

    values = [cell.estimate.value for cell in row.cells if cell is not None]
    ranks = rankdata([-value for value in values]) if len(values) == len(row.cells) else None
    cells = tuple(
        None
        if cell is None
        else ComparisonCell(
            estimate=cell.estimate,
            difference=cell.difference,
            significant=column in significant_columns,
            rank=None if ranks is None else float(ranks[column]),
        )
        for column, cell in enumerate(row.cells)
    )
    return ComparisonRow(dataset=row.dataset, protocol=row.protocol, metric=row.metric, n=row.n, cells=cells)


def _mean_rows(comparison_rows: Sequence[ComparisonRow]) -> list[MeanRow]:
    from scipy.stats import friedmanchisquare

    groups: dict[tuple[str, str], list[list[ComparisonCell]]] = {}
    for comparison_row in comparison_rows:
        cells = [cell for cell in comparison_row.cells if cell is not None]
        if len(cells) == len(comparison_row.cells):
            groups.setdefault((comparison_row.protocol, comparison_row.metric), []).append(cells)
    mean_rows = []
    for (protocol, metric), cell_rows in groups.items():
        values = np.array([[cell.estimate.value for cell in group_cells] for group_cells in cell_rows])
        ranks = np.array([[cell.rank for cell in group_cells] for group_cells in cell_rows], np.float64)
        can_test = len(cell_rows) >= 3 and values.shape[1] >= 3
        if len(cell_rows) > 1:
            mean_rows.append(
                MeanRow(
                    protocol=protocol,
                    metric=metric,
                    num_datasets=len(cell_rows),
                    values=tuple(values.mean(axis=0).tolist()),
                    ranks=tuple(ranks.mean(axis=0).tolist()),
                    p_value=float(friedmanchisquare(*values.T).pvalue) if can_test else None,
                )
            )
    return mean_rows
