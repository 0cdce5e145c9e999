"""What a folder is read as, and errors where two readings are possible."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.pictures import (
    Picture,
    format_csv,
    samples_by_id,
    tar_members,
    write_file,
    write_images,
    write_tar,
)
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.data.readers import ImportOptions
from likewise.errors import InvalidInputError


@pytest.fixture
def photos(tmp_path: Path, pictures: list[Picture]) -> Path:
    """A folder of images with a text file each."""
    write_images(tmp_path / "photos", pictures)
    for name, _, caption in pictures:
        write_file(tmp_path / "photos" / f"{name}.txt", f"text: {caption}")
    return tmp_path / "photos"


def read(source: Path, **options: Any) -> CaptionDataset:
    out = source.parent / f"out-{len(list(source.parent.iterdir()))}"
    return import_dataset(source, out, ImportOptions(**options))


def expect_error(source: Path, field: str, *messages: str, **options: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        read(source, **options)
    assert error.value.field == field
    for message in messages:
        assert message in str(error.value)


def test_captions_in_a_table_and_in_text_files(photos: Path, pictures: list[Picture]) -> None:
    write_file(photos / "t.csv", format_csv(pictures, ""))
    expect_error(photos, "source_format", "the table t.csv", "caption files such as that of")
    assert read(photos, source_format="folder")[0].captions[0].startswith("text: ")
    for dataset in (read(photos, source_format="table"), read(photos / "t.csv")):
        assert not dataset[0].captions[0].startswith("text: ")


@pytest.mark.parametrize(
    "content",
    [
        "path,reason\n{name}.jpg,blurred\n",  # no captions
        "path,caption\nelsewhere.jpg,a dog\n",  # other images
        "date,price\r2020,3\r",
        '{"blob": "' + "x" * 200_000 + '"}\n',
        "a\0b,c\n1,2\n",
        "\xff\xfe\xfa",
        "",
    ],
)
def test_unrelated_tables_beside_captioned_images(
    photos: Path, pictures: list[Picture], content: str
) -> None:
    write_file(photos / "stray.csv", content.replace("{name}", pictures[0][0]).encode("latin-1"))
    dataset = read(photos)
    assert len(dataset) == 6
    assert all(sample.captions[0].startswith("text: ") for sample in dataset)
    assert dataset.artifact.manifest.ignored == {"file type .csv": 1}


def test_a_table_of_few_images(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src", pictures)
    table = write_file(tmp_path / "src" / "t.csv", format_csv(pictures[:2], ""))
    expect_error(tmp_path / "src", "source_format", "6 images", "t.csv lists 2")
    assert len(read(tmp_path / "src", source_format="folder")) == 6
    dataset = read(tmp_path / "src", source_format="table")
    assert len(dataset) == len(read(table)) == 2
    assert dataset.artifact.manifest.ignored == {"image that the table does not list": 4}
    write_file(table, format_csv(pictures[:4], ""))
    assert len(read(tmp_path / "src")) == 4


def test_archives_beside_images(tmp_path: Path, pictures: list[Picture]) -> None:
    src = tmp_path / "src"
    write_tar(src / "0.tar", tar_members(pictures[:3]))
    write_file(src / "preview.png", pictures[5][1])
    expect_error(src, "source_format", "1 image", "0.tar")
    dataset = read(src, source_format="tar")
    assert len(dataset) == 3
    assert dataset.artifact.manifest.ignored == {"image outside the archives": 1}
    assert len(read(src, source_format="folder")) == 1
    expect_error(src, "source_format", "1 image, 0 tables and 1 tar archive", source_format="table")
    expect_error(src / "0.tar", "source_format", source_format="table")


def test_tables_in_subfolders_are_read_together(tmp_path: Path, pictures: list[Picture]) -> None:
    parts = {"train": pictures[:4], "test": pictures[4:]}
    for split, part in parts.items():
        write_images(tmp_path / "src" / split, part)
        rows = [json.dumps({"file_name": f"{n}.jpg", "text": c, "split": split}) for n, _, c in part]
        write_file(tmp_path / "src" / split / "metadata.jsonl", "\n".join(rows))
    assert samples_by_id(read(tmp_path / "src")) == {
        f"{split}/{name}.jpg": (data, (caption,))
        for split, part in parts.items()
        for name, data, caption in part
    }
    assert len(read(tmp_path / "src", where=("split=test",))) == 2
    expect_error(tmp_path / "src", "where", "split=train", where=("split=val",))
    write_file(tmp_path / "src" / "train" / "more.jsonl", rows[0])
    with pytest.raises(InvalidInputError, match="several tables of images"):
        read(tmp_path / "src")


def test_images_of_a_table_in_two_folders(tmp_path: Path, pictures: list[Picture]) -> None:
    for folder in ("depth", "rgb"):
        write_images(tmp_path / "src" / folder, pictures)
    write_file(tmp_path / "src" / "t.csv", format_csv(pictures, ""))
    expect_error(tmp_path / "src", "images", "depth", "rgb")
    expect_error(tmp_path / "src" / "t.csv", "images", "depth", "rgb")
    dataset = read(tmp_path / "src", images=tmp_path / "src" / "rgb")
    assert dataset.root.name == "rgb"
    assert len(dataset) == 6


def test_the_folder_of_a_table_precedes_others(tmp_path: Path, pictures: list[Picture]) -> None:
    for folder in ("", "thumbs"):
        write_images(tmp_path / "src" / folder, pictures)
    table = write_file(tmp_path / "src" / "t.csv", format_csv(pictures, ""))
    assert read(table).root == tmp_path / "src"


def test_a_damaged_table_in_a_subfolder_is_skipped_and_counted(
    tmp_path: Path, pictures: list[Picture]
) -> None:
    """Damage behind the header of one table must not hide its images, nor end the import of the other."""
    for split in ("train", "test"):
        rows = [
            {"image": data, "text": f"{caption} {i}"} for i in range(300) for _, data, caption in pictures
        ]
        (tmp_path / "src" / split).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "src" / split / "data.parquet")
    damaged = tmp_path / "src/test/data.parquet"
    content = bytearray(damaged.read_bytes())
    content[100 : len(content) * 3 // 4] = b"\0" * (len(content) * 3 // 4 - 100)
    damaged.write_bytes(content)
    dataset = read(tmp_path / "src")
    assert len(dataset) == 300 * len(pictures)
    manifest = dataset.artifact.manifest
    assert manifest.skipped | manifest.ignored in (
        {"table cannot be read": 1},
        {"table that is not used": 1},
    )


def test_other_tables_of_a_folder_are_counted(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src", pictures)
    write_file(tmp_path / "src/captions.csv", format_csv(pictures, ""))
    write_file(tmp_path / "src/notes.csv", "date,price\n2020,3\n")
    assert read(tmp_path / "src").artifact.manifest.ignored == {"table that is not used": 1}
