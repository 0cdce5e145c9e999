"""Folders of images with caption files."""

import json
from pathlib import Path

from helpers.pictures import Picture, expected_samples, samples_by_id, write_file, write_images
from likewise.data.importing import import_dataset
from likewise.data.readers import ImportOptions, open_reader


def test_folder_with_json_files(tmp_path: Path, pictures: list[Picture]) -> None:
    for i, (name, data, caption) in enumerate(pictures):
        folder = tmp_path / "src" / ("cats" if i % 2 else "dogs") / "deep"
        write_file(folder / f"{name}.jpg", data)
        captions = caption if i else [caption, "another 猫"]
        write_file(folder / f"{name}.json", json.dumps({"caption": captions, "kind": i, "url": "x"}))
    dataset = import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(label_column="kind"))
    expected = {
        f"{'cats' if i % 2 else 'dogs'}/deep/{name}": (data, (caption,) if i else (caption, "another 猫"))
        for i, (name, data, caption) in enumerate(pictures)
    }
    assert samples_by_id(dataset) == expected
    assert [s.id for s in dataset] == sorted(expected)
    assert {s.id: (s.group, s.label) for s in dataset} == {
        key: (key.split("/")[0], str(i)) for i, key in enumerate(expected)
    }
    assert all((s.width, s.height) == (72, 72) for s in dataset)
    assert dataset.artifact.manifest.counts == {
        "shards": 1, "captions": 7, "without_caption": 0, "with_several_captions": 1, "empty_captions": 0,
        "files": 12, "caption_files": 6
    }  # fmt: skip


def test_folder_with_text_files_and_uncaptioned_images(tmp_path: Path, pictures: list[Picture]) -> None:
    src = tmp_path / "src"
    write_images(src, pictures[:3])
    (name, data, caption), (uncaptioned, uncaptioned_data, _), (both, both_data, _) = pictures[:3]
    write_file(src / f"{name}.txt", f"\ufeff  {caption}\nand so on \n")
    write_file(src / f"{both}.json", '{"caption": "from json"}')
    write_file(src / f"{both}.txt", "from text")
    write_file(src / ".hidden.jpg", data)
    write_file(src / "notes.json", "[]")
    dataset = import_dataset(src, tmp_path / "out", ImportOptions(caption_lines="join"))
    assert samples_by_id(dataset) == {
        name: (data, (f"{caption} and so on",)),
        uncaptioned: (uncaptioned_data, ()),
        both: (both_data, ("from json",)),
    }
    assert all(s.group is None for s in dataset)
    manifest = dataset.artifact.manifest
    assert manifest.counts["without_caption"] == 1
    assert manifest.counts["overridden_captions"] == 1  # the text that differs from the JSON file
    assert manifest.ignored == {"hidden file": 1, "caption file without an image": 1}
    assert manifest.ignored_examples == {
        "hidden file": ".hidden.jpg", "caption file without an image": "notes.json"
    }  # fmt: skip


def test_invalid_caption_files_are_skipped(tmp_path: Path, pictures: list[Picture]) -> None:
    src = tmp_path / "src"
    write_images(src, pictures[:4])
    names = [name for name, _, _ in pictures]
    write_file(src / f"{names[0]}.json", '{"caption": ')
    write_file(src / f"{names[1]}.json", '[["caption"], 1]')
    write_file(src / f"{names[2]}.txt", b"caf\xe9")
    dataset = import_dataset(src, tmp_path / "out")
    assert [s.id for s in dataset] == [names[3]]
    assert {entry["id"]: entry["reason"] for entry in dataset.skipped_entries()} == {
        names[0]: "caption file is not valid JSON",
        names[1]: "caption file is neither a JSON object nor a list of texts",
        names[2]: "caption file is not UTF-8, UTF-16 or UTF-32",
    }


def test_where_matches_keys_of_json_files(tmp_path: Path, pictures: list[Picture]) -> None:
    for i, (name, data, caption) in enumerate(pictures):
        write_file(tmp_path / "src" / f"{name}.jpg", data)
        write_file(tmp_path / "src" / f"{name}.json", json.dumps({"title": caption, "split": "ab"[i % 2]}))
    options = ImportOptions(caption_column=("title",), where=("split=b",))
    dataset = import_dataset(tmp_path / "src", tmp_path / "out", options)
    assert samples_by_id(dataset) == expected_samples(pictures[1::2])


def test_symlink_cycles_are_not_followed(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src" / "a", pictures[:1])
    (tmp_path / "src" / "a" / "loop").symlink_to(tmp_path / "src")
    assert len(import_dataset(tmp_path / "src", tmp_path / "out")) == 1


def test_fingerprint_is_deterministic(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src", pictures)
    first, second = (open_reader(str(tmp_path / "src"), ImportOptions()) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert first.count() == 6
