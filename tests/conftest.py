"""Fixtures on real data: emoji from installed packages, as the demo uses them."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Shapes and types of every annotated function are checked while the tests run.
install_import_hook("likewise", "beartype.beartype")

from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.data.readers.base import ImportOptions
from likewise.demo import make_emoji_dataset
from likewise.embeddings.embed import embed
from likewise.neighbors.index import find_neighbors
from support import MINILM


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of some hundred emoji pictures with captions, labels, splits, concepts and houses."""
    return make_emoji_dataset(tmp_path_factory.mktemp("emoji") / "pictures", subsample=12)


@pytest.fixture(scope="session")
def collection(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    """A collection of the training emoji, imported in several shards, with embeddings and neighbors."""
    options = ImportOptions(
        caption_column=("caption", "alias"),
        label_column="label",
        group_column="house",
        where=("split=train",),
    )
    made = import_dataset(emoji, tmp_path_factory.mktemp("collection") / "c", options, shard_rows=64)
    embed(made, MINILM)
    find_neighbors(made, k=5)
    return made
