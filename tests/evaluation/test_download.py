"""Each reader reads a small dataset in the layout of the original; nothing is downloaded."""

import csv
import gzip
import hashlib
import json
import pickle
import socket
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets as tv
import torchvision.datasets.utils
from PIL import Image
from scipy.io import savemat

from likewise.data.images import decode_image
from likewise.errors import DependencyError, InvalidInputError
from likewise.evaluation.datasets import download
from likewise.evaluation.datasets.download import download_dataset
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.evaluation.datasets.registry import DATASETS

RNG = np.random.default_rng(0)
Rows = dict[str, tuple[str, str]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def random_pixels(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *shape), np.uint8)


def write_images(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels(1, 6, 8, 3)[0]).save(file)


def write_lines(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


def download_rows(name: str, folder: Path) -> Rows:
    """Download and open a dataset; return split and label by file, after decoding every file."""
    assert download_dataset(name, folder) == folder
    dataset = open_labeled(folder)
    for file in dataset.files:
        assert decode_image((folder / file).read_bytes()).ndim == 3
    assert not (folder / "source" / "extracting.json").exists()
    with (folder / "labels.csv").open() as stream:
        return {row["file"]: (row["split"], row["label"]) for row in csv.DictReader(stream)}


def food101(source: Path) -> Rows:
    base = source / "food-101"
    for split, first in (("train", 0), ("test", 2)):
        names_by_class = {c: [f"{c}/{first + i}" for i in range(2)] for c in ("apple_pie", "waffles")}
        write_images(
            *(base / "images" / f"{name}.jpg" for names in names_by_class.values() for name in names)
        )
        write_lines(base / "meta" / f"{split}.json", json.dumps(names_by_class))
    return {
        f"source/food-101/images/{c}/{i}.jpg": ("train" if i < 2 else "test", c)
        for c in ("apple_pie", "waffles")
        for i in range(4)
    }


def dtd(source: Path) -> Rows:
    base = source / "dtd" / "dtd"
    rows = {}
    for split in ("train", "val", "test"):
        names = [f"{c}/{c}_{split}.jpg" for c in ("banded", "zigzagged")]
        write_images(*(base / "images" / name for name in names))
        write_lines(base / "labels" / f"{split}1.txt", *names)
        rows |= {f"source/dtd/dtd/images/{name}": (split, name.split("/")[0]) for name in names}
    return rows


def pets(source: Path) -> Rows:
    base = source / "oxford-iiit-pet"
    rows = {}
    for split, source_split in (("train", "trainval"), ("test", "test")):
        cats = [f"Abyssinian_{source_split}1 1 1 1", f"american_bulldog_{source_split}2 2 2 1"]
        lines = [line.replace(f"_{source_split}", f"_{'7' if split == 'train' else '8'}") for line in cats]
        write_lines(base / "annotations" / f"{source_split}.txt", *lines)
        for line, label in zip(lines, ("Abyssinian", "American Bulldog"), strict=True):
            write_images(base / "images" / f"{line.split()[0]}.jpg")
            rows[f"source/oxford-iiit-pet/images/{line.split()[0]}.jpg"] = (split, label)
    return rows


def aircraft(source: Path) -> Rows:
    base = source / "fgvc-aircraft-2013b" / "data"
    write_lines(base / "variants.txt", "707-320", "A300B4 x")
    rows = {}
    for number, split in enumerate(("train", "val", "test")):
        lines = [f"00{number}1 707-320", f"00{number}2 A300B4 x"]
        write_lines(base / f"images_variant_{split}.txt", *lines)
        for line in lines:
            image, label = line.split(" ", 1)
            write_images(base / "images" / f"{image}.jpg")
            rows[f"source/fgvc-aircraft-2013b/data/images/{image}.jpg"] = (split, label)
    return rows


def country211(source: Path) -> Rows:
    rows = {}
    for split, source_split in (("train", "train"), ("val", "valid"), ("test", "test")):
        for label in ("AD", "ZW"):
            write_images(source / "country211" / source_split / label / "1.jpg")
            rows[f"source/country211/{source_split}/{label}/1.jpg"] = (split, label)
    return rows


def rendered_sst2(source: Path) -> Rows:
    rows = {}
    for split, source_split in (("train", "train"), ("val", "valid"), ("test", "test")):
        for label in ("negative", "positive"):
            write_images(source / "rendered-sst2" / source_split / label / "1.png")
            rows[f"source/rendered-sst2/{source_split}/{label}/1.png"] = (split, label)
    return rows


def gtsrb(source: Path) -> Rows:
    base = source / "gtsrb"
    write_images(*(base / "GTSRB" / "Training" / f"{c:05d}" / "00000_00000.ppm" for c in (0, 1)))
    write_images(*(base / "GTSRB" / "Final_Test" / "Images" / f"{i:05d}.ppm" for i in (0, 1)))
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    write_lines(base / "GT-final_test.csv", head, "00000.ppm;8;6;1;1;5;5;1", "00001.ppm;8;6;1;1;5;5;0")
    return {
        "source/gtsrb/GTSRB/Training/00000/00000_00000.ppm": ("train", "00"),
        "source/gtsrb/GTSRB/Training/00001/00000_00000.ppm": ("train", "01"),
        "source/gtsrb/GTSRB/Final_Test/Images/00000.ppm": ("test", "01"),
        "source/gtsrb/GTSRB/Final_Test/Images/00001.ppm": ("test", "00"),
    }


def sun397(source: Path) -> Rows:
    rows = {}
    write_lines(source / "SUN397" / "ClassName.txt", "/a/abbey", "/a/apartment_building/outdoor")
    for split in ("train", "test"):
        lines = [f"/a/abbey/sun_{split}.jpg", f"/a/apartment_building/outdoor/sun_{split}.jpg"]
        write_images(*(source / "SUN397" / line[1:] for line in (*lines, "/a/abbey/sun_unused.jpg")))
        write_lines(source / "partitions" / f"{split.title()}ing_01.txt", *lines)
        for line, label in zip(lines, ("abbey", "apartment_building/outdoor"), strict=True):
            rows[f"source/SUN397{line}"] = (split, label)
    return rows


def cub200(source: Path) -> Rows:
    base = source / "CUB_200_2011"
    names = [f"{c}/{c[4:]}_{i}.jpg" for c in ("001.Albatross", "002.Auklet") for i in (1, 2)]
    write_images(*(base / "images" / name for name in names))
    write_lines(base / "images.txt", *(f"{i} {name}" for i, name in enumerate(names, 1)))
    write_lines(base / "train_test_split.txt", *(f"{i} {i % 2}" for i in range(1, 5)))
    return {
        f"source/CUB_200_2011/images/{name}": ("train" if i % 2 else "test", name.split("/")[0])
        for i, name in enumerate(names, 1)
    }


@pytest.mark.parametrize(
    "make", [food101, dtd, pets, aircraft, country211, rendered_sst2, gtsrb, sun397, cub200]
)
def test_datasets_of_image_files_are_read_without_copies(
    make: Callable[[Path], Rows], tmp_path: Path
) -> None:
    expected = make(tmp_path / "source")
    assert download_rows(make.__name__, tmp_path) == expected
    assert not (tmp_path / "images").exists()


def test_flowers102_is_read_with_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "source" / "flowers-102"
    write_images(*(base / "jpg" / f"image_{i:05d}.jpg" for i in range(1, 7)))
    savemat(base / "imagelabels.mat", {"labels": [[1, 1, 1, 2, 2, 2]]})
    savemat(base / "setid.mat", {"trnid": [[1, 4]], "valid": [[2, 5]], "tstid": [[3, 6]]})
    sums = {"label": "imagelabels.mat", "setid": "setid.mat", "image": "imagelabels.mat"}
    monkeypatch.setattr(tv.Flowers102, "_file_dict", {k: (f, md5(base / f)) for k, f in sums.items()})
    splits = ("train", "val", "test")
    assert download_rows("flowers102", tmp_path) == {
        f"source/flowers-102/jpg/image_{i + 1:05d}.jpg": (
            splits[i % 3],
            ("pink primrose", "hard-leaved pocket orchid")[i // 3],
        )
        for i in range(6)
    }


def test_caltech101_is_split_by_hash(tmp_path: Path) -> None:
    base = tmp_path / "source" / "caltech101" / "101_ObjectCategories"
    sizes = {"BACKGROUND_Google": 33, "accordion": 31, "anchor": 35}
    for label, count in sizes.items():
        write_images(*(base / label / f"image_{i:04d}.jpg" for i in range(1, count + 1)))
    write_lines(base / "BACKGROUND_Google" / "tmp", "no image")
    rows = download_rows("caltech101", tmp_path)
    expected = {("train", c): 30 for c in sizes} | {("test", c): n - 30 for c, n in sizes.items()}
    assert Counter(rows.values()) == expected
    keys = {f: hashlib.blake2b("/".join(f.split("/")[-2:]).encode(), digest_size=16).digest() for f in rows}
    for label in sizes:
        train = [keys[f] for f, row in rows.items() if row == ("train", label)]
        assert max(train) < min(keys[f] for f, row in rows.items() if row == ("test", label))


def test_eurosat_is_split_by_images_per_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train": 3, "val": 2, "test": 4}
    info = DATASETS["eurosat"]
    monkeypatch.setitem(
        DATASETS, "eurosat", replace(info, download=replace(info.download, images_per_class=sizes))
    )
    base = tmp_path / "source" / "eurosat" / "2750"
    for label in ("Forest", "River"):
        write_images(*(base / label / f"{label}_{i}.jpg" for i in range(12)))
    rows = download_rows("eurosat", tmp_path)
    assert Counter(rows.values()) == {(s, c): n for s, n in sizes.items() for c in ("Forest", "River")}


def test_clevr_labels_are_object_counts(tmp_path: Path) -> None:
    base = tmp_path / "source" / "clevr" / "CLEVR_v1.0"
    counts = {}
    for split in ("train", "val"):
        names = [f"CLEVR_{split}_{i:06d}.png" for i in range(6)]
        write_images(*(base / "images" / split / name for name in names))
        counts |= {name: 3 + i % 3 for i, name in enumerate(names)}
        scenes = [{"image_filename": n, "objects": [{}] * counts[n]} for n in names]
        write_lines(base / "scenes" / f"CLEVR_{split}_scenes.json", json.dumps({"scenes": scenes}))
    rows = download_rows("clevr_counts", tmp_path)
    assert len(rows) == 12
    for file, row in rows.items():
        name = Path(file).name
        assert row == ("train" if "train" in name else "test", str(counts[name]))


def write_idx(file: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(header + array.tobytes())


def read_images(folder: Path, split: str) -> np.ndarray:
    return np.stack([np.asarray(Image.open(f)) for f in sorted((folder / "images" / split).glob("*.png"))])


def test_mnist_is_written_once_and_resumes(tmp_path: Path) -> None:
    raw = tmp_path / "source" / "MNIST" / "raw"
    data = {"train": random_pixels(4, 28, 28), "test": random_pixels(2, 28, 28)}
    for split, source_split in (("train", "train"), ("test", "t10k")):
        write_idx(raw / f"{source_split}-images-idx3-ubyte", data[split])
        write_idx(
            raw / f"{source_split}-labels-idx1-ubyte", np.array([0, 7] * (len(data[split]) // 2), np.uint8)
        )
    rows = download_rows("mnist", tmp_path)
    assert rows["images/train/000001.png"] == ("train", "7 - seven")
    assert rows["images/test/000000.png"] == ("test", "0 - zero")
    for split, array in data.items():
        np.testing.assert_array_equal(read_images(tmp_path, split), array)
    table = (tmp_path / "labels.csv").read_bytes()
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "images" / "train" / "000002.png").unlink()
    download_dataset("mnist", tmp_path)
    assert (tmp_path / "labels.csv").read_bytes() == table
    np.testing.assert_array_equal(read_images(tmp_path, "train"), data["train"])


def test_svhn_images_are_written_as_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    data = random_pixels(2, 32, 32, 3)
    checksums = {}
    for split in ("train", "test"):
        file = source / f"{split}_32x32.mat"
        savemat(file, {"X": data.transpose(1, 2, 3, 0), "y": np.array([[10], [4]], np.uint8)})
        checksums[split] = ["http://nowhere.invalid", file.name, md5(file)]
    monkeypatch.setattr(tv.SVHN, "split_list", checksums)
    rows = download_rows("svhn", tmp_path)
    assert rows["images/test/000000.png"] == ("test", "0")
    assert rows["images/train/000001.png"] == ("train", "4")
    np.testing.assert_array_equal(read_images(tmp_path, "train"), data)


def test_stl10_images_are_written_as_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "source" / "stl10_binary"
    write_lines(base / "class_names.txt", "airplane", "bird")
    data = random_pixels(2, 3, 96, 96)
    for split in ("train", "test"):
        (base / f"{split}_X.bin").write_bytes(data.tobytes())
        (base / f"{split}_y.bin").write_bytes(bytes([2, 1]))
        names = [f"{split}_X.bin", f"{split}_y.bin"]
        monkeypatch.setattr(tv.STL10, f"{split}_list", [[n, md5(base / n)] for n in names])
    rows = download_rows("stl10", tmp_path)
    assert rows["images/train/000000.png"] == ("train", "bird")
    np.testing.assert_array_equal(read_images(tmp_path, "test"), data.transpose(0, 3, 2, 1))


@pytest.mark.parametrize(("name", "cls"), [("cifar10", tv.CIFAR10), ("cifar100", tv.CIFAR100)])
def test_cifar_images_are_written_as_png(
    name: str, cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "source" / cls.base_folder
    base.mkdir(parents=True)
    data = random_pixels(2, 3072)
    label = "labels" if name == "cifar10" else "fine_labels"
    for file in ("train", "test"):
        (base / file).write_bytes(pickle.dumps({"data": data, label: [1, 0]}))
        monkeypatch.setattr(cls, f"{file}_list", [[file, md5(base / file)]])
    meta = base / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: ["airplane", "automobile"]}))
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5(meta)})
    rows = download_rows(name, tmp_path)
    assert rows["images/train/000000.png"] == ("train", "automobile")
    np.testing.assert_array_equal(
        read_images(tmp_path, "test"), data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    )


def test_patch_camelyon_images_are_written_as_png(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    base = tmp_path / "source" / "pcam"
    base.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        stem = f"camelyonpatch_level_2_split_{split}"
        with h5py.File(base / f"{stem}_x.h5", "w") as file:
            file["x"] = random_pixels(2, 96, 96, 3)
        with h5py.File(base / f"{stem}_y.h5", "w") as file:
            file["y"] = np.array([0, 1], np.uint8).reshape(-1, 1, 1, 1)
    rows = download_rows("patch_camelyon", tmp_path)
    assert rows["images/val/000001.png"] == ("val", "tumor")
    assert len(rows) == 6


def test_patch_camelyon_without_h5py_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("likewise.evaluation.datasets.download.find_spec", lambda _: None)
    with pytest.raises(DependencyError, match="pip install h5py"):
        download_dataset("patch_camelyon", tmp_path)


@pytest.fixture
def hub(tmp_path: Path) -> Callable[..., Any]:
    """Write splits of a small dataset as parquet, two shards each, as the hub lays them out."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    def write_shards(splits: dict[str, int]) -> None:
        features = Features({"image": ImageColumn(), "label": ClassLabel(names=["b 2012", "a/c"])})
        for split, count in splits.items():
            images = [Image.fromarray(random_pixels(1, 6, 8, 3)[0]) for _ in range(count)]
            table = Dataset.from_dict(
                {"image": images, "label": [i % 2 for i in range(count)]}, features=features
            )
            (tmp_path / "source" / "data").mkdir(parents=True, exist_ok=True)
            for part in range(2):
                shard = tmp_path / "source" / "data" / f"{split}-{part:05d}-of-00002.parquet"
                table.shard(2, part, contiguous=True).to_parquet(shard)

    return write_shards


def test_hub_dataset_is_read_from_parquet_shards(hub: Callable[..., Any], tmp_path: Path) -> None:
    hub({"train": 6, "test": 4})
    rows = download_rows("cars", tmp_path)
    expected = {(s, c): n for s, n in (("train", 3), ("test", 2)) for c in ("b 2012", "a/c")}
    assert Counter(rows.values()) == expected
    assert all(file.startswith(f"images/{split}/") for file, (split, _) in rows.items())


def test_resisc45_is_split_by_images_per_class(hub: Callable[..., Any], tmp_path: Path) -> None:
    hub({"train": 160, "validation": 80, "test": 80})
    rows = download_rows("resisc45", tmp_path)
    sizes = {"train": 70, "val": 70, "test": 20}
    assert Counter(rows.values()) == {(s, c): n for s, n in sizes.items() for c in ("b 2012", "a/c")}


def test_missing_shard_raises(hub: Callable[..., Any], tmp_path: Path) -> None:
    hub({"train": 6, "test": 4})
    (tmp_path / "source" / "data" / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(InvalidInputError, match=r"cars.* data/train-\*\.parquet"):
        download_dataset("cars", tmp_path)
    assert len(list((tmp_path / "source" / "data").glob("*.parquet"))) == 3


def test_existing_archive_is_extracted_and_partial_extraction_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = food101(tmp_path / "complete")
    source = tmp_path / "source"
    source.mkdir()
    archive = source / "food-101.tar.gz"
    with tarfile.open(archive, "w:gz") as stream:
        stream.add(tmp_path / "complete" / "food-101", "food-101")
    monkeypatch.setattr(tv.Food101, "_MD5", md5(archive))
    # The files after a kill during extraction.
    write_images(source / "food-101" / "images" / "apple_pie" / "0.jpg")
    (source / "food-101" / "meta").mkdir()
    write_lines(source / "extracting.json", "[]")
    assert download_rows("food101", tmp_path) == expected
    assert archive.is_file()


def test_failed_download_does_not_delete_existing_files(tmp_path: Path) -> None:
    gtsrb(tmp_path / "source")
    (tmp_path / "source" / "gtsrb" / "GT-final_test.csv").unlink()
    before = sorted((tmp_path / "source").rglob("*.ppm"))
    with pytest.raises(InvalidInputError, match="GTSRB_Final_Test_GT.zip"):
        download_dataset("gtsrb", tmp_path)
    assert sorted((tmp_path / "source").rglob("*.ppm")) == before


def test_damaged_archive_raises(tmp_path: Path) -> None:
    archive = tmp_path / "source" / "fgvc-aircraft-2013b.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(gzip.compress(b"no archive" * 100)[:-12])
    with pytest.raises(InvalidInputError, match="damaged copies"):
        download_dataset("aircraft", tmp_path)


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"patch_camelyon"}))
def test_download_error_names_files_and_folder(name: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidInputError) as excinfo:
        download_dataset(name, tmp_path / name)
    assert time.monotonic() - start < 5
    assert "\n" not in str(excinfo.value)
    for part in (DATASETS[name].homepage, *DATASETS[name].files, str(tmp_path / name / "source")):
        assert part in str(excinfo.value)
    assert not (tmp_path / name / "labels.csv").exists()


def test_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_TIMEOUT_SECONDS", 0.2)
    original = torchvision.datasets.utils.urllib
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/CUB_200_2011.tgz"
        monkeypatch.setattr(download, "_CUB_URL", url)
        with pytest.raises(InvalidInputError, match="timed out"):
            download_dataset("cub200", tmp_path)
    assert socket.getdefaulttimeout() is None
    assert torchvision.datasets.utils.urllib is original


def test_imagenet_error_names_its_archives(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"ILSVRC2012_img_train\.tar, ILSVRC2012_img_val\.tar"):
        download_dataset("imagenet", tmp_path)


def test_existing_dataset_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKEWISE_DATASETS", str(tmp_path))
    write_lines(tmp_path / "imagenet" / "labels.csv", "file,split,label")
    assert download_dataset("imagenet") == tmp_path / "imagenet"
    assert not (tmp_path / "imagenet" / "source").exists()


def test_unknown_names_raise(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="Did you mean food101"):
        download_dataset("food11", tmp_path)
    assert not list(tmp_path.iterdir())
