"""Named image classification datasets: sizes, metrics, licenses and sources, read from `datasets.yaml`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from likewise.artifacts import read_yaml
from likewise.errors import InvalidInputError, did_you_mean
from likewise.evaluation.datasets.labeled import LabeledDataset

ACCURACY = "accuracy"
MEAN_CLASS_ACCURACY = "mean per-class accuracy"


@dataclass(frozen=True, kw_only=True)
class DownloadSpec:
    """Where the files of a dataset come from and how they are read."""

    reader: str
    """Name of a reader in `likewise.evaluation.datasets.download`."""
    loader: str
    """A class of torchvision.datasets, or a repository on the Hugging Face hub."""
    split_args: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"train": {}})
    """For each of our splits, the arguments of the loader."""
    images_per_class: Mapping[str, int | None] | None = None
    """For datasets without official splits, the images per class in each split; None is the rest."""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """Facts about a dataset that are known before its download."""

    title: str
    """Name in print."""
    num_classes: int
    """Number of classes."""
    split_sizes: Mapping[str, int]
    """Number of images per split, by the rule in `note`."""
    download_mb: int
    """Approximate size of the download in 10^6 bytes."""
    homepage: str
    """Where the dataset is described."""
    download: DownloadSpec
    """How its files are read."""
    files: tuple[str, ...]
    """The downloaded files, relative to the folder `source` of the dataset."""
    metric: str = ACCURACY
    """The metric in El Banani et al. 2023 and Radford et al. 2021."""
    license: str = "not stated"
    """The terms of use on its home page."""
    note: str = "official splits"
    """How its splits are defined."""


def _read_registry() -> dict[str, DatasetInfo]:
    entries = read_yaml(Path(__file__).with_name("datasets.yaml"))
    return {
        name: DatasetInfo(
            **entry | {"download": DownloadSpec(**entry["download"]), "files": tuple(entry["files"])}
        )
        for name, entry in entries.items()
    }


DATASETS = _read_registry()


def get_dataset_info(name: str) -> DatasetInfo:
    """Return the facts about a named dataset.

    Raises:
        InvalidInputError: for an unknown name; the message lists close matches.
    """
    if name not in DATASETS:
        suggestion = did_you_mean(name, list(DATASETS))
        raise InvalidInputError(
            f"unknown dataset {name!r}; known: {', '.join(DATASETS)}.{suggestion}", field="datasets"
        )
    return DATASETS[name]


def check_complete(name: str, dataset: LabeledDataset) -> None:
    """Check the numbers of images and classes of a dataset, because scores on a part are not comparable.

    Raises:
        InvalidInputError: naming the splits and classes that differ.
    """
    info, counts = get_dataset_info(name), dataset.split_counts()
    mismatches = [
        f"{counts.get(split, 0):,} of {info.split_sizes.get(split, 0):,} {split} images"
        for split in ("train", "val", "test")
        if counts.get(split, 0) != info.split_sizes.get(split, 0)
    ]
    if len(dataset.classes) != info.num_classes:
        mismatches.append(f"{len(dataset.classes):,} of {info.num_classes:,} classes")
    if mismatches:
        message = " and ".join(filter(None, (", ".join(mismatches[:-1]), mismatches[-1])))
        raise InvalidInputError(
            f"{name} has {message}: it is incomplete; delete {dataset.root} and download it again",
            path=dataset.root,
        )
