"""Mutated files of every format end with an error of likewise or with counts that add up."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmarks import fuzz as fuzzer
from benchmarks.fuzz_readers import READERS, ReaderTest, Source
from benchmarks.mutations import Files

from likewise.artifacts import MANIFEST, Artifact, damaged_as_error
from likewise.data.readers.cells import cell_texts, equals_text
from likewise.data.readers.columns import _is_textual
from likewise.data.readers.files import IgnoredFiles
from likewise.data.readers.sidecars import SidecarError, parse_json_sidecar
from likewise.data.readers.tables import cell_image
from likewise.errors import ArtifactError, InvalidInputError
from likewise.evaluation.datasets.annotations import clean_label, is_true, parse_class_number, parse_numbers
from likewise.evaluation.datasets.yolo import find_yolo_config

ROOT = Path(__file__).parent.parent
_NUM_CASES = dict.fromkeys(READERS, 200) | {"images": 800, "weights": 100}


def test_mutated_files(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.fuzz", "--cases", "150", "--failures", tmp_path],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = dict(line.split(":") for line in result.stdout.splitlines())
    assert list(lines) == list(READERS)
    for line in lines.values():
        assert line.startswith(" 150 cases")
        assert " read" in line
        assert "Error" in line
        assert line.endswith(" 0 failures")


def _raise() -> None:
    raise KeyError("x")


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang() -> None:
    time.sleep(30)


def _write() -> None:
    os.write(2, b"libfoo: warning")


def _allocate() -> None:
    np.ones(2**27)


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (_raise, "KeyError"),
        (_crash, "Segmentation fault"),
        (_hang, "Timeout"),
        (_write, "libfoo"),
        (_allocate, "MiB, more than"),
    ],
)
def test_bad_readers_fail(
    check: Callable[[], None], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_mutated(_: Path, files: Files) -> None:
        if files["a.txt"] != b"abc":
            check()

    source = Source(files={"a.txt": b"abc"}, mutable=("a.txt",), check=check_mutated)
    test = ReaderTest(name="bad", make_sources=lambda _: [source], max_mib=1024, is_silent=True)
    monkeypatch.setitem(READERS, "bad", test)
    monkeypatch.setattr(fuzzer, "_CASE_SECONDS", 1 if check is _hang else 20)
    report = fuzzer.fuzz("bad", 3, failures=tmp_path)
    assert report.num_cases == 3
    assert report.failures
    failure = report.failures[0]
    assert expected in str(failure.error)
    folder = tmp_path / f"bad-0-{failure.index}"
    assert expected in (folder / "error.txt").read_text()
    assert (folder / "files" / "a.txt").read_bytes() != b"abc"
    if check is _raise:
        with pytest.raises(KeyError):
            fuzzer.replay("bad", 0, failure.index)


def test_deep_nesting_is_no_text() -> None:
    deep: object = "x"
    for _ in range(900):
        deep = [deep]
    with pytest.raises(ValueError, match="not text"):
        cell_texts(deep)
    with pytest.raises(ValueError, match="not text"):
        equals_text(deep, "x")
    image = cell_image(deep)
    assert image is not None
    assert image.path == "x"
    assert not _is_textual(deep)
    assert clean_label(deep) == ""
    assert not is_true(deep)
    with pytest.raises(SidecarError):
        parse_json_sidecar(b"[" * 990 + b"]" * 990)
    assert cell_texts([[["a"], {"raw": "b"}]]) == ("a", "b")


def test_huge_and_odd_numbers() -> None:
    assert parse_numbers([1, 10**400], 2) is None
    assert [parse_class_number(text) for text in ("007", " 2 ", "²", "-1", "9" * 10, "")] == [
        7,
        2,
        *[None] * 4,
    ]


@pytest.mark.parametrize(
    "names", ["nc: ²", f"nc: {'9' * 20}", "nc: 999999999", "names: {²: cat}", "names: " + "[" * 3000]
)
def test_yolo_config_with_odd_class_numbers(tmp_path: Path, names: str) -> None:
    (tmp_path / "data.yaml").write_text(f"train: a\nval: b\n{names}\n")
    with pytest.raises(InvalidInputError):
        find_yolo_config(tmp_path, IgnoredFiles())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("counts", []),
            ("counts", {"shards": -1}),
            ("counts", {"shards": "x"}),
            ("counts", {"shards": 1.5}),
        ),
        *(("inputs", {"a": 1}), ("settings", 3), ("key", None), ("skipped", {"a": None}), ("unknown", 1)),
    ],
)
def test_damaged_manifest(tmp_path: Path, name: str, value: object) -> None:
    Artifact.create_or_resume(tmp_path, "thing", {"a": 1}, {}).finish({"shards": 1})
    content = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(content | {name: value}))
    with pytest.raises(ArtifactError, match="damaged"):
        Artifact.open(tmp_path, "thing")


def test_manifest_without_a_value(tmp_path: Path) -> None:
    Artifact.create_or_resume(tmp_path, "thing", {"a": 1}, {}).finish({"shards": 1})
    manifest = Artifact.open(tmp_path, "thing").manifest
    assert manifest.settings["a"] == 1
    assert manifest.counts.get("rows") is None
    with pytest.raises(ArtifactError, match="lacks 'rows'") as raised:
        _ = manifest.counts["rows"]
    assert raised.value.path == tmp_path / MANIFEST


@pytest.mark.parametrize("error", [MemoryError(), SyntaxError("x"), RuntimeError(), OSError("no number")])
def test_errors_of_libraries_name_the_damaged_file(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(ArtifactError, match="damaged"), damaged_as_error(tmp_path / "x.npy"):
        raise error
