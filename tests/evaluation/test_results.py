"""Encoders side by side: tests against scipy, ranks worked out by hand, files that others can read."""

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
    compare_encoders,
    holm_bonferroni,
    read_encoder_results,
    welch_difference,
)
from likewise.evaluation.statistics import Estimate, bootstrap, paired_difference
from likewise.report.comparison import to_csv, to_latex, to_markdown, to_rows, write_comparison

RNG = np.random.default_rng(0)


def row(where: str, items: np.ndarray, *, paired: str = "items") -> ResultRow:
    return ResultRow(
        dataset=where,
        dataset_key=where,
        encoder_key="",
        flops=1,
        protocol="linear",
        metric="accuracy",
        estimate=bootstrap(items),
        n=len(items),
        per_item=items,
        groups=None,
        pairing=paired,
        config={},
        details={},
    )


def entry(name: str, *seeds: dict[str, np.ndarray]) -> EncoderResults:
    found = tuple({r.key: r for r in (row(k, v) for k, v in seed.items())} for seed in seeds)
    return EncoderResults(name=name, rows_by_seed=found)


def draw(share: float, n: int = 400) -> np.ndarray:
    return (RNG.random(n) < share).astype(float)


def test_one_seed_is_tested_on_the_same_items_and_marked_when_it_holds_among_all() -> None:
    base, worse, equal = draw(0.7), draw(0.5), draw(0.7)
    table = compare_encoders([entry("a", {"x": base}), entry("b", {"x": worse}), entry("c", {"x": equal})])
    first, second, third = table.rows[0].cells
    assert first is not None and second is not None and third is not None
    assert first.difference is None
    assert second.difference == paired_difference(base, worse)
    assert (second.significant, third.significant) == (True, False)
    assert "▼" in to_rows(table)[1][5]


def test_several_seeds_are_tested_by_welch_and_shown_with_students_interval() -> None:
    seeds = {name: [draw(share) for _ in range(4)] for name, share in (("a", 0.5), ("b", 0.8))}
    table = compare_encoders([entry(name, *({"x": s} for s in each)) for name, each in seeds.items()])
    a, b = (np.array([s.mean() for s in each]) for each in seeds.values())
    cell = table.rows[0].cells[1]
    assert cell is not None and cell.difference is not None
    expected = ttest_ind(b, a, equal_var=False)
    assert cell.difference.p_value == pytest.approx(expected.pvalue)
    assert cell.difference.value == pytest.approx(b.mean() - a.mean())
    assert cell.estimate.value == pytest.approx(b.mean())
    assert cell.estimate.high - b.mean() == pytest.approx(3.182446 * b.std(ddof=1) / 2, rel=1e-5)
    assert welch_difference(np.array([0.5, 0.5]), np.array([0.5, 0.5])).p_value == 1


def test_holm_is_the_step_down_procedure() -> None:
    assert holm_bonferroni([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm_bonferroni([0.02, 0.02, 0.02], 0.05) == [False, False, False]
    assert holm_bonferroni([], 0.05) == []


def test_ranks_and_means_are_over_the_sets_that_all_have() -> None:
    values = {"x": (0.9, 0.8, 0.7), "y": (0.6, 0.6, 0.2), "z": (0.1, 0.5, 0.9)}
    entries = [
        entry(
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


def test_files_hold_what_the_table_says(tmp_path: Path) -> None:
    table = compare_encoders([entry("a_1", {"x": draw(0.7)}), entry("b|2", {"x": draw(0.4)})])
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


def test_names_must_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("likewise.evaluation.results.read_results", lambda _: [row("x", draw(0.5))])
    entries = read_encoder_results(["mine=a/run,b/run", str(tmp_path)])
    assert [e.name for e in entries] == ["mine", tmp_path.name]
    assert len(entries[0].rows_by_seed) == 2
    with pytest.raises(InvalidInputError, match="NAME=run"):
        read_encoder_results(["a/run", "b/run"])


def test_an_estimate_of_one_seed_is_its_own() -> None:
    items = draw(0.3)
    cell = compare_encoders([entry("a", {"x": items})]).rows[0].cells[0]
    assert cell is not None
    assert cell.estimate == bootstrap(items)
    assert isinstance(cell.estimate, Estimate)
