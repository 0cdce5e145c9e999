"""The neighbors artifact: compared to a direct computation, with missing captions, and resumed."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from likewise.artifacts import MANIFEST
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.embeddings.embed import embed
from likewise.embeddings.registry import SentenceTransformerEncoder, resolve_encoder
from likewise.embeddings.store import find_embeddings
from likewise.errors import ArtifactError, InvalidInputError
from likewise.locks import HOST
from likewise.neighbors.index import Neighbors, find_neighbors
from support import MINILM


def test_neighbors_are_sorted_by_similarity(dataset: CaptionDataset) -> None:
    """Read this first: find the nearest captions of each image."""
    neighbors = find_neighbors(dataset, k=5)
    positions, similarity = neighbors.topk(3)
    assert positions.shape == similarity.shape == (len(dataset), 3)
    assert (np.diff(similarity, axis=1) <= 0).all()  # nearest first
    assert neighbors.encoder == MINILM
    assert find_neighbors(dataset, k=5).path == neighbors.path  # computed once


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_neighbors_equal_a_direct_computation(dataset: CaptionDataset) -> None:
    encoder = SentenceTransformerEncoder(resolve_encoder(MINILM))
    # As stored: one float16 row per caption, then their mean.
    rows = [encoder.encode(sample.captions, 8).astype(np.float16).astype(np.float64) for sample in dataset]
    vectors = np.stack([row.mean(axis=0) for row in rows])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    neighbors = find_neighbors(dataset, k=5)
    positions, similarity = neighbors.topk()
    expected = -np.sort(-scores, axis=1)[:, :5]
    np.testing.assert_allclose(similarity, expected, atol=2e-3)
    np.testing.assert_allclose(np.take_along_axis(scores, positions, axis=1), expected, atol=2e-3)
    assert (positions != np.arange(len(dataset))[:, None]).all()


def test_images_without_caption_have_no_neighbors(emoji: Path, tmp_path: Path) -> None:
    table = tmp_path / "some.csv"
    lines = emoji.read_text().splitlines()[:30]
    csv_lines = [lines[0]]
    for i, line in enumerate(lines[1:]):
        cells = line.split(",")
        csv_lines.append(
            ",".join([f"{emoji.parent}/{cells[0]}", "" if i % 3 == 0 else cells[1], "", *cells[3:]])
        )
    table.write_text("\n".join(csv_lines) + "\n")
    partial = import_dataset(table, tmp_path / "c", ImportOptions(caption_column=("caption",)))
    embed(partial, MINILM)
    positions, _ = find_neighbors(partial, k=3).topk()
    is_uncaptioned = np.array([not sample.captions for sample in partial])
    assert is_uncaptioned.sum() > 5
    assert (positions[is_uncaptioned] == -1).all()
    assert (positions[~is_uncaptioned] >= 0).all()
    assert not is_uncaptioned[positions[~is_uncaptioned]].any()


def test_resumed_neighbors_equal_uninterrupted(dataset: CaptionDataset, tmp_path: Path) -> None:
    copy = CaptionDataset(shutil.copytree(dataset.path, tmp_path / "c"))
    neighbors = find_neighbors(copy, k=5)
    expected = snapshot(neighbors.path)
    assert sum(name.endswith(".parquet") for name in expected) > 2
    manifest = (neighbors.path / MANIFEST).read_text().replace('"complete": true', '"complete": false')
    (neighbors.path / MANIFEST).write_text(manifest)
    (neighbors.path / "neighbors-00001.parquet").unlink()
    (neighbors.path / f".neighbors-00001.parquet.{HOST}.999999999.tmp").write_bytes(b"half a shard")
    with pytest.raises(ArtifactError, match="incomplete"):
        Neighbors(neighbors.path)
    assert snapshot(find_neighbors(copy, k=5).path) == expected


def test_resumed_embeddings_equal_uninterrupted(dataset: CaptionDataset, tmp_path: Path) -> None:
    copy = CaptionDataset(shutil.copytree(dataset.path, tmp_path / "c"))
    path = find_embeddings(copy, None).path
    expected = snapshot(path)
    manifest = (path / MANIFEST).read_text().replace('"complete": true', '"complete": false')
    (path / MANIFEST).write_text(manifest)
    (path / "ids-00001.npy").unlink()
    (path / "vectors-00001.npy").unlink()
    embed(copy, MINILM)
    assert snapshot(path) == expected


def test_shards_contain_the_ids_of_the_dataset(dataset: CaptionDataset) -> None:
    neighbors = find_neighbors(dataset, k=5)
    ids = [
        i for path in sorted(neighbors.path.glob("*.parquet")) for i in pq.read_table(path)["id"].to_pylist()
    ]
    assert ids == [sample.id for sample in dataset]


def test_invalid_k_raises(dataset: CaptionDataset) -> None:
    with pytest.raises(InvalidInputError, match="at least 1") as excinfo:
        find_neighbors(dataset, k=0)
    assert excinfo.value.field == "k"
    with pytest.raises(InvalidInputError, match="have a caption"):
        find_neighbors(dataset, k=100_000)
    with pytest.raises(ArtifactError, match="5 neighbors per row, not 9"):
        find_neighbors(dataset, k=5).topk(9)


def test_missing_embeddings_raise(emoji: Path, tmp_path: Path) -> None:
    partial = import_dataset(emoji, tmp_path / "c", ImportOptions(caption_column=("caption",)))
    with pytest.raises(ArtifactError, match="embed the dataset"):
        find_neighbors(partial)
