"""The demo, made small: every step, the table and the page, interrupted and run again."""

from pathlib import Path

import pytest

from likewise import demo
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
    again, same = demo.run_demo(tmp_path / "demo", quick=True)
    assert again.read_text() == text
    assert [r.to_dict() for r in same] == [r.to_dict() for r in rows]
    # Both arms left the same start, so at least one weight must have moved in each.
    start = load_tensors(tmp_path / "demo" / "untrained.safetensors")[0]
    for arm in demo.PAIR_SOURCES:
        trained = load_tensors(tmp_path / "demo" / f"run-{arm}" / "encoder.safetensors")[0]
        assert any(not trained[name].equal(start[name]) for name in start)


def test_variants_of_a_concept_stay_on_one_side() -> None:
    sides: dict[str, set[bool]] = {}
    for emoji in load_emoji():
        sides.setdefault(emoji.concept_group, set()).add(emoji.is_test)
    assert all(len(side) == 1 for side in sides.values())
    by_name = {e.name: e for e in load_emoji()}
    assert by_name["man shrugging"].is_test == by_name["woman shrugging"].is_test
    assert 0.1 < sum(e.is_test for e in load_emoji()) / len(load_emoji()) < 0.3
