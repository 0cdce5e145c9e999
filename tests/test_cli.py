"""The command line: exit codes, one-line errors that name flags, JSON, resuming after a kill."""

import csv
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml

import likewise
from likewise.cli.__main__ import main
from likewise.cli.evaluation import parse_encoder
from likewise.data.dataset import CaptionDataset
from likewise.errors import InvalidInputError
from support import MINILM, save_png

COMMANDS = [
    "adapt",
    "analyze-pairs",
    "audit",
    "compare",
    "datasets",
    "demo",
    "embed",
    "evaluate",
    "import",
    "methods",
    "neighbors",
    "report",
    "run",
    "train",
]
TINY = ["--backbone", "resnet10t", "--image-size", "32", "--batch-size", "8", "--max-steps", "1", "--quiet"]


def run_cli(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "likewise.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def call(*arguments: str | Path) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as excinfo:
        main([*map(str, arguments)])
    return int(excinfo.value.code or 0)


def test_import_embed_and_neighbors_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog", "car"):
        save_png(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text(f"a {name} on a road")
    dataset = tmp_path / "photos.likewise"
    assert call("import", tmp_path / "photos", dataset) == 0
    assert "3 images, 3 captions" in capsys.readouterr().out
    assert call("embed", dataset, "--encoder", "tfidf") == 0
    capsys.readouterr()
    assert call("neighbors", dataset, "-k", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["k"] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"likewise {command}" in text.split("Example:")[1]


def test_help_groups_flags_and_shows_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--help") == 0
    text = capsys.readouterr().out
    groups = ["Pair sampling", "Neighbor search", "Method options", "Optimization", "Validation", "Output"]
    positions = [text.index(f"╭─ {group}") for group in groups]
    assert positions == sorted(positions)
    assert "--pairs CHOICE" in text
    assert "[default: scratch]" in text
    assert "[choices: auto, fp32, bf16" in " ".join(text.split())
    assert "`" not in text


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        (["trian"], 2, 'Did you mean "train"'),
        (["train", "c"], 2, "--out"),
        (["train", "c", "--out", "r", "--epohcs", "3"], 2, "--epochs"),
        (["train", "c", "--out", "r", "--pairs", "langage"], 2, "language"),
        (["train", "c", "--out", "r", "--augmentation", "simcrl"], 2, "simclr"),
        (["train", "c", "--out", "r", "--method", "simcrl"], 2, "simclr"),
        (["train", "c", "--out", "r"], 1, "c"),
        (["train", "c", "--out", "r", "--seed", "-1"], 1, "--seed"),
        (
            ["train", "c", "--out", "r", "--method", "vicreg", "--memory-bank-size", "9"],
            1,
            "--memory-bank-size",
        ),
        (["train", "c", "--out", "r", "--pairs", "file"], 1, "--pairs 'file' and --pairs-file"),
        (["train", "c", "--out", "r", "-k", "0"], 1, "-k must be"),
        (["import", "nowhere", "c"], 1, "nowhere"),
        (["import", "empty", "c"], 1, "empty"),
        (["import", "text.jpg", "c"], 1, "text.jpg"),
        (["import", "table.csv", "c"], 1, "table.csv"),
        (["import", "table.csv", "c", "--image-column", "picture"], 1, "picture"),
        (["import", "table.csv", "c", "--limit", "0"], 1, "--limit must be"),
        (["embed", "empty"], 1, "empty"),
        (["embed", "c", "--max-length", "0"], 1, "--max-length"),
        (["audit", "c", "--max-aspect", "0.5"], 1, "c"),
        (["neighbors", "nowhere"], 1, "nowhere"),
        (["evaluate", "nowhere", "--dataset", "empty"], 1, "nowhere"),
        (["evaluate", "random:resnet10t", "--dataset", "empty", "--protocol", "lineer"], 1, "linear"),
        (["evaluate", "random:resnet5O", "--dataset", "set", "--image-size", "32"], 1, "resnet50"),
        (["evaluate", "random:resnet10t", "--dataset", "set", "--ignore-index", "x"], 2, "--ignore-index"),
        (["evaluate", "random:resnet10t", "--dataset", "set", "--device", "gpu"], 1, "--device"),
        (["report", "nowhere"], 1, "nowhere"),
    ],
)
def test_invalid_usage_is_a_one_line_error(
    arguments: list[str],
    exit_code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    for split in ("train", "test"):
        for label in ("one", "two"):
            save_png(tmp_path / "set" / split / label / "a.png")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    result = call(*arguments), capsys.readouterr()
    assert result[0] == exit_code, result
    assert text in result[1].out + result[1].err
    if exit_code == 1:
        assert result[1].err.startswith("error: ")
        assert len(result[1].err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_errors_of_a_process_are_one_line(tmp_path: Path) -> None:
    result = run_cli("embed", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" in run_cli("embed", tmp_path, "--debug").stderr


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("first\nsecond"), "unexpected ValueError: first; this is a bug of likewise"),
        (KeyError(), "unexpected KeyError; this is a bug"),
        (yaml.YAMLError("bad"), "unexpected YAMLError: bad"),
        (csv.Error("field larger than limit"), "unexpected Error: field larger"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "unexpected UnicodeDecodeError"),
        (pyarrow.ArrowInvalid("bad"), "unexpected ArrowInvalid: bad"),
        (RecursionError("deep"), "unexpected RecursionError: deep"),
        (OSError("Corrupt snappy compressed data."), "unexpected OSError: Corrupt snappy"),
        (MemoryError(), "not enough memory; use smaller batches"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
        (PermissionError(13, "Permission denied", "a/b"), "Permission denied: a/b"),
        (OSError(28, "No space left on device", "a/b"), "No space left on device: a/b"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
    ],
    ids=repr,
)
def test_no_exception_reaches_the_user(
    error: Exception, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(CaptionDataset, "open", fail)
    assert call("audit", "photos") == 1
    message = capsys.readouterr().err
    assert message.lstrip().startswith(f"error: {text}")
    assert len(message.strip().splitlines()) == 1
    assert ("--debug" in message) == ("unexpected" in text)
    with pytest.raises(type(error)):
        main(["audit", "photos", "--debug"])


@pytest.mark.parametrize(
    ("redirect", "exit_code", "stderr"),
    [
        ("| head -c 0; exit ${PIPESTATUS[0]}", {0, 1}, ""),
        ("> /dev/full", {1}, "error: No space left on device\n"),
        (">&-", {0}, ""),
        ("2>&-", {0}, ""),
    ],
)
def test_output_that_cannot_be_written(redirect: str, exit_code: set[int], stderr: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m likewise.cli methods --json {redirect}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode in exit_code, result.stderr) == (True, stderr)


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    save_png(folder / "cat.png")
    (folder / "cat.txt").write_text("a cat")
    command = [sys.executable, "-m", "likewise.cli", "import", str(folder), str(tmp_path / "鳥"), "--quiet"]
    environment = os.environ | {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1:strict"}
    result = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"\u9ce5" in result.stdout


def test_columns_and_datasets_may_contain_commas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            save_png(tmp_path / "birds, and cats" / split / label / "a.png")
    shutil.copytree("birds, and cats", "plain")
    save_png(tmp_path / "a.png")
    Path("table.csv").write_text('image,"caption, en",de,"x,y"\na.png,one,eins,other\n')
    columns = {
        ("caption, en",): ("one",),
        ("caption, en", "de"): ("one", "eins"),
        ("de,image",): ("eins", "a.png"),
        ("x,y", "caption, en"): ("other", "one"),
    }
    for i, (names, captions) in enumerate(columns.items()):
        flags = [token for name in names for token in ("--caption-column", name)]
        assert call("import", "table.csv", f"d{i}", *flags, "--quiet") == 0
        assert CaptionDataset(f"d{i}")[0].captions == captions
    capsys.readouterr()
    assert call("import", "table.csv", "other", "--caption-column", "de,fr", "--quiet") == 1
    assert "has no column 'fr'" in capsys.readouterr().err
    for flags in (["--dataset", "birds, and cats"], ["--dataset", "birds, and cats", "--dataset", "plain"]):
        arguments = ["random:resnet10t", "--image-size", "32", *flags, "--protocol", "knn", "--out", "out"]
        assert call("evaluate", *arguments, "--quiet", "--json") == 0
        names = [result["dataset"]["name"] for result in json.loads(capsys.readouterr().out)["results"]]
        assert names == [flags[1], *flags[3:]]


def test_sidecar_keys_may_contain_commas(tmp_path: Path) -> None:
    contents = {
        "a": {"title": "first", "en": "second"},
        "b": {"en": "second"},
        "c": {"title, en": "whole", "title": "first", "en": "second"},
    }
    flags = ("--caption-column", "title, en", "--quiet")

    def import_captions(names: str) -> list[tuple[str, ...]]:
        folder = tmp_path / names
        for name in names:
            save_png(folder / f"{name}.png")
            (folder / f"{name}.json").write_text(json.dumps(contents[name]))
        assert call("import", folder, tmp_path / f"{names}-dataset", *flags) == 0
        return [sample.captions for sample in CaptionDataset(tmp_path / f"{names}-dataset")]

    assert import_captions("ab") == [("first", "second"), ("second",)]
    # A key that exists is not split.
    assert import_captions("abc") == [(), (), ("whole",)]


def test_seeds_of_encoders_may_contain_commas_and_equals_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("lr=0.1", "lr=0.2", "a, b", "plain"):
        Path(folder).mkdir()
    expected = {
        "plain": (None, ("plain",)),
        "lr=0.1": (None, ("lr=0.1",)),
        "lr=0.1,lr=0.2": (None, ("lr=0.1", "lr=0.2")),
        "self=lr=0.1,plain": ("self", ("lr=0.1", "plain")),
        "self=a, b": ("self", ("a, b",)),
        "=plain": (None, ("plain",)),
    }
    assert {text: parse_encoder(text) for text in expected} == expected


def test_json_is_the_only_output(dataset: CaptionDataset) -> None:
    result = run_cli("neighbors", dataset.path, "-k", "5", "--json", "--quiet")
    assert json.loads(result.stdout)["k"] == 5
    assert result.stderr == ""


def test_library_errors_name_fields_not_flags() -> None:
    # In a subprocess, because the type checks of the tests would raise first.
    code = "import likewise; likewise.PairConfig(source='langage')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "self, language, vision" in result.stderr
    assert "Did you mean language" in result.stderr
    with pytest.raises(InvalidInputError) as excinfo:
        likewise.TrainConfig(batch_size=1)
    assert excinfo.value.field == "batch_size"
    assert "`batch_size`" in str(excinfo.value)


def test_messages_go_to_stderr_for_the_duration_of_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_messages() -> None:
        logging.getLogger("likewise.test").info("reused [8 embeddings]")
        logging.getLogger("likewise.test").warning("fewer images")

    logger = logging.getLogger("likewise")
    state = logger.level, list(logger.handlers)
    monkeypatch.setattr("likewise.cli.__main__.app", lambda *_, **__: log_messages())
    assert call("methods") == 0
    assert capsys.readouterr().err == "reused [8 embeddings]\nwarning: fewer images\n"
    assert call("methods", "--quiet") == 0
    assert capsys.readouterr().err == "warning: fewer images\n"
    assert (logger.level, logger.handlers) == state


def test_unknown_encoder_is_a_one_line_error(
    dataset: CaptionDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("embed", dataset.path, "--encoder", "./no-such-model", "--quiet") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "./no-such-model" in error


def test_dataset_without_captions_trains_with_self_pairs(tmp_path: Path) -> None:
    for name in "abcd":
        save_png(tmp_path / "images" / f"{name}.png")
    imported = run_cli("import", tmp_path / "images", tmp_path / "c")
    assert imported.returncode == 0, imported.stderr
    assert "without a caption: 4" in imported.stdout
    embedded = run_cli("embed", tmp_path / "c")
    assert embedded.returncode == 1
    assert "caption" in embedded.stderr
    flags = [flag if flag != "8" else "4" for flag in TINY]
    trained = run_cli("train", tmp_path / "c", "--out", tmp_path / "run", "--pairs", "self", *flags)
    assert trained.returncode == 0, trained.stderr


def test_import_reports_skipped_and_ignored_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog"):
        save_png(tmp_path / "photos" / f"{name}.png")
        (tmp_path / "photos" / f"{name}.txt").write_text(f"a {name}")
    assert call("import", tmp_path / "photos", tmp_path / "good", "--strict", "--quiet") == 0
    assert capsys.readouterr().out == f"2 images, 2 captions: {tmp_path / 'good'}\n"
    (tmp_path / "photos" / "bad.png").write_text("<html>")
    (tmp_path / "photos" / "notes.docx").write_text("x")
    assert call("import", tmp_path / "photos", tmp_path / "all", "--strict", "--quiet") == 1
    output = capsys.readouterr()
    assert "skipped: 1 (1 not an image)" in output.out
    assert "ignored: 1 of 6 files: file type .docx (1, such as notes.docx)" in output.out
    assert "--strict: 1 entries were skipped (not an image)" in output.err
    # The dataset is complete nevertheless; ignored files are no reason to fail.
    assert call("import", tmp_path / "photos", tmp_path / "all", "--json", "--quiet") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["files"], summary["caption_files"]) == (2, 6, 2)
    assert (summary["skipped"], summary["ignored"]) == ({"not an image": 1}, {"file type .docx": 1})
    assert summary["ignored_examples"] == {"file type .docx": "notes.docx"}


def test_adapt_compares_start_and_adapted_encoder(
    dataset: CaptionDataset, workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--image-size", "32", "--batch-size", "32", "--max-steps", "3", "--num-val-pairs", "20"]
    command = ["adapt", dataset.path, "--encoder", "random:resnet10t", "--out", tmp_path / "run", *options]
    assert call(*command, "--eval-dataset", workdir / "labeled", "--quiet", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["comparison"]["encoder_names"] == ["start", "adapted"]
    assert result["adaptation"]["blend"] in (0, 0.25, 0.5, 0.75, 1)
    assert call(*command, "--quiet") == 0
    assert "(chosen)" in capsys.readouterr().out


def test_existing_folders_are_not_overwritten(
    dataset: CaptionDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("data")
    assert call("train", dataset.path, "--out", tmp_path, *TINY) == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("embeddings", ["embed", "--encoder", MINILM]),
        ("neighbors", ["neighbors", "-k", "5"]),
        ("image_cache", ["train", "--out", "run", *TINY[:-1]]),
    ],
)
def test_killed_command_resumes_to_the_same_bytes(
    stage: str, command: list[str], dataset: CaptionDataset, tmp_path: Path
) -> None:
    copy = tmp_path / "c"
    shutil.copytree(dataset.path, copy)
    shutil.rmtree(copy / stage, ignore_errors=stage == "image_cache")
    arguments = [sys.executable, "-m", "likewise.cli", command[0], str(copy), *command[1:], "--quiet"]
    process = subprocess.Popen(arguments, cwd=tmp_path)
    deadline = time.monotonic() + 90
    # Killed when the stage has started: the manifest is the first file that it writes.
    while not list((copy / stage).glob("*/artifact.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    resumed = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    (artifact,) = (copy / stage).glob("*")
    uninterrupted = tmp_path / "uninterrupted"
    shutil.copytree(dataset.path, uninterrupted)
    shutil.rmtree(uninterrupted / stage, ignore_errors=True)
    uninterrupted_command = [
        str(uninterrupted) if argument == str(copy) else argument for argument in arguments
    ]
    uninterrupted_command = ["run2" if argument == "run" else argument for argument in uninterrupted_command]
    subprocess.run(uninterrupted_command, cwd=tmp_path, check=True, capture_output=True)
    assert read_files(artifact) == read_files(uninterrupted / stage / artifact.name)


def test_killed_evaluation_resumes_to_the_same_bytes(emoji: Path, tmp_path: Path) -> None:
    flags = ["--dataset", str(emoji.parent), "--protocol", "knn,retrieval", "--image-size", "48", "--quiet"]
    command = [sys.executable, "-m", "likewise.cli", "evaluate", "random:resnet10t", *flags, "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=os.environ)
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("killed/features/*/artifact.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for out in ("killed", "uninterrupted"):
        subprocess.run([*command, str(tmp_path / out)], check=True, capture_output=True)
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "uninterrupted")
