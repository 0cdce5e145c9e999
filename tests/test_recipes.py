"""Recipes and `likewise run`: every recipe of the package is valid, and a run equals its commands."""

import json
import re
import shlex
from pathlib import Path

import pytest

import likewise
from likewise.artifacts import read_json
from likewise.cli.__main__ import main
from likewise.cli.pipeline import DEFAULT_RECIPE, read_recipe
from likewise.data.dataset import CaptionDataset
from likewise.training.methods.options import SimSiamOptions
from likewise.training.train import Run

RECIPES_DIR = Path(likewise.__file__).parent / "recipes"
RECIPES = sorted(
    path.relative_to(RECIPES_DIR).with_suffix("").as_posix() for path in RECIPES_DIR.rglob("*.yaml")
)
TINY = """
import:
  caption_column: [caption, alias]
  where: [split=train]
embed:
  encoder: all-MiniLM-L6-v2
train:
  method: simsiam
  projector_dims: [32, 16]
  backbone: resnet10t
  image_size: 32
  batch-size: 32
  max_steps: 2
evaluate:
  protocol: [knn]
"""


def call(*command: str | Path) -> int:
    with pytest.raises(SystemExit) as excinfo:
        main([*map(str, command), "--quiet"])
    return int(excinfo.value.code or 0)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_a_recipe_is_parsed_into_configs(recipe: Path) -> None:
    config = read_recipe(str(recipe), ["train.k=3", "train.base_lr=2e-3", "evaluate.shots=1"])
    assert config.import_options.caption_column == ("caption", "alias")
    assert config.embed is not None
    assert config.embed.encoder == "all-MiniLM-L6-v2"
    assert config.train.method == SimSiamOptions(projector_dims=(32, 16))
    assert config.train.base_lr == 2e-3
    assert config.pairs == likewise.PairConfig(k=3)
    assert config.protocols.protocol == ("knn",)
    assert config.protocol_flags.shots == 1


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_contains_its_command(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("run", "photos", "--recipe", name, "--out", "out", "--dataset", "labeled", "--dry-run")
    assert call(*command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "likewise report out/run"
    text = (RECIPES_DIR / f"{name}.yaml").read_text()
    assert f"likewise run IMAGES --recipe {name} --out" in text
    for key in ("what:", "cost:", "score:"):
        assert key in text


def test_package_has_full_and_small_recipes() -> None:
    assert {name.split("/")[0] for name in RECIPES} == {"lgssl", "small"}
    assert DEFAULT_RECIPE in RECIPES


def test_default_recipe_is_small_lgsimclr(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("run", "photos", "--out", "out", "--dry-run") == 0
    default = capsys.readouterr().out
    assert call("run", "photos", "--out", "out", "--recipe", "small/lgsimclr", "--dry-run") == 0
    assert capsys.readouterr().out == default
    assert "likewise import photos out/dataset" in default


def test_run_command_writes_all_stages_and_reuses_them(
    recipe: Path, emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("run", emoji, "--recipe", recipe, "--out", out, "--dataset", emoji.parent)
    assert call(*command) == 0
    assert len(CaptionDataset(out / "dataset")) == 207
    run = Run(out / "run")
    assert run.artifact.manifest.settings["method"] == "simsiam"
    assert run.artifact.manifest.settings["projector_dims"] == [32, 16]
    assert (out / "run" / "report.html").stat().st_size > 10_000
    assert "knn" in json.dumps(read_json(next((out / "run" / "evaluation").rglob("results.json"))))
    assert "knn" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert call(*command, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"] == str(out / "run")
    assert [item["dataset"]["name"] for item in result["results"]]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_printed_commands_give_the_same_run(
    recipe: Path, emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single, steps = tmp_path / "single", tmp_path / "steps"
    flags = ("--recipe", recipe, "--set", "train.seed=3", "--set", "train.max-steps=1")
    assert call("run", emoji, "--out", single, *flags) == 0
    capsys.readouterr()
    assert call("run", emoji, "--out", steps, *flags, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert not steps.exists()
    for line in lines:
        assert call(*shlex.split(line)[1:]) == 0
    manifests = [Run(out / "run").artifact.manifest for out in (single, steps)]
    assert manifests[0].key == manifests[1].key
    assert manifests[0].settings["seed"] == 3


def test_run_command_accepts_an_imported_dataset(
    dataset: CaptionDataset, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", dataset.path, "--recipe", recipe, "--out", tmp_path / "o", "--dry-run") == 0
    assert capsys.readouterr().out.startswith(f"likewise embed {dataset.path}")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "bad.yaml"),
        ("a: [", "not valid YAML"),
        ("trian:\n  seed: 1", "unknown section 'trian'.*Did you mean train"),
        ("embed: {}", "no section train"),
        ("train: 3", "section train: .*3"),
        ("train:\n  metod: simclr", "section train: unknown key 'metod'.*Did you mean method"),
        ("train:\n  source: self", "section train: unknown key 'source'"),
        ("train:\n  pairs: langage", "section train: .*'langage'.*Did you mean language"),
        ("train:\n  pairs: file", "section train: `pairs`"),
        ("train:\n  image_size: large", "section train: `image_size` must be int, got 'large'"),
        ("train:\n  seed: true", "section train: `seed` must be int, got True"),
        ("train:\n  base_lr: fast", "section train: `base_lr` must be float"),
        ("train:\n  mine_in_batch: 3\n  method: pair-classifier", "`mine_in_batch` must be bool"),
        (
            "train:\n  method: vicreg\n  memory_bank_size: 600",
            "`memory_bank_size` is not an option of method",
        ),
        ("train: {}\nevaluate:\n  protocl: knn", "section evaluate: .*'protocl'.*protocol"),
        ("train:\n  method: supcon\n  num_positives: 3", "section train: `k` must be at least"),
    ],
)
def test_invalid_recipe_is_a_one_line_error_and_writes_no_files(
    text: str, pattern: str, emoji: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "bad.yaml", tmp_path / "o"
    path.write_text(text)
    assert call("run", emoji, "--recipe", path, "--out", out, "--dataset", "labeled") == 1
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(pattern, error), error
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "exit_code", "text"),
    [
        (["--recipe", "none.yaml"], 1, "none.yaml"),
        (["--recipe", "small/simcrl"], 1, "Did you mean small/simclr"),
        (["--set", "seed=1"], 1, "--set must be SECTION.KEY=VALUE"),
        (["--set", "train.seed"], 1, "SECTION.KEY=VALUE"),
        (["--set", "train.sed=1"], 1, "Did you mean seed"),
        (["--set", "train.batch_size=1"], 1, "batch_size"),
    ],
)
def test_invalid_run_flags_are_errors(
    flags: list[str], exit_code: int, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", "x", "--out", tmp_path / "o", *flags) == exit_code
    assert text in " ".join(capsys.readouterr().err.split())


def test_run_without_out_is_a_usage_error() -> None:
    assert call("run", "x") == 2
