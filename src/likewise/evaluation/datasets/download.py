"""Download named datasets, once, into a folder with a `labels.csv` like any other dataset."""

import csv
import hashlib
import json
import logging
import os
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from likewise.artifacts import atomic_write, disk_full_as_error, flush_disks, write_json
from likewise.errors import DependencyError, InvalidInputError, LikewiseError
from likewise.evaluation.datasets.registry import DatasetInfo, DownloadSpec, get_dataset_info
from likewise.locks import lock_directory
from likewise.parallel import default_num_workers, prefetch_map
from likewise.progress import NULL_PROGRESS, Progress

logger = logging.getLogger(__name__)

_CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
_CUB_MD5 = "97eceeb196236b17998738112f37df78"
_SUN397_PARTITIONS_URL = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"
_SUN397_PARTITIONS_MD5 = "29a205c0a0129d21f36cbecfefe81881"
_PCAM_URL = "https://zenodo.org/records/2546921/files/"
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class ImageItem:
    """An image file with its split and label."""

    file: Path
    split: str
    label: str
    hash_key: str = ""  # decides its split, in datasets that are split by hash


@dataclass(frozen=True, kw_only=True)
class DownloadJob:
    """The input of a reader."""

    spec: DownloadSpec
    root: Path  # folder of the downloads
    progress: Progress


def _hash_split(items: Iterable[ImageItem], images_per_class: Mapping[str, int | None]) -> list[ImageItem]:
    """Split each class in the order of a hash of the images' keys, the same on every machine.

    Args:
        items: Images with keys that are unique within a class.
        images_per_class: Images per class of each split, in this order; None is the rest.
    """
    items_by_class: dict[str, list[ImageItem]] = defaultdict(list)
    for item in items:
        items_by_class[item.label].append(item)
    split_items = []
    for class_items in items_by_class.values():
        class_items.sort(key=lambda item: hashlib.blake2b(item.hash_key.encode(), digest_size=16).digest())
        start = 0
        for split, count in images_per_class.items():
            end = len(class_items) if count is None else start + count
            split_items += [
                ImageItem(file=item.file, split=split, label=item.label) for item in class_items[start:end]
            ]
            start = end
    return split_items


def _open_torchvision(job: DownloadJob, split: str, download: bool = True) -> Any:
    import torchvision.datasets

    dataset_class = getattr(torchvision.datasets, job.spec.loader)
    return dataset_class(job.root, **job.spec.split_args[split], **({"download": True} if download else {}))


def _iter_samples(dataset: Any) -> Iterator[tuple[Path, str]]:
    """Yield file and label of each image of a torchvision dataset of files."""
    # The attributes differ by class.
    for name in ("_image_files", "_images"):
        if hasattr(dataset, name):
            samples = list(zip(getattr(dataset, name), dataset._labels, strict=True))
            break
    else:
        samples = dataset._samples if hasattr(dataset, "_samples") else dataset.samples
    # A class of ImageNet has many names, and two classes share one; the WordNet id is unique.
    class_names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
    for file, label in samples:
        yield Path(file), class_names[label] if class_names else f"{label:02d}"


def _read_files(job: DownloadJob, download: bool = True) -> list[ImageItem]:
    """Read a dataset of image files, without copying them."""
    samples_by_split = [
        (split, _iter_samples(_open_torchvision(job, split, download))) for split in job.spec.split_args
    ]
    return [
        ImageItem(file=file, split=split, label=label)
        for split, samples in samples_by_split
        for file, label in samples
    ]


def _read_arrays(job: DownloadJob, download: bool = True) -> list[ImageItem]:
    """Read a dataset of arrays; each image is written once as PNG."""
    items = []
    for split in job.spec.split_args:
        dataset = _open_torchvision(job, split, download)
        folder = job.root.parent / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        write_image = partial(_write_png, dataset, getattr(dataset, "classes", None), folder)
        with job.progress.task(f"images {split}", len(dataset), "images") as bar:
            for file, label in prefetch_map(write_image, range(len(dataset)), default_num_workers()):
                items.append(ImageItem(file=file, split=split, label=label))
                bar.update()
    return items


def _write_png(dataset: Any, class_names: list[str] | None, folder: Path, index: int) -> tuple[Path, str]:
    image, label = dataset[index]
    file = folder / f"{index:06d}.png"
    if not file.is_file():
        with atomic_write(file, flush=False) as tmp_path:
            image.save(tmp_path, format="png")
    return file, class_names[label] if class_names else str(label)


def _read_aircraft(job: DownloadJob) -> list[ImageItem]:
    """Read FGVC-Aircraft; its archive has no checksum in torchvision, so it is renamed once complete."""
    from torchvision.datasets import FGVCAircraft
    from torchvision.datasets.utils import download_url

    archive = job.root / Path(FGVCAircraft._URL).name
    if not (job.root / "fgvc-aircraft-2013b").is_dir() and not archive.is_file():
        with atomic_write(archive) as tmp_path:
            download_url(FGVCAircraft._URL, job.root, tmp_path.name)
    return _read_files(job)


def _read_caltech101(job: DownloadJob) -> list[ImageItem]:
    _open_torchvision(job, "train")
    files = (job.root / "caltech101" / "101_ObjectCategories").glob("*/image_*.jpg")
    return _hash_split(
        (_unsplit_item(file, file.parent.name) for file in files), job.spec.images_per_class or {}
    )


def _read_eurosat(job: DownloadJob) -> list[ImageItem]:
    return _hash_split(
        (_unsplit_item(*sample) for sample in _iter_samples(_open_torchvision(job, "train"))),
        job.spec.images_per_class or {},
    )


def _unsplit_item(file: Path, label: str) -> ImageItem:
    return ImageItem(file=file, split="", label=label, hash_key=f"{file.parent.name}/{file.name}")


def _read_clevr(job: DownloadJob) -> list[ImageItem]:
    """Read a subset of CLEVR, as in CLIP; its test images have no labels."""
    items = []
    for split, images_per_class in (("train", {"train": 1500, "val": 500}), ("val", {"test": 500})):
        dataset = _open_torchvision(job, split)
        labels = {file: str(label) for file, label in zip(dataset._image_files, dataset._labels, strict=True)}
        split_items = _hash_split(
            (ImageItem(file=file, split="", label="", hash_key=file.name) for file in labels),
            images_per_class,
        )
        items += [
            ImageItem(file=item.file, split=item.split, label=labels[item.file]) for item in split_items
        ]
    return items


def _read_sun397(job: DownloadJob) -> list[ImageItem]:
    list_files = {
        split: job.root / "partitions" / f"{split.title()}ing_01.txt" for split in ("train", "test")
    }
    if not all(list_file.is_file() for list_file in list_files.values()):
        _download_and_extract(_SUN397_PARTITIONS_URL, job.root, _SUN397_PARTITIONS_MD5, "partitions")
    _open_torchvision(job, "train")
    return [
        # A line is /a/abbey/FILE: the letter is only a folder, and a class may have two levels.
        ImageItem(file=job.root / "SUN397" / line[1:], split=split, label=line[3 : line.rindex("/")])
        for split, list_file in list_files.items()
        for line in list_file.read_text().split()
    ]


def _download_and_extract(url: str, folder: Path, md5: str, subdir: str = "") -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(url, str(folder), str(folder / subdir), md5=md5)


def _read_cub200(job: DownloadJob) -> list[ImageItem]:
    folder = job.root / "CUB_200_2011"
    if not folder.is_dir():
        _download_and_extract(_CUB_URL, job.root, _CUB_MD5)
    files, is_train = (
        dict(line.split() for line in (folder / table).read_text().splitlines())
        for table in ("images.txt", "train_test_split.txt")
    )
    split_names = {"1": "train", "0": "test"}
    return [
        ImageItem(
            file=folder / "images" / file, split=split_names[is_train[image_id]], label=file.split("/")[0]
        )
        for image_id, file in files.items()
    ]


def _read_pcam(job: DownloadJob) -> list[ImageItem]:
    """Read PatchCamelyon from Zenodo with torchvision's checksums; torchvision itself uses Google Drive."""
    from torchvision.datasets import PCAM

    if find_spec("h5py") is None:
        raise DependencyError("patch_camelyon is stored as HDF5 and needs h5py: pip install h5py")
    for split_files in PCAM._FILES.values():
        for file, _, md5 in split_files.values():
            if not (job.root / "pcam" / file).is_file():
                _download_and_extract(f"{_PCAM_URL}{file}.gz", job.root / "pcam", md5)
    class_names = {"0": "normal", "1": "tumor"}
    return [replace(item, label=class_names[item.label]) for item in _read_arrays(job, download=False)]


def _read_parquet(job: DownloadJob) -> list[ImageItem]:
    """Read a dataset of the Hugging Face hub; its encoded images are written once, unchanged."""
    from huggingface_hub import snapshot_download

    splits = {split: args["split"] for split, args in job.spec.split_args.items()}
    if not all(_find_shards(job.root, source_split) for source_split in splits.values()):
        patterns = [f"data/{source_split}-*.parquet" for source_split in splits.values()]
        snapshot_download(job.spec.loader, repo_type="dataset", allow_patterns=patterns, local_dir=job.root)
    items = []
    for split, source_split in splits.items():
        # Without a network the hub's client returns the folder as it is, without an error.
        if not (shards := _find_shards(job.root, source_split)):
            raise FileNotFoundError(f"shards of {source_split} are missing")
        folder = job.root.parent / "images" / source_split
        items += [item for shard in shards for item in _extract_shard(shard, split, folder)]
    return items if job.spec.images_per_class is None else _hash_split(items, job.spec.images_per_class)


def _find_shards(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split, named split-00000-of-00002, or an empty list if any is missing."""
    shards = sorted((folder / "data").glob(f"{split}-*-of-*.parquet"))
    return shards if shards and len(shards) == int(shards[0].stem.split("-of-")[1].split("-")[0]) else []


def _extract_shard(shard: Path, split: str, folder: Path) -> Iterator[ImageItem]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(shard)
    metadata = json.loads((table.schema_arrow.metadata or {})[b"huggingface"])
    class_names = metadata["info"]["features"]["label"]["names"]
    folder.mkdir(parents=True, exist_ok=True)
    for batch in table.iter_batches(batch_size=64, columns=["image", "label"]):
        for row in batch.to_pylist():
            content = row["image"]["bytes"]
            key = hashlib.blake2b(content, digest_size=16).hexdigest()
            file = folder / f"{key}{Path(row['image']['path'] or '').suffix or '.img'}"
            if not file.is_file():
                with atomic_write(file, flush=False) as tmp_path:
                    tmp_path.write_bytes(content)
            yield ImageItem(file=file, split=split, label=class_names[row["label"]], hash_key=key)


READERS: dict[str, Callable[[DownloadJob], list[ImageItem]]] = {
    "files": _read_files,
    "arrays": _read_arrays,
    "parquet": _read_parquet,
    "aircraft": _read_aircraft,
    "caltech101": _read_caltech101,
    "clevr_counts": _read_clevr,
    "cub200": _read_cub200,
    "eurosat": _read_eurosat,
    "imagenet": partial(_read_files, download=False),  # its terms forbid an automatic download
    "patch_camelyon": _read_pcam,
    "sun397": _read_sun397,
}


_LABELS_FILE = "labels.csv"
_STATE_FILE = "extracting.json"


def download_dataset(name: str, root: Path | None = None, progress: Progress = NULL_PROGRESS) -> Path:
    """Return the folder of a named dataset, for `open_labeled`; download it first if it is missing.

    Args:
        name: A name of the registry.
        root: Folder of the dataset; defaults to `NAME` in $LIKEWISE_DATASETS or ~/.cache/likewise/datasets.
        progress: Progress reporter.

    Raises:
        InvalidInputError: for an unknown name, or if the download fails; the message names the files to
            download by hand and their folder.
        DependencyError: if a package that reads the dataset is missing.
    """
    info = get_dataset_info(name)
    root = root or dataset_dir(name)
    with lock_directory(root, "dataset"):
        if not (root / _LABELS_FILE).is_file():
            _download(name, info, root, progress)
    return root


def _download(name: str, info: DatasetInfo, root: Path, progress: Progress) -> None:
    """Download and unpack a dataset; the table of labels is written last and marks it as complete."""
    source_dir = root / "source"
    source_dir.mkdir(parents=True, exist_ok=True)
    logger.info(
        f"downloading {info.title} to {root}: up to {info.download_mb:,} MB from {info.homepage} "
        f"(license: {info.license})"
    )
    try:
        with disk_full_as_error(source_dir), _download_timeout(), _cleanup_on_failure(source_dir, info.files):
            items = READERS[info.download.reader](
                DownloadJob(spec=info.download, root=source_dir, progress=progress)
            )
    except LikewiseError:
        raise
    except Exception as error:  # each library and server raises its own types
        raise InvalidInputError(
            _manual_download_message(name, info, source_dir, error), path=source_dir
        ) from error
    flush_disks()
    _write_table(root, items)


def dataset_dir(name: str) -> Path:
    """Return the default folder of a dataset: NAME in $LIKEWISE_DATASETS or ~/.cache/likewise/datasets."""
    return Path(os.environ.get("LIKEWISE_DATASETS") or "~/.cache/likewise/datasets").expanduser() / name


def is_downloaded(name: str) -> bool:
    """Return whether a named dataset has been downloaded."""
    return (dataset_dir(name) / _LABELS_FILE).is_file()


def _manual_download_message(name: str, info: DatasetInfo, source_dir: Path, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    files = f"{', '.join(info.files)} from {info.homepage} into {source_dir}"
    return f"cannot download {name}: {reason}. Put {files} (at these paths; delete damaged copies) and retry"


@contextmanager
def _download_timeout() -> Iterator[None]:
    """Give the downloads of torchvision a timeout, for which it has no option."""
    from torchvision.datasets import utils

    request = SimpleNamespace(
        Request=urllib.request.Request, urlopen=partial(urllib.request.urlopen, timeout=_TIMEOUT_SECONDS)
    )
    # Only the name inside torchvision's module is replaced, so no other code is affected.
    original = utils.urllib
    setattr(utils, "urllib", SimpleNamespace(request=request, error=urllib.error))  # noqa: B010
    try:
        yield
    finally:
        utils.urllib = original


@contextmanager
def _cleanup_on_failure(source_dir: Path, archives: tuple[str, ...]) -> Iterator[None]:
    """Remove the files that a failed or killed run extracted, but neither archives nor files of the user.

    torchvision takes an existing folder for a complete one, so a partly extracted one must not remain.
    """
    state_file = source_dir / _STATE_FILE
    if state_file.is_file():
        _remove_extracted(source_dir, {*json.loads(state_file.read_text()), *archives})
    else:
        write_json(
            state_file,
            [path.relative_to(source_dir).as_posix() for path in source_dir.rglob("*") if path.is_file()],
        )
    try:
        yield
    except BaseException:
        _remove_extracted(source_dir, {*json.loads(state_file.read_text()), *archives})
        state_file.unlink()
        raise
    state_file.unlink()


def _remove_extracted(source_dir: Path, keep: set[str]) -> None:
    for path in sorted(source_dir.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        # Complete shards of the hub stay: their names are not known in advance.
        elif (
            path.relative_to(source_dir).as_posix() not in keep | {_STATE_FILE} and path.suffix != ".parquet"
        ):
            path.unlink()


def _write_table(root: Path, items: Iterable[ImageItem]) -> None:
    rows = [(Path(os.path.relpath(item.file, root)).as_posix(), item.split, item.label) for item in items]
    with (
        atomic_write(root / _LABELS_FILE) as tmp_path,
        tmp_path.open("w", encoding="utf-8", newline="") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "split", "label"))
        writer.writerows(sorted(rows))
