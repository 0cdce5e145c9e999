"""Artifacts: atomic writes, config hashes, no overwritten data and no pickles."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from likewise.artifacts import (
    FORMAT_VERSION,
    MANIFEST,
    Artifact,
    atomic_write,
    config_hash,
    fingerprint,
    load_array,
    mmap_array,
    read_json,
    read_jsonl,
    read_yaml,
    slugify,
    write_array,
    write_json,
    write_yaml,
)
from likewise.errors import ArtifactError, InvalidInputError
from likewise.locks import HOST, LOCK_NAME


def test_artifact_is_created_resumed_finished_and_reused(tmp_path: Path) -> None:
    first = Artifact.create_or_resume(tmp_path / "a", "thing", {"size": 3}, {"from": "x"})
    assert not first.is_complete
    (tmp_path / "a" / f".part.npy.{HOST}.999999999.tmp").write_bytes(b"left by a kill")
    remaining = [f".part.npy.{HOST}.{os.getppid()}.tmp", ".part.npy.other-host.999999999.tmp", ".mine.tmp"]
    for name in remaining:
        (tmp_path / "a" / name).write_bytes(b"of a running process, another machine, a user")
    with pytest.raises(ArtifactError, match="incomplete; run the step"):
        Artifact.open(tmp_path / "a", "thing")
    resumed = Artifact.create_or_resume(tmp_path / "a", "thing", {"size": 3}, {"from": "x"})
    assert sorted(p.name for p in (tmp_path / "a").glob(".*.tmp")) == sorted(remaining)
    resumed.finish({"rows": 4}, {"broken": 1})
    done = Artifact.create_or_resume(tmp_path / "a", "thing", {"size": 3}, {"from": "x"})
    assert done.is_complete
    assert Artifact.open(tmp_path / "a", "thing").manifest.skipped == {"broken": 1}


def test_existing_folder_with_other_settings_inputs_or_type_raises(tmp_path: Path) -> None:
    Artifact.create_or_resume(
        tmp_path / "a", "thing", {"size": 3, "note": 1}, {"from": "x"}, non_hashed=("note",)
    ).finish({})
    assert Artifact.create_or_resume(
        tmp_path / "a", "thing", {"size": 3, "note": 2}, {"from": "x"}, non_hashed=("note",)
    ).is_complete
    before = (tmp_path / "a" / MANIFEST).read_bytes()
    with pytest.raises(ArtifactError, match="size was 3, is 4"):
        Artifact.create_or_resume(
            tmp_path / "a", "thing", {"size": 4, "note": 1}, {"from": "x"}, non_hashed=("note",)
        )
    with pytest.raises(ArtifactError, match="inputs"):
        Artifact.create_or_resume(
            tmp_path / "a", "thing", {"size": 3, "note": 1}, {"from": "y"}, non_hashed=("note",)
        )
    with pytest.raises(ArtifactError, match="thing.*stone"):
        Artifact.create_or_resume(tmp_path / "a", "stone", {}, {})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="not empty"):
        Artifact.create_or_resume(tmp_path / "b", "thing", {}, {})
    with pytest.raises(ArtifactError, match="is a file"):
        Artifact.create_or_resume(tmp_path / "b" / "notes.txt", "thing", {}, {})
    assert (tmp_path / "a" / MANIFEST).read_bytes() == before
    assert (tmp_path / "b" / "notes.txt").read_text() == "precious"


def test_damaged_or_newer_manifests_raise(tmp_path: Path) -> None:
    Artifact.create_or_resume(tmp_path / "a", "thing", {}, {})
    (tmp_path / "a" / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        Artifact.open(tmp_path / "a", "thing")
    write_json(tmp_path / "a" / MANIFEST, {"format": 99})
    with pytest.raises(ArtifactError, match="newer likewise"):
        Artifact.open(tmp_path / "a", "thing")
    with pytest.raises(ArtifactError, match="does not exist"):
        Artifact.open(tmp_path / "none", "thing")


def test_failed_write_does_not_change_the_file(tmp_path: Path) -> None:
    target = tmp_path / "f.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_long_names_can_be_written(tmp_path: Path) -> None:
    target = tmp_path / ("ä" * 125 + ".txt")  # 254 bytes; file systems allow 255
    with atomic_write(target) as temporary:
        temporary.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_kill_during_the_first_write_does_not_block_the_folder(tmp_path: Path) -> None:
    (tmp_path / f".{MANIFEST}.{HOST}.999999999.tmp").write_text("{")
    (tmp_path / LOCK_NAME).touch()
    with Artifact.exclusive(tmp_path, "thing", {}, {}) as artifact:
        artifact.finish({})
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_full_disk_raises_artifact_error() -> None:
    # Every write to /dev/full fails with the error of a full disk.
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space") as excinfo:
        full.write_bytes(b"x" * 10_000)
    assert excinfo.value.errno == errno.ENOSPC


def test_full_disk_error_names_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"no space left .*f\.npy"),
        atomic_write(tmp_path / "f.npy"),
    ):
        Path("/dev/full").write_bytes(b"x" * 10_000)
    assert not list(tmp_path.iterdir())


def test_pickled_object_arrays_raise(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"evil\.npy is damaged .*allow_pickle"):
        mmap_array(tmp_path / "evil.npy")
    write_array(tmp_path / "good.npy", np.arange(5))
    assert mmap_array(tmp_path / "good.npy").tolist() == [0, 1, 2, 3, 4]


def test_config_hash_ignores_order(tmp_path: Path) -> None:
    assert config_hash("a", {"x": 1, "y": 2}, {}) == config_hash("a", {"y": 2, "x": 1}, {})
    keys = {
        config_hash("a", {"x": 1}, {}),
        config_hash("b", {"x": 1}, {}),
        config_hash("a", {"x": 2}, {}),
        config_hash("a", {"x": 1}, {"i": "1"}),
    }
    assert len(keys) == 4
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("1")
    before = fingerprint(tmp_path / "d")
    (tmp_path / "d" / "f").write_text("2")
    assert fingerprint(tmp_path / "d") != before


def test_slugify_gives_safe_folder_names() -> None:
    assert slugify("sentence-transformers/all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    assert slugify("../..") == "unnamed"
    assert "/" not in slugify("a b/c d:e")


def test_yaml_round_trip(tmp_path: Path) -> None:
    write_yaml(tmp_path / "s.yaml", {"rate": 0.0, "name": "x"})
    assert read_yaml(tmp_path / "s.yaml") == {"rate": 0.0, "name": "x"}
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InvalidInputError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")
    with pytest.raises(InvalidInputError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")


def test_older_format_raises(tmp_path: Path) -> None:
    Artifact.create_or_resume(tmp_path / "a", "thing", {}, {}).finish({})
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest | {"format": FORMAT_VERSION - 1}))
    for read in (Artifact.open, lambda path, kind: Artifact.create_or_resume(path, kind, {}, {})):
        with pytest.raises(ArtifactError, match="older") as excinfo:
            read(tmp_path / "a", "thing")
        assert excinfo.value.path == tmp_path / "a"


def test_find_returns_complete_artifacts_of_one_kind(tmp_path: Path) -> None:
    for name in ("b", "a", "incomplete"):
        artifact = Artifact.create_or_resume(tmp_path / name, "thing", {}, {})
        if name != "incomplete":
            artifact.finish({})
    Artifact.create_or_resume(tmp_path / "other", "stone", {}, {}).finish({})
    (tmp_path / "empty").mkdir()
    assert [artifact.path.name for artifact in Artifact.find(tmp_path, "thing")] == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"<html>", b"\xff" * 5000])
def test_damaged_arrays_name_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    for read in (load_array, mmap_array):
        with pytest.raises(ArtifactError, match=r"a\.npy is damaged") as error:
            read(tmp_path / "a.npy")
        assert error.value.path == tmp_path / "a.npy"
    write_array(tmp_path / "b.npy", np.arange(5000))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:9000])
    with pytest.raises(ArtifactError, match=r"b\.npy is damaged"):
        mmap_array(tmp_path / "b.npy")


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_settings_are_read_with_a_mark_and_errors_name_the_file(
    read: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "settings"
    path.write_bytes('\ufeff{"größe": "ü"}'.encode())
    assert read(path) == {"größe": "ü"}
    invalid = [b"\xff\xfe{", "{'a': '\u00fc'}".encode("latin-1"), b"{" * 100_000, b'{"a": ]', b"\x00"]
    for content in [*invalid, *([b"a: 2025-99-99"] if read is read_yaml else [])]:
        path.write_bytes(content)
        with pytest.raises(InvalidInputError, match="settings is not valid") as error:
            read(path)
        assert error.value.path == path


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{" * 100_000, b"null"])
def test_damaged_manifests_are_errors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "artifact.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        Artifact.open(tmp_path, "dataset")


def test_json_lines_skip_a_truncated_character_and_contain_any_text(tmp_path: Path) -> None:
    rows = [{"a": "one\u2028two\x0bthree\x85"}, {"a": "ü"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes((text + '\n{"a": "ü').encode()[:-1])
    assert read_jsonl(tmp_path / "a.jsonl") == rows
