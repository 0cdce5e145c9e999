"""Labeled and captioned datasets: every row and file is used or counted, and keys follow the content."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.captioned import open_captioned
from likewise.evaluation.datasets.labeled import open_labeled

CLASSES = ("001", "1", "True")


def write_images(folder: Path, size: tuple[int, int] = (8, 6)) -> list[tuple[str, str, str]]:
    """Write four images of each class, and return the rows file, label and split."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(12):
        label, split = CLASSES[i % 3], "train" if i < 6 else "test"
        Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i}.png")
        rows.append((f"{i}.png", label, split))
    return rows


def csv_text(rows: Sequence[tuple[str, ...]], header: str = "file,label,split") -> str:
    return header + "\n" + "".join(",".join(row) + "\n" for row in rows)


def test_folders_ignore_hidden_and_system_files_and_count_the_others(tmp_path: Path) -> None:
    for split in ("train", "Validation"):
        for label in ("cat", "dog"):
            write_images(tmp_path / split / label / "deeper")
    used = 2 * 2 * 12
    for name in (".ipynb_checkpoints/a.png", "cat/.DS_Store", "cat/._0.png", "@eaDir/x.png", "dog/Thumbs.db"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "train/cat/notes.DOCX").write_bytes(b"x")
    (tmp_path / "train/flat.png").write_bytes(b"x")
    (tmp_path / "unlabeled/cat").mkdir(parents=True)
    (tmp_path / "unlabeled/cat/0.png").write_bytes(b"x")
    dataset = open_labeled(tmp_path)
    assert len(dataset) == used
    assert dataset.classes == ("cat", "dog")
    assert dataset.split_counts() == {"train": 24, "test": 24}
    assert dataset.ignored == {"hidden file": 3, "system file": 2, "file type .docx": 1}
    assert dataset.skipped == {
        "images without a class folder (first: train/flat.png)": 1,
        "images outside of the folders train, val and test (first: unlabeled/cat/0.png)": 1,
    }


@pytest.mark.parametrize(
    ("name", "header", "separator"),
    [
        ("labels.csv", "file, label, split", ", "),
        ("labels.CSV", "File;Label;Split", ";"),
        ("labels.tsv", "split\tlabel\tfilename", "\t"),
        ("labels.csv", "\ufefffile\tlabel\tsplit", "\t"),
    ],
)
def test_tables_are_read_as_import_reads_them(name: str, header: str, separator: str, tmp_path: Path) -> None:
    rows = write_images(tmp_path / "images")
    columns = [0, 1, 2] if header.strip("\ufeff").lower().startswith("file") else [2, 1, 0]
    lines = [header, *(separator.join(row[i] for i in columns) for row in rows)]
    (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    dataset = open_labeled(tmp_path)
    assert dataset.classes == CLASSES
    assert len(dataset) == len(rows)
    assert all((dataset.root / file).is_file() for file in dataset.files)


def test_parquet_and_json_lines_give_the_same_dataset(tmp_path: Path) -> None:
    rows = write_images(tmp_path)
    frame = pd.DataFrame(rows, columns=["file", "label", "split"])
    frame.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps(dict(zip(frame.columns, row, strict=True))) + "\n" for row in rows)
    )
    (tmp_path / "c.csv").write_text(csv_text(rows))
    keys = {open_labeled(tmp_path / name).key for name in ("a.parquet", "b.jsonl", "c.csv")}
    assert len(keys) == 1


ODD_ROWS = [
    ("x" * 300 + ".png", "1", "train"),
    ("https://example.org/a.png", "1", "train"),
    ("a.png", "", "train"),
    ("", "1", "test"),
    ("a.png", "1", "unlabeled"),
    ("a.png", "1", " "),
    ("a\0.png", "1", "train"),
    ("a.png", "1"),
    ("0.png", "1", "test"),
    ("./0.png", "001", "train"),
    ("0.png", "True", "train"),
]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(ODD_ROWS), max_size=8))
def test_every_row_is_used_or_counted(tmp_path: Path, odd: list[tuple[str, ...]]) -> None:
    rows = write_images(tmp_path)
    (tmp_path / "labels.csv").write_text(csv_text([*rows, *odd]))
    dataset = open_labeled(tmp_path)
    assert len(dataset) + sum(dataset.skipped.values()) == len(rows) + len(odd)
    assert set(CLASSES) == set(dataset.classes)
    # The long name is a missing file, which is counted when the image is read.
    assert len(dataset) <= len(rows) + 1


def test_a_table_without_a_usable_row_says_why(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(csv_text([("a.png", "1", "later"), ("b.png", "", "train")]))
    with pytest.raises(InvalidInputError, match="no train images.*1 skipped: split 'later'.*without a file"):
        open_labeled(tmp_path)


def test_boxes_are_fractions_in_both_units(tmp_path: Path) -> None:
    rows = write_images(tmp_path, size=(80, 40))
    header = "file,label,split,x0,y0,x1,y1"
    fractions = [(*row, "0.25", "0.5", "0.75", "1") for row in rows]
    pixels = [(*row, "20", "20", "60", "40") for row in rows]
    pixels[0] = (*rows[0], "0.25", "0.5", "0.75", "1")  # in the other unit
    expected = np.tile([0.25, 0.5, 0.75, 1.0], (len(rows), 1))
    (tmp_path / "a.csv").write_text(csv_text(fractions, header))
    (tmp_path / "b.csv").write_text(csv_text(pixels, header))
    dataset = open_labeled(tmp_path / "a.csv")
    assert dataset.boxes is not None
    np.testing.assert_allclose(dataset.boxes, expected)
    dataset = open_labeled(tmp_path / "b.csv")
    assert dataset.boxes is not None
    np.testing.assert_allclose(dataset.boxes[1:], expected[1:])
    assert np.isnan(dataset.boxes[0]).all()
    assert dataset.skipped == {"boxes that are not in pixels, excluded (first: b.csv line 2)": 1}
    mixed = [pair[i % 2] for i, pair in enumerate(zip(fractions, pixels, strict=True))]
    (tmp_path / "c.csv").write_text(csv_text(mixed, header))
    with pytest.raises(InvalidInputError, match="fractions of width and height.*only pixels"):
        open_labeled(tmp_path / "c.csv")


def test_key_follows_the_content_of_images_and_rows(tmp_path: Path) -> None:
    root = tmp_path / "a"
    rows = write_images(root)
    (root / "labels.csv").write_text(csv_text(rows))
    key = open_labeled(root).key
    shutil.copytree(root, tmp_path / "b", copy_function=shutil.copyfile)
    os.utime(tmp_path / "b/0.png", (1, 1))
    assert open_labeled(tmp_path / "b").key == key
    assert (root / "3.png").stat().st_size == (root / "4.png").stat().st_size
    shutil.copyfile(root / "4.png", tmp_path / "b/3.png")
    assert open_labeled(tmp_path / "b").key != key
    (root / "labels.csv").write_text(csv_text([(rows[0][0], "1", "train"), *rows[1:]]))
    assert open_labeled(root).key != key


def test_key_notices_a_change_in_the_middle_of_an_uncompressed_image(tmp_path: Path) -> None:
    root = tmp_path / "a"
    rows = write_images(root)
    pixels = np.zeros((300, 300, 3), np.uint8)
    Image.fromarray(pixels).save(root / "0.bmp")
    (root / "labels.csv").write_text(csv_text([("0.bmp", "1", "train"), *rows[1:]]))
    key = open_labeled(root).key
    pixels[150, 150] = 255
    Image.fromarray(pixels).save(root / "0.bmp")
    assert open_labeled(root).key != key


def test_captions_count_short_rows_and_use_val_without_test(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "images")
    rows = [("0.png", "a cat", "val"), ("0.png", "one cat", "val"), ("1.png", "a dog", "train")]
    table = tmp_path / "captions.csv"
    table.write_text(csv_text([*rows, ("2.png", ""), ("3.png", "", "val"), ("4.png", "x", "dunno")],
                              "File,caption,Split"))  # fmt: skip
    with caplog.at_level(logging.INFO, "likewise"):
        dataset = open_captioned(tmp_path)
    assert "val is the test split" in caplog.text
    assert dataset.files == ("0.png",)
    assert dataset.captions == (("a cat", "one cat"),)
    assert sum(dataset.skipped.values()) == 3
    assert dataset.skipped["without a file or a caption"] == 1
    assert (dataset.root / "0.png").is_file()
    table.unlink()
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "0.png", "caption": ["a cat", "b"]}) + "\n")
    assert open_captioned(tmp_path).captions == (("a cat", "b"),)


@pytest.mark.parametrize(
    "spelling",
    [r"sub dir\ü{}.png", "sub%20dir/%C3%BC{}.png", "sub dir/u\u0308{}.png", "file://ROOT/sub%20dir/ü{}.png"],
)
def test_paths_are_found_as_import_finds_them(spelling: str, tmp_path: Path) -> None:
    rows = write_images(tmp_path / "sub dir")
    for name, _, _ in rows:
        (tmp_path / "sub dir" / name).rename(tmp_path / "sub dir" / f"ü{name}")
    spelling = spelling.replace("ROOT", tmp_path.as_posix())
    rows = [(spelling.format(name.removesuffix(".png")), label, split) for name, label, split in rows]
    again = ("./sub dir/ü0.png", rows[0][1], "train")
    (tmp_path / "labels.csv").write_text(csv_text([*rows, again]), encoding="utf-8")
    dataset = open_labeled(tmp_path)
    assert len(dataset) == len(rows)
    assert all((dataset.root / file).is_file() for file in dataset.files)
    assert list(dataset.skipped.values()) == [1]  # the second spelling of one image


def test_two_columns_of_different_existing_files_raise(tmp_path: Path) -> None:
    rows = write_images(tmp_path)
    both = [(name, f"{11 - i}.png", label, split) for i, (name, label, split) in enumerate(rows)]
    table = tmp_path / "labels.csv"
    table.write_text(csv_text(both, "image,path,label,split"))
    with pytest.raises(InvalidInputError, match="'image' and 'path'"):
        open_labeled(tmp_path)
    table.write_text(csv_text([(a, a, *rest) for a, _, *rest in both], "image,path,label,split"))
    assert len(open_labeled(tmp_path)) == len(rows)


@pytest.mark.parametrize("name", ["labels.json", "labels.jsonl"])
def test_json_tables_are_found_with_columns_that_begin_late(name: str, tmp_path: Path) -> None:
    rows = write_images(tmp_path)
    entries = [{"file": file, "label": label, "split": split} for file, label, split in rows]
    entries[:0] = [{"file": "0.png"}] * 150
    lines = [json.dumps(entry) for entry in entries]
    (tmp_path / name).write_text(f"[{','.join(lines)}]" if name.endswith("json") else "\n".join(lines))
    dataset = open_labeled(tmp_path)
    assert (len(dataset), sum(dataset.skipped.values())) == (len(rows), 150)


def test_class_names_in_json_beside_class_folders_are_no_table(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            write_images(tmp_path / split / label)
    (tmp_path / "labels.json").write_text('{"0": "cat", "1": "dog"}')
    dataset = open_labeled(tmp_path)
    assert (len(dataset), dataset.ignored) == (48, {"file type .json": 1})


def test_two_spellings_of_an_image_are_one_captioned_image(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [("0.png", "a cat"), ("./0.png", "one cat"), (r".\0.png", "cat"), ("1.png", "a dog")]
    (tmp_path / "captions.csv").write_text(csv_text(rows, "file,caption"))
    dataset = open_captioned(tmp_path)
    assert dataset.files == ("0.png", "1.png")
    assert dataset.captions == (("a cat", "one cat", "cat"), ("a dog",))
    late = [{"file": "0.png"}] * 150 + [{"file": "1.png", "caption": "a dog"}]
    (tmp_path / "late.jsonl").write_text("\n".join(map(json.dumps, late)))
    assert open_captioned(tmp_path / "late.jsonl").captions == (("a dog",),)
