"""Tar archives in WebDataset format."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from helpers.pictures import (
    Picture,
    expected_samples,
    read_files,
    samples_by_id,
    write_file,
)
from likewise.data.importing import import_dataset
from likewise.errors import InvalidInputError


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def tar_members(pictures: list[Picture]) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for i, (name, data, caption) in enumerate(pictures):
        members[f"{name}.jpg"] = data
        members |= (
            {f"{name}.txt": caption.encode()}
            if i % 2
            else {f"{name}.json": json.dumps({"caption": caption}).encode()}
        )
    return members


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
