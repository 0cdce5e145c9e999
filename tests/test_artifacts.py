"""Artifacts: atomic, keyed, never mixed, never unpickled."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from likewise.artifacts import (
    MANIFEST,
    atomic,
    begin,
    fingerprint,
    key_of,
    open_artifact,
    read_array,
    read_yaml,
    slug,
    write_array,
    write_json,
    write_yaml,
)
from likewise.errors import ArtifactError, InputError


def test_begun_resumed_finished_reused(tmp_path: Path) -> None:
    first = begin(tmp_path / "a", "thing", {"size": 3}, {"from": "x"})
    assert not first.complete
    (tmp_path / "a" / ".part.npy.999999999.tmp").write_bytes(b"left by a kill")
    (tmp_path / "a" / f".part.npy.{os.getppid()}.tmp").write_bytes(b"being written")
    with pytest.raises(ArtifactError, match="unfinished; run the command"):
        open_artifact(tmp_path / "a", "thing")
    again = begin(tmp_path / "a", "thing", {"size": 3}, {"from": "x"})
    assert [p.name for p in (tmp_path / "a").glob(".*.tmp")] == [f".part.npy.{os.getppid()}.tmp"]
    again.finish({"rows": 4}, {"broken": 1})
    done = begin(tmp_path / "a", "thing", {"size": 3}, {"from": "x"})
    assert done.complete
    assert open_artifact(tmp_path / "a", "thing").manifest.skipped == {"broken": 1}


def test_other_settings_inputs_or_kinds_are_never_mixed(tmp_path: Path) -> None:
    begin(tmp_path / "a", "thing", {"size": 3, "note": 1}, {"from": "x"}, volatile=("note",)).finish({})
    assert begin(tmp_path / "a", "thing", {"size": 3, "note": 2}, {"from": "x"}, volatile=("note",)).complete
    before = (tmp_path / "a" / MANIFEST).read_bytes()
    with pytest.raises(ArtifactError, match="size was 3, is 4"):
        begin(tmp_path / "a", "thing", {"size": 4, "note": 1}, {"from": "x"}, volatile=("note",))
    with pytest.raises(ArtifactError, match="its inputs have changed since"):
        begin(tmp_path / "a", "thing", {"size": 3, "note": 1}, {"from": "y"}, volatile=("note",))
    with pytest.raises(ArtifactError, match="holds a thing, not a stone"):
        begin(tmp_path / "a", "stone", {}, {})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="not empty and holds no thing"):
        begin(tmp_path / "b", "thing", {}, {})
    with pytest.raises(ArtifactError, match="is a file"):
        begin(tmp_path / "b" / "mine.txt", "thing", {}, {})
    assert (tmp_path / "a" / MANIFEST).read_bytes() == before
    assert (tmp_path / "b" / "mine.txt").read_text() == "precious"


def test_damaged_or_newer_manifests_are_told(tmp_path: Path) -> None:
    begin(tmp_path / "a", "thing", {}, {})
    (tmp_path / "a" / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        open_artifact(tmp_path / "a", "thing")
    write_json(tmp_path / "a" / MANIFEST, {"format": 99})
    with pytest.raises(ArtifactError, match="newer likewise"):
        open_artifact(tmp_path / "a", "thing")
    with pytest.raises(ArtifactError, match="does not exist"):
        open_artifact(tmp_path / "none", "thing")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "f.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"]


def test_a_full_disk_is_one_sentence() -> None:
    # /dev/full takes no byte: the real error, without filling a disk.
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space") as caught:
        full.write_bytes(b"x" * 10_000)
    assert caught.value.errno == errno.ENOSPC


def test_no_space_left_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"no space left to write .*f\.npy.*run the same command again"),
        atomic(tmp_path / "f.npy"),
    ):
        Path("/dev/full").write_bytes(b"x" * 10_000)
    assert not list(tmp_path.iterdir())


def test_arrays_with_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_array(tmp_path / "evil.npy")
    write_array(tmp_path / "good.npy", np.arange(5))
    assert read_array(tmp_path / "good.npy").tolist() == [0, 1, 2, 3, 4]


def test_keys_cover_settings_and_inputs_whatever_their_order(tmp_path: Path) -> None:
    assert key_of("a", {"x": 1, "y": 2}, {}) == key_of("a", {"y": 2, "x": 1}, {})
    keys = {
        key_of("a", {"x": 1}, {}),
        key_of("b", {"x": 1}, {}),
        key_of("a", {"x": 2}, {}),
        key_of("a", {"x": 1}, {"i": "1"}),
    }
    assert len(keys) == 4
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("1")
    one = fingerprint(tmp_path / "d")
    (tmp_path / "d" / "f").write_text("2")
    assert fingerprint(tmp_path / "d") != one


def test_slugs_are_safe_folder_names() -> None:
    assert slug("sentence-transformers/all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    assert slug("../..") == "unnamed"
    assert "/" not in slug("a b/c d:e")


def test_settings_go_to_yaml_and_back(tmp_path: Path) -> None:
    write_yaml(tmp_path / "s.yaml", {"rate": 0.0, "name": "x"})
    assert read_yaml(tmp_path / "s.yaml") == {"rate": 0.0, "name": "x"}
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not valid YAML"):
        read_yaml(tmp_path / "bad.yaml")
    with pytest.raises(InputError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")
