"""Comparison of encoders: statistical tests against scipy, ranks, and files in open formats."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import friedmanchisquare, ttest_ind

from likewise.errors import InvalidInputError
from likewise.evaluation.results import (
    EncoderResults,
    ResultRow,
    compare,
    compare_encoders,
    holm_bonferroni,
    welch_difference,
)
from likewise.evaluation.statistics import Estimate, bootstrap, paired_difference
from likewise.report.comparison import to_csv, to_latex, to_markdown, to_rows, write_comparison

RNG = np.random.default_rng(0)


def make_row(dataset: str, per_item: np.ndarray, *, pairing: str = "items") -> ResultRow:
    return ResultRow(
        dataset=dataset,
        dataset_key=dataset,
        encoder_key="",
        flops=1,
        protocol="linear",
        metric="accuracy",
        estimate=bootstrap(per_item),
        n=len(per_item),
        per_item=per_item,
        groups=None,
        pairing=pairing,
        config={},
        details={},
    )


def make_encoder(name: str, *seeds: dict[str, np.ndarray]) -> EncoderResults:
    rows_by_seed = tuple(
        {row.key: row for row in (make_row(dataset, per_item) for dataset, per_item in seed.items())}
        for seed in seeds
    )
    return EncoderResults(name=name, rows_by_seed=rows_by_seed)


def sample_correct(accuracy: float, n: int = 400) -> np.ndarray:
    return (RNG.random(n) < accuracy).astype(float)


def test_one_seed_is_tested_on_the_same_items_with_holm_correction() -> None:
    baseline, worse, equal = sample_correct(0.7), sample_correct(0.5), sample_correct(0.7)
    table = compare_encoders(
        [make_encoder("a", {"x": baseline}), make_encoder("b", {"x": worse}), make_encoder("c", {"x": equal})]
    )
    first, second, third = table.rows[0].cells
    assert first is not None and second is not None and third is not None
    assert first.difference is None
    assert second.difference == paired_difference(baseline, worse)
    assert (second.significant, third.significant) == (True, False)
    assert "▼" in to_rows(table)[1][5]


def test_several_seeds_are_tested_by_welch_with_students_interval() -> None:
    seeds = {
        name: [sample_correct(accuracy) for _ in range(4)] for name, accuracy in (("a", 0.5), ("b", 0.8))
    }
    table = compare_encoders(
        [make_encoder(name, *({"x": s} for s in values)) for name, values in seeds.items()]
    )
    a, b = (np.array([s.mean() for s in values]) for values in seeds.values())
    cell = table.rows[0].cells[1]
    assert cell is not None and cell.difference is not None
    expected = ttest_ind(b, a, equal_var=False)
    assert cell.difference.p_value == pytest.approx(expected.pvalue)
    assert cell.difference.value == pytest.approx(b.mean() - a.mean())
    assert cell.estimate.value == pytest.approx(b.mean())
    assert cell.estimate.high - b.mean() == pytest.approx(3.182446 * b.std(ddof=1) / 2, rel=1e-5)
    assert welch_difference(np.array([0.5, 0.5]), np.array([0.5, 0.5])).p_value == 1


def test_holm_bonferroni_is_the_step_down_procedure() -> None:
    assert holm_bonferroni([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm_bonferroni([0.02, 0.02, 0.02], 0.05) == [False, False, False]
    assert holm_bonferroni([], 0.05) == []


def test_ranks_and_means_are_over_shared_datasets() -> None:
    values = {"x": (0.9, 0.8, 0.7), "y": (0.6, 0.6, 0.2), "z": (0.1, 0.5, 0.9)}
    entries = [
        make_encoder(
            name, {s: np.full(10, v[i]) for s, v in values.items()} | ({"only": np.ones(3)} if i == 0 else {})
        )
        for i, name in enumerate("abc")
    ]
    table = compare_encoders(entries)
    (average,) = table.mean_rows
    assert average.num_datasets == 3
    assert average.ranks == pytest.approx(((1 + 1.5 + 3) / 3, (2 + 1.5 + 2) / 3, (3 + 3 + 1) / 3))
    assert average.values == pytest.approx((1.6 / 3, 1.9 / 3, 1.8 / 3))
    assert average.p_value == pytest.approx(friedmanchisquare(*np.array(list(values.values())).T).pvalue)
    only = table.rows[-1]
    assert (only.dataset, only.cells[1]) == ("only", None)
    assert only.cells[0] is not None and only.cells[0].rank is None


def test_files_contain_the_values_of_the_table(tmp_path: Path) -> None:
    table = compare_encoders(
        [make_encoder("a_1", {"x": sample_correct(0.7)}), make_encoder("b|2", {"x": sample_correct(0.4)})]
    )
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [r["encoder"] for r in rows] == ["a_1", "b|2"]
    cell = table.rows[0].cells[1]
    assert cell is not None and cell.difference is not None
    assert float(rows[1]["value"]) == cell.estimate.value
    assert float(rows[1]["p_value"]) == cell.difference.p_value
    assert "b\\|2" in to_markdown(table)
    assert all(line.count(" | ") == 5 for line in to_markdown(table).splitlines()[:3])
    tex = to_latex(table)
    assert "a\\_1" in tex
    assert r"$^\downarrow$" in tex
    assert tex.count("\\textbf") == 1
    files = write_comparison(table, tmp_path / "out", [1.0, 2.0])
    assert [f.name for f in files] == [
        "comparison.csv",
        "comparison.md",
        "comparison.tex",
        "comparison.svg",
        "cost.svg",
    ]
    first = (tmp_path / "out/comparison.svg").read_bytes()
    write_comparison(table, tmp_path / "out", [1.0, 1.0])
    assert (tmp_path / "out/comparison.svg").read_bytes() == first


def test_compare_reads_results_and_requires_distinct_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {name: [make_row("x", sample_correct(0.5))] for name in ("run", "other")}
    monkeypatch.setattr("likewise.evaluation.results.read_results", lambda path: rows[Path(path).name])
    comparison = compare([["a/run", "b/run"], tmp_path / "other"], names=["first", None])
    assert comparison.encoder_names == ("first", "other")
    assert comparison.encoder_flops == (1, 1)
    frame = comparison.to_dataframe()
    assert frame["encoder"].tolist() == ["first", "other"]
    assert frame["value"].tolist() == [rows["run"][0].value, rows["other"][0].value]
    assert comparison.table().splitlines()[0].split() == [
        "dataset",
        "protocol",
        "metric",
        "n",
        "first",
        "other",
    ]
    assert f"{100 * rows['other'][0].value:.1f} [" in comparison.table()
    with pytest.raises(InvalidInputError) as excinfo:
        compare(["a/run", "b/run"])
    assert excinfo.value.field == "encoders"


def test_estimate_of_one_seed_is_its_bootstrap() -> None:
    per_item = sample_correct(0.3)
    cell = compare_encoders([make_encoder("a", {"x": per_item})]).rows[0].cells[0]
    assert cell is not None
    assert cell.estimate == bootstrap(per_item)
    assert isinstance(cell.estimate, Estimate)
