"""Tar archives in WebDataset format."""

import gzip
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from helpers.pictures import (
    Picture,
    expected_samples,
    read_files,
    samples_by_id,
    tar_members,
    write_file,
    write_tar,
)
from likewise.data.importing import import_dataset
from likewise.data.readers import ImportOptions
from likewise.errors import InvalidInputError


def test_tar_is_read_in_place(tmp_path: Path, pictures: list[Picture]) -> None:
    path = write_tar(tmp_path / "src" / "00000.tar", tar_members(pictures))
    expected_files = read_files(tmp_path / "src")
    dataset = import_dataset(path, tmp_path / "out")
    assert samples_by_id(dataset) == expected_samples(pictures, "00000/{}")
    assert all(s.group == "00000" and s.image.bytes is None and s.image.path == "00000.tar" for s in dataset)
    assert read_files(tmp_path / "src") == expected_files


@pytest.mark.parametrize("pattern", ["", "*.tar"])
def test_several_tar_archives(tmp_path: Path, pictures: list[Picture], pattern: str) -> None:
    write_tar(tmp_path / "src" / "b.tar", tar_members(pictures[3:]))
    write_tar(tmp_path / "src" / "a.tar", tar_members(pictures[:3]))
    dataset = import_dataset(f"{tmp_path}/src/{pattern}".rstrip("/"), tmp_path / "out")
    assert list(samples_by_id(dataset)) == [
        *expected_samples(pictures[:3], "a/{}"),
        *expected_samples(pictures[3:], "b/{}"),
    ]
    assert samples_by_id(dataset) == expected_samples(pictures[:3], "a/{}") | expected_samples(
        pictures[3:], "b/{}"
    )


def test_tartar_members(tmp_path: Path, pictures: list[Picture]) -> None:
    """Members of a sample may be scattered; masks are not samples; names with dots and `..` are allowed."""
    data = pictures[0][1]
    members = {
        "s.jpg": data,
        "s.mask.png": data,
        "../../evil.jpg": data,
        "000.114.28.jpg": data,
        "000.171.33.jpg": data,
        "._s.jpg": b"x",
        "s.json": b'{"caption": "late"}',
        "/abs.jpg": data,
    }
    dataset = import_dataset(write_tar(tmp_path / "t.tar", members), tmp_path / "out")
    assert {key: captions for key, (_, captions) in samples_by_id(dataset).items()} == {
        "t/s": ("late",), "t/../../evil": (), "t/000.114.28": (), "t/000.171.33": (), "t//abs": ()
    }  # fmt: skip
    assert dataset.artifact.manifest.ignored == {"another image of a sample": 1, "hidden file": 1}
    assert {p.name for p in tmp_path.rglob("*")} == {"t.tar", "out", "artifact.json", "samples-00000.parquet"}


@pytest.mark.parametrize("cut_at", ["data", "header", "garbage"])
def test_truncatedwrite_tar(tmp_path: Path, pictures: list[Picture], cut_at: str) -> None:
    uninterrupted = write_tar(tmp_path / "t.tar", tar_members(pictures)).read_bytes()
    with tarfile.open(tmp_path / "t.tar") as archive:
        fourth = archive.getmember(f"{pictures[3][0]}.jpg")
    cut = fourth.offset_data + 600 if cut_at == "data" else fourth.offset + 200
    write_file(tmp_path / "t.tar", uninterrupted[:cut] + (b"\x99" * 4096 if cut_at == "garbage" else b""))
    dataset = import_dataset(tmp_path / "t.tar", tmp_path / "out")
    assert samples_by_id(dataset) == expected_samples(pictures[:3], "t/{}")
    ((reason, count),) = dataset.artifact.manifest.skipped.items()
    assert count == 1
    assert "archive is" in reason


def test_compressed_tar_raises(tmp_path: Path, pictures: list[Picture]) -> None:
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz"):
        pass
    for name in ("t.tar.gz", "renamed.tar"):
        write_file(tmp_path / name, (tmp_path / "t.tar.gz").read_bytes())
        with pytest.raises(InvalidInputError, match="is compressed"):
            import_dataset(tmp_path / name, tmp_path / "out")
    write_file(tmp_path / "no.tar", pictures[0][1])
    with pytest.raises(InvalidInputError, match="no readable image.*archive is"):
        import_dataset(tmp_path / "no.tar", tmp_path / "out")


def add_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write an archive in which names may be repeated."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def import_captions(path: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    dataset = import_dataset(path, path.parent / f"out-{path.stem}", ImportOptions(**options))
    return {sample.id: sample.captions for sample in dataset}


def test_repeated_keys_start_new_samples(tmp_path: Path, pictures: list[Picture]) -> None:
    red, blue = pictures[0][1], pictures[1][1]
    halves = [
        *[("0.jpg", red), ("0.txt", b"red"), ("1.jpg", red), ("1.json", b'{"caption": "red 1"}')],
        *[("0.png", blue), ("0.json", b'{"caption": "blue"}'), ("1.jpg", blue), ("1.txt", b"blue 1")],
    ]
    dataset = import_dataset(add_members(tmp_path / "t.tar", halves), tmp_path / "out")
    assert samples_by_id(dataset) == {
        "t/0": (red, ("red",)), "t/1": (red, ("red 1",)),
        "t/0#2": (blue, ("blue",)), "t/1#2": (blue, ("blue 1",)),
    }  # fmt: skip
    assert dataset.artifact.manifest.counts["repeated_keys"] == 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("i i t t", ("t1", "t2")),
        ("i t i t", ("t1", "t2")),
        ("i i t", None),
        ("i t t", None),
    ],
)
def test_repeated_names_without_their_own_run(
    tmp_path: Path, pictures: list[Picture], names: str, expected: tuple[str, ...] | None
) -> None:
    members, texts = [("good.jpg", pictures[0][1])], iter(("t1", "t2"))
    members += [
        ("0.jpg", pictures[1][1]) if name == "i" else ("0.txt", next(texts).encode())
        for name in names.split()
    ]
    dataset = import_dataset(add_members(tmp_path / "t.tar", members), tmp_path / "out")
    captions = tuple(caption for sample in dataset for caption in sample.captions)
    assert captions == (expected or ())
    assert bool(dataset.artifact.manifest.skipped) == (expected is None)


def test_keys_end_at_the_first_dot_if_names_differ_behind_it(tmp_path: Path, pictures: list[Picture]) -> None:
    data = pictures[0][1]
    members = {
        "a/s0.image.jpg": data,
        "a/s0.caption.txt": b"dotted",
        "a/s0.boxes.json": b"[[1, 2]]",
        "s1.view.jpg": data,
        "s1.json": b'{"caption": "one dot"}',
        "photo v2.0 (final).jpg": data,
        "photo v2.1 (final).jpg": data,
        "photo v2.0 (final).txt": b"v2.0",
        "photo v2.1 (final).txt": b"v2.1",
        "s2.jpg": data,
        "s2.mask.png": data,
        "s2.txt": b"main",
        "./b/s3.jpg": data,
        "./b/s3.jpg.txt": b"full name",
    }
    assert import_captions(write_tar(tmp_path / "t.tar", members)) == {
        "t/a/s0": ("dotted",), "t/s1": ("one dot",), "t/photo v2.0 (final)": ("v2.0",),
        "t/photo v2.1 (final)": ("v2.1",), "t/s2": ("main",), "t/b/s3": ("full name",),
    }  # fmt: skip


def test_image_column_selects_one_of_several_images(tmp_path: Path, pictures: list[Picture]) -> None:
    data, other = pictures[0][1], pictures[1][1]
    members = {"good.jpg": data, "0.left.jpg": data, "0.right.jpg": other, "0.caption.txt": b"both"}
    path = write_tar(tmp_path / "t.tar", members)
    dataset = import_dataset(path, tmp_path / "out")
    assert [sample.id for sample in dataset] == ["t/good"]
    ((reason, count),) = dataset.artifact.manifest.skipped.items()
    assert (count, "set `image_column`" in reason) == (2, True)
    for name in ("right", "right.jpg"):
        dataset = import_dataset(path, tmp_path / name, ImportOptions(image_column=name))
        assert samples_by_id(dataset) == {"t/0": (other, ("both",))}
    with pytest.raises(InvalidInputError, match="another image of a sample"):
        import_dataset(path, tmp_path / "none", ImportOptions(image_column="middle"))


def test_links_are_resolved_inside_the_archive(tmp_path: Path, pictures: list[Picture]) -> None:
    src, data = tmp_path / "x", pictures[0][1]
    write_file(src / "0.jpg", data)
    write_file(src / "0.txt", "a caption")
    os.link(src / "0.jpg", src / "1.jpg")
    (src / "sub").mkdir()
    for name, target in (
        ("sub/2.jpg", "../1.jpg"),
        ("sub/2.txt", "../0.txt"),
        ("3.jpg", "../0.jpg"),
        ("4.jpg", "4.jpg"),
    ):
        (src / name).symlink_to(target)
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        archive.add(src, "x")
    dataset = import_dataset(tmp_path / "t.tar", tmp_path / "out")
    assert samples_by_id(dataset) == {
        "t/x/0": (data, ("a caption",)), "t/x/1": (data, ()), "t/x/sub/2": (data, ("a caption",))
    }  # fmt: skip
    assert dataset.artifact.manifest.skipped == {"link to nothing in the archive": 2}


def test_hidden_members_are_ignored(tmp_path: Path, pictures: list[Picture]) -> None:
    data = pictures[0][1]
    names = ["./a.jpg", "./._a.jpg", "./.git/b.jpg", "__MACOSX/c.jpg", "d/Thumbs.db"]
    dataset = import_dataset(write_tar(tmp_path / "t.tar", dict.fromkeys(names, data)), tmp_path / "out")
    assert [sample.id for sample in dataset] == ["t/a"]
    assert dataset.artifact.manifest.ignored == {"hidden file": 2, "system file": 2}


def test_one_bad_archive_does_not_end_the_import(tmp_path: Path, pictures: list[Picture]) -> None:
    write_tar(tmp_path / "src" / "a" / "good.tar", tar_members(pictures))
    write_file(tmp_path / "src" / "bad.tar", b"x" * 2000)
    write_file(tmp_path / "src" / "packed.tar", gzip.compress(b"x"))
    write_file(tmp_path / "src" / "stats.json", "{}")
    dataset = import_dataset(tmp_path / "src", tmp_path / "out")
    assert samples_by_id(dataset) == expected_samples(pictures, "a/good/{}")
    assert sum(dataset.artifact.manifest.skipped.values()) == 2
    assert "archive is compressed" in dataset.artifact.manifest.skipped
    assert dataset.artifact.manifest.ignored == {"file type .json": 1}
