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


def test_the_catalogue_holds_the_suite_of_the_paper_and_more() -> None:
    paper = (
        "food101 cifar10 cifar100 cub200 sun397 cars aircraft dtd pets caltech101 flowers102 stl10 eurosat"
    )
    assert {*paper.split(), "resisc45", "patch_camelyon"} <= set(DATASETS)
    assert len(DATASETS) == 22
    assert {name for name, told in DATASETS.items() if told.metric == MEAN_CLASS_ACCURACY} == {
        "aircraft",
        "pets",
        "caltech101",
        "flowers102",
    }


@pytest.mark.parametrize("name", DATASETS)
def test_an_entry_is_whole(name: str) -> None:
    told = DATASETS[name]
    assert {"train", "test"} <= set(told.split_sizes) <= {"train", "val", "test"}
    assert all(count >= told.num_classes for count in told.split_sizes.values())
    assert told.homepage.startswith("http")
    assert told.download.reader in READERS
    assert told.files
    assert told.download_mb > 0


def test_split_sizes_follow_from_the_rule() -> None:
    for name in ("eurosat", "resisc45"):
        told = DATASETS[name]
        assert told.download.images_per_class is not None
        assert {
            s: told.num_classes * (n or 0) for s, n in told.download.images_per_class.items()
        } == told.split_sizes
    # 9,144 images in 101 categories and the background.
    assert DATASETS["caltech101"].split_sizes == {"train": 30 * 102, "test": 9144 - 30 * 102}


def test_unknown_names_are_told_with_close_ones() -> None:
    with pytest.raises(InvalidInputError, match="no known set 'cifar11'.*Did you mean cifar10"):
        get_dataset_info("cifar11")


def test_a_set_is_checked_against_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for label in ("pink", "rose"):
            for index in range(count):
                save_png(tmp_path / split / label / f"{index}.png")
    images = open_labeled(tmp_path)
    monkeypatch.setitem(
        DATASETS, "tiny", replace(DATASETS["dtd"], num_classes=2, split_sizes={"train": 6, "test": 4})
    )
    check_complete("tiny", images)
    with pytest.raises(InvalidInputError) as told:
        check_complete("food101", images)
    assert str(told.value) == (
        "food101 has 6 of 75,750 train images, 4 of 25,250 test images and 2 of 101 classes: it is "
        f"incomplete; delete {tmp_path} and run again"
    )
    with pytest.raises(InvalidInputError, match="dtd has .*0 of 1,880 val images"):
        check_complete("dtd", images)
