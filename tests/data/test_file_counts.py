"""Every file of a folder or archive is used, skipped or ignored with its reason."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from helpers.pictures import Picture, write_file, write_images
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.data.readers.files import IgnoredFiles, file_type_reason, walk_files
from likewise.errors import InvalidInputError

_FOLDERS = ("", "a/", "a/b.c/", "ü/", ".hidden/", "__MACOSX/")
_STEMS = ("0", "1", "2", "v2.0 (final)", "0.image", "0.mask", "x.jpg", "._1", "日本")
_SUFFIXES = (
    *(".jpg", ".JPG", ".png", ".txt", ".TXT", ".json", ".caption"),
    *(".jpg.txt", ".docx", "", ".123", ".tar.gz", ".caption.txt"),
)


def random_files(rng: random.Random, pictures: list[Picture]) -> list[tuple[str, bytes]]:
    """Return names and contents of random files, all names distinct, some contents damaged."""
    names = {
        rng.choice(_FOLDERS) + rng.choice(_STEMS) + rng.choice(_SUFFIXES) for _ in range(rng.randint(1, 40))
    }
    contents = (b"a caption", b'{"caption": "b"}', b'"c"', b"\xff", b"")
    is_image = (".jpg", ".png")
    return [
        (
            name,
            rng.choice(pictures)[1]
            if name.lower().endswith(is_image) and rng.random() < 0.8
            else rng.choice(contents),
        )
        for name in sorted(names)
    ]


def assert_all_counted(dataset: CaptionDataset, num_files: int) -> None:
    manifest = dataset.artifact.manifest
    num_captions = manifest.counts.get("caption_files", 0)
    num_others = sum(manifest.skipped.values()) + sum(manifest.ignored.values())
    assert manifest.counts["files"] == num_files
    assert len(dataset) + num_captions + num_others == num_files
    assert manifest.skipped.get("duplicate id", 0) == 0
    assert manifest.ignored.keys() == manifest.ignored_examples.keys()


def count_entries(folder: Path) -> int:
    """Count files; links, hidden folders and the dataset count once, as their content is not read."""
    num_files = 0
    for path in folder.iterdir():
        is_single = path.is_symlink() or path.name.startswith(".") or path.name in {"__MACOSX", "out"}
        num_files += 1 if is_single or not path.is_dir() else count_entries(path)
    return num_files


@pytest.mark.parametrize("seed", range(12))
def test_files_of_a_folder(tmp_path: Path, pictures: list[Picture], seed: int) -> None:
    rng = random.Random(seed)
    src = tmp_path / "src"
    write_images(src, pictures[:1])
    for name, data in random_files(rng, pictures):
        write_file(src / name, data)
    (src / "loop.jpg").symlink_to("loop.jpg")
    (src / "loop.txt").symlink_to("nowhere")
    (src / "up").symlink_to("..")
    (src / "same").symlink_to(".")
    dataset = import_dataset(src, src / "out")
    assert_all_counted(dataset, count_entries(src))


@pytest.mark.parametrize("seed", range(12))
def test_members_of_an_archive(tmp_path: Path, pictures: list[Picture], seed: int) -> None:
    rng = random.Random(seed)
    files = [("good.jpg", pictures[0][1]), *random_files(rng, pictures)]
    members = [*files, *rng.sample(files, rng.randint(0, len(files)))]
    if seed % 2:
        rng.shuffle(members)
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for index, target in enumerate(("good.jpg", "nothing.jpg", "l2.jpg")):
            info = tarfile.TarInfo(f"l{index}.jpg")
            info.type, info.linkname = rng.choice((tarfile.LNKTYPE, tarfile.SYMTYPE)), target
            archive.addfile(info)
    assert_all_counted(import_dataset(tmp_path / "t.tar", tmp_path / "out"), len(members) + 3)


def test_a_consistent_import_is_one_line(
    tmp_path: Path, pictures: list[Picture], log: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "src", pictures)
    for name, _, caption in pictures:
        write_file(tmp_path / "src" / f"{name}.txt", caption)
    dataset = import_dataset(tmp_path / "src", tmp_path / "out")
    assert len(log.messages) == 1
    assert not dataset.artifact.manifest.ignored


def test_a_mostly_skipped_source_is_a_loud_warning(
    tmp_path: Path, pictures: list[Picture], log: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "src", pictures[:2])
    for index in range(3):
        write_file(tmp_path / "src" / f"bad{index}.jpg", b"<html>")
    import_dataset(tmp_path / "src", tmp_path / "out")
    assert any("more than half of the entries were skipped" in message for message in log.messages)


def test_walk_is_complete_and_deterministic(tmp_path: Path) -> None:
    names = ["b.txt", "a/c.txt", "a/b/d.txt", ".git/config", "Thumbs.db", "a/.DS_Store", "z/artifact.json"]
    for name in names:
        write_file(tmp_path / name, "x")
    os.mkfifo(tmp_path / "pipe")
    ignored = IgnoredFiles()
    assert list(walk_files(tmp_path, ignored)) == ["b.txt", "a/c.txt", "a/b/d.txt"]
    assert ignored.counts == {
        "hidden file": 2, "system file": 1, "folder written by likewise": 1, "broken link or special file": 1
    }  # fmt: skip
    assert ignored.num_seen == 8
    with pytest.raises(InvalidInputError, match="cannot read the folder"):
        list(walk_files(tmp_path / "nothing", ignored))


def test_names_that_are_not_utf8_are_ignored_and_recorded(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src", pictures[:1])
    (tmp_path / "src" / os.fsdecode(b"caf\xe9.doc\xff")).write_bytes(b"x")
    dataset = import_dataset(tmp_path / "src", tmp_path / "out")
    assert dataset.artifact.manifest.ignored_examples == {"other file type": "caf\\udce9.doc\\udcff"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.DOCX", "file type .docx"),
        ("README", "file without a suffix"),
        ("a.1234", "other file type"),
        ("Mr. Smith and friends", "other file type"),
    ],
)
def test_file_type_reason(name: str, reason: str) -> None:
    assert file_type_reason(name) == reason
