"""Fixtures with real data: emoji images and names from installed packages, as in the demo."""

import csv
import os
import shutil
from pathlib import Path

# As in the command line (see likewise/cli/__main__.py). It must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import pytest
from jaxtyping import install_import_hook

# Check the shapes and types of all annotated functions while the tests run.
install_import_hook("likewise", "beartype.beartype")

from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.demo import make_emoji_dataset
from likewise.embeddings.embed import embed
from likewise.neighbors.index import find_neighbors
from support import MINILM


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of whole commands first: they take longest, and the workers should finish together."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the table of a few hundred emoji images with captions, labels, splits, concepts and vendors."""
    return make_emoji_dataset(tmp_path_factory.mktemp("emoji") / "pictures", subsample=12)


@pytest.fixture(scope="session")
def dataset(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    """Return the training emoji as a dataset of several shards, with caption embeddings and neighbors."""
    options = ImportOptions(
        caption_column=("caption", "alias"),
        label_column="label",
        group_column="vendor",
        where=("split=train",),
    )
    dataset = import_dataset(emoji, tmp_path_factory.mktemp("dataset") / "c", options, shard_rows=64)
    embed(dataset, MINILM)
    find_neighbors(dataset, k=5)
    return dataset


@pytest.fixture
def workdir(emoji: Path, tmp_path: Path) -> Path:
    """Return a folder with the captioned photos, labeled dataset and two images of the documentation."""
    with emoji.open() as stream:
        for row in csv.DictReader(stream):
            name = f"{row['vendor']}-{row['instance']}.png"
            if row["split"] == "train":
                photo = tmp_path / "photos" / row["vendor"] / name
                photo.parent.mkdir(parents=True, exist_ok=True)
                photo.with_suffix(".txt").write_text(row["caption"])
                shutil.copy(emoji.parent / row["file"], photo)
            labeled = tmp_path / "labeled" / row["split"] / row["category"] / name
            labeled.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(emoji.parent / row["file"], labeled)
    for photo, name in zip(
        sorted((tmp_path / "photos").rglob("*.png")), ("cat.jpg", "dog.jpg"), strict=False
    ):
        shutil.copy(photo, tmp_path / name)
    return tmp_path
