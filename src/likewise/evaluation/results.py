"""Results of evaluations: read from disk, shown as tables, and compared between encoders."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from likewise.artifacts import mmap_array, read_json
from likewise.errors import ArtifactError, InvalidInputError
from likewise.evaluation.statistics import Difference, Estimate, bootstrap_difference, paired_difference

if TYPE_CHECKING:
    import pandas as pd

RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """The value of one metric of one encoder on one dataset."""

    dataset: str
    """Name of the dataset."""
    dataset_key: str
    """Fingerprint of the dataset."""
    encoder: str = ""
    """Name of the encoder."""
    encoder_key: str
    """Fingerprint of the encoder and its preprocessing."""
    flops: int | None
    """Floating-point operations per image, if known."""
    protocol: str
    """Name of the protocol."""
    metric: str
    """Name of the metric, such as `accuracy`."""
    estimate: Estimate
    """Value and 95 % interval, as fractions."""
    n: int
    """Number of items: test images, episodes, queries or restarts."""
    per_item: np.ndarray
    """(n,) score of each item, or the value on each bootstrap resample if `pairing` is `draws`."""
    groups: np.ndarray | None
    """(n,) cluster of each item, if the items are not independent."""
    pairing: str
    """How encoders are compared: by `items`, by `draws`, or `no`."""
    config: dict[str, Any]
    """Options of the protocol."""
    details: dict[str, Any]
    """Further facts, such as selected hyperparameters."""

    @property
    def value(self) -> float:
        """The value, as a fraction."""
        return self.estimate.value

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.estimate.low

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.estimate.high

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Two rows with the same key are comparable: dataset, protocol with its options, and metric."""
        return (self.dataset_key, self.protocol, json.dumps(self.config, sort_keys=True), self.metric)


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalResults(Sequence[ResultRow]):
    """Results of one encoder: a sequence of rows, or `results["eurosat", "knn", "accuracy"].value`."""

    path: Path
    """Folder of the results; `results.json` and the per-item scores are in one subfolder per dataset."""
    rows: tuple[ResultRow, ...]
    """One row per dataset, protocol and metric."""
    raw: tuple[dict[str, Any], ...] = field(repr=False)
    """The contents of each `results.json`."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ResultRow]:
        return iter(self.rows)

    def __getitem__(self, key: Any) -> Any:
        """Return a row by its position, or by (dataset, protocol, metric).

        Raises:
            KeyError: if there is no such row, or several with different options of the protocol.
        """
        if not isinstance(key, tuple):
            return self.rows[key]
        matches = [row for row in self.rows if (row.dataset, row.protocol, row.metric) == key]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise KeyError(f"{key} has {len(matches)} results with different options; iterate over the rows")
        available = sorted({(row.dataset, row.protocol, row.metric) for row in self.rows})
        raise KeyError(f"{key} is not among the results: {available}")

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return an aligned table of all rows, in percent with 95 % intervals."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("dataset", "protocol", "metric"):
            table.add_column(name, no_wrap=True)
        for name in ("value", "95 % interval", "n"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            interval = f"[{100 * row.low:.1f}, {100 * row.high:.1f}]"
            table.add_row(
                *map(
                    _escape_markup,
                    (row.dataset, row.protocol, row.metric, f"{100 * row.value:.1f}", interval),
                ),
                f"{row.n:,}",
            )
        return _render(table)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return the rows as a table with encoder, dataset, protocol, metric, value, low, high and n."""
        import pandas as pd

        columns = ("encoder", "dataset", "protocol", "metric", "value", "low", "high", "n")
        return pd.DataFrame([[getattr(row, name) for name in columns] for row in self.rows], columns=columns)


def _escape_markup(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _render(table: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    console.print(table)
    lines = console.file.getvalue().splitlines()  # pyrefly: ignore[missing-attribute]
    return "\n".join(line.rstrip() for line in lines)


def read_results(path: str | os.PathLike[str]) -> EvalResults:
    """Read all results of a run or of a folder of results.

    Raises:
        ArtifactError: if there are none, or results of several encoders.
    """
    path = Path(path)
    result_files = sorted(path.glob(f"evaluation/*/{RESULTS_FILE}")) or sorted(path.glob(f"*/{RESULTS_FILE}"))
    if not result_files:
        raise ArtifactError(f"{path} holds no results of an evaluation", path=path)
    results = load_results(result_files[0].parent.parent, result_files)
    if len({row.encoder_key for row in results}) > 1:
        raise ArtifactError(
            f"{path} holds results of several encoders or image sizes; give each its own `out` folder",
            field="out",
            path=path,
        )
    return results


def load_results(path: Path, result_files: Sequence[Path]) -> EvalResults:
    """Read the given `results.json` files of a folder."""
    unique_files = list(dict.fromkeys(result_files))
    raw = tuple(read_json(result_file) for result_file in unique_files)
    rows = [
        row
        for result_file, result in zip(unique_files, raw, strict=True)
        for row in _to_rows(result, result_file.parent)
    ]
    return EvalResults(path=path, rows=tuple(rows), raw=raw)


def _to_rows(result: dict[str, Any], folder: Path) -> list[ResultRow]:
    return [
        ResultRow(
            dataset=result["dataset"]["name"],
            dataset_key=result["dataset"]["key"],
            encoder=result["encoder"]["name"],
            encoder_key=f"{result['encoder']['fingerprint']} {result['encoder']['transform']}",
            flops=result["encoder"]["flops"],
            protocol=protocol,
            metric=score["metric"],
            estimate=Estimate(value=score["value"], low=score["low"], high=score["high"]),
            n=score["n"],
            per_item=mmap_array(folder / score["per_item"]),
            groups=None if score["groups"] is None else mmap_array(folder / score["groups"]),
            pairing=score["pairing"],
            config=protocol_result["config"],
            details=score["details"],
        )
        for protocol, protocol_result in result["protocols"].items()
        for score in protocol_result["scores"]
    ]


@dataclass(frozen=True, kw_only=True)
class MetricComparison:
    """One metric of several encoders, each compared with the first one on the same items."""

    baseline: ResultRow
    """The result of the first encoder."""
    estimates: list[Estimate]
    """The value of each encoder."""
    differences: list[Difference | None]
    """The difference of each encoder but the first from the first; None if it cannot be tested."""

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-compatible values."""
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


def compare_metrics(results: Sequence[Sequence[ResultRow]]) -> list[MetricComparison]:
    """Compare each encoder with the first one on all metrics that every encoder has.

    A difference is None if the items differ (another number of readable images), and for means over classes,
    which are not means over items.
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
    """Test the difference of two encoders on the same items or draws; None if it cannot be tested."""
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
    """Results of one encoder, or of several that differ only in their seed."""

    name: str
    """Name in the comparison."""
    rows_by_seed: tuple[dict[RowKey, ResultRow], ...]
    """The rows of each seed by their key."""

    def first_row(self, key: RowKey) -> ResultRow | None:
        """Return the row of the first seed, if all seeds have one."""
        return self.rows_by_seed[0][key] if all(key in rows for rows in self.rows_by_seed) else None


@dataclass(frozen=True, kw_only=True)
class ComparisonCell:
    """One metric of one encoder, and its difference from the first encoder."""

    estimate: Estimate
    """The value; over several seeds their mean, with the interval of Student's t."""
    difference: Difference | None = None
    """Difference from the first encoder; None for that one itself, and if it cannot be tested."""
    significant: bool = False
    """Whether the difference is significant after the Holm correction over all tests of the comparison."""
    rank: float | None = None
    """Rank among the encoders, 1 for the largest value; None if an encoder lacks the metric."""


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One metric on one dataset for each encoder; None for encoders without it."""

    dataset: str
    protocol: str
    metric: str
    n: int
    cells: tuple[ComparisonCell | None, ...]


@dataclass(frozen=True, kw_only=True)
class MeanRow:
    """One metric averaged over the datasets that every encoder was evaluated on."""

    protocol: str
    metric: str
    num_datasets: int
    values: tuple[float, ...]
    """Mean value of each encoder."""
    ranks: tuple[float, ...]
    """Mean rank of each encoder."""
    p_value: float | None
    """Friedman test of equal ranks; None with fewer than three encoders or datasets."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results of several encoders side by side, tested against the first one."""

    encoder_names: tuple[str, ...]
    encoder_flops: tuple[int | None, ...]
    """Floating-point operations per image of each encoder."""
    rows: tuple[ComparisonRow, ...]
    mean_rows: tuple[MeanRow, ...]

    def table(self) -> str:
        """Return an aligned table in percent, with 95 % intervals; ▲ and ▼ mark significant differences."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("dataset", "protocol", "metric"):
            table.add_column(name, no_wrap=True)
        for name in ("n", *self.encoder_names):
            table.add_column(_escape_markup(name), justify="right", no_wrap=True)
        for row in self.rows:
            texts = (row.dataset, row.protocol, row.metric, f"{row.n:,}", *map(_format_cell, row.cells))
            table.add_row(*map(_escape_markup, texts))
        return _render(table)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return one line per row and encoder, with value, low, high, difference, p_value and rank."""
        import pandas as pd

        lines = [
            {
                "dataset": row.dataset,
                "protocol": row.protocol,
                "metric": row.metric,
                "n": row.n,
                "encoder": name,
            }
            | _cell_values(cell)
            for row in self.rows
            for name, cell in zip(self.encoder_names, row.cells, strict=True)
            if cell is not None
        ]
        return pd.DataFrame(lines)


def _format_cell(cell: ComparisonCell | None) -> str:
    if cell is None:
        return ""
    value, low, high = (100 * x for x in (cell.estimate.value, cell.estimate.low, cell.estimate.high))
    mark = (
        "" if cell.difference is None or not cell.significant else " ▲" if cell.difference.value > 0 else " ▼"
    )
    return f"{value:.1f} [{low:.1f}, {high:.1f}]{mark}"


def _cell_values(cell: ComparisonCell) -> dict[str, Any]:
    difference = cell.difference
    return {
        **asdict(cell.estimate),
        "difference": None if difference is None else difference.value,
        "p_value": None if difference is None else difference.p_value,
        "significant": cell.significant,
        "rank": cell.rank,
    }


Evaluated = EvalResults | str | os.PathLike[str]
"""Results, or the path of a run or of a folder of results."""


def compare(
    encoders: Sequence[Evaluated | Sequence[Evaluated]], names: Sequence[str | None] | None = None
) -> Comparison:
    """Compare encoders that were evaluated on the same datasets: intervals, tests against the first, ranks.

    Args:
        encoders: Results, runs or paths of either, one per encoder; a list of these for an encoder that was
            trained with several seeds.
        names: Name of each encoder; defaults to the names of the folders.

    Raises:
        ArtifactError: if an encoder has no results.
        InvalidInputError: if two encoders have the same name.
    """
    return compare_encoders([
        _read_encoder_results(name, _as_list(encoder))
        for encoder, name in zip(encoders, names or [None] * len(encoders), strict=True)
    ])  # fmt: skip


def _as_list(seeds: Evaluated | Sequence[Evaluated]) -> Sequence[Evaluated]:
    return [seeds] if isinstance(seeds, EvalResults | str | os.PathLike) else seeds


def _read_encoder_results(name: str | None, seeds: Sequence[Evaluated]) -> EncoderResults:
    results = [seed if isinstance(seed, EvalResults) else read_results(seed) for seed in seeds]
    rows_by_seed = tuple({row.key: row for row in seed_results} for seed_results in results)
    return EncoderResults(name=name or _default_name(seeds), rows_by_seed=rows_by_seed)


def _default_name(seeds: Sequence[Evaluated]) -> str:
    path = seeds[0].path if isinstance(seeds[0], EvalResults) else Path(seeds[0])
    name = path.resolve().parent.name if path.name == "evaluation" else path.resolve().name
    return name if len(seeds) == 1 else f"{name} and {len(seeds) - 1} more"


def compare_encoders(encoder_results: Sequence[EncoderResults]) -> Comparison:
    """Compare all results, test each encoder against the first, and rank them.

    A difference is tested on the same items (see `paired_difference`); if both encoders have several seeds,
    by Welch's t-test over the seeds, which includes the variation between seeds. The probability of any
    false positive in the whole comparison is at most 5 % (Holm 1979).

    Raises:
        InvalidInputError: if two encoders have the same name.
    """
    names = [result.name for result in encoder_results]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise InvalidInputError(
            f"two encoders have the name {duplicates[0]!r}; give them different names", field="encoders"
        )
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
        encoder_flops=tuple(next(iter(result.rows_by_seed[0].values())).flops for result in encoder_results),
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
    """Return which hypotheses are rejected by Holm's step-down procedure (1979)."""
    is_rejected = [False] * len(p_values)
    for num_rejected, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        if p_values[index] > alpha / (len(p_values) - num_rejected):
            break
        is_rejected[index] = True
    return is_rejected


def _add_significance(row: ComparisonRow, significant_columns: set[int]) -> ComparisonRow:
    """Return the row with significance and ranks."""
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
