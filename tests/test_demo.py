"""A small demo: every step, the comparisons, the report, and a repeated call."""

import contextlib
import html
import re
import shlex
from pathlib import Path

import pytest

from likewise import demo
from likewise.artifacts import read_json, write_json
from likewise.cli.__main__ import main
from likewise.data.dataset import CaptionDataset
from likewise.demo import DemoConfig, DemoResult, load_emoji
from likewise.models.checkpoints import load_tensors
from likewise.models.encoders import load_encoder
from likewise.report.results import BaselineDifference
from likewise.report.run_report import write_report
from likewise.training.blending import AdaptOutcome
from likewise.training.train import Run


def test_demo_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = DemoConfig(subsample=7, epochs=1, episodes=50, start_image_size=64, adapt_steps=10)
    monkeypatch.setattr(demo, "QUICK", tiny)
    out = tmp_path / "demo"
    result = demo.run_demo(out, quick=True)
    for rows, num_encoders in ((result.scratch, 3), (result.adaptation, 2)):
        assert {(r.baseline.protocol, r.baseline.metric) for r in rows} >= {
            ("retrieval", "recall@1"),
            ("linear", "accuracy"),
            ("fewshot", "accuracy"),
        }
        for row in rows:
            assert len(row.estimates) == num_encoders
            assert all(e.low <= e.value <= e.high for e in row.estimates)
            assert row.differences[0] is not None
    text = result.report_path.read_text()
    for credit in ("Twemoji", "CC BY 4.0", "OpenMoji", "CC BY-SA 4.0", "EfficientNet-Lite0", "Apache 2.0"):
        assert credit in text
    assert {sample.group for sample in CaptionDataset.open(out / "dataset")} == {"openmoji", "twemoji"}
    repeated = demo.run_demo(out, quick=True)
    assert repeated.report_path.read_text() == text
    assert [r.to_dict() for r in repeated.scratch] == [r.to_dict() for r in result.scratch]
    assert [r.to_dict() for r in repeated.adaptation] == [r.to_dict() for r in result.adaptation]
    # Both runs have the same initial weights, and each changes them.
    initial = load_tensors(out / "untrained.safetensors")[0]
    for source in demo.PAIR_SOURCES:
        trained = load_tensors(out / f"run-{source}" / "encoder.safetensors")[0]
        assert any(not trained[name].equal(initial[name]) for name in initial)
    _check_adaptation(out, result)


def _check_adaptation(out: Path, result: DemoResult) -> None:
    """Check the start and the adapted encoder, their difference in the report, and its command."""
    start, run = out / "efficientnet-lite0", out / "run-adapted"
    assert load_encoder(run).transform == load_encoder(out / "efficientnet-lite0.safetensors").transform
    assert load_encoder(run).transform.mean == (0.5, 0.5, 0.5)
    page = write_report([run, start], out / "adapted.html").read_text()
    for text in (result.report_path.read_text(), page):
        # The adapted encoder is compared with its start, whatever the baseline of the others is.
        assert "with efficientnet-lite0 adapted by language pairs" in text or result.outcome.blend == 0
        difference = result.adaptation[0].differences[0]
        assert difference is not None
        assert BaselineDifference(stats=difference).text in text
        assert ("The adaptation kept the start" in text) == (result.outcome.blend == 0)
    manifest = (run / "artifact.json").read_bytes()
    [command] = [line for line in _commands(page) if line.startswith("likewise adapt")]
    with contextlib.chdir(out), pytest.raises(SystemExit) as exit_info:
        main(shlex.split(command)[1:])
    assert exit_info.value.code == 0
    assert (run / "artifact.json").read_bytes() == manifest
    # A start that was kept is named in the report.
    write_json(run / "adaptation.json", read_json(run / "adaptation.json") | {"blend": 0.0})
    assert "The adaptation kept the start" in write_report([run, start], out / "kept.html").read_text()
    assert AdaptOutcome.read(Run(run)).summary().startswith("kept the start")


def _commands(page: str) -> list[str]:
    lines = re.findall(r"<code>(.*?)</code>", page, re.DOTALL)
    return [html.unescape(re.sub("<[^>]+>", "", line)) for line in lines]


def test_variants_of_a_concept_are_in_one_split() -> None:
    splits: dict[str, set[bool]] = {}
    for emoji in load_emoji():
        splits.setdefault(emoji.concept_group, set()).add(emoji.is_test)
    assert all(len(is_test) == 1 for is_test in splits.values())
    by_name = {e.name: e for e in load_emoji()}
    assert by_name["man shrugging"].is_test == by_name["woman shrugging"].is_test
    assert 0.1 < sum(e.is_test for e in load_emoji()) / len(load_emoji()) < 0.3
