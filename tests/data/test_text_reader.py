"""CSV and other delimited tables, JSON Lines and Flickr token files."""

import csv
import io
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from likewise.data.readers import ImportOptions, open_reader, open_table_file
from likewise.data.readers.base import SkippedSample
from likewise.data.readers.tables import TableRow
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


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the values of all rows, and the reasons of skipped rows by location."""
    rows = list(open_table_file(path).iter_rows(()))
    return (
        [row.values for row in rows if isinstance(row, TableRow)],
        {row.location.partition(" ")[2]: row.reason for row in rows if isinstance(row, SkippedSample)},
    )


ROWS = [{"image": f"{i}.jpg", "caption": f"die Tür {i}"} for i in range(4)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("name", "delimiter"), [("t.csv", ","), ("t.csv", "\t"), ("t.tsv", "\t"), ("t.txt", ";"), ("t.CSV", "|")]
)
def test_encodings_line_ends_and_delimiters(
    tmp_path: Path, encoding: str, line_end: str, name: str, delimiter: str
) -> None:
    lines = [delimiter.join(row) for row in (("image", "caption"), *(row.values() for row in ROWS))]
    text = line_end.join(["", " ", *lines[:2], "", *lines[2:], ""])
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    assert read(write_file(tmp_path / name, (mark + text).encode(encoding))) == (ROWS, {})


@pytest.mark.parametrize("text", ["sep=;\nimage;caption\n", '"sep=;"\r\n\r\nimage;caption\r\n'])
def test_first_line_may_set_the_delimiter(tmp_path: Path, text: str) -> None:
    rows = "".join(f"{row['image']};{row['caption']}, red\n" for row in ROWS)
    values, skipped = read(write_file(tmp_path / "t.csv", text + rows))
    assert [row["caption"] for row in values] == [f"{row['caption']}, red" for row in ROWS]
    assert not skipped


def test_headers_with_quotes_spaces_and_empty_cells(tmp_path: Path) -> None:
    long_name = "x" * 200_000
    text = f'\t image \t"caption\n(English)"\t{long_name}\n0\ta.jpg\tone\t\n1\tb.jpg\ttwo\t{long_name}\n'
    table = open_table_file(write_file(tmp_path / "t.tsv", text))
    assert table.column_names() == ["", "image", "caption (English)", long_name]
    rows, skipped = read(tmp_path / "t.tsv")
    assert [(row["image"], row["caption (English)"]) for row in rows] == [("a.jpg", "one"), ("b.jpg", "two")]
    assert not skipped


@pytest.mark.parametrize("name", ["t.tsv", "t.csv"])
def test_quotes_that_are_part_of_the_text(tmp_path: Path, name: str) -> None:
    """Unpaired quotes lose no rows, even where a later quote happens to close them."""
    delimiter = "\t" if name == "t.tsv" else ","
    captions = ['"Night train', "plain", 'says "hi" twice', '"Harbour" at dawn', "the end"]
    for last in ('a 5"', "six"):
        lines = [f"{i}.jpg{delimiter}{caption}" for i, caption in enumerate([*captions, last])]
        path = write_file(tmp_path / name, "\n".join([f"image{delimiter}caption", *lines]))
        assert [row["caption"] for row in read(path)[0]] == [*captions, last]
        assert any("quotes are part of the text" in message for message in open_table_file(path).messages())


def test_stray_quotes_in_quoted_csv_lose_only_their_rows(tmp_path: Path) -> None:
    lines = [f'{i}.jpg,"one, {i}","two ""{i}"""' for i in range(20)]
    lines[5] = '5.jpg,"never closed,x'
    lines[9] = '9.jpg,"closed" too early,x'
    lines[12] = '12.jpg,"over\ntwo lines","and\n\nthree"'
    rows, skipped = read(write_file(tmp_path / "t.csv", "\n".join(["image,caption,note", *lines])))
    assert [row["image"] for row in rows] == [f"{i}.jpg" for i in range(20) if i not in (5, 9)]
    assert rows[10]["note"] == "and\n\nthree"
    assert skipped == {"line 7": "row is not valid CSV", "line 11": "row is not valid CSV"}


def test_spaces_before_quotes(tmp_path: Path) -> None:
    path = write_file(tmp_path / "t.csv", 'image, caption\na.jpg, "one, two"\nb.jpg, three\n')
    assert [row["caption"].strip() for row in read(path)[0]] == ["one, two", "three"]


cell_text_strategy = st.text(st.sampled_from("a\",;\t\n\r'|#é\u2028\ufeff 😀\\"), max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    cells=st.lists(st.tuples(cell_text_strategy, cell_text_strategy), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
)
def test_written_csv_is_read_back(cells: list[tuple[str, str]], delimiter: str) -> None:
    """All cells are read as the csv module wrote them, with universal line ends."""
    stream = io.StringIO(newline="")
    rows = [(f"{i}.jpg", *row) for i, row in enumerate(cells)]
    csv.writer(stream, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("image", "a", "b"), *rows])
    # A cell that needs its quotes, so that the other reading is not possible.
    stream.write(f'"z.jpg"{delimiter}"{delimiter}"{delimiter}"""{delimiter}"\n' * 9)
    with tempfile.TemporaryDirectory() as folder:
        values, skipped = read(write_file(Path(folder) / "t.csv", stream.getvalue()))
    assert not skipped
    assert [tuple(row.values()) for row in values[: len(rows)]] == [
        tuple(cell.replace("\r\n", "\n").replace("\r", "\n") for cell in row) for row in rows
    ]


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.text(st.sampled_from('ab"é 😀'), min_size=1, max_size=12), min_size=1, max_size=8),
    name=st.sampled_from(["t.csv", "t.tsv", "t.jsonl", "captions.token"]),
)
def test_no_line_is_lost(lines: list[str], name: str) -> None:
    """Every line is part of a row or of a skipped row, whatever its quotes."""
    marker = {"t.csv": "N{},", "t.tsv": "N{}\t", "t.jsonl": "N{}", "captions.token": "N{}.jpg#0\t"}[name]
    header = {"t.csv": "image,caption\n", "t.tsv": "image\tcaption\n"}.get(name, "")
    first = {"t.jsonl": "{}\n", "captions.token": "x.jpg#0\ty\n"}.get(name, "")
    text = header + first + "".join(f"{marker.format(i)}{line}\n" for i, line in enumerate(lines))
    with tempfile.TemporaryDirectory() as folder:
        rows = list(open_table_file(write_file(Path(folder) / name, text)).iter_rows(()))
    content = " ".join(str(row.values) for row in rows if isinstance(row, TableRow))
    num_used = sum(content.count(f"N{i}") > 0 for i in range(len(lines)))
    assert num_used + sum(isinstance(row, SkippedSample) for row in rows) == len(lines)


def test_unsupported_encodings_raise_and_single_lines_are_counted(tmp_path: Path) -> None:
    for text, encoding, advice in (
        ("ein Käfer, größer", "latin-1", "Windows-1252"),
        ("赤い車", "shift_jis", "another script"),
        ("красная машина", "cp1251", "another script"),
    ):
        path = write_file(tmp_path / "t.csv", f"image;caption\na.jpg;ok\nb.jpg;{text}\n".encode(encoding))
        with pytest.raises(InvalidInputError, match=f"t.csv, line 3: not UTF-8; .*{advice}") as error:
            open_reader(str(path), ImportOptions()).count()
        assert error.value.path == path
    lines = [f"{i}.jpg;Käfer".encode() for i in range(3)]
    path = write_file(tmp_path / "t.csv", b"\n".join([b"image;caption", lines[0], b"x.jpg;\xe4", *lines[1:]]))
    rows, skipped = read(path)
    assert len(rows) == 3
    assert skipped == {"line 3": "row is not UTF-8"}


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b'{"blob": "' + b"x" * 200_000 + b'"}\n',
        b"a\0b,c\n1,2\n",
        b"date,price\r2020,3\r",
        b'"' + b"x,\n" * 20_000,
        b"\xff\xfe\x00",
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".captions.json", ".captions.txt"])
def test_unrelated_table_beside_images_is_no_error(
    tmp_path: Path, pictures: list[Picture], data: bytes, suffix: str
) -> None:
    write_images(tmp_path, pictures[:2])
    write_file(tmp_path / f"export{suffix}", data)
    assert open_reader(str(tmp_path), ImportOptions()).count() == 2


@pytest.mark.parametrize(
    "form", ["list", "indented list", "lines", "indented", "list.jsonl", "indented.jsonl"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_forms(tmp_path: Path, form: str, encoding: str) -> None:
    form, _, suffix = form.partition(".")
    indent = 1 if "indented" in form else None
    if "list" in form:
        text = json.dumps(ROWS, indent=indent)
    else:
        text = "\n".join(json.dumps(row, indent=indent, ensure_ascii=False) for row in ROWS)
    path = write_file(tmp_path / f"t.{suffix or 'json'}", text.encode(encoding))
    assert read(path) == (ROWS, {})


def test_invalid_json_rows_are_counted(tmp_path: Path) -> None:
    items = ['{"image": "a.jpg"}', '{"image": "b.jpg", "image": "c.jpg"}', "3", '{"x": 1.50}', '{"x": NaN}']
    rows, skipped = read(write_file(tmp_path / "t.json", f"[{', '.join(items)}]"))
    assert [str(row.get("x", row.get("image"))) for row in rows] == ["a.jpg", "1.50", "nan"]
    assert skipped == {"item 1": "item has a key twice", "item 2": "item is not a JSON object"}
    text = '{\n "image": "a.jpg"\n}\n{\n "image":\n{\n "image": "c.jpg"\n}\n'
    rows, skipped = read(write_file(tmp_path / "t.jsonl", text))
    assert [row["image"] for row in rows] == ["a.jpg", "c.jpg"]
    assert skipped == {"line 4": "line is not valid JSON"}
    rows, skipped = read(write_file(tmp_path / "t.jsonl", '{"image": "a"}{"image": "b"}\n{"image": "c\n'))
    assert len(rows) == 2
    assert skipped == {"line 2": "line is not valid JSON"}


def test_json_lists_are_read_in_constant_memory(tmp_path: Path) -> None:
    items = [{"image": f"{i}.jpg", "caption": "x" * 5000} for i in range(2000)]
    table = open_table_file(write_file(tmp_path / "t.json", json.dumps(items, indent=1)))
    tracemalloc.start()
    assert sum(1 for _ in table.iter_rows(())) == len(items)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_columns_of_late_rows(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures[:1])
    rows: list[dict[str, str]] = [{"image": f"{pictures[0][0]}.jpg"}] * 150
    rows += [{"image": rows[0]["image"], "caption": "late", "kind": "x"}]
    path = write_file(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
    assert import_dataset(path, tmp_path / "out")[0].captions == ("late",)
    options = ImportOptions(label_column="kind")
    assert import_dataset(path, tmp_path / "out2", options)[0].label == "x"
    with pytest.raises(InvalidInputError, match="no column 'kindd'.*Did you mean kind"):
        import_dataset(path, tmp_path / "out3", ImportOptions(label_column="kindd"))
