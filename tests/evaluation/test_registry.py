from dataclasses import replace
from pathlib import Path

import pytest

from likewise.errors import InputError
from likewise.evaluation.datasets.download import READERS
from likewise.evaluation.datasets.labeled import open_set
from likewise.evaluation.datasets.registry import CATALOG, PER_CLASS, check_known, known
from support import save_png


def test_the_catalogue_holds_the_suite_of_the_paper_and_more() -> None:
    paper = (
        "food101 cifar10 cifar100 cub200 sun397 cars aircraft dtd pets caltech101 flowers102 stl10 eurosat"
    )
    assert {*paper.split(), "resisc45", "patch_camelyon"} <= set(CATALOG)
    assert len(CATALOG) == 22
    assert {name for name, told in CATALOG.items() if told.metric == PER_CLASS} == {
        "aircraft",
        "pets",
        "caltech101",
        "flowers102",
    }


@pytest.mark.parametrize("name", CATALOG)
def test_an_entry_is_whole(name: str) -> None:
    told = CATALOG[name]
    assert {"train", "test"} <= set(told.images) <= {"train", "val", "test"}
    assert all(count >= told.classes for count in told.images.values())
    assert told.homepage.startswith("http")
    assert told.source.adapter in READERS
    assert told.files
    assert told.megabytes > 0


def test_split_sizes_follow_from_the_rule() -> None:
    for name in ("eurosat", "resisc45"):
        told = CATALOG[name]
        assert told.source.sizes is not None
        assert {s: told.classes * (n or 0) for s, n in told.source.sizes.items()} == told.images
    # 9,144 images in 101 categories and the background.
    assert CATALOG["caltech101"].images == {"train": 30 * 102, "test": 9144 - 30 * 102}


def test_unknown_names_are_told_with_close_ones() -> None:
    with pytest.raises(InputError, match="no known set 'cifar11'.*Did you mean cifar10"):
        known("cifar11")


def test_a_set_is_checked_against_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for label in ("pink", "rose"):
            for index in range(count):
                save_png(tmp_path / split / label / f"{index}.png")
    images = open_set(tmp_path)
    monkeypatch.setitem(CATALOG, "tiny", replace(CATALOG["dtd"], classes=2, images={"train": 6, "test": 4}))
    check_known("tiny", images)
    with pytest.raises(InputError) as told:
        check_known("food101", images)
    assert str(told.value) == (
        "food101 has 6 of 75,750 train images, 4 of 25,250 test images and 2 of 101 classes: it is "
        f"incomplete; delete {tmp_path} and run again"
    )
    with pytest.raises(InputError, match="dtd has .*0 of 1,880 val images"):
        check_known("dtd", images)
