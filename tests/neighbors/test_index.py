"""The neighbors artifact: against a direct computation, with captions missing, resumed and rerun."""

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
from likewise.neighbors.index import Neighbors, find_neighbors
from support import MINILM


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_equals_direct_computation_from_captions(collection: CaptionDataset) -> None:
    encoder = SentenceTransformerEncoder(resolve_encoder(MINILM))
    # As on disk: one float16 row a caption, then their mean.
    rows = [encoder.encode(record.captions, 8).astype(np.float16).astype(np.float64) for record in collection]
    vectors = np.stack([each.mean(axis=0) for each in rows])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    found = find_neighbors(collection, k=5)
    positions, similarity = found.topk()
    best = -np.sort(-similar, axis=1)[:, :5]
    np.testing.assert_allclose(similarity, best, atol=2e-3)
    np.testing.assert_allclose(np.take_along_axis(similar, positions, axis=1), best, atol=2e-3)
    assert (positions != np.arange(len(collection))[:, None]).all()


def test_only_captioned_images_take_part(emoji: Path, tmp_path: Path) -> None:
    table = tmp_path / "some.csv"
    lines = emoji.read_text().splitlines()[:30]
    kept = [lines[0]]
    for number, line in enumerate(lines[1:]):
        cells = line.split(",")
        kept.append(
            ",".join([f"{emoji.parent}/{cells[0]}", "" if number % 3 == 0 else cells[1], "", *cells[3:]])
        )
    table.write_text("\n".join(kept) + "\n")
    made = import_dataset(table, tmp_path / "c", ImportOptions(caption_column=("caption",)))
    embed(made, MINILM)
    positions, _ = find_neighbors(made, k=3).topk()
    silent = np.array([not record.captions for record in made])
    assert silent.sum() > 5
    assert (positions[silent] == -1).all()
    assert (positions[~silent] >= 0).all()
    assert not silent[positions[~silent]].any()


def test_resumed_equals_uninterrupted(collection: CaptionDataset, tmp_path: Path) -> None:
    copy = CaptionDataset(shutil.copytree(collection.path, tmp_path / "c"))
    found = find_neighbors(copy, k=5)
    whole = snapshot(found.path)
    assert sum(name.endswith(".parquet") for name in whole) > 2
    manifest = (found.path / MANIFEST).read_text().replace('"complete": true', '"complete": false')
    (found.path / MANIFEST).write_text(manifest)
    (found.path / "neighbors-00001.parquet").unlink()
    (found.path / ".neighbors-00001.parquet.999999999.tmp").write_bytes(b"half a shard")
    with pytest.raises(ArtifactError, match="incomplete"):
        Neighbors(found.path)
    assert snapshot(find_neighbors(copy, k=5).path) == whole


def test_embedding_resumed_equals_uninterrupted(collection: CaptionDataset, tmp_path: Path) -> None:
    copy = CaptionDataset(shutil.copytree(collection.path, tmp_path / "c"))
    path = find_embeddings(copy, None).path
    whole = snapshot(path)
    manifest = (path / MANIFEST).read_text().replace('"complete": true', '"complete": false')
    (path / MANIFEST).write_text(manifest)
    (path / "ids-00001.npy").unlink()
    (path / "vectors-00001.npy").unlink()
    embed(copy, MINILM)
    assert snapshot(path) == whole


def test_shards_hold_the_ids_of_the_collection(collection: CaptionDataset) -> None:
    found = find_neighbors(collection, k=5)
    ids = [i for path in sorted(found.path.glob("*.parquet")) for i in pq.read_table(path)["id"].to_pylist()]
    assert ids == [record.id for record in collection]


def test_bad_k_is_refused(collection: CaptionDataset) -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        find_neighbors(collection, k=0)
    with pytest.raises(InvalidInputError, match="have a caption to compare"):
        find_neighbors(collection, k=100_000)
    with pytest.raises(ArtifactError, match="holds 5 neighbors an image, not 9"):
        find_neighbors(collection, k=5).topk(9)


def test_missing_embeddings_name_the_command(emoji: Path, tmp_path: Path) -> None:
    made = import_dataset(emoji, tmp_path / "c", ImportOptions(caption_column=("caption",)))
    with pytest.raises(ArtifactError, match="embed the dataset first"):
        find_neighbors(made)
