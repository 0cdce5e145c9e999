"""Recipes: all that are shipped are sound, and running one is running its commands."""

import json
import shlex
from pathlib import Path

import pytest

import likewise
from likewise.artifacts import read_json
from likewise.cli.__main__ import main
from likewise.data.dataset import CaptionDataset
from likewise.training.train import Run

RECIPES = sorted((Path(likewise.__file__).parent / "recipes").rglob("*.yaml"))
TINY = """
import:
  caption_column: [caption, alias]
  where: [split=train]
embed:
  encoder: all-MiniLM-L6-v2
train:
  method: simsiam
  head: [32, 16]
  backbone: resnet10t
  size: 32
  batch-size: 32
  steps: 2
evaluate:
  protocol: [knn]
"""


def call(*command: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        main([*map(str, command), "--quiet"])
    return int(left.value.code or 0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_sound_and_tells_its_own_command(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", path, "--source", "photos", "--out", "out", "--on", "set", "--dry-run") == 0
    commands = capsys.readouterr().out.splitlines()
    assert commands[-1] == "likewise report out/run"
    about = path.read_text()
    assert f"likewise run {path.parent.name}/{path.stem} --source" in about
    for told in ("what:", "cost:", "score:"):
        assert told in about


def test_there_are_recipes() -> None:
    assert {path.parent.name for path in RECIPES} == {"lgssl", "small"}


def test_a_recipe_runs_the_whole_chain_and_once_only(
    recipe: Path, emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("run", recipe, "--source", emoji, "--out", out, "--on", emoji.parent)
    assert call(*command) == 0
    assert len(CaptionDataset(out / "collection")) == 207
    run = Run(out / "run")
    assert run.artifact.manifest.settings["method"] == "simsiam"
    assert run.artifact.manifest.settings["head"] == [32, 16]
    assert (out / "run" / "report.html").stat().st_size > 10_000
    knn = read_json(next((out / "run" / "evaluation").rglob("results.json")))
    assert "knn" in json.dumps(knn)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    capsys.readouterr()
    assert call(*command) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")} == before


def test_the_commands_that_are_shown_make_the_same_run(
    recipe: Path, emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, steps = tmp_path / "whole", tmp_path / "steps"
    # A seed of another value than the default, from the command line.
    override = ("--override", "train.seed=3", "--override", "train.steps=1")
    assert call("run", recipe, "--source", emoji, "--out", whole, *override) == 0
    capsys.readouterr()
    assert call("run", recipe, "--source", emoji, "--out", steps, *override, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert not steps.exists()
    for line in lines:
        assert call(*shlex.split(line)[1:]) == 0
    runs = [Run(out / "run").artifact.manifest for out in (whole, steps)]
    assert runs[0].key == runs[1].key
    assert runs[0].settings["seed"] == 3


def test_a_collection_is_taken_as_it_is(
    collection: CaptionDataset, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", recipe, "--source", collection.path, "--out", tmp_path / "o", "--dry-run") == 0
    assert capsys.readouterr().out.startswith(f"likewise embed {collection.path}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no settings"),
        ("a: [", "not valid YAML"),
        ("trian:\n  seed: 1", "unknown section 'trian'.*Did you mean train"),
        ("embed: {}", "no section train"),
        ("train: 3", "section train holds 3"),
        ("train:\n  metod: simclr", "section train: .*--metod.*Did you mean --method"),
        ("train:\n  size: large", "section train: .*size"),
        ("train:\n  method: vicreg\n  queue: 600", "section train: --queue means nothing to --method vicreg"),
        ("train: {}\nevaluate:\n  protocl: knn", "section evaluate: .*protocl"),
        ("train:\n  method: supcon\n  partners: 3", "give -k 3 or more"),
    ],
)
def test_a_bad_recipe_is_one_sentence_before_anything_is_made(
    text: str, told: str, emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    (tmp_path / "bad.yaml").write_text(text)
    assert call("run", tmp_path / "bad.yaml", "--source", emoji, "--out", tmp_path / "o", "--on", "set") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(told, error), error
    assert not (tmp_path / "o").exists()


def test_what_is_not_there_is_told(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", tmp_path / "none.yaml", "--source", "x", "--out", tmp_path / "o") == 1
    assert "none.yaml does not exist" in " ".join(capsys.readouterr().err.split())
    assert call("run", recipe, "--source", "x", "--out", tmp_path / "o", "--override", "seed=1") == 1
    assert "SECTION.FLAG=VALUE" in capsys.readouterr().err
    assert call("run", recipe, "--out", tmp_path / "o") == 2
