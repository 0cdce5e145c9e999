"""Import: validation of samples, shards, resuming, targets and invalid sources."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.pictures import (
    Picture,
    format_csv,
    load_pictures,
    read_files,
    write_file,
    write_images,
)
from helpers.progress import RecordingProgress
from likewise.data.dataset import CaptionDataset, Sample
from likewise.data.importing import import_dataset, normalize_caption, shard_chunks
from likewise.data.readers import ImportOptions
from likewise.data.readers.base import RawSample, UInt64Set
from likewise.errors import ArtifactError, InvalidInputError
from likewise.locks import HOST


def encode_jpeg(size: tuple[int, int], mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, 90 if mode == "L" else (90,) * len(mode)).save(out, "JPEG")
    return out.getvalue()


def test_samples_have_only_the_fields_of_the_source(tmp_path: Path, pictures: list[Picture]) -> None:
    name, data, caption = pictures[0]
    write_file(tmp_path / "src" / f"{name}.jpg", data)
    write_file(tmp_path / "src" / f"{name}.txt", caption)
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
    assert vars(record.image) == {
        "path": f"{name}.jpg",
        "offset": None,
        "size": None,
        "bytes": None,
        "bands": None,
    }


def test_captions_are_normalized_to_one_line() -> None:
    assert normalize_caption("  a\r\n\n b\u2028c\td  ") == "a b c\td"
    assert normalize_caption("\t\n \u00a0") == ""
    assert normalize_caption("žluťoučký 🐈 \ud83d") == "žluťoučký 🐈 ?"


def test_unusual_images_are_imported_and_broken_ones_skipped(
    tmp_path: Path, pictures: list[Picture], log: pytest.LogCaptureFixture
) -> None:
    src = tmp_path / "src"
    good = pictures[0][1]
    deep, clear = io.BytesIO(), io.BytesIO()
    Image.fromarray((np.arange(900, dtype=np.uint16) * 70).reshape(30, 30)).save(deep, "PNG")
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(clear, "PNG")
    valid = {
        "cmyk.jpg": encode_jpeg((40, 30), "CMYK"),
        "deep.png": deep.getvalue(),
        "clear.png": clear.getvalue(),
    }
    valid |= {"grey.JPG": encode_jpeg((8, 9), "L"), "png_inside.jpg": clear.getvalue()}
    broken = {
        "cut.jpg": (good[: len(good) // 2], "truncated"),
        "text.jpg": (b"<html>not found</html>", "not an image"),
        "empty.jpg": (b"", "file is empty"),
        "tall.jpg": (encode_jpeg((1, 500)), "aspect ratio above 20"),
    }
    for name, data in valid.items():
        write_file(src / name, data)
    for name, (data, _) in broken.items():
        write_file(src / name, data)
    (src / "gone.jpg").symlink_to(src / "nowhere")
    dataset = import_dataset(src, tmp_path / "out")
    assert {s.image.path for s in dataset} == valid.keys()
    assert {s.id: (s.width, s.height) for s in dataset} == {
        "cmyk": (40, 30), "deep": (30, 30), "clear": (20, 10), "grey": (8, 9), "png_inside": (20, 10)
    }  # fmt: skip
    reasons = {entry["location"]: entry["reason"] for entry in dataset.skipped_entries()}
    assert reasons == {name: reason for name, (_, reason) in broken.items()} | {
        "gone.jpg": "broken link or special file"
    }
    assert dataset.artifact.manifest.skipped == dict.fromkeys(reasons.values(), 1)
    assert any(s.startswith("skipped 5 entries:") for s in log.messages)
    assert any("no image has a caption" in s for s in log.messages)


def test_duplicate_ids_are_skipped(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path, pictures)
    rows = [f"{'same' if i in (1, 4) else i},{n}.jpg,{c}" for i, (n, _, c) in enumerate(pictures)]
    table = write_file(tmp_path / "t.csv", "\n".join(["key,file,caption", *rows]))
    options = ImportOptions(id_column="key")
    dataset = import_dataset(table, tmp_path / "out", options, shard_rows=2)
    assert [s.id for s in dataset] == ["0", "same", "2", "3", "5"]
    assert list(dataset.skipped_entries()) == [
        {"id": "same", "location": "t.csv line 6", "reason": "duplicate id", "num_captions": 1}
    ]
    # Also where the first was imported by an earlier run.
    for name in ("samples-00002.parquet", "skipped-00002.jsonl"):
        (tmp_path / "out" / name).unlink()
    mark_incomplete(tmp_path / "out")
    assert [s.id for s in import_dataset(table, tmp_path / "out", options, shard_rows=2)] == [
        s.id for s in dataset
    ]


def test_uint64_set_equals_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("likewise.data.readers.base._MIN_MERGE_SIZE", 7)
    rng = np.random.default_rng(0)
    edges = [0, 2**63 - 1, 2**63, 2**64 - 1]
    numbers = [*edges, *rng.integers(0, 2**64, 500, np.uint64).tolist(), *range(100)]
    values, expected = UInt64Set(), set()
    for number in rng.choice(np.array(numbers, np.uint64), 3000).tolist():
        assert values.add(number) == (number not in expected)
        expected.add(number)


def test_limit(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src", pictures)
    dataset = import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(limit=1))
    assert [s.id for s in dataset] == [sorted(n for n, _, _ in pictures)[0]]
    assert len(import_dataset(tmp_path / "src", tmp_path / "out4", ImportOptions(limit=4))) == 4


def test_invalid_sources_raise(tmp_path: Path, pictures: list[Picture]) -> None:
    (tmp_path / "empty").mkdir()
    image = write_file(tmp_path / "a.jpg", pictures[0][1])
    write_file(tmp_path / "packed" / "a.zip", b"x")
    write_file(tmp_path / "odd" / "t.csv", "a,b\n")
    for source, message in (
        (tmp_path / "emptie", "does not exist. Did you mean empty"),
        (tmp_path / "empty", "no images, tables or tar archives in"),
        (write_file(tmp_path / "a.npy", b"x"), "unknown format; expected"),
        (image, "single image"),
        (tmp_path / "packed", "only compressed files such as a.zip"),
        (tmp_path / "odd", "cannot infer the image column of t.csv"),
        (tmp_path / "*.tar", "no file matches"),
        (write_file(tmp_path / "t.csv.gz", b"x"), "csv.gz is compressed"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            import_dataset(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_invalid_options_raise(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src", pictures[:1])
    with pytest.raises(InvalidInputError) as error:
        ImportOptions(limit=0)
    assert error.value.field == "limit"
    with pytest.raises(InvalidInputError) as error:
        import_dataset(tmp_path / "src", tmp_path / "out", shard_rows=0)
    assert error.value.field == "shard_rows"
    with pytest.raises(InvalidInputError) as error:
        import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(image_column="x"))
    assert error.value.field == "image_column"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target_exists", [True, False])
def test_source_without_readable_images_raises(
    tmp_path: Path, pictures: list[Picture], *, target_exists: bool
) -> None:
    table = write_file(tmp_path / "t.csv", format_csv(pictures))
    if target_exists:
        (tmp_path / "out").mkdir()
    with pytest.raises(
        InvalidInputError,
        match=r"no readable image in .*file is missing \(6, such as t\.csv line 2: .*/1f947\.jpg\)",
    ):
        import_dataset(table, tmp_path / "out")
    assert (tmp_path / "out").exists() == target_exists
    assert not target_exists or not list((tmp_path / "out").iterdir())


def test_dataset_inside_its_source(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src", pictures)
    first = import_dataset(tmp_path / "src", tmp_path / "src" / "out")
    again = import_dataset(tmp_path / "src", tmp_path / "src" / "out")
    assert first.key == again.key
    with pytest.raises(InvalidInputError, match="written by likewise"):
        import_dataset(tmp_path / "src" / "out", tmp_path / "out")


def test_complete_dataset_is_not_imported_again(
    tmp_path: Path, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path / "src", pictures)
    import_dataset(tmp_path / "src", tmp_path / "out")
    before = read_files(tmp_path / "out")
    monkeypatch.setattr("likewise.data.importing.decode_image", raise_if_decoded)
    assert len(import_dataset(tmp_path / "src", tmp_path / "out")) == 6
    assert "already complete" in log.messages[-1]
    assert read_files(tmp_path / "out") == before
    with pytest.raises(ArtifactError, match="limit was None, is 2"):
        import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(limit=2))
    assert read_files(tmp_path / "out") == before


def raise_if_decoded(*_: object) -> None:
    raise AssertionError("an image was decoded again")


def test_changed_source_raises(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "images", pictures)
    table = write_file(tmp_path / "t.csv", format_csv(pictures))
    for source in (tmp_path / "images", table):
        out = tmp_path / f"out-{source.name}"
        import_dataset(source, out)
        write_file(tmp_path / "images" / f"{pictures[0][0]}.jpg", pictures[1][1] + b"\0" * len(out.name))
        with pytest.raises(ArtifactError, match="inputs have changed"):
            import_dataset(source, out)


def test_moved_source_updates_the_root(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "src", pictures)
    import_dataset(tmp_path / "src", tmp_path / "out")
    (tmp_path / "src").rename(tmp_path / "moved")
    dataset = import_dataset(tmp_path / "moved", tmp_path / "out")
    assert dataset.root == tmp_path / "moved"
    assert CaptionDataset(tmp_path / "out").root == tmp_path / "moved"


def test_shards_are_limited_by_embedded_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from likewise.data.dataset import ImageRef

    monkeypatch.setattr("likewise.data.importing._SHARD_BYTES", 10)
    entries = [
        RawSample(id=str(i), image=ImageRef(bytes=b"12345"), captions=(), group=None, label=None, location="")
        for i in range(5)
    ]
    assert [len(chunk) for chunk in shard_chunks(entries, 4096)] == [2, 2, 1]


def mark_incomplete(target: Path) -> None:
    """Make a manifest look as a killed run leaves it."""
    manifest = json.loads((target / "artifact.json").read_text())
    manifest |= {"complete": False, "counts": {}, "skipped": {}}
    (target / "artifact.json").write_text(
        json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    )


@pytest.fixture
def table_of_48(tmp_path: Path) -> Path:
    """A table of 48 real images, some of them broken or with duplicate ids."""
    for i, (name, data, caption) in enumerate(load_pictures(48)):
        write_file(tmp_path / "src" / f"{name}.jpg", data[:300] if i in (2, 3, 20, 24, 25, 26, 27) else data)
        with (tmp_path / "src" / "t.csv").open("a") as table:
            table.write("file,caption,id\n" if not i else "")
            table.write(f"{name}.jpg,{caption if i % 5 else ' '},{'twice' if i in (1, 40) else i}\n")
    return tmp_path / "src" / "t.csv"


@pytest.mark.parametrize("removed", ["first", "records only", "last", "all", "stale skips"])
def test_resumed_equals_uninterrupted(tmp_path: Path, table_of_48: Path, removed: str) -> None:
    options = ImportOptions(id_column="id")
    uninterrupted = import_dataset(
        table_of_48, tmp_path / "uninterrupted", options, shard_rows=4, num_workers=0
    )
    assert len(uninterrupted) == 40
    assert len(uninterrupted.samples(6)) == 0  # a shard of nothing but broken images
    out = tmp_path / "out"
    import_dataset(table_of_48, out, options, shard_rows=4)
    mark_incomplete(out)
    removed_files = {
        "first": ["samples-00000.parquet", "skipped-00000.jsonl"],
        "records only": ["samples-00006.parquet"],
        "last": ["samples-00011.parquet"],
        "all": [p.name for p in out.iterdir() if p.name != "artifact.json"],
        "stale skips": ["samples-00001.parquet"],
    }[removed]
    for name in removed_files:
        (out / name).unlink()
    if removed == "stale skips":
        write_file(out / "skipped-00001.jsonl", '{"id": "x", "location": "x", "reason": "x"}\n')
    write_file(out / f".samples-00000.parquet.{HOST}.999999999.tmp", b"half")
    progress = RecordingProgress()
    import_dataset(table_of_48, out, options, shard_rows=4, progress=progress)
    assert read_files(out) == read_files(tmp_path / "uninterrupted")
    assert progress.totals[0][0] == 48
    if removed == "last":
        assert progress.totals[0][1] == 44


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

options = ImportOptions(id_column="id")
import_dataset(sys.argv[1], sys.argv[2], options, shard_rows=4, progress=SlowProgress())
"""


def test_killed_import_resumes(tmp_path: Path, table_of_48: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(table_of_48), str(out)])
    try:
        deadline = time.monotonic() + 30
        while not (out / "samples-00000.parquet").exists():
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.002)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    num_done = len(list(out.glob("samples-*")))
    assert 0 < num_done < 12
    with pytest.raises(ArtifactError, match="incomplete"):
        CaptionDataset(out)
    decoded = count_decoded(monkeypatch)
    options = ImportOptions(id_column="id")
    import_dataset(table_of_48, out, options, shard_rows=4)
    assert len(decoded) <= 48 - 4 * num_done
    import_dataset(table_of_48, tmp_path / "uninterrupted", options, shard_rows=4)
    assert read_files(out) == read_files(tmp_path / "uninterrupted")


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from likewise.data import importing

    calls: list[int] = []
    decode_image: Callable = importing.decode_image

    def count_and_decode(data: bytes, **options: object) -> np.ndarray:
        calls.append(1)
        return decode_image(data, **options)

    monkeypatch.setattr(importing, "decode_image", count_and_decode)
    return calls


def write_source(folder: Path, kind: str, pictures: list[Picture]) -> Path:
    """Write captioned images as a folder, a table beside them, an archive, or a table that contains them."""
    write_images(folder, pictures)
    captions = [caption for _, _, caption in pictures]
    if kind == "parquet":
        values = {"image": [data for _, data, _ in pictures], "caption": captions}
        pq.write_table(pa.table(values), folder / "t.parquet", compression="none")
        return folder / "t.parquet"
    if kind == "table":
        rows = [f"{name}.jpg,{caption}" for name, _, caption in pictures]
        return write_file(folder / "t.csv", "\n".join(["file,caption", *rows]))
    for name, _, caption in pictures:
        write_file(folder / f"{name}.txt", caption)
    if kind == "folder":
        return folder
    with tarfile.open(folder / "t.tar", "w") as archive:
        for path in sorted(folder.glob("*.???")):
            if path.suffix != ".tar":
                archive.add(path, path.name)
    return folder / "t.tar"


@pytest.mark.parametrize("kind", ["folder", "table", "tar", "parquet"])
def test_copied_source_keeps_its_dataset_and_a_mended_one_does_not(
    tmp_path: Path, pictures: list[Picture], kind: str
) -> None:
    source = write_source(tmp_path / "src", kind, pictures)
    key = import_dataset(source, tmp_path / "out").key
    for path in (tmp_path / "src").iterdir():
        os.utime(path, (1, 1))
    assert import_dataset(source, tmp_path / "out").key == key
    shutil.copytree(tmp_path / "src", tmp_path / "copy", copy_function=shutil.copyfile)
    copy = tmp_path / "copy" / source.relative_to(tmp_path / "src")
    dataset = import_dataset(copy, tmp_path / "out")
    assert (dataset.key, dataset.root) == (key, tmp_path / "copy")
    _, _, caption = pictures[0]
    for path in filter(Path.is_file, (copy, *(tmp_path / "copy").iterdir())):
        times = path.stat()
        path.write_bytes(path.read_bytes().replace(caption.encode(), caption.encode().swapcase()))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert path.stat().st_size == times.st_size
    with pytest.raises(ArtifactError, match="its inputs have changed"):
        import_dataset(copy, tmp_path / "out")
