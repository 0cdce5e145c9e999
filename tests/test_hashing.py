"""Fingerprints depend on content and names, not on times or places."""

import os
import shutil
from pathlib import Path

import pytest

from likewise.hashing import SAMPLED_BYTES, content_fingerprint, hash_files


@pytest.mark.parametrize("size", [0, 10, SAMPLED_BYTES, 3 * SAMPLED_BYTES + 1])
def test_copied_and_touched_files_keep_their_fingerprint(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(os.urandom(size))
    before = content_fingerprint(path)
    os.utime(path, (1, 1))
    copy = tmp_path / "other folder" / "b"
    copy.parent.mkdir()
    shutil.copyfile(path, copy)
    assert content_fingerprint(path) == content_fingerprint(str(copy)) == before


@pytest.mark.parametrize("size", [10, SAMPLED_BYTES, 3 * SAMPLED_BYTES + 1])
@pytest.mark.parametrize("position", [0, -1])
def test_mended_files_have_another_fingerprint(tmp_path: Path, size: int, position: int) -> None:
    path = tmp_path / "a"
    content = bytearray(os.urandom(size))
    path.write_bytes(content)
    before = content_fingerprint(path)
    content[position] ^= 1
    path.write_bytes(content)
    assert content_fingerprint(path) != before
    path.write_bytes(content + b"\0")
    assert content_fingerprint(path) != before


def test_whole_bytes_decides_whether_the_middle_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    content = bytearray(8 * SAMPLED_BYTES)
    path.write_bytes(content)
    sampled, whole = content_fingerprint(path), content_fingerprint(path, len(content))
    content[len(content) // 2] = 1
    path.write_bytes(content)
    assert content_fingerprint(path) == sampled
    assert content_fingerprint(path, len(content)) != whole


def test_what_is_no_readable_file_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it must not wait for a writer
    for name in (tmp_path, tmp_path / "pipe", tmp_path / "none", "a\0b", "\ud800"):
        assert content_fingerprint(name) == "missing"


def test_hash_of_files_depends_on_names_and_order_of_many_files(tmp_path: Path) -> None:
    names = [f"{i:03d}" for i in range(200)]
    for name in names:
        (tmp_path / name).write_text(name)
    before = hash_files(tmp_path, iter(names))
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert hash_files(tmp_path / "copy", names) == before
    assert hash_files(tmp_path, names[::-1]) != before
    assert hash_files(tmp_path, names[:-1]) != before
    (tmp_path / names[150]).unlink()
    assert hash_files(tmp_path, names) != before


@pytest.mark.parametrize(("suffix", "is_whole"), [("bmp", True), ("tif", True), ("jpg", False)])
def test_files_that_are_no_compressed_images_are_hashed_completely(
    tmp_path: Path, suffix: str, is_whole: bool
) -> None:
    file = tmp_path / f"a.{suffix}"
    content = bytearray(4 * SAMPLED_BYTES)
    file.write_bytes(content)
    before = content_fingerprint(file)
    content[SAMPLED_BYTES // 2 + 50_000] = 1  # between the sampled blocks
    file.write_bytes(content)
    assert (content_fingerprint(file) != before) == is_whole
