"""A small demo: every step, the comparison, the report, and a repeated call."""

from pathlib import Path

import pytest

from likewise import demo
from likewise.data.dataset import CaptionDataset
from likewise.demo import load_emoji
from likewise.models.checkpoints import load_tensors


def test_demo_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", demo.DemoConfig(subsample=4, epochs=1, episodes=50))
    page, rows = demo.run_demo(tmp_path / "demo", quick=True)
    assert {(r.baseline.protocol, r.baseline.metric) for r in rows} >= {
        ("retrieval", "recall@1"),
        ("linear", "accuracy"),
        ("fewshot", "accuracy"),
    }
    for row in rows:
        assert len(row.estimates) == 3
        assert all(e.low <= e.value <= e.high for e in row.estimates)
        assert row.differences[0] is not None
    text = page.read_text()
    for credit in ("Twemoji", "CC BY 4.0", "OpenMoji", "CC BY-SA 4.0"):
        assert credit in text
    assert {sample.group for sample in CaptionDataset.open(tmp_path / "demo" / "dataset")} == {
        "openmoji",
        "twemoji",
    }
    repeated_page, repeated_rows = demo.run_demo(tmp_path / "demo", quick=True)
    assert repeated_page.read_text() == text
    assert [r.to_dict() for r in repeated_rows] == [r.to_dict() for r in rows]
    # Both runs have the same initial weights, and each changes them.
    initial = load_tensors(tmp_path / "demo" / "untrained.safetensors")[0]
    for source in demo.PAIR_SOURCES:
        trained = load_tensors(tmp_path / "demo" / f"run-{source}" / "encoder.safetensors")[0]
        assert any(not trained[name].equal(initial[name]) for name in initial)


def test_variants_of_a_concept_are_in_one_split() -> None:
    splits: dict[str, set[bool]] = {}
    for emoji in load_emoji():
        splits.setdefault(emoji.concept_group, set()).add(emoji.is_test)
    assert all(len(is_test) == 1 for is_test in splits.values())
    by_name = {e.name: e for e in load_emoji()}
    assert by_name["man shrugging"].is_test == by_name["woman shrugging"].is_test
    assert 0.1 < sum(e.is_test for e in load_emoji()) / len(load_emoji()) < 0.3
