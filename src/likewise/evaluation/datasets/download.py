"""Fetch well-known sets by name: downloaded once, then a folder with a `labels.csv` like any other."""

import csv
import hashlib
import json
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from likewise.artifacts import atomic, told_if_full, write_json
from likewise.errors import DependencyError, InputError, LikewiseError
from likewise.evaluation.datasets.registry import KnownSet, Source, known
from likewise.parallel import default_workers, ordered_map
from likewise.progress import SILENT, Progress

_CUB = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
_CUB_MD5 = "97eceeb196236b17998738112f37df78"
_PARTITIONS = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"
_PARTITIONS_MD5 = "29a205c0a0129d21f36cbecfefe81881"
_PCAM = "https://zenodo.org/records/2546921/files/"


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image file with its split and label."""

    file: Path
    split: str
    label: str
    key: str = ""  # what its place in a split by hash depends on


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a reader is to read, and where."""

    told: Source
    folder: Path  # where downloads go
    progress: Progress


def _deal(items: Iterable[Item], sizes: Mapping[str, int | None]) -> list[Item]:
    """Split each class in the order of a hash of its images' keys, the same on every machine.

    Args:
        items: Images with keys that are unique within a class.
        sizes: How many of each class a split takes, in turn; None takes the rest.
    """
    classes: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        classes[item.label].append(item)
    dealt = []
    for members in classes.values():
        members.sort(key=lambda item: hashlib.blake2b(item.key.encode(), digest_size=16).digest())
        start = 0
        for split, size in sizes.items():
            end = len(members) if size is None else start + size
            dealt += [Item(file=m.file, split=split, label=m.label) for m in members[start:end]]
            start = end
    return dealt


def _open(job: Job, split: str, download: bool = True) -> Any:
    import torchvision.datasets

    kind = getattr(torchvision.datasets, job.told.copy)
    return kind(job.folder, **job.told.splits[split], **({"download": True} if download else {}))


def _pairs(data: Any) -> Iterator[tuple[Path, str]]:
    """Yield file and label of each image of a torchvision set that keeps files, whatever it calls them."""
    for name in ("_image_files", "_images"):
        if hasattr(data, name):
            samples = list(zip(getattr(data, name), data._labels, strict=True))
            break
    else:
        samples = data._samples if hasattr(data, "_samples") else data.samples
    # A class of ImageNet has many names, and two classes share one: its WordNet number is unique.
    names = getattr(data, "wnids", None) or getattr(data, "classes", None)
    for file, label in samples:
        yield Path(file), names[label] if names else f"{label:02d}"


def _files(job: Job, download: bool = True) -> list[Item]:
    """Read a set whose images are files: nothing is copied."""
    read = [(split, _pairs(_open(job, split, download))) for split in job.told.splits]
    return [Item(file=file, split=split, label=label) for split, pairs in read for file, label in pairs]


def _arrays(job: Job, download: bool = True) -> list[Item]:
    """Read a set whose images are arrays: each is written once as PNG."""
    items = []
    for split in job.told.splits:
        data = _open(job, split, download)
        folder = job.folder.parent / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        work = partial(_write_png, data, getattr(data, "classes", None), folder)
        with job.progress.task(f"images {split}", len(data), "images") as task:
            for file, label in ordered_map(work, range(len(data)), default_workers()):
                items.append(Item(file=file, split=split, label=label))
                task.advance()
    return items


def _write_png(data: Any, names: list[str] | None, folder: Path, index: int) -> tuple[Path, str]:
    image, label = data[index]
    file = folder / f"{index:06d}.png"
    if not file.is_file():
        with atomic(file) as temporary:
            image.save(temporary, format="png")
    return file, names[label] if names else str(label)


def _aircraft(job: Job) -> list[Item]:
    """Its archive has no checksum in torchvision: it takes its name only when it is whole."""
    from torchvision.datasets import FGVCAircraft
    from torchvision.datasets.utils import download_url

    archive = job.folder / Path(FGVCAircraft._URL).name
    if not (job.folder / "fgvc-aircraft-2013b").is_dir() and not archive.is_file():
        with atomic(archive) as temporary:
            download_url(FGVCAircraft._URL, job.folder, temporary.name)
    return _files(job)


def _caltech101(job: Job) -> list[Item]:
    _open(job, "train")
    found = (job.folder / "caltech101" / "101_ObjectCategories").glob("*/image_*.jpg")
    return _deal((_named(file, file.parent.name) for file in found), job.told.sizes or {})


def _eurosat(job: Job) -> list[Item]:
    return _deal((_named(*pair) for pair in _pairs(_open(job, "train"))), job.told.sizes or {})


def _named(file: Path, label: str) -> Item:
    return Item(file=file, split="", label=label, key=f"{file.parent.name}/{file.name}")


def _clevr(job: Job) -> list[Item]:
    """Few of its images serve, as in CLIP; its test images have no labels."""
    chosen = []
    for split, sizes in (("train", {"train": 1500, "val": 500}), ("val", {"test": 500})):
        data = _open(job, split)
        counts = {file: str(label) for file, label in zip(data._image_files, data._labels, strict=True)}
        dealt = _deal((Item(file=f, split="", label="", key=f.name) for f in counts), sizes)
        chosen += [Item(file=item.file, split=item.split, label=counts[item.file]) for item in dealt]
    return chosen


def _sun397(job: Job) -> list[Item]:
    lists = {split: job.folder / "partitions" / f"{split.title()}ing_01.txt" for split in ("train", "test")}
    if not all(file.is_file() for file in lists.values()):
        _unpacked(_PARTITIONS, job.folder, _PARTITIONS_MD5, "partitions")
    _open(job, "train")
    return [
        # A line is /a/abbey/FILE: the letter only sorts the folders, and a class may have two levels.
        Item(file=job.folder / "SUN397" / line[1:], split=split, label=line[3 : line.rindex("/")])
        for split, file in lists.items()
        for line in file.read_text().split()
    ]


def _unpacked(url: str, folder: Path, md5: str, below: str = "") -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(url, str(folder), str(folder / below), md5=md5)


def _cub200(job: Job) -> list[Item]:
    folder = job.folder / "CUB_200_2011"
    if not folder.is_dir():
        _unpacked(_CUB, job.folder, _CUB_MD5)
    files, train = (
        dict(line.split() for line in (folder / table).read_text().splitlines())
        for table in ("images.txt", "train_test_split.txt")
    )
    split = {"1": "train", "0": "test"}
    return [
        Item(file=folder / "images" / file, split=split[train[number]], label=file.split("/")[0])
        for number, file in files.items()
    ]


def _pcam(job: Job) -> list[Item]:
    """Taken from Zenodo, its home, with torchvision's checksums: torchvision itself asks Google Drive."""
    from torchvision.datasets import PCAM

    if find_spec("h5py") is None:
        raise DependencyError("patch_camelyon is stored as HDF5, which h5py reads: pip install h5py")
    for parts in PCAM._FILES.values():
        for file, _, md5 in parts.values():
            if not (job.folder / "pcam" / file).is_file():
                _unpacked(f"{_PCAM}{file}.gz", job.folder / "pcam", md5)
    names = {"0": "normal", "1": "tumor"}
    return [replace(item, label=names[item.label]) for item in _arrays(job, download=False)]


def _parquet(job: Job) -> list[Item]:
    """Read a set of the hub: encoded images are written once as they are."""
    from huggingface_hub import snapshot_download

    splits = {ours: told["split"] for ours, told in job.told.splits.items()}
    if not all(_shards(job.folder, theirs) for theirs in splits.values()):
        wanted = [f"data/{theirs}-*.parquet" for theirs in splits.values()]
        snapshot_download(job.told.copy, repo_type="dataset", allow_patterns=wanted, local_dir=job.folder)
    items = []
    for ours, theirs in splits.items():
        # Without network the hub's client returns the folder as it is, and raises nothing.
        if not (shards := _shards(job.folder, theirs)):
            raise FileNotFoundError(f"parts of {theirs} are missing")
        folder = job.folder.parent / "images" / theirs
        items += [item for shard in shards for item in _unpack(shard, ours, folder)]
    return items if job.told.sizes is None else _deal(items, job.told.sizes)


def _shards(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split, named split-00000-of-00002, or nothing unless all are there."""
    found = sorted((folder / "data").glob(f"{split}-*-of-*.parquet"))
    return found if found and len(found) == int(found[0].stem.split("-of-")[1].split("-")[0]) else []


def _unpack(shard: Path, split: str, folder: Path) -> Iterator[Item]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(shard)
    told = json.loads((table.schema_arrow.metadata or {})[b"huggingface"])
    names = told["info"]["features"]["label"]["names"]
    folder.mkdir(parents=True, exist_ok=True)
    for batch in table.iter_batches(batch_size=64, columns=["image", "label"]):
        for row in batch.to_pylist():
            content = row["image"]["bytes"]
            key = hashlib.blake2b(content, digest_size=16).hexdigest()
            file = folder / f"{key}{Path(row['image']['path'] or '').suffix or '.img'}"
            if not file.is_file():
                with atomic(file) as temporary:
                    temporary.write_bytes(content)
            yield Item(file=file, split=split, label=names[row["label"]], key=key)


READERS: dict[str, Callable[[Job], list[Item]]] = {
    "files": _files,
    "arrays": _arrays,
    "parquet": _parquet,
    "aircraft": _aircraft,
    "caltech101": _caltech101,
    "clevr_counts": _clevr,
    "cub200": _cub200,
    "eurosat": _eurosat,
    "imagenet": partial(_files, download=False),  # a person puts the archives there
    "patch_camelyon": _pcam,
    "sun397": _sun397,
}


_TABLE = "labels.csv"
_BEGUN = "begun.json"


def fetch(name: str, folder: Path | None = None, progress: Progress = SILENT) -> Path:
    """Return the folder of a known set, for `open_set`; what is not there yet is downloaded.

    Args:
        name: A name of the catalogue.
        folder: Where the set lies or shall lie; by default $LIKEWISE_SETS or ~/.cache/likewise/sets, /NAME.
        progress: Where to tell what is downloaded and written.

    Raises:
        InputError: where the name is unknown, or the set is not there and cannot be downloaded; the message
            says what to put where.
        DependencyError: where a package that reads the set is missing.
    """
    told = known(name)
    folder = folder or place(name)
    if (folder / _TABLE).is_file():
        return folder
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    progress.say(
        f"fetching {told.title} into {folder}: about {told.megabytes:,} MB where not there yet, from "
        f"{told.homepage} (licence: {told.licence})"
    )
    try:
        with told_if_full(source), _patience(), _clean(source, told.files):
            items = READERS[told.source.adapter](Job(told=told.source, folder=source, progress=progress))
    except LikewiseError:
        raise
    except Exception as fault:  # each library and each server raises its own
        raise InputError(_by_hand(name, told, source, fault)) from fault
    _write_table(folder, items)
    return folder


def place(name: str) -> Path:
    """Return where a known set lies by default: $LIKEWISE_SETS or ~/.cache/likewise/sets, /NAME."""
    return Path(os.environ.get("LIKEWISE_SETS") or "~/.cache/likewise/sets").expanduser() / name


def is_here(name: str) -> bool:
    """Tell whether a known set was fetched."""
    return (place(name) / _TABLE).is_file()


def _by_hand(name: str, told: KnownSet, source: Path, fault: Exception) -> str:
    reason = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
    files = f"{', '.join(told.files)} from {told.homepage} into {source}"
    return f"to make {name}, put {files} (at these paths; delete damaged copies) and run again ({reason})"


@contextmanager
def _patience(seconds: float = 60.0) -> Iterator[None]:
    """Give up a server that stays silent: by default Python waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _clean(source: Path, archives: tuple[str, ...]) -> Iterator[None]:
    """Remove what a failed or killed run unpacked, but neither archives nor what the user had put there.

    torchvision takes a folder that exists for a finished one, so a half-unpacked one must not stay.
    """
    begun = source / _BEGUN
    if begun.is_file():
        _sweep(source, {*json.loads(begun.read_text()), *archives})
    else:
        write_json(begun, [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()])
    try:
        yield
    except BaseException:
        _sweep(source, {*json.loads(begun.read_text()), *archives})
        begun.unlink()
        raise
    begun.unlink()


def _sweep(source: Path, kept: set[str]) -> None:
    for path in sorted(source.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        # Whole shards of the hub are kept: their names cannot be known beforehand.
        elif path.relative_to(source).as_posix() not in kept | {_BEGUN} and path.suffix != ".parquet":
            path.unlink()


def _write_table(folder: Path, items: Iterable[Item]) -> None:
    rows = [(Path(os.path.relpath(item.file, folder)).as_posix(), item.split, item.label) for item in items]
    with atomic(folder / _TABLE) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "split", "label"))
        writer.writerows(sorted(rows))
