"""Artifacts: atomic writes, config hashes, no overwritten data and no pickles."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from likewise.artifacts import (
    FORMAT_VERSION,
    MANIFEST,
    Artifact,
    atomic_write,
    config_hash,
    fingerprint,
    mmap_array,
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
    with pytest.raises(ValueError, match="allow_pickle"):
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
