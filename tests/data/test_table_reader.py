"""Tables: columns, merging of rows, image paths, Parquet and COCO."""

import base64
import json
import tempfile
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.pictures import (
    Picture,
    SamplesById,
    expected_samples,
    format_csv,
    samples_by_id,
    write_file,
    write_images,
)
from likewise.data.importing import import_dataset
from likewise.data.readers import ImportOptions, open_reader
from likewise.data.readers.base import RawSample, SkippedSample
from likewise.data.readers.columns import match_caption_columns
from likewise.data.readers.parquet import open_parquet_table
from likewise.data.readers.tables import TableRow
from likewise.errors import InvalidInputError


def test_all_import_options(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "elsewhere", pictures)
    rows = ["nr,pic,a,b,kind,year,split,lang"]
    for i, (name, _, caption) in enumerate(pictures):
        split, lang = ("train", "de" if i == 0 else "en") if i < 4 else ("test", "en")
        rows.append(f"n{i},{name}.jpg,{caption},{' ' if i == 1 else 'second'},k{i},{2000 + i},{split},{lang}")
    options = ImportOptions(
        image_column="pic",
        caption_column=("b", "a"),
        label_column="kind",
        group_column="year",
        id_column="nr",
        where=("split=train", "lang=en"),
        images=tmp_path / "elsewhere",
    )
    dataset = import_dataset(write_file(tmp_path / "t.csv", "\n".join(rows)), tmp_path / "out", options)
    assert [(s.id, s.captions, s.label, s.group) for s in dataset] == [
        ("n1", (pictures[1][2],), "k1", "2001"),
        ("n2", ("second", pictures[2][2]), "k2", "2002"),
        ("n3", ("second", pictures[3][2]), "k3", "2003"),
    ]
    assert samples_by_id(dataset)["n2"][0] == pictures[2][1]
    assert dataset.artifact.manifest.counts["empty_captions"] == 1


def test_missing_columns_raise(tmp_path: Path, pictures: list[Picture]) -> None:
    table = write_file(tmp_path / "t.csv", format_csv(pictures))
    for field, options in (
        ("caption_column", ImportOptions(caption_column=("Titel",))),
        ("where", ImportOptions(where=("Titel=x",))),
    ):
        with pytest.raises(
            InvalidInputError, match=r"t\.csv has no column 'Titel'; .*File, Title\. Did you mean Title\?"
        ) as error:
            import_dataset(table, tmp_path / "out", options)
        assert error.value.field == field
    with pytest.raises(InvalidInputError, match="cannot infer the image column.*a, b") as error:
        import_dataset(write_file(tmp_path / "u.csv", "a,b\n1,2\n"), tmp_path / "out")
    assert error.value.field == "image_column"
    for condition, message in (
        ("Title", "COLUMN=VALUE"),
        ("Title=cat", "no row with Title=cat; it has Title="),
    ):
        with pytest.raises(InvalidInputError, match=message) as error:
            import_dataset(table, tmp_path / "out", ImportOptions(where=(condition,)))
        assert error.value.field == "where"
    assert not (tmp_path / "out").exists()


def test_scattered_rows_of_an_image_are_merged(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures[:2])
    (a, *_), (b, *_) = pictures[:2]
    table = write_file(
        tmp_path / "t.csv", f"image,caption\n{b}.jpg,b1\n{a}.jpg,a1\n{b}.jpg,b2\n{b}.jpg,b1\n{a}.jpg,\n"
    )
    dataset = import_dataset(table, tmp_path / "out")
    assert [(s.id, s.captions) for s in dataset] == [(f"{b}.jpg", ("b1", "b2", "b1")), (f"{a}.jpg", ("a1",))]
    assert dataset.artifact.manifest.counts["empty_captions"] == 1
    assert not dataset.artifact.manifest.skipped


def test_merging_adjacent_rows_uses_constant_memory(tmp_path: Path) -> None:
    n, captions_per_image, text = 500, 5, "a long caption " * 70
    names = [f"{number:04d}.jpg" for number in range(n)]
    lines = [
        "image,caption",
        *(f"{name},{i} {name} {text}" for name in names for i in range(captions_per_image)),
    ]
    lines.insert(3, "a row too short")  # between two rows of the first image
    reader = open_reader(str(write_file(tmp_path / "t.csv", "\n".join(lines))), ImportOptions())
    assert reader.count() == n
    tracemalloc.start()
    count = 0
    for entry in reader.iter_samples():
        if isinstance(entry, RawSample):
            assert entry.id == names[count]
            assert [caption.split()[:2] for caption in entry.captions] == [
                [str(i), entry.id] for i in range(captions_per_image)
            ]
            count += 1
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == n
    assert peak_bytes < n * captions_per_image * len(text) / 4


def test_paths_in_mappings_are_merged_by_image(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures[:2])
    (a, *_), (b, *_) = pictures[:2]
    for order in ((a, a, b), (a, b, a)):
        rows = [json.dumps({"image": {"path": f"{n}.jpg"}, "caption": f"{i}"}) for i, n in enumerate(order)]
        table = write_file(tmp_path / "t.jsonl", "\n".join(rows))
        assert open_reader(str(table), ImportOptions()).count() == 2
        dataset = import_dataset(table, tmp_path / f"out-{order.index(b)}")
        assert {s.id: s.captions for s in dataset} == {
            f"{n}.jpg": tuple(str(i) for i, m in enumerate(order) if m == n) for n in (a, b)
        }


def test_absolute_relative_and_invalid_image_paths(tmp_path: Path, pictures: list[Picture]) -> None:
    """Absolute paths and parent folders are allowed; entries that cannot be files are skipped."""
    write_images(tmp_path, pictures[:2])
    rows = [
        str(tmp_path / f"{pictures[0][0]}.jpg"),
        f"../{pictures[1][0]}.jpg",
        "absent.jpg",
        "",
        "https://x.org/a.jpg",
    ]
    lines = [{"file": row, "caption": "c"} for row in [*rows, "a\0b.jpg", "\ud800.jpg", "x" * 5000]]
    table = write_file(tmp_path / "t" / "t.jsonl", "\n".join(map(json.dumps, lines)))
    dataset = import_dataset(table, tmp_path / "out")
    assert [s.id for s in dataset] == rows[:2]
    folder = tmp_path / "t"
    long_path = f"{folder}/{'x' * 5000}"[:300]
    assert {entry["location"]: entry["reason"] for entry in dataset.skipped_entries()} == {
        f"t.jsonl line 3: {folder}/absent.jpg": "file is missing",
        "t.jsonl line 4": "row has no image",
        "t.jsonl line 5": "image is a URL, not a file",
        "t.jsonl line 6": "file name contains a NUL character",
        "t.jsonl line 7": "name is not UTF-8",
        f"t.jsonl line 8: {long_path}": "file cannot be read",
    }


def test_folder_with_one_table_of_images(
    tmp_path: Path, pictures: list[Picture], log: pytest.LogCaptureFixture
) -> None:
    src = tmp_path / "src"
    write_images(src / "images", pictures)
    write_file(src / "captions.csv", format_csv(pictures))
    write_file(src / "sizes.csv", "file,width\n")
    write_file(src / "licences.csv", "owner,url\n")
    dataset = import_dataset(src, tmp_path / "out")
    assert samples_by_id(dataset) == expected_samples(pictures, "images/{}.jpg")
    assert log.messages[0] == "src: reading table captions.csv"
    write_file(src / "more.csv", format_csv(pictures))
    with pytest.raises(InvalidInputError, match=r"several tables of images \(captions.csv, more.csv\)"):
        import_dataset(src, tmp_path / "out2")


def test_parquet_with_paths(tmp_path: Path, pictures: list[Picture], log: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "images", pictures)
    rows = [{"path": f"{n}.jpg", "caption": [c], "year": 7} for n, _, c in pictures]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    options = ImportOptions(group_column="year")
    dataset = import_dataset(tmp_path / "t.parquet", tmp_path / "out", options)
    assert samples_by_id(dataset) == expected_samples(pictures, "{}.jpg")
    assert {s.group for s in dataset} == {"7"}
    assert dataset.root == tmp_path / "images"
    assert any("folder" in sentence and "images" in sentence for sentence in log.messages)


def test_parquet_with_embedded_images(tmp_path: Path, pictures: list[Picture]) -> None:
    rows = [{"file": "no", "photo": {"bytes": d, "path": "same.jpg"}, "text": c} for _, d, c in pictures]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    dataset = import_dataset(tmp_path / "t.parquet", tmp_path / "out")
    assert samples_by_id(dataset) == {f"{i:08d}": (d, (c,)) for i, (_, d, c) in enumerate(pictures)}
    assert not dataset.artifact.manifest.skipped


def test_parquet_structs_without_bytes_use_the_path(tmp_path: Path, pictures: list[Picture]) -> None:
    """Without bytes in the mapping its path is read; only requested columns are read."""
    write_images(tmp_path, pictures[:1])
    name, data, _ = pictures[0]
    rows = [{"image": {"bytes": None, "path": f"{name}.jpg"}, "text": c} for c in "ab"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "t.parquet")
    dataset = import_dataset(tmp_path / "t.parquet", tmp_path / "out")
    assert samples_by_id(dataset) == {f"{name}.jpg": (data, ("a", "b"))}
    parquet_rows = open_parquet_table(tmp_path / "t.parquet").iter_rows(["text"])
    assert [row.values for row in parquet_rows if isinstance(row, TableRow)] == [{"text": "a"}, {"text": "b"}]


def test_folder_of_parquet_shards_is_ambiguous(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist([{"image": "a.jpg", "text": "a"}]), tmp_path / f"{name}.parquet")
    with pytest.raises(InvalidInputError, match=r"several tables.*or all of them as hf:"):
        import_dataset(tmp_path, tmp_path / "out")


def test_damaged_parquet_raises(tmp_path: Path, pictures: list[Picture]) -> None:
    rows = [{"image": f"{n}.jpg", "caption": c} for n, _, c in pictures]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    uninterrupted = (tmp_path / "t.parquet").read_bytes()
    for data in (uninterrupted[:100], b"", uninterrupted[:4] + b"\xff" * 60 + uninterrupted[64:]):
        with pytest.raises(InvalidInputError, match=r"t\.parquet is (not a Parquet|damaged)"):
            import_dataset(write_file(tmp_path / "t.parquet", data), tmp_path / "out")


@pytest.mark.parametrize("explicit", [True, False])
def test_coco_captions(tmp_path: Path, pictures: list[Picture], *, explicit: bool) -> None:
    write_images(tmp_path / ("val2017" if not explicit else "pictures"), pictures)
    coco = {
        "images": [{"id": 100 + i, "file_name": f"{n}.jpg"} for i, (n, _, _) in enumerate(pictures)],
        "annotations": [
            *({"image_id": 100 + i, "caption": c} for i, (_, _, c) in enumerate(pictures)),
            {"image_id": 102, "caption": "more\n"},
            {"image_id": 999, "caption": "of nothing"},
        ],
    }
    path = write_file(tmp_path / "annotations" / "captions_val2017.json", json.dumps(coco))
    options = ImportOptions(images=tmp_path / "pictures" if explicit else None)
    dataset = import_dataset(path, tmp_path / "out", options)
    expected: SamplesById = {str(100 + i): (d, (c,)) for i, (_, d, c) in enumerate(pictures)}
    expected["102"] = (pictures[2][1], (pictures[2][2], "more"))
    assert samples_by_id(dataset) == expected
    assert dataset.artifact.manifest.skipped == {"caption of an unknown image": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a.jpg"}', "COCO"),
        ('[{"image": "a.jpg"}, {"image"', "not valid JSON after item 1"),
        ("{", "not valid JSON"),
        ('{"images": [], "annotations": [{"bbox": 1}]}', "boxes"),
    ],
)
def test_json_not_in_coco_format_raises(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        import_dataset(write_file(tmp_path / "a.json", text), tmp_path / "out")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_absent_values(tmp_path: Path, pictures: list[Picture], suffix: str) -> None:
    """Missing values of pandas are no captions, labels, groups and ids."""
    write_images(tmp_path, pictures[:4])
    frame = pd.DataFrame(
        {
            "image": [f"{n}.jpg" for n, _, _ in pictures[:4]],
            "caption": ["one", None, float("nan"), " "],
            "year": [2001.0, float("nan"), float("inf"), 2004.5],
            "kind": [True, False, None, True],
            "key": ["001", None, "1", pd.NA],
        }
    )
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        records = frame.astype(object).where(frame.notna() | (frame == float("inf")), float("nan"))
        rows = [json.dumps(row) for row in records.to_dict("records")]
        write_file(path, "\n".join(rows) if suffix == "jsonl" else f"[{','.join(rows)}]")
    options = ImportOptions(label_column="year", group_column="kind", id_column="key")
    samples = list(import_dataset(path, tmp_path / "out", options))
    assert [s.captions for s in samples] == [("one",), (), (), ()]
    infinite = "inf" if suffix == "csv" else None  # text of a CSV file is text
    assert [s.label for s in samples] == ["2001.0", None, infinite, "2004.5"]
    true, false = ("True", "False") if suffix == "csv" else ("true", "false")
    assert [s.group for s in samples] == [true, false, None, true]
    assert [s.id for s in samples] == ["001", f"{pictures[1][0]}.jpg", "1", f"{pictures[3][0]}.jpg"]
    where = ImportOptions(where=("caption=", "kind=False"))
    selected = import_dataset(path, tmp_path / "out2", where)
    assert [s.id for s in selected] == [f"{pictures[1][0]}.jpg"]
    counts = selected.artifact.manifest.counts
    assert counts["rows"] == len(selected) + counts["rows_excluded_by_where"]


def test_words_for_missing_values_are_reported(
    tmp_path: Path, pictures: list[Picture], log: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, pictures[:3])
    rows = [
        f"{n}.jpg,{c},{k}"
        for (n, _, _), c, k in zip(pictures[:3], ("nan", "nan", "a"), ("x", "N/A", ""), strict=True)
    ]
    dataset = import_dataset(
        write_file(tmp_path / "t.csv", "\n".join(["image,caption,kind", *rows])),
        tmp_path / "out",
        ImportOptions(label_column="kind"),
    )
    assert [(s.captions, s.label) for s in dataset] == [(("nan",), "x"), (("nan",), "N/A"), (("a",), None)]
    assert any("2 cells of column 'caption' are the text 'nan'" in message for message in log.messages)
    assert any("1 cells of column 'kind' are the text 'N/A'" in message for message in log.messages)


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_column_of_other_bytes_is_no_image_column(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures[:2])
    names = [f"{n}.jpg" for n, _, _ in pictures[:2]]
    others = {
        "phash": pa.array([b"\x01" * 8, b"\xff" * 8], pa.binary(8)),
        "audio": [{"bytes": b"RIFF", "path": "a.wav"}] * 2,
        "embedding": [b"\0\0\x80?"] * 2,
    }
    thumbnails = [None, pictures[0][1]]
    for i, columns in enumerate(
        (
            {**others, "image_path": names},
            {**others, "thumbnail": thumbnails, "image_path": names},
            {**others, "image_path": [name.encode() for name in names]},
            {**others, "image_path": [[name] for name in names]},
            {**others, "image_path": pa.array(names).dictionary_encode()},
            {**others, "image_path": pa.array(names, pa.large_string())},
        )
    ):
        path = write_parquet(tmp_path / f"{i}.parquet", {**columns, "text": ["one", "two"]})
        assert [s.id for s in import_dataset(path, tmp_path / f"out{i}")] == names
    path = write_parquet(tmp_path / "h.parquet", others)
    with pytest.raises(InvalidInputError, match="cannot infer the image column"):
        import_dataset(path, tmp_path / "out")
    with pytest.raises(InvalidInputError, match=r"not an image \(2, "):
        import_dataset(path, tmp_path / "out", ImportOptions(image_column="phash"))


def test_several_image_columns_raise(tmp_path: Path, pictures: list[Picture]) -> None:
    data = [d for _, d, _ in pictures]
    path = write_parquet(tmp_path / "t.parquet", {"before": data, "after": data})
    with pytest.raises(InvalidInputError, match="several image columns: 'before' and 'after'") as error:
        import_dataset(path, tmp_path / "out")
    assert error.value.field == "image_column"
    assert len(import_dataset(path, tmp_path / "out", ImportOptions(image_column="after"))) == 6
    write_images(tmp_path, pictures[:3])
    a, b, c = (f"{n}.jpg" for n, _, _ in pictures[:3])
    for text, expected in (
        (f"filename,path,text\n{a},x/{a},one\n{b},x/{b},two\n", [a, b]),
        (f"filename,path,text\n{a},./{a},one\n{b},./{b},two\n", [a, b]),
        (f"filename,path,text\n{a},{c},one\n{b},{b},two\n", None),
    ):
        path = write_file(tmp_path / "t.csv", text)
        if expected is None:
            with pytest.raises(InvalidInputError, match="'path' and 'filename'"):
                open_reader(str(path), ImportOptions())
        else:
            samples = list(open_reader(str(path), ImportOptions()).iter_samples())
            assert [Path(s.id).name for s in samples] == expected


def test_caption_columns_of_nested_types(tmp_path: Path, pictures: list[Picture]) -> None:
    data = [d for _, d, _ in pictures[:2]]
    for i, (captions, expected) in enumerate(
        (
            ([{"raw": "one", "tokens": ["o"]}, {"raw": "two", "tokens": []}], [("one",), ("two",)]),
            ([[{"raw": "one"}, {"raw": "1"}], None], [("one", "1"), ()]),
            ([[["one"], ["1"]], []], [("one", "1"), ()]),
            ([b"one", "zwölf".encode()], [("one",), ("zwölf",)]),
        )
    ):
        path = write_parquet(
            tmp_path / f"{i}.parquet",
            {"image": [[d] for d in data], "caption": captions, "text": [[0.5]] * 2},
        )
        assert [s.captions for s in import_dataset(path, tmp_path / f"out{i}")] == expected
    path = write_parquet(
        tmp_path / "t.parquet", {"image": data, "caption": [[0.5]] * 2, "text": ["one", "two"]}
    )
    assert [s.captions for s in import_dataset(path, tmp_path / "out")] == [("one",), ("two",)]
    path = write_parquet(tmp_path / "u.parquet", {"image": [data, data[:1]], "caption": [{"de": "x"}] * 2})
    with pytest.raises(InvalidInputError, match=r"caption is not text \(1, .*; row has several images \(1, "):
        import_dataset(path, tmp_path / "none")


def test_invalid_values_of_parquet_are_counted(tmp_path: Path, pictures: list[Picture]) -> None:
    captions = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary()).cast(pa.string(), safe=False)
    path = write_parquet(tmp_path / "t.parquet", {"image": [d for _, d, _ in pictures[:3]], "text": captions})
    dataset = import_dataset(path, tmp_path / "out")
    assert [s.captions for s in dataset] == [("one",), ("three",)]
    assert dataset.artifact.manifest.skipped == {"row has an invalid value": 1}


def test_ids_and_labels_of_rows_with_one_image(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures[:2])
    a, b = (f"{n}.jpg" for n, _, _ in pictures[:2])
    rows = ["sku,image,title,kind", f"A,{a},red,top", f"B,{b},blue,", f"C,./{a},small,hat"]
    rows += [f"A,{a},cotton,top", f"B,{b},x,hat", f"B,{a},y,"]
    path = write_file(tmp_path / "t.csv", "\n".join(rows))
    by_id = import_dataset(path, tmp_path / "out", ImportOptions(id_column="sku", label_column="kind"))
    assert [(s.id, s.captions, s.label) for s in by_id] == [
        ("A", ("red", "cotton"), "top"),
        ("B", ("blue", "x"), "hat"),
        ("C", ("small",), "hat"),
    ]
    assert by_id.artifact.manifest.skipped == {"duplicate id": 1}
    by_path = import_dataset(path, tmp_path / "out2", ImportOptions(label_column="kind"))
    assert [(s.id, s.captions, s.label) for s in by_path] == [
        (a, ("red", "cotton", "y"), "top"),
        (b, ("blue", "x"), "hat"),
    ]
    assert by_path.artifact.manifest.skipped == {"label differs from that of an earlier row of the image": 1}


def test_other_ways_to_write_paths(
    tmp_path: Path, pictures: list[Picture], log: pytest.LogCaptureFixture
) -> None:
    names = ["a b.jpg", "it's #1 (100%).jpg", unicodedata.normalize("NFD", "Zürich.jpg"), "c%20d.jpg"]
    for name in names:
        write_file(tmp_path / "t" / "img" / name, pictures[0][1])
    nfc = unicodedata.normalize("NFC", names[2])
    paths = [
        r"img\a b.jpg",
        "img/it's%20%231%20(100%25).jpg",
        f"img\\{nfc}",
        "img/c%20d.jpg",  # the literal file comes first
        f"file://{tmp_path}/t/img/a%20b.jpg",
        "IMG/A B.JPG",  # the only file of this name in another letter case
        "file:///absent.jpg",
    ]
    path = write_file(
        tmp_path / "t" / "t.jsonl", "\n".join(json.dumps({"image": p, "text": p}) for p in paths)
    )
    dataset = import_dataset(path, tmp_path / "out")
    assert [s.captions for s in dataset] == [(paths[0], paths[4], paths[5]), *((p,) for p in paths[1:4])]
    assert [e["location"] for e in dataset.skipped_entries()] == ["t.jsonl line 7: /absent.jpg"]
    for change in (
        "another letter case, such as IMG",
        "backslashes, such as img",
        "percent signs, ",
        "another Unicode form",
        "`file://` URLs",
    ):
        assert any(change in message for message in log.messages), change


def test_image_folders_that_fit_equally_raise(tmp_path: Path, pictures: list[Picture]) -> None:
    for folder in ("depth", "rgb"):
        write_images(tmp_path / folder, pictures[:2])
    path = write_file(tmp_path / "t.csv", format_csv(pictures[:2], folder=""))
    with pytest.raises(InvalidInputError, match="depth and .*rgb; set `images`") as error:
        import_dataset(path, tmp_path / "out")
    assert error.value.field == "images"
    assert len(import_dataset(path, tmp_path / "out", ImportOptions(images=tmp_path / "rgb"))) == 2


@pytest.mark.parametrize("convert", [str, float, lambda i: f" {i} "])
def test_coco_ids_are_joined_by_value(tmp_path: Path, pictures: list[Picture], convert: Any) -> None:
    write_images(tmp_path, pictures[:3])
    images: list[Any] = [{"id": i, "file_name": f"{n}.jpg"} for i, (n, _, _) in enumerate(pictures[:3])]
    images += [{"id": 7, "file_name": f"{pictures[0][0]}.jpg"}, {"id": 1, "file_name": "again.jpg"}, None]
    annotations: list[Any] = [
        {"image_id": convert(i), "caption": text} for i, text in enumerate(("one", "two", "three"))
    ]
    annotations += [{"image_id": 7, "caption": "same file"}, {"image_id": True, "caption": "x"}, 3]
    annotations += [{"image_id": 99, "caption": "x"}, {"image_id": 99, "caption": "y"}, {"image_id": 0}]
    text = json.dumps({"images": images, "annotations": annotations})
    for encoding in ("utf-8-sig", "utf-16"):
        path = write_file(tmp_path / "captions.json", text.encode(encoding))
        dataset = import_dataset(path, tmp_path / encoding)
        assert [(s.id, s.captions) for s in dataset] == [
            ("0", ("one", "same file")),
            ("1", ("two",)),
            ("2", ("three",)),
        ]
        assert dataset.artifact.manifest.skipped == {
            "annotation has no caption": 1,
            "annotation has no image id": 2,
            "caption of an unknown image": 2,
            "image has no id": 1,
            "image id is listed twice": 1,
        }


# pandas writes a carriage return without quotes, which makes it a line end.
cells = (
    st.none()
    | st.text(st.characters(exclude_characters="\r"), max_size=5)
    | st.floats()
    | st.booleans()
    | st.integers()
    | st.binary(max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=8),
    suffix=st.sampled_from(["jsonl", "json", "csv", "parquet"]),
)
def test_each_row_is_used_or_skipped(rows: list[tuple[Any, Any, Any]], suffix: str) -> None:
    """Rows of any values are parts of samples or skipped samples, and raise no error."""
    texts = [
        {"image": f"{i}.jpg", "caption": f"N{i}", "label": a, "group": b, "where": c}
        for i, (a, b, c) in enumerate(rows)
    ]
    for row in texts:
        for key, value in row.items():
            if isinstance(value, bytes) and suffix != "parquet":
                row[key] = [{"nested": 1}]
            elif suffix in ("parquet", "csv") and value is not None and not isinstance(value, bytes):
                row[key] = str(value).encode("utf-8", "replace").decode()
            if suffix == "parquet" and isinstance(row[key], str):
                row[key] = row[key].encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(texts), path)
        elif suffix == "csv":
            pd.DataFrame(texts).to_csv(path, index=False)
        else:
            lines = [json.dumps(row) for row in texts]
            write_file(path, "\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
        options = ImportOptions(label_column="label", group_column="group")
        entries = list(open_reader(str(path), options).iter_samples())
    num_used = sum(len(entry.captions) for entry in entries if isinstance(entry, RawSample))
    assert num_used + sum(isinstance(entry, SkippedSample) for entry in entries) == len(rows)


def test_base64_images_have_a_reason(tmp_path: Path, pictures: list[Picture]) -> None:
    name, data, caption = pictures[0]
    write_images(tmp_path, pictures[:1])
    rows = [
        (f"{name}.jpg", caption),
        (base64.b64encode(data).decode(), "a"),
        ("data:image/png;base64,AAAA", "b"),
    ]
    pd.DataFrame(rows, columns=["image", "caption"]).to_json(
        tmp_path / "t.jsonl", orient="records", lines=True
    )
    dataset = import_dataset(tmp_path / "t.jsonl", tmp_path / "out")
    assert dataset.artifact.manifest.skipped == {"image is base64 text, not a file": 2}


def test_column_names_may_end_with_a_note(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures)
    rows = [(f"{name}.jpg", caption) for name, _, caption in pictures]
    pd.DataFrame(rows, columns=["Image [path]", "Caption (English)"]).to_csv(tmp_path / "t.csv", index=False)
    dataset = import_dataset(tmp_path / "t.csv", tmp_path / "out")
    assert [sample.captions for sample in dataset] == [(caption,) for _, _, caption in pictures]


def test_huge_integers_of_json_are_text(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures[:2])
    huge = "9" * 5000
    rows = [f'{{"image": "{name}.jpg", "caption": ["x", {huge}]}}' for name, _, _ in pictures[:2]]
    for name, text in {"t.jsonl": "\n".join(rows), "t.json": f"[{','.join(rows)}]"}.items():
        dataset = import_dataset(write_file(tmp_path / name, text), tmp_path / f"{name}-out")
        assert [sample.captions for sample in dataset] == [("x", huge)] * 2


def test_parquet_columns_whose_names_are_no_text_raise(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"image": ["a.jpg"], "caption": ["x"]})
    path.write_bytes(path.read_bytes().replace(b"image", b"im\xffge"))
    with pytest.raises(InvalidInputError, match="is not a Parquet file: 'utf-8' codec") as error:
        import_dataset(path, tmp_path / "out")
    assert error.value.path == path


def test_long_column_names_take_linear_time() -> None:
    names = [f"caption {'(' * 200_000}x)", "x" + "[" * 200_000, "file"]
    assert match_caption_columns(names) == [names[0]]
