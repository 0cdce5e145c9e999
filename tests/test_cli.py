"""The command line as a user meets it: one sentence for bad input, the right exit code, nothing broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from likewise.data.dataset import CaptionDataset
from support import MINILM, save_png


def likewise(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "likewise.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize(
    "verb", ["import", "embed", "neighbors", "diagnose", "audit", "train", "evaluate", "report", "demo"]
)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    told = likewise(verb, "--help")
    assert told.returncode == 0
    assert f"likewise {verb}" in told.stdout.split("Example:")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["trian"], 2, 'Did you mean "train"'),
        (["train", "c"], 2, "--out"),
        (["train", "c", "--out", "r", "--epohcs", "3"], 2, "--epochs"),
        (["train", "c", "--out", "r", "--pairs", "langage"], 2, "language"),
        (["train", "c", "--out", "r"], 1, "there is no collection at c"),
        (["train", "c", "--out", "r", "--views", "simcrl"], 1, "there is no collection"),
        (["import", "nowhere", "c"], 1, "nowhere"),
        (["import", "empty", "c"], 1, "empty"),
        (["import", "text.jpg", "c"], 1, "text.jpg"),
        (["import", "table.csv", "c"], 1, "table.csv"),
        (["import", "table.csv", "c", "--image-column", "picture"], 1, "picture"),
        (["embed", "empty"], 1, "is not a collection"),
        (["neighbors", "nowhere"], 1, "does not exist"),
        (["evaluate", "nowhere", "--on", "empty"], 1, "empty"),
        (["evaluate", "random:resnet10t", "--on", "empty", "--protocol", "lineer"], 1, "linear"),
        (["evaluate", "random:resnet5O", "--on", "set", "--size", "32"], 1, "resnet50"),
        (["report", "nowhere"], 1, "nowhere"),
        (
            ["evaluate", "random:resnet10t", "--on", "set", "--size", "32", "--device", "gpu"],
            1,
            "--device gpu",
        ),
        (["train", "c", "--out", "r", "--seed", "-1"], 1, "--seed is -1"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], code: int, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    for split in ("train", "test"):
        for label in ("one", "two"):
            save_png(tmp_path / "set" / split / label / "a.png")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    told = likewise(*arguments, cwd=tmp_path)
    assert told.returncode == code, told.stderr
    assert sentence in told.stdout + told.stderr
    assert "Traceback" not in told.stderr
    if code == 1:
        assert told.stderr.startswith("error: ")
        assert len(told.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_debug_shows_the_stack(tmp_path: Path) -> None:
    assert "Traceback" in likewise("embed", tmp_path, "--debug").stderr


def test_json_is_for_machines(collection: CaptionDataset) -> None:
    told = likewise("neighbors", collection.path, "-k", "5", "--json", "--quiet")
    assert json.loads(told.stdout)["k"] == 5
    assert told.stderr == ""


def test_names_are_checked_in_python_too() -> None:
    code = "import likewise; likewise.PairRule(pairs='langage')"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "unknown source of pairs 'langage'; known: self, language, vision" in told.stderr
    assert "Did you mean language" in told.stderr


def test_unknown_encoders_are_one_sentence(collection: CaptionDataset) -> None:
    told = likewise("embed", collection.path, "--encoder", "./no-such-model")
    assert told.returncode == 1
    assert told.stderr.startswith("error: there is no model folder at ./no-such-model")


def test_a_collection_without_captions_trains_on_itself(tmp_path: Path) -> None:
    for name in "abcd":
        save_png(tmp_path / "images" / f"{name}.png")
    made = likewise("import", tmp_path / "images", tmp_path / "c")
    assert made.returncode == 0, made.stderr
    assert "without a caption: 4" in made.stdout
    told = likewise("embed", tmp_path / "c")
    assert told.returncode == 1
    assert "has a caption: there is nothing to embed; use --pairs self" in told.stderr
    flags = ["--backbone", "resnet10t", "--size", "32", "--batch-size", "4", "--steps", "1", "--quiet"]
    told = likewise("train", tmp_path / "c", "--out", tmp_path / "run", "--pairs", "self", *flags)
    assert told.returncode == 0, told.stderr


def test_targets_that_exist_are_not_touched(collection: CaptionDataset, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    flags = ["--backbone", "resnet10t", "--size", "32", "--batch-size", "8", "--steps", "1", "--quiet"]
    told = likewise("train", collection.path, "--out", tmp_path, *flags)
    assert told.returncode == 1
    assert "not empty" in told.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("embeddings", ["embed", "--encoder", MINILM]),
        ("neighbors", ["neighbors", "-k", "5"]),
        (
            "image_cache",
            [
                "train",
                "--out",
                "run",
                "--backbone",
                "resnet10t",
                "--size",
                "32",
                "--batch-size",
                "8",
                "--steps",
                "1",
            ],
        ),
    ],
)
def test_killed_at_any_moment_and_run_again(
    stage: str, command: list[str], collection: CaptionDataset, tmp_path: Path
) -> None:
    copy = tmp_path / "c"
    shutil.copytree(collection.path, copy)
    shutil.rmtree(copy / "image_cache", ignore_errors=True)
    if stage != "image_cache":
        shutil.rmtree(copy / stage)
    arguments = [sys.executable, "-m", "likewise.cli", command[0], str(copy), *command[1:], "--quiet"]
    process = subprocess.Popen(arguments, cwd=tmp_path)
    deadline = time.monotonic() + 90
    # Killed as soon as the stage has begun: its manifest is the first thing it writes.
    while not list((copy / stage).glob("*/artifact.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    again = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    (made,) = (copy / stage).glob("*")
    uninterrupted = tmp_path / "whole"
    shutil.copytree(collection.path, uninterrupted)
    shutil.rmtree(uninterrupted / stage, ignore_errors=True)
    whole = [str(uninterrupted) if a == str(copy) else a for a in arguments]
    whole = ["run2" if a == "run" else a for a in whole]
    subprocess.run(whole, cwd=tmp_path, check=True, capture_output=True)
    assert snapshot(made) == snapshot(uninterrupted / stage / made.name)


def test_killed_during_evaluation_and_run_again(emoji: Path, tmp_path: Path) -> None:
    flags = ["--on", str(emoji.parent), "--protocol", "knn,retrieval", "--size", "48", "--quiet"]
    command = [sys.executable, "-m", "likewise.cli", "evaluate", "random:resnet10t", *flags, "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=os.environ)
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("killed/features/*/artifact.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for out in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / out)], check=True, capture_output=True)
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")
