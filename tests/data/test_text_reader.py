"""CSV and other delimited tables, JSON Lines and Flickr token files."""

import json
from pathlib import Path

import pytest

from helpers.pictures import (
    Picture,
    expected_samples,
    format_csv,
    samples_by_id,
    write_file,
    write_images,
)
from helpers.progress import RecordingProgress
from likewise.data.importing import import_dataset
from likewise.errors import InvalidInputError


@pytest.mark.parametrize(
    ("name", "delimiter", "bom"),
    [("t.csv", ",", ""), ("t.csv", ";", "\ufeff"), ("t.tsv", "\t", "")],
)
def test_delimited_tables(
    tmp_path: Path,
    pictures: list[Picture],
    name: str,
    delimiter: str,
    bom: str,
    log: pytest.LogCaptureFixture,
) -> None:
    write_images(tmp_path / "images", pictures)
    table = write_file(tmp_path / name, bom + format_csv(pictures, delimiter=delimiter))
    progress = RecordingProgress()
    dataset = import_dataset(table, tmp_path / "out", progress=progress)
    assert samples_by_id(dataset) == expected_samples(pictures, "images/{}.jpg")
    assert dataset.root == tmp_path
    assert log.messages[:2] == [
        f"{name}: image column is 'File'",
        f"{name}: caption column is 'Title'",
    ]
    assert progress.totals == [(6, 0)]


def test_json_lines(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures)
    lines = [
        json.dumps({"image": f"{n}.jpg", "captions": [c, "x\u2028y\r\nz"]}).encode() for n, _, c in pictures
    ]
    table = write_file(
        tmp_path / "t.jsonl", b"\n".join([*lines, b"", b"{damaged", b"[1]", b'"\xe9"', b'{"image": 3}'])
    )
    dataset = import_dataset(table, tmp_path / "out")
    assert samples_by_id(dataset) == {f"{n}.jpg": (d, (c, "x y z")) for n, d, c in pictures}
    assert {(entry["location"], entry["reason"]) for entry in dataset.skipped_entries()} == {
        ("t.jsonl line 8", "line is not valid JSON"),
        ("t.jsonl line 9", "line is not a JSON object"),
        ("t.jsonl line 10", "line is not UTF-8"),
        ("t.jsonl line 11", "row has no image"),
    }


@pytest.mark.parametrize(
    ("name", "header", "row_format"),
    [
        ("Flicker8k_Dataset/Flickr8k.token.txt", "", "{}.jpg#{}\t{}"),
        ("flickr30k_images/results_20130124.token", "", "{}.jpg#{}\t{}"),
        ("flickr30k_images/results.csv", "image_name| comment_number| comment", "{}.jpg| {}| {}"),
    ],
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_flickr_token_files(
    tmp_path: Path, pictures: list[Picture], name: str, header: str, row_format: str, *, as_folder: bool
) -> None:
    src = tmp_path / "src"
    image_folder, name = name.split("/")
    write_images(src / image_folder, pictures)
    rows = [row_format.format(n, i, f'{c}, "{i}" .') for n, _, c in pictures for i in range(3)]
    table = write_file(src / name, "\n".join([header, *rows] if header else rows))
    dataset = import_dataset(src if as_folder else table, tmp_path / "out")
    assert samples_by_id(dataset) == {
        f"{n}.jpg": (d, tuple(f'{c}, "{i}" .' for i in range(3))) for n, d, c in pictures
    }


def test_flickr8k_captions_txt(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "Images", pictures)
    text = "image,caption\n" + "".join(f"{n}.jpg,{c}\n" for n, _, c in pictures)
    dataset = import_dataset(write_file(tmp_path / "captions.txt", text), tmp_path / "out")
    assert samples_by_id(dataset) == expected_samples(pictures, "{}.jpg")


def test_invalid_rows_are_skipped(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures)
    names = [f"{n}.jpg" for n, _, _ in pictures]
    rows = [
        "file,caption",
        f'{names[0]},"two\nlines"',
        names[1],
        f"{names[2]},a,b",
        "",
        f'{names[3]},"a"b',
        f"{names[4]},x\0",
        f"{names[5]},fine,,",
    ]
    dataset = import_dataset(write_file(tmp_path / "t.csv", "\r\n".join(rows)), tmp_path / "out")
    assert [(s.id, s.captions) for s in dataset] == [(names[0], ("two lines",)), (names[5], ("fine",))]
    assert [(entry["location"], entry["reason"]) for entry in dataset.skipped_entries()] == [
        ("t.csv line 4", "row has too few columns"),
        ("t.csv line 5", "row has too many columns"),
        ("t.csv line 7", "row is not valid CSV"),
        ("t.csv line 8", "row contains a NUL character"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"file,caption\na.jpg,ok\nb.jpg,caf\xe9\n", r"t\.csv, line 3: not UTF-8"),
        (b"fil\xe9,caption\n", "line 1: not UTF-8"),
        (b"file,file,caption\n", "duplicate column 'file'"),
        (b"", "is empty"),
        (b"file,caption\n", "has no rows"),
    ],
)
def test_invalid_tables_raise(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        import_dataset(write_file(tmp_path / "t.csv", data), tmp_path / "out")
    assert not (tmp_path / "out").exists()
