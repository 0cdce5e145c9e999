"""Perceptual hashes and clusters of near-duplicates, against brute force and on altered images."""

import csv
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from likewise.artifacts import read_json, write_json
from likewise.data import perceptual_hash as duplicates
from likewise.data.dataset import CaptionDataset
from likewise.data.images import decode_image
from likewise.data.importing import import_dataset
from likewise.data.perceptual_hash import (
    PerceptualHashes,
    brightness_and_contrast,
    compute_perceptual_hashes,
    difference_hash,
    find_close_pairs,
    find_near_duplicate_clusters,
)
from likewise.errors import ArtifactError, InvalidInputError


def copy_dataset(dataset: CaptionDataset, folder: Path) -> CaptionDataset:
    """The same dataset elsewhere, so that what a test writes into it stays there."""
    names = ("image_cache", "embeddings", "neighbors", "hashes", "audit")
    return CaptionDataset(shutil.copytree(dataset.path, folder / "c", ignore=shutil.ignore_patterns(*names)))


@pytest.fixture(scope="module")
def altered(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    """A hundred emoji, and copies of most: at another size as a JPEG of low quality, or a little darker."""
    folder = tmp_path_factory.mktemp("altered")
    with emoji.open(encoding="utf-8") as stream:
        pictures = [emoji.parent / row["file"] for row in csv.DictReader(stream)][:100]
    rows = [("file", "caption")]
    for i, picture in enumerate(pictures):
        pixels = Image.fromarray(decode_image(picture.read_bytes()))
        pixels.save(folder / f"{i:03}.png")
        rows.append((f"{i:03}.png", f"picture {i}"))
        if i % 3 == 0:
            pixels.resize((190, 190), Image.Resampling.BICUBIC).save(folder / f"{i:03}-copy.jpg", quality=60)
            rows.append((f"{i:03}-copy.jpg", f"picture {i}, re-encoded"))
        if i % 3 == 1:
            Image.fromarray((np.asarray(pixels) * 0.985).astype(np.uint8)).save(folder / f"{i:03}-darker.png")
            rows.append((f"{i:03}-darker.png", f"picture {i}, a little darker"))
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return import_dataset(folder / "table.csv", folder / "c", shard_rows=40)


def test_difference_hash_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 256, (8, 9), dtype=np.uint8)
    expected = ""
    for row in gray:
        for left, right in pairwise(row):
            expected += "1" if right > left else "0"
    assert difference_hash(np.repeat(gray[..., None], 3, axis=2)) == int(expected, 2)


def test_hash_of_a_gradient_has_all_bits_or_none() -> None:
    ramp = np.broadcast_to(np.arange(0, 180, 2, dtype=np.uint8)[None, :, None], (64, 90, 3)).copy()
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(ramp[:, ::-1].copy()) == 0


def test_rescaled_and_compressed_copies_are_found(altered: CaptionDataset) -> None:
    clusters = find_near_duplicate_clusters(compute_perceptual_hashes(altered))
    codes = {sample.id: clusters[i] for i, sample in enumerate(altered)}
    found = [
        codes[name] >= 0 and codes[name] == codes[name.replace("-copy.jpg", ".png")]
        for name in codes
        if "-copy" in name
    ]
    assert len(found) == 34
    assert np.mean(found) >= 0.9  # a hash near a tie may move by more than 3 bits


def brute_force(hashes: PerceptualHashes, max_hamming: int) -> np.ndarray:
    """Compare all with all in float64 and number components by their first member."""
    pixels = hashes.thumbnails(np.arange(len(hashes))).reshape(len(hashes), -1).astype(np.float64)
    spread = np.sqrt(pixels.reshape(len(hashes), 64, 3).var(axis=1).mean(axis=1))
    joined = np.zeros((len(hashes), len(hashes)), bool)
    for i in range(len(hashes)):
        for j in range(i + 1, len(hashes)):
            bits = bin(int(hashes.hashes[i]) ^ int(hashes.hashes[j])).count("1")
            rms = np.sqrt(((pixels[i] - pixels[j]) ** 2).mean())
            near = rms <= 0.07 * np.sqrt((spread[i] ** 2 + spread[j] ** 2) / 2 + 1)
            usable = hashes.readable[[i, j]].all() and min(spread[i], spread[j]) >= 1
            joined[i, j] = bits <= max_hamming and near and usable
    _, labels = connected_components(coo_matrix(joined), directed=False)
    codes: dict[int, int] = {}
    is_singleton = np.bincount(labels)[labels] == 1
    return np.array(
        [
            -1 if is_single else codes.setdefault(label, len(codes))
            for label, is_single in zip(labels, is_singleton, strict=True)
        ]
    )


@pytest.mark.parametrize("max_hamming", [0, 3, 8])
def test_clusters_equal_brute_force(altered: CaptionDataset, max_hamming: int) -> None:
    hashes = compute_perceptual_hashes(altered)
    assert (find_near_duplicate_clusters(hashes, max_hamming) == brute_force(hashes, max_hamming)).all()


@pytest.mark.parametrize("max_hamming", [0, 1, 3, 6, 8])
@pytest.mark.parametrize("max_bucket_size", [4, 16, 1024])
def test_every_close_pair_is_found_once(
    max_hamming: int, max_bucket_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_MAX_BUCKET_SIZE", max_bucket_size)
    rng = np.random.default_rng(max_hamming)
    # Whole families of hashes, so that buckets are long and pairs of every max_hamming are there.
    bits = np.repeat(rng.integers(0, 2**63, 4, dtype=np.uint64), 30)
    for _ in range(6):
        flipped = np.uint64(1) << rng.integers(0, 64, len(bits)).astype(np.uint64)
        bits ^= np.where(rng.random(len(bits)) < 0.3, flipped, np.uint64(0))
    members = np.flatnonzero(rng.random(len(bits)) < 0.9)
    pairs = [
        (min(a, b), max(a, b))
        for first, second in find_close_pairs(bits, members, np.arange(64), max_hamming)
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    expected = {
        (int(a), int(b))
        for i, a in enumerate(members)
        for b in members[i + 1 :]
        if int(bits[a] ^ bits[b]).bit_count() <= max_hamming
    }
    assert set(pairs) == expected
    assert len(pairs) == len(expected)
    assert expected


def test_many_identical_images_are_not_compared_pairwise(altered: CaptionDataset, tmp_path: Path) -> None:
    rows = np.load(compute_perceptual_hashes(altered).shard_paths[0])[[0, 1, 0, 0]]
    np.save(tmp_path / "rows.npy", np.repeat(rows, 20_000))
    mean, contrast = brightness_and_contrast(rows["thumbnail"])
    hashes = PerceptualHashes(
        hashes=np.repeat(rows["bits"], 20_000),
        readable=np.ones(80_000, bool),
        mean=np.repeat(mean, 20_000),
        contrast=np.repeat(contrast, 20_000),
        shard_paths=(tmp_path / "rows.npy",),
        shard_offsets=np.array([0, 80_000]),
    )
    # Were copies compared one by one, this would take three billion comparisons.
    assert np.bincount(find_near_duplicate_clusters(hashes)).tolist() in ([80_000], [60_000, 20_000])


def test_uniform_images_are_not_near_duplicates(tmp_path: Path) -> None:
    colors = ["white", "white", "#fefefe", "red", "red"]
    for i, color in enumerate(colors):
        Image.new("RGB", (80, 80), color).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a page")
    hashes = compute_perceptual_hashes(import_dataset(tmp_path, tmp_path / "c"))
    assert hashes.uniform.all()
    assert (find_near_duplicate_clusters(hashes) == -1).all()


def test_similar_outlines_in_other_colors_are_not_near_duplicates(tmp_path: Path) -> None:
    for i, color in enumerate([(200, 30, 30), (30, 160, 40), (202, 30, 32)]):
        shape = np.full((96, 96, 3), 255, np.uint8)
        shape[20:80, 30:70] = color
        Image.fromarray(shape).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a box")
    hashes = compute_perceptual_hashes(import_dataset(tmp_path, tmp_path / "c"))
    assert len(set(hashes.hashes.tolist())) == 1
    assert find_near_duplicate_clusters(hashes).tolist() == [0, -1, 0]


def test_interrupted_hashing_resumes(dataset: CaptionDataset, tmp_path: Path) -> None:
    dataset = copy_dataset(dataset, tmp_path)
    compute_perceptual_hashes(dataset, num_workers=0)
    folder = dataset.path / "hashes"
    expected = {file.name: file.read_bytes() for file in folder.iterdir()}
    mtime = (folder / "hashes-00000.npy").stat().st_mtime_ns
    (folder / "hashes-00001.npy").unlink()
    manifest = read_json(folder / "artifact.json")
    write_json(folder / "artifact.json", manifest | {"complete": False, "counts": {}})
    compute_perceptual_hashes(dataset, num_workers=2)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == expected
    assert (folder / "hashes-00000.npy").stat().st_mtime_ns == mtime


def test_unreadable_images_are_counted_and_not_clustered(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(0, 180, 2, dtype=np.uint8)[None, :, None], (64, 90, 3))
    for i in range(4):
        Image.fromarray(ramp.copy()).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a ramp")
    dataset = import_dataset(tmp_path, tmp_path / "c")
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"no image")
    hashes = compute_perceptual_hashes(dataset)
    assert hashes.readable.tolist() == [True, False, False, True]
    assert find_near_duplicate_clusters(hashes).tolist() == [0, -1, -1, 0]
    assert read_json(dataset.path / "hashes" / "artifact.json")["skipped"] == {"no longer readable": 2}


def test_missing_image_folder_raises(altered: CaptionDataset, tmp_path: Path) -> None:
    dataset = copy_dataset(altered, tmp_path)
    manifest = read_json(dataset.path / "artifact.json")
    manifest["settings"]["root"] = str(tmp_path / "gone")
    write_json(dataset.path / "artifact.json", manifest)
    with pytest.raises(ArtifactError, match="gone, the image folder of"):
        compute_perceptual_hashes(CaptionDataset(dataset.path))


@pytest.mark.parametrize("max_hamming", [-1, 9])
def test_max_hamming_out_of_range_raises(altered: CaptionDataset, max_hamming: int) -> None:
    with pytest.raises(InvalidInputError, match="between 0 and 8") as error:
        find_near_duplicate_clusters(compute_perceptual_hashes(altered), max_hamming)
    assert error.value.field == "max_hamming"
