"""Tables: columns, merging of rows, image paths, Parquet and COCO."""

import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
from likewise.data.readers.base import RawSample
from likewise.data.readers.parquet import open_parquet_table
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
    assert [row.values for row in open_parquet_table(tmp_path / "t.parquet").iter_rows(["text"])] == [
        {"text": "a"},
        {"text": "b"},
    ]


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
