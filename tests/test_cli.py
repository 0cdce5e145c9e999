"""The command line: exit codes, one-line errors that name flags, JSON, resuming after a kill."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import likewise
from likewise.cli.__main__ import main
from likewise.cli.flags import format_list, parse_list
from likewise.data.dataset import CaptionDataset
from likewise.errors import InvalidInputError
from support import MINILM, save_png

COMMANDS = [
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
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, arguments)])
    return int(exit_info.value.code or 0)


def test_import_embed_neighbors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "[default: resnet50]" in text
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
def test_invalid_usage_is_one_line(
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


def test_json_is_the_only_output(dataset: CaptionDataset) -> None:
    result = run_cli("neighbors", dataset.path, "-k", "5", "--json", "--quiet")
    assert json.loads(result.stdout)["k"] == 5
    assert result.stderr == ""


def test_library_errors_name_fields_not_flags() -> None:
    # In a process of its own: here, type checks would reject the value first.
    code = "import likewise; likewise.PairConfig(source='langage')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "self, language, vision" in result.stderr
    assert "Did you mean language" in result.stderr
    with pytest.raises(InvalidInputError) as error_info:
        likewise.TrainConfig(batch_size=1)
    assert error_info.value.field == "batch_size"
    assert "`batch_size`" in str(error_info.value)


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


def test_unknown_encoder_is_one_line(dataset: CaptionDataset, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("eurosat, dtd", ("eurosat", "dtd")),
        ('"birds, and cats",dtd', ("birds, and cats", "dtd")),
        ('"a ""b"", c"', ('a "b", c',)),
        ('7" disc', ('7" disc',)),
        (",", ()),
    ],
)
def test_quotes_enclose_commas(text: str, parts: tuple[str, ...]) -> None:
    assert parse_list(text) == parts
    assert parse_list(format_list(parts)) == parts


def test_existing_folders_are_not_overwritten(
    dataset: CaptionDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
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
    # Killed as soon as the stage has begun: its manifest is the first file that it writes.
    while not list((copy / stage).glob("*/artifact.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    resumed = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    (artifact,) = (copy / stage).glob("*")
    uninterrupted = tmp_path / "whole"
    shutil.copytree(dataset.path, uninterrupted)
    shutil.rmtree(uninterrupted / stage, ignore_errors=True)
    whole = [str(uninterrupted) if argument == str(copy) else argument for argument in arguments]
    whole = ["run2" if argument == "run" else argument for argument in whole]
    subprocess.run(whole, cwd=tmp_path, check=True, capture_output=True)
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
    for out in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / out)], check=True, capture_output=True)
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "whole")
