"""The registry of named datasets."""

from dataclasses import replace
from pathlib import Path

import pytest

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.download import READERS
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.evaluation.datasets.registry import (
    DATASETS,
    MEAN_CLASS_ACCURACY,
    check_complete,
    get_dataset_info,
)
from support import save_png


def test_registry_contains_the_datasets_of_the_paper() -> None:
    paper = (
        "food101 cifar10 cifar100 cub200 sun397 cars aircraft dtd pets caltech101 flowers102 stl10 eurosat"
    )
    assert {*paper.split(), "resisc45", "patch_camelyon"} <= set(DATASETS)
    assert len(DATASETS) == 22
    assert {name for name, info in DATASETS.items() if info.metric == MEAN_CLASS_ACCURACY} == {
        "aircraft",
        "pets",
        "caltech101",
        "flowers102",
    }


@pytest.mark.parametrize("name", DATASETS)
def test_entries_are_complete(name: str) -> None:
    info = DATASETS[name]
    assert {"train", "test"} <= set(info.split_sizes) <= {"train", "val", "test"}
    assert all(count >= info.num_classes for count in info.split_sizes.values())
    assert info.homepage.startswith("http")
    assert info.download.reader in READERS
    assert info.files
    assert info.download_mb > 0


def test_split_sizes_equal_images_per_class_times_classes() -> None:
    for name in ("eurosat", "resisc45"):
        info = DATASETS[name]
        assert info.download.images_per_class is not None
        assert {
            s: info.num_classes * (n or 0) for s, n in info.download.images_per_class.items()
        } == info.split_sizes
    # 9,144 images in 101 categories and the background.
    assert DATASETS["caltech101"].split_sizes == {"train": 30 * 102, "test": 9144 - 30 * 102}


def test_unknown_names_raise_with_close_matches() -> None:
    with pytest.raises(InvalidInputError, match="Did you mean cifar10") as excinfo:
        get_dataset_info("cifar11")
    assert excinfo.value.field == "datasets"


def test_incomplete_datasets_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for label in ("pink", "rose"):
            for index in range(count):
                save_png(tmp_path / split / label / f"{index}.png")
    dataset = open_labeled(tmp_path)
    monkeypatch.setitem(
        DATASETS, "tiny", replace(DATASETS["dtd"], num_classes=2, split_sizes={"train": 6, "test": 4})
    )
    check_complete("tiny", dataset)
    with pytest.raises(InvalidInputError) as excinfo:
        check_complete("food101", dataset)
    for text in ("6 of 75,750 train", "4 of 25,250 test", "2 of 101 classes", str(tmp_path)):
        assert text in str(excinfo.value)
    with pytest.raises(InvalidInputError, match="0 of 1,880 val"):
        check_complete("dtd", dataset)
