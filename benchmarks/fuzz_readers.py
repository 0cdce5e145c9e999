"""The readers under test: small valid inputs made in code, how each is read, and which counts must add up."""

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.fuzz_images import ReaderTest, Source, encode_image, make_image, make_image_sources
from benchmarks.mutations import Files
from likewise import ImportOptions, embed, find_neighbors, import_dataset
from likewise.artifacts import MANIFEST, read_jsonl
from likewise.data.dataset import CaptionDataset
from likewise.data.images import read_image, read_image_size
from likewise.data.readers import open_reader
from likewise.data.readers.base import RawSample, SkippedSample
from likewise.data.readers.cells import cell_texts
from likewise.data.readers.formats import open_table_file
from likewise.data.readers.table_reader import TableReader
from likewise.data.readers.tables import TableRow, cell_image
from likewise.embeddings.store import Embeddings
from likewise.evaluation.datasets.base import ImageDataset
from likewise.evaluation.datasets.detection import open_detection
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.evaluation.datasets.segmentation import open_segmentation
from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.models.checkpoints import save_encoder
from likewise.models.encoders import load_encoder
from likewise.neighbors.index import Neighbors

__all__ = ["READERS", "ReaderTest", "Source"]

_BACKBONE = "test_resnet"


def import_source(name: str, options: ImportOptions | None = None) -> Callable[[Path, Files], None]:
    """Return a check that imports a file, or the folder itself for an empty name."""
    options = ImportOptions() if options is None else options

    def check(folder: Path, files: Files) -> None:
        path = folder / name
        reader = open_reader(str(path), options)
        dataset = import_dataset(path, folder.parent / "out", options, shard_rows=4, num_workers=0)
        try:
            check_dataset(dataset)
            if isinstance(reader, TableReader):
                check_table_counts(reader, dataset)
            else:
                check_file_counts(dataset)
        finally:
            shutil.rmtree(folder.parent / "out", ignore_errors=True)

    return check


def check_dataset(dataset: CaptionDataset) -> None:
    """Read a dataset by all its methods; the counts of its manifest are those of its content."""
    samples, manifest = list(dataset), dataset.artifact.manifest
    assert len(samples) == len(dataset) > 0
    assert len({sample.id for sample in samples}) == len(samples)
    assert sum(len(sample.captions) for sample in samples) == manifest.counts["captions"]
    assert sum(1 for _ in dataset.skipped_entries()) == sum(manifest.skipped.values())
    assert dataset[len(dataset) - 1] == samples[-1]
    pixels = read_image(samples[0].image, dataset.root)
    assert pixels.shape[:2] == (samples[0].height, samples[0].width)


def check_table_counts(reader: TableReader, dataset: CaptionDataset) -> None:
    """Each row is a sample, merged into one, or skipped; no caption is lost."""
    rows = list(reader.table.iter_rows(reader.columns.required_columns()))
    entries = list(reader.iter_samples())
    skipped = [entry for entry in entries if isinstance(entry, SkippedSample)]
    samples = [entry for entry in entries if isinstance(entry, RawSample)]
    manifest = dataset.artifact.manifest
    assert len(dataset) + sum(manifest.skipped.values()) == len(entries) <= len(rows)
    assert len(skipped) >= sum(isinstance(row, SkippedSample) for row in rows)
    lost = sum("is not text" in entry.reason or "differs" in entry.reason for entry in skipped)
    embedded = reader.columns.image in reader.table.embedded_columns()
    texts = [
        text
        for row in rows
        if isinstance(row, TableRow)
        and not lost
        and cell_image(row.values.get(reader.columns.image or ""), is_embedded=embedded) is not None
        for column in reader.columns.captions
        for text in cell_texts(row.values.get(column))
    ]
    if not lost:
        assert sorted(texts) == sorted(text for sample in samples for text in sample.captions)
    if reader.table.name.endswith((".csv", ".tsv")) and '"' not in (text := _plain_text(reader)):
        num_lines = sum(1 for line in text.splitlines() if line.strip(" \f"))
        assert len(rows) in (num_lines - 1, num_lines - 2), "a line was lost"  # 2 with a line such as sep=;


def _plain_text(reader: TableReader) -> str:
    """Return the text of an ASCII file, or a quote for another one."""
    data = (reader.table.root / reader.table.name).read_bytes()
    odd = any(byte > 126 or (byte < 32 and byte not in b"\t\r\n") for byte in data)
    return '"' if odd else data.decode()


def check_file_counts(dataset: CaptionDataset) -> None:
    """Each file of a folder or an archive is used, skipped or ignored."""
    manifest = dataset.artifact.manifest
    num_errors = sum(count for reason, count in manifest.skipped.items() if reason.startswith("archive is "))
    num_others = sum(manifest.skipped.values()) + sum(manifest.ignored.values()) - num_errors
    num_captions = manifest.counts.get("caption_files", 0)
    assert len(dataset) + num_captions + num_others == manifest.counts["files"]


def _pictures(count: int = 4) -> Files:
    return {f"{index}.png": encode_image(make_image(index), "PNG") for index in range(count)}


_ROWS = [
    {"image": f"{index}.png", "caption": caption, "label": "a" if index else "b", "id": str(7 + index)}
    for index, caption in [
        (0, "a red, round thing"),
        (0, 'a "quoted" one'),
        (1, "größer"),
        (2, "1.10"),
        (3, "x"),
    ]
]


def _write_csv(delimiter: str, rows: list[dict[str, str]] = _ROWS) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def make_table_sources(folder: Path) -> list[Source]:
    """Return delimited files and a token file."""
    plain = "image,caption\n" + "".join(f"{i % 4}.png,thing number {i}\n" for i in range(8))
    tables = {
        "a.csv": _write_csv(","),
        "b.tsv": _write_csv("\t"),
        "c.csv": _write_csv(";").replace(b"\r\n", b"\n"),
        "plain.csv": plain.encode(),
        "token.txt": "".join(f"{i // 2}.png#{i % 2}\ta thing {i}\n" for i in range(8)).encode(),
    }
    labeled = ImportOptions(label_column="label", id_column="id", where=("label=a",))
    sources = [_table_source(name, data) for name, data in tables.items()]
    return [*sources, _table_source("a.csv", tables["a.csv"], labeled, counts=False)]


def _table_source(
    name: str, data: bytes, options: ImportOptions | None = None, *, counts: bool = True
) -> Source:
    check = import_source(name, options) if counts else import_only(name, options or ImportOptions())
    return Source(files=_pictures() | {name: data}, mutable=(name,), check=check)


def import_only(name: str, options: ImportOptions) -> Callable[[Path, Files], None]:
    """Return a check that imports a table of which `where` excludes rows."""

    def check(folder: Path, files: Files) -> None:
        try:
            check_dataset(import_dataset(folder / name, folder.parent / "out", options, num_workers=0))
        finally:
            shutil.rmtree(folder.parent / "out", ignore_errors=True)

    return check


def make_json_lines_sources(folder: Path) -> list[Source]:
    """Return JSON Lines, objects over several lines, and nested captions."""
    nested = [{"file": f"{i}.png", "captions": [f"a {i}", {"raw": f"b {i}"}], "n": i} for i in range(4)]
    return [
        _table_source("a.jsonl", "".join(json.dumps(row) + "\n" for row in _ROWS).encode()),
        _table_source("b.jsonl", "".join(json.dumps(row, indent=1) + "\n" for row in _ROWS).encode()),
        _table_source("c.jsonl", "".join(json.dumps(row) + "\n" for row in nested).encode()),
    ]


def make_json_sources(folder: Path) -> list[Source]:
    """Return a list of objects, and COCO captions."""
    coco = {
        "images": [{"id": index, "file_name": f"{index}.png", "width": 20} for index in range(4)],
        "annotations": [{"id": i, "image_id": i // 2, "caption": f"a thing {i}"} for i in range(8)],
    }
    return [
        _table_source("list.json", json.dumps(_ROWS).encode()),
        _table_source("list.json", json.dumps(_ROWS, indent=1).encode()),
        _table_source("coco.json", json.dumps(coco).encode()),
        _table_source("coco.json", json.dumps(coco, indent=1).encode()),
    ]


def _parquet(columns: dict[str, object], **options: object) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, **options)
    return stream.getvalue()


def make_parquet_sources(folder: Path) -> list[Source]:
    """Return tables of paths, of bytes, and of images as Hugging Face writes them."""
    names = [row["image"] for row in _ROWS]
    captions = [row["caption"] for row in _ROWS]
    data = list(_pictures(5).values())
    tables = [
        _parquet({"image": names, "caption": captions, "label": [0, 1, None, 1, 0]}),
        _parquet({"image": names, "captions": [[text, "b"] for text in captions]}, compression="none"),
        _parquet({"image": data, "text": captions}, compression="zstd"),
        _parquet({"image": [{"bytes": each, "path": None} for each in data], "text": captions}),
    ]
    return [_table_source("a.parquet", table) for table in tables]


def _tar(files: Files, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        archive.addfile(link)
    return stream.getvalue()


def _captioned_files() -> Files:
    files: Files = {}
    for index, (name, data) in enumerate(_pictures().items()):
        stem = name.removesuffix(".png")
        values = {"caption": f"a thing {index}", "tags": ["a", "b"], "n": index}
        files |= {f"x/{name}": data, f"x/{stem}.txt": f"a text {index}\n".encode()}
        files[f"x/{stem}.json"] = json.dumps(values).encode()
    return files


def make_tar_sources(folder: Path) -> list[Source]:
    """Return archives in three formats, and a folder of archives."""
    files = {name.removeprefix("x/"): data for name, data in _captioned_files().items()}
    long_names = {"n" * 120 + f"/{name}": data for name, data in files.items()}
    archives = [_tar(files), _tar(long_names, tarfile.GNU_FORMAT), _tar(long_names, tarfile.PAX_FORMAT)]
    shards = {"0.tar": archives[0], "1.tar": archives[2]}
    return [
        *(
            Source(files={"a.tar": each}, mutable=("a.tar",), check=import_source("a.tar"))
            for each in archives
        ),
        Source(files=shards, mutable=tuple(shards), check=import_source("")),
    ]


def make_sidecar_sources(folder: Path) -> list[Source]:
    """Return a folder of images with text and JSON files."""
    files = _captioned_files()
    texts = {name: data for name, data in files.items() if not name.endswith(".json")}
    several = texts | {"x/0.txt": b"A cat.\nA dog.\n", "x/1.caption": b"A car.\nA tree.\nA house."}
    return [
        Source(files=each, mutable=tuple(each), check=import_source("")) for each in (files, texts, several)
    ]


def num_excluded(dataset: ImageDataset, *prefixes: str) -> int:
    """Return the number of skipped entries, without those whose reason has one of the prefixes."""
    return sum(count for reason, count in dataset.skipped.items() if not reason.startswith(prefixes))


def check_labeled(name: str) -> Callable[[Path, Files], None]:
    """Return a check of a labeled dataset: each row, or each file, is used, skipped or ignored."""

    def check(folder: Path, files: Files) -> None:
        dataset = open_labeled(folder / name)
        assert len(dataset.labels) == len(dataset.splits) == len(dataset) == len(dataset.files)
        assert dataset.labels.max() < len(dataset.classes)
        num_entries = _count_rows(folder / name) if name else len(files)
        num_used = len(dataset) + num_excluded(dataset, "boxes", "declared", "images with boxes")
        assert num_used + sum(dataset.ignored.values()) == num_entries
        if dataset.boxes is not None:
            assert np.nanmin(dataset.boxes) >= 0
            assert np.nanmax(dataset.boxes) <= 1

    return check


def _count_rows(path: Path) -> int:
    table = open_table_file(path)
    return sum(1 for _ in table.iter_rows(list(table.column_names())))


def _split_rows(boxes: tuple[str, ...]) -> list[dict[str, str]]:
    return [
        {"file": f"{index}.png", "label": "ab"[index % 2], "split": split}
        | dict(zip(("x0", "y0", "x1", "y1"), boxes, strict=True))
        for index, split in enumerate(("train", "train", "test", "test"))
    ]


def make_labeled_sources(folder: Path) -> list[Source]:
    """Return tables of labels with boxes, and a folder."""
    by_class = {f"{s}/{c}/0.png": _pictures(1)["0.png"] for s in ("train", "test") for c in "ab"}
    tables = {
        "labels.csv": _write_csv(",", _split_rows(("0.1", "0.1", "0.5", "0.9"))),
        "pixels.csv": _write_csv(",", _split_rows(("2", "3", "12", "13"))),
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in _split_rows(("2", "3", "12", "13"))).encode(),
    }
    return [
        *(
            Source(files=_pictures() | {name: data}, mutable=(name,), check=check_labeled(name))
            for name, data in tables.items()
        ),
        Source(files=by_class, mutable=tuple(by_class), check=check_labeled("")),
    ]


def check_detection(name: str) -> Callable[[Path, Files], None]:
    """Return a check of boxes: they are in their images, and labels are classes."""

    def check(folder: Path, files: Files) -> None:
        dataset = open_detection(folder / name)
        num_images = len(dataset)
        assert len(dataset.boxes) == len(dataset.labels) == len(dataset.is_crowd) == num_images
        for boxes, labels in zip(dataset.boxes, dataset.labels, strict=True):
            assert ((boxes >= 0) & (boxes <= 1)).all()
            assert (boxes[:, :2] < boxes[:, 2:]).all()
            assert ((labels >= 0) & (labels < len(dataset.classes))).all()
        if name == "boxes.csv":
            table_rows = _count_rows(folder / name)
            merged = {reason: n for reason, n in dataset.skipped.items() if not reason.startswith("boxes")}
            assert (
                num_images
                <= table_rows
                <= sum(map(len, dataset.boxes))
                + sum(dataset.skipped.values())
                + sum(not len(boxes) for boxes in dataset.boxes)
                + len(merged)
            )

    return check


def _coco_boxes(first: int) -> bytes:
    content = {
        "images": [{"id": i, "file_name": f"{first + i}.png", "width": 20, "height": 14} for i in range(2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {
                "id": i,
                "image_id": i // 2,
                "category_id": 1 + 2 * (i % 2),
                "bbox": [1, 2, 5.5, 6],
                "iscrowd": 0,
            }
            for i in range(4)
        ],
    }
    return json.dumps(content, indent=1).encode()


_VOC = """<annotation><filename>{0}.png</filename><size><width>20</width><height>14</height></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>9</ymax>
</bndbox></object></annotation>
"""


def make_detection_sources(folder: Path) -> list[Source]:
    """Return boxes in a table, and in the formats of COCO, VOC and YOLO."""
    images = list(_pictures().items())
    coco = {f"train/{name}": data for name, data in images[:2]} | {
        f"val/{name}": data for name, data in images[2:]
    }
    coco_texts = {
        f"annotations/instances_{split}.json": _coco_boxes(first)
        for split, first in [("train", 0), ("val", 2)]
    }
    voc = {f"JPEGImages/{name}": data for name, data in images}
    voc_texts = {f"Annotations/{index}.xml": _VOC.format(index).encode() for index in range(4)}
    voc_texts |= {"ImageSets/Main/train.txt": b"0\n1\n", "ImageSets/Main/val.txt": b"2\n3\n"}
    yolo = {
        f"images/{'train' if index < 2 else 'val'}/{name}": data for index, (name, data) in enumerate(images)
    }
    yolo_texts = {
        name.replace("images", "labels").replace(
            ".png", ".txt"
        ): b"0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.5 0.1 0.5 0.6\n"
        for name in yolo
    }
    yolo_texts["data.yaml"] = b"path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n"
    counted = yolo_texts | {
        "data.yaml": b"train: images/train\nval: [images/val]\nnc: 2\nnames: [cat, dog]\n"
    }
    table = {"boxes.csv": _write_csv(",", _split_rows(("2", "3", "12", "13")))}
    return [
        Source(
            files=files | texts,
            mutable=tuple(texts),
            check=check_detection("boxes.csv" if texts is table else ""),
        )
        for files, texts in (
            (coco, coco_texts), (voc, voc_texts), (yolo, yolo_texts), (yolo, counted), (_pictures(), table)
        )
    ]  # fmt: skip


def check_segmentation(name: str) -> Callable[[Path, Files], None]:
    """Return a check of masks: each can be loaded, and each row or file is used, skipped or ignored."""

    def check(folder: Path, files: Files) -> None:
        dataset = open_segmentation(folder / name)
        for index, file in enumerate(dataset.files):
            mask = dataset.load_mask(index)
            assert mask.shape == read_image_size(dataset.root / file)[::-1]
            assert mask.min() >= -1
            assert mask.max() < len(dataset.classes)
        if name:
            assert len(dataset) + num_excluded(dataset) == _count_rows(folder / name)
        else:
            num_files = 2 * len(dataset) + sum(dataset.ignored.values())
            assert num_files <= len(files) <= num_files + 2 * sum(dataset.skipped.values()) + 1

    return check


def make_segmentation_sources(folder: Path) -> list[Source]:
    """Return masks in folders, and in a table."""
    values = np.zeros((14, 20), np.uint8)
    values[3:8, 4:15], values[0, 0] = 1, 255
    mask = encode_image(Image.fromarray(values), "PNG")
    palette = encode_image(Image.fromarray(values).convert("P"), "GIF")
    one_bit = encode_image(Image.fromarray(values == 1), "TIFF")
    masks = {"train/masks/0.png": mask, "train/masks/1.gif": palette, "test/masks/2.png": mask}
    masks["test/masks/3.tif"] = one_bit
    images = {
        f"{'train' if index < 2 else 'test'}/images/{name}": data
        for index, (name, data) in enumerate(_pictures().items())
    }
    names = {"classes.txt": b"nothing\nthing\n"}
    rows = [
        {"file": file, "mask": mask_file, "split": file.partition("/")[0]}
        for file, mask_file in zip(images, masks, strict=True)
    ]
    index = {"index.csv": _write_csv(",", rows)}
    return [
        Source(files=images | masks | names, mutable=(*masks, *names), check=check_segmentation("")),
        Source(files=images | masks | index, mutable=tuple(index), check=check_segmentation("index.csv")),
    ]


def check_weights(backbone: str | None) -> Callable[[Path, Files], None]:
    """Return a check of a file of weights: all weights of the encoder are finite."""

    def check(folder: Path, files: Files) -> None:
        (name,) = files
        encoder = load_encoder(str(folder / name), backbone=backbone, image_size=32, device="cpu")
        for tensor in encoder.model.state_dict().values():
            assert tensor.isfinite().all()

    return check


def make_weight_sources(folder: Path) -> list[Source]:
    """Return files of `torch.save`, also in its old format, of safetensors, and an encoder of the package."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = BackboneConfig(name=_BACKBONE, image_size=32)
    model, _ = build_backbone(config)
    state = model.state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, folder / "a.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "a.safetensors")
    save_encoder(folder / "encoder.safetensors", model, config)
    return [
        Source(
            files={path.name: path.read_bytes()},
            mutable=(path.name,),
            check=check_weights(None if path.stem == "encoder" else _BACKBONE),
        )
        for path in sorted(folder.iterdir())
    ]


def check_artifacts(folder: Path, files: Files) -> None:
    """Read a dataset, its embeddings and its neighbors by all their methods."""
    dataset = CaptionDataset(folder)
    assert dataset.summary()
    dataset.require_images()
    assert sum(1 for _ in dataset) == len(dataset)
    for index in range(len(dataset)):
        read_image(dataset[index].image, dataset.root)
    for shard in range(len(dataset.shard_paths)):
        assert dataset.read_columns(shard, ["captions"]).keys() == {"captions"}
    list(dataset.skipped_entries())
    read_jsonl(folder / "skipped-00000.jsonl")
    for name in sorted(files):
        if name.endswith(MANIFEST) and name.startswith("embeddings"):
            embeddings = Embeddings((folder / name).parent)
            for shard in range(embeddings.num_shards):
                embeddings.load_shard(shard)
                embeddings.load_mean_vectors(shard)
        elif name.endswith(MANIFEST) and name.startswith("neighbors"):
            Neighbors((folder / name).parent).topk()


def make_artifact_sources(folder: Path) -> list[Source]:
    """Return a dataset of several shards with skipped rows, embeddings and neighbors."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [*_pictures(12).values(), b"damaged"]
    captions = [f"a {'red' if i % 2 else 'blue'} thing {i % 5}" for i in range(len(images))]
    (folder / "a.parquet").write_bytes(_parquet({"image": images, "caption": captions}))
    target = folder / "dataset"
    if not target.exists():
        dataset = import_dataset(folder / "a.parquet", target, shard_rows=8, num_workers=0)
        embed(dataset, "tfidf")
        find_neighbors(dataset, k=3, device="cpu")
    files = {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }
    # Names of folders that differ from run to run would move the mutations.
    files = {
        name: data.replace(os.fsencode(folder), b"/source") if name.endswith(".json") else data
        for name, data in files.items()
    }
    files = {name: data for name, data in files.items() if not Path(name).name.startswith(".")}
    names = tuple(sorted(files))
    manifests = tuple(name for name in names if name.endswith(".json"))
    return [
        Source(files=files, mutable=names, check=check_artifacts),
        Source(files=files, mutable=manifests, check=check_artifacts),
    ]


READERS = {
    test.name: test
    for test in (
        ReaderTest(name="images", make_sources=make_image_sources, max_mib=6144, is_silent=True),
        ReaderTest(name="tables", make_sources=make_table_sources),
        ReaderTest(name="json-lines", make_sources=make_json_lines_sources),
        ReaderTest(name="json", make_sources=make_json_sources),
        ReaderTest(name="parquet", make_sources=make_parquet_sources),
        ReaderTest(name="tars", make_sources=make_tar_sources, max_mib=6144, is_silent=True),
        ReaderTest(name="sidecars", make_sources=make_sidecar_sources, max_mib=6144, is_silent=True),
        ReaderTest(name="labeled", make_sources=make_labeled_sources),
        ReaderTest(name="detection", make_sources=make_detection_sources),
        ReaderTest(name="segmentation", make_sources=make_segmentation_sources, max_mib=6144, is_silent=True),
        ReaderTest(name="weights", make_sources=make_weight_sources),
        ReaderTest(name="artifacts", make_sources=make_artifact_sources),
    )
}
