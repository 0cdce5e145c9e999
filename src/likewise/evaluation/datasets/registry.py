"""Well-known image classification sets: their sizes, measures, licences and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from likewise.errors import InvalidInputError, did_you_mean
from likewise.evaluation.datasets.labeled import LabeledDataset

ACCURACY = "accuracy"
MEAN_CLASS_ACCURACY = "mean per-class accuracy"
OFFICIAL_SPLITS = "the set's own splits"

TRAIN_TEST_ARGS = {split: {"split": split} for split in ("train", "test")}
TRAIN_VAL_TEST_ARGS = {split: {"split": split} for split in ("train", "val", "test")}
TRAIN_FLAG_ARGS = {"train": {"train": True}, "test": {"train": False}}


@dataclass(frozen=True, kw_only=True)
class DownloadSpec:
    """How the files of a set are read.

    Attributes:
        reader: The reader in `likewise.evaluation.sets.fetch`.
        loader: The class of torchvision.datasets, or the repository on the Hugging Face hub.
        split_args: For each of our splits, the arguments that choose the set's own.
        images_per_class: Where the set has no splits of its own, how many of each class a split takes; None
            is the rest.
    """

    reader: str
    loader: str
    split_args: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"train": {}})
    images_per_class: Mapping[str, int | None] | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """What is known of a set before it is there.

    Attributes:
        title: Its name in print.
        num_classes: How many classes it has.
        split_sizes: How many images each split has, by the rule in `note`.
        metric: What is reported for it, as in El Banani et al. 2023 and Radford et al. 2021.
        download_mb: About how much is downloaded, in 10^6 bytes.
        license: What its home page says of its use.
        homepage: Where it is described.
        download: How its files are read.
        files: What is downloaded, relative to the folder `download` of the set.
        note: How its splits come about.
    """

    title: str
    num_classes: int
    split_sizes: Mapping[str, int]
    download_mb: int
    homepage: str
    download: DownloadSpec
    files: tuple[str, ...]
    metric: str = ACCURACY
    license: str = "not stated"
    note: str = OFFICIAL_SPLITS


DATASETS: dict[str, DatasetInfo] = {
    "food101": DatasetInfo(
        title="Food-101",
        num_classes=101,
        split_sizes={"train": 75_750, "test": 25_250},
        download_mb=4996,
        homepage="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        download=DownloadSpec(reader="files", loader="Food101", split_args=TRAIN_TEST_ARGS),
        files=("food-101.tar.gz",),
    ),
    "cifar10": DatasetInfo(
        title="CIFAR-10",
        num_classes=10,
        split_sizes={"train": 50_000, "test": 10_000},
        download_mb=170,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        download=DownloadSpec(reader="arrays", loader="CIFAR10", split_args=TRAIN_FLAG_ARGS),
        files=("cifar-10-python.tar.gz",),
    ),
    "cifar100": DatasetInfo(
        title="CIFAR-100",
        num_classes=100,
        split_sizes={"train": 50_000, "test": 10_000},
        download_mb=169,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        download=DownloadSpec(reader="arrays", loader="CIFAR100", split_args=TRAIN_FLAG_ARGS),
        files=("cifar-100-python.tar.gz",),
        note="the set's own splits; the 100 fine labels",
    ),
    "cub200": DatasetInfo(
        title="Caltech-UCSD Birds-200-2011",
        num_classes=200,
        split_sizes={"train": 5994, "test": 5794},
        download_mb=1151,
        license="non-commercial research and education only",
        homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        download=DownloadSpec(reader="cub200", loader="CUB_200_2011"),
        files=("CUB_200_2011.tgz",),
    ),
    "sun397": DatasetInfo(
        title="SUN397",
        num_classes=397,
        split_sizes={"train": 19_850, "test": 19_850},
        download_mb=39_000,
        license="research purposes only",
        homepage="https://vision.princeton.edu/projects/2010/SUN/",
        download=DownloadSpec(reader="sun397", loader="SUN397"),
        files=("SUN397.tar.gz", "Partitions.zip"),
        note="partition 01 of the authors' ten: 50 train and 50 test images a class, the rest unused",
    ),
    "cars": DatasetInfo(
        title="Stanford Cars",
        num_classes=196,
        split_sizes={"train": 8144, "test": 8041},
        download_mb=1976,
        homepage="https://huggingface.co/datasets/tanganke/stanford_cars",
        download=DownloadSpec(reader="parquet", loader="tanganke/stanford_cars", split_args=TRAIN_TEST_ARGS),
        files=("data/train-*.parquet", "data/test-*.parquet"),
    ),
    "aircraft": DatasetInfo(
        title="FGVC-Aircraft",
        num_classes=100,
        split_sizes={"train": 3334, "val": 3333, "test": 3333},
        download_mb=2754,
        metric=MEAN_CLASS_ACCURACY,
        license="non-commercial research only",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        download=DownloadSpec(reader="aircraft", loader="FGVCAircraft", split_args=TRAIN_VAL_TEST_ARGS),
        files=("fgvc-aircraft-2013b.tar.gz",),
        note="the set's own splits; the 100 variants",
    ),
    "dtd": DatasetInfo(
        title="Describable Textures",
        num_classes=47,
        split_sizes={"train": 1880, "val": 1880, "test": 1880},
        download_mb=625,
        license="research purposes only",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        download=DownloadSpec(reader="files", loader="DTD", split_args=TRAIN_VAL_TEST_ARGS),
        files=("dtd/dtd-r1.0.1.tar.gz",),
        note="partition 1 of the authors' ten",
    ),
    "pets": DatasetInfo(
        title="Oxford-IIIT Pet",
        num_classes=37,
        split_sizes={"train": 3680, "test": 3669},
        download_mb=811,
        metric=MEAN_CLASS_ACCURACY,
        license="CC BY-SA 4.0",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        download=DownloadSpec(
            reader="files",
            loader="OxfordIIITPet",
            split_args={"train": {"split": "trainval"}, "test": {"split": "test"}},
        ),
        files=("oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"),
        note="the set's own trainval and test",
    ),
    "caltech101": DatasetInfo(
        title="Caltech-101",
        num_classes=102,
        split_sizes={"train": 3060, "test": 6084},
        download_mb=137,
        metric=MEAN_CLASS_ACCURACY,
        license="CC BY 4.0",
        homepage="https://data.caltech.edu/records/mzrjq-6wc02",
        download=DownloadSpec(
            reader="caltech101", loader="Caltech101", images_per_class={"train": 30, "test": None}
        ),
        files=("caltech101/caltech-101.zip",),
        note="by hash of CLASS/FILE 30 train images a class; 102 classes with the background, as in LGSSL",
    ),
    "flowers102": DatasetInfo(
        title="Oxford Flowers-102",
        num_classes=102,
        split_sizes={"train": 1020, "val": 1020, "test": 6149},
        download_mb=345,
        metric=MEAN_CLASS_ACCURACY,
        homepage="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        download=DownloadSpec(reader="files", loader="Flowers102", split_args=TRAIN_VAL_TEST_ARGS),
        files=("flowers-102/102flowers.tgz", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
    ),
    "stl10": DatasetInfo(
        title="STL-10",
        num_classes=10,
        split_sizes={"train": 5000, "test": 8000},
        download_mb=2640,
        homepage="https://cs.stanford.edu/~acoates/stl10/",
        download=DownloadSpec(reader="arrays", loader="STL10", split_args=TRAIN_TEST_ARGS),
        files=("stl10_binary.tar.gz",),
        note="the set's own splits; the unlabelled images are left out",
    ),
    "eurosat": DatasetInfo(
        title="EuroSAT",
        num_classes=10,
        split_sizes={"train": 5000, "val": 5000, "test": 5000},
        download_mb=94,
        license="MIT",
        homepage="https://github.com/phelber/EuroSAT",
        download=DownloadSpec(
            reader="eurosat", loader="EuroSAT", images_per_class={"train": 500, "val": 500, "test": 500}
        ),
        files=("eurosat/EuroSAT.zip",),
        note="by hash of CLASS/FILE 500 images a class and split; sizes as in LGSSL, not its images",
    ),
    "resisc45": DatasetInfo(
        title="NWPU-RESISC45",
        num_classes=45,
        split_sizes={"train": 3150, "val": 3150, "test": 25_200},
        download_mb=425,
        homepage="https://huggingface.co/datasets/timm/resisc45",
        download=DownloadSpec(
            reader="parquet",
            loader="timm/resisc45",
            split_args=TRAIN_VAL_TEST_ARGS | {"val": {"split": "validation"}},
            images_per_class={"train": 70, "val": 70, "test": 560},
        ),
        files=("data/train-*.parquet", "data/validation-*.parquet", "data/test-*.parquet"),
        note="by hash of the bytes 70, 70 and 560 images a class; sizes as in LGSSL, not its images",
    ),
    "patch_camelyon": DatasetInfo(
        title="PatchCamelyon",
        num_classes=2,
        split_sizes={"train": 262_144, "val": 32_768, "test": 32_768},
        download_mb=8030,
        license="CC0",
        homepage="https://zenodo.org/records/2546921",
        download=DownloadSpec(reader="patch_camelyon", loader="PCAM", split_args=TRAIN_VAL_TEST_ARGS),
        files=(
            *(
                f"pcam/camelyonpatch_level_2_split_{split}_{part}.h5.gz"
                for split in ("train", "valid", "test")
                for part in "xy"
            ),
        ),
    ),
    "imagenet": DatasetInfo(
        title="ImageNet-1k (ILSVRC2012)",
        num_classes=1000,
        split_sizes={"train": 1_281_167, "test": 50_000},
        download_mb=154_600,
        license="non-commercial research and education only",
        homepage="https://image-net.org/download.php",
        download=DownloadSpec(
            reader="imagenet",
            loader="ImageNet",
            split_args={"train": {"split": "train"}, "test": {"split": "val"}},
        ),
        files=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"),
        note="its val images are test; never downloaded: a person must accept its terms",
    ),
    "mnist": DatasetInfo(
        title="MNIST",
        num_classes=10,
        split_sizes={"train": 60_000, "test": 10_000},
        download_mb=12,
        homepage="http://yann.lecun.com/exdb/mnist/",
        download=DownloadSpec(reader="arrays", loader="MNIST", split_args=TRAIN_FLAG_ARGS),
        files=(
            "MNIST/raw/train-images-idx3-ubyte.gz",
            "MNIST/raw/train-labels-idx1-ubyte.gz",
            "MNIST/raw/t10k-images-idx3-ubyte.gz",
            "MNIST/raw/t10k-labels-idx1-ubyte.gz",
        ),
    ),
    "clevr_counts": DatasetInfo(
        title="CLEVR, number of objects",
        num_classes=8,
        split_sizes={"train": 1500, "val": 500, "test": 500},
        download_mb=19_020,
        license="CC BY 4.0",
        homepage="https://cs.stanford.edu/people/jcjohns/clevr/",
        download=DownloadSpec(
            reader="clevr_counts", loader="CLEVRClassification", split_args=TRAIN_VAL_TEST_ARGS
        ),
        files=("clevr/CLEVR_v1.0.zip",),
        note="by hash of FILE: test from its val, the rest from its train; sizes as in LGSSL",
    ),
    "svhn": DatasetInfo(
        title="Street View House Numbers",
        num_classes=10,
        split_sizes={"train": 73_257, "test": 26_032},
        download_mb=246,
        license="non-commercial use only",
        homepage="http://ufldl.stanford.edu/housenumbers/",
        download=DownloadSpec(reader="arrays", loader="SVHN", split_args=TRAIN_TEST_ARGS),
        files=("train_32x32.mat", "test_32x32.mat"),
        note="the set's own splits; the extra images are left out",
    ),
    "gtsrb": DatasetInfo(
        title="German Traffic Sign Recognition",
        num_classes=43,
        split_sizes={"train": 26_640, "test": 12_630},
        download_mb=276,
        homepage="https://benchmark.ini.rub.de/",
        download=DownloadSpec(reader="files", loader="GTSRB", split_args=TRAIN_TEST_ARGS),
        files=(
            "gtsrb/GTSRB-Training_fixed.zip",
            "gtsrb/GTSRB_Final_Test_Images.zip",
            "gtsrb/GTSRB_Final_Test_GT.zip",
        ),
    ),
    "country211": DatasetInfo(
        title="Country211",
        num_classes=211,
        split_sizes={"train": 31_650, "val": 10_550, "test": 21_100},
        download_mb=11_000,
        homepage="https://github.com/openai/CLIP/blob/main/data/country211.md",
        download=DownloadSpec(
            reader="files", loader="Country211", split_args=TRAIN_VAL_TEST_ARGS | {"val": {"split": "valid"}}
        ),
        files=("country211.tgz",),
    ),
    "rendered_sst2": DatasetInfo(
        title="Rendered SST2",
        num_classes=2,
        split_sizes={"train": 6920, "val": 872, "test": 1821},
        download_mb=131,
        homepage="https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md",
        download=DownloadSpec(reader="files", loader="RenderedSST2", split_args=TRAIN_VAL_TEST_ARGS),
        files=("rendered-sst2.tgz",),
    ),
}


def get_dataset_info(name: str) -> DatasetInfo:
    """Return a set of the catalogue by its name.

    Raises:
        InputError: where there is none of that name; the message lists close ones.
    """
    if name not in DATASETS:
        suggestion = did_you_mean(name, list(DATASETS))
        raise InvalidInputError(
            f"there is no known set {name!r}; choose from {', '.join(DATASETS)}.{suggestion}"
        )
    return DATASETS[name]


def check_complete(name: str, dataset: LabeledDataset) -> None:
    """Compare a set with the catalogue: a set that is incomplete gives figures that mean something else.

    Raises:
        InputError: naming each split and the classes that differ.
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
            f"{name} has {message}: it is incomplete; delete {dataset.root} and run again"
        )
