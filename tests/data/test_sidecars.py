"""Caption files: which belong to which image, and what their content means."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.pictures import Picture, write_file, write_images
from likewise.data.config import CaptionLines
from likewise.data.importing import import_dataset
from likewise.data.readers import ImportOptions
from likewise.data.readers.folder import image_ids
from likewise.data.readers.sidecars import are_separate_captions, pair_sidecars
from likewise.errors import InvalidInputError

PARAGRAPH = (
    "A man in a red coat walks along the shore while two dogs\n"
    "chase each other through the shallow water; behind them the\n"
    "sun sets over the harbor and a few fishing boats return with\n"
    "the catch of the day"
)


def test_caption_files_belong_to_a_name_before_a_stem() -> None:
    images = ["a.jpg", "a.png", "b.jpg", "c.jpg", "d.jpg", "é v2.0.jpg"]
    sidecars = ["a.txt", "a.png.txt", "b.TXT", "b.json", "c.caption", "c.txt", "e.txt", "é v2.0.txt"]
    assigned, unused = pair_sidecars(images, sidecars)
    assert assigned == {
        "a.jpg": ["a.txt"],
        "a.png": ["a.png.txt"],
        "b.jpg": ["b.json", "b.TXT"],
        "c.jpg": ["c.txt"],
        "d.jpg": [],
        "é v2.0.jpg": ["é v2.0.txt"],
    }
    assert unused == ["c.caption", "e.txt"]


def test_ids_are_stems_where_these_are_unique() -> None:
    assert image_ids(["a.jpg", "a.png", "b.jpg", "c.jpg", "c.jpg.png", "c.jpg.gif.webp"]) == {
        "a.jpg": "a.jpg",
        "a.png": "a.png",
        "b.jpg": "b",
        "c.jpg": "c",
        "c.jpg.png": "c.jpg.png",
        "c.jpg.gif.webp": "c.jpg.gif",
    }


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["A dog runs.\nTwo cats sleep!"], True),
        (["狗在跑。\n猫在睡。"], True),
        (["red bird\nbird on a branch\na small bird", "blue bird\nbird\nanother long line"], True),
        ([PARAGRAPH], False),
        ([PARAGRAPH, PARAGRAPH.replace("two dogs", "one dogs").partition("return")[0]], False),
        (["a dog\nin the park"], None),
        (["A dog runs.\n\nBehind it is a park."], None),
        (["Title\nsome longer text on the work", "Other\nmore text on the work\nin two lines"], None),
        # Lines of a template have similar lengths.
        (["\n".join(f"a photograph of the bird with the number {i}" for i in range(5))], None),
    ],
)
def test_lines_are_captions_or_one_text(texts: list[str], expected: bool | None) -> None:
    assert are_separate_captions([text.split("\n") for text in texts]) is expected


@pytest.mark.parametrize(
    ("caption_lines", "expected"),
    [("separate", ("a dog", "in the park")), ("join", ("a dog in the park",)), ("auto", None)],
)
def test_lines_of_a_text_file(
    tmp_path: Path, pictures: list[Picture], caption_lines: CaptionLines, expected: tuple[str, ...] | None
) -> None:
    write_images(tmp_path / "src", pictures[:1])
    write_file(tmp_path / "src" / f"{pictures[0][0]}.caption", "a dog\nin the park\n")
    options = ImportOptions(caption_lines=caption_lines)
    if expected is None:
        with pytest.raises(
            InvalidInputError, match="one caption per line, or one caption in several"
        ) as error:
            import_dataset(tmp_path / "src", tmp_path / "out", options)
        assert error.value.field == "caption_lines"
    else:
        (sample,) = import_dataset(tmp_path / "src", tmp_path / "out", options)
        assert sample.captions == expected


def test_rare_lines_after_the_probed_files_are_joined_and_counted(
    tmp_path: Path, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("likewise.data.readers.sidecars._NUM_PROBED_IMAGES", 2)
    write_images(tmp_path / "src", pictures)
    *_, last = sorted(name for name, _, _ in pictures)
    for name, _, caption in pictures:
        write_file(tmp_path / "src" / f"{name}.txt", "one\ntwo" if name == last else caption)
    dataset = import_dataset(tmp_path / "src", tmp_path / "out")
    assert dataset[5].captions == ("one two",)
    assert dataset.artifact.manifest.counts["joined_captions"] == 1


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (["a", ["b", "c"]], ("a", "b", "c")),
        ("a text", ("a text",)),
        ({"captions": [["a"], "b"]}, ("a", "b")),
        ({"caption": "", "captions": None}, ("from the text",)),
        ({"caption": "a"}, ("a",)),
    ],
)
def test_json_content(
    tmp_path: Path, pictures: list[Picture], content: object, captions: tuple[str, ...]
) -> None:
    write_images(tmp_path / "src", pictures[:1])
    write_file(tmp_path / "src" / f"{pictures[0][0]}.jpg.json", json.dumps(content))
    write_file(tmp_path / "src" / f"{pictures[0][0]}.TXT", "from the text")
    (sample,) = import_dataset(tmp_path / "src", tmp_path / "out")
    assert tuple(filter(None, sample.captions)) == captions


def test_a_common_key_is_inferred_and_reported(
    tmp_path: Path, pictures: list[Picture], log: pytest.LogCaptureFixture
) -> None:
    for name, data, caption in pictures:
        write_file(tmp_path / "src" / f"{name}.jpg", data)
        write_file(tmp_path / "src" / f"{name}.json", json.dumps({"url": "u", "text": caption, "title": ""}))
    dataset = import_dataset(tmp_path / "src", tmp_path / "out")
    assert "captions are 'title'" in log.text
    assert "set `caption_column` to use text" in log.text
    assert sum(len(sample.captions) for sample in dataset) == 0
    options = ImportOptions(caption_column=("text",))
    dataset = import_dataset(tmp_path / "src", tmp_path / "text", options)
    assert sum(len(sample.captions) for sample in dataset) == 6


@pytest.mark.parametrize("num_probed", [2, 1000])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("caption_column", ("titel",)),
        ("label_column", "lable"),
        ("group_column", "Year"),
        ("id_column", "uuid"),
        ("where", ("lable=x",)),
    ],
)
def test_keys_that_no_file_has_raise(
    tmp_path: Path,
    pictures: list[Picture],
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: Any,
    num_probed: int,
) -> None:
    monkeypatch.setattr("likewise.data.readers.sidecars._NUM_PROBED_IMAGES", num_probed)
    *_, last = sorted(name for name, _, _ in pictures)
    for name, data, caption in pictures:
        write_file(tmp_path / "src" / f"{name}.jpg", data)
        # Keys that only the last file has are found, too.
        late = {"title": caption, "label": "x", "year": 1, "id": name} if name == last else {}
        write_file(tmp_path / "src" / f"{name}.json", json.dumps({"caption": caption, **late}))
    with pytest.raises(InvalidInputError, match="caption, title, label, year, id") as error:
        import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(**{field: value}))
    assert error.value.field == field
    options = ImportOptions(label_column="label", where=("label=x",))
    assert [sample.id for sample in import_dataset(tmp_path / "src", tmp_path / "found", options)] == [last]
    with pytest.raises(InvalidInputError, match="no image with label=z; it has label=x") as error:
        import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(where=("label=z",)))
    assert error.value.field == "where"
    assert not (tmp_path / "out").exists()


def test_names_without_caption_files_raise(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src", pictures)
    with pytest.raises(InvalidInputError, match="no image of src has a caption file"):
        import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(label_column="label"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_and_written_numbers(tmp_path: Path, pictures: list[Picture], encoding: str) -> None:
    write_images(tmp_path / "in", pictures[:2])
    names = [name for name, _, _ in pictures[:2]]
    (tmp_path / "in" / f"{names[0]}.txt").write_text("ein großer Käfer", encoding=encoding)
    (tmp_path / "in" / f"{names[1]}.json").write_text('{"caption": "ü", "size": 1.10}', encoding=encoding)
    dataset = import_dataset(tmp_path / "in", tmp_path / "out", ImportOptions(label_column="size"))
    by_id = {sample.id: sample for sample in dataset}
    assert by_id[names[0]].captions == ("ein großer Käfer",)
    assert (by_id[names[1]].captions, by_id[names[1]].label) == (("ü",), "1.10")


def test_text_files_without_a_use_are_counted(tmp_path: Path, pictures: list[Picture]) -> None:
    for name, data, caption in pictures[:2]:
        write_file(tmp_path / "in" / f"{name}.jpg", data)
        write_file(tmp_path / "in" / f"{name}.txt", caption)
        write_file(tmp_path / "in" / f"{name}.json", json.dumps({"title": "a title"}))
    dataset = import_dataset(tmp_path / "in", tmp_path / "out", ImportOptions(caption_column=("title",)))
    assert [sample.captions for sample in dataset] == [("a title",)] * 2
    assert dataset.artifact.manifest.counts["unused_text_files"] == 2
