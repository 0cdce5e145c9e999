"""Well-known image classification sets: their sizes, measures, licences and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from likewise.errors import InputError, close_matches
from likewise.evaluation.datasets.labeled import LabelledSet

ACCURACY = "accuracy"
PER_CLASS = "mean per-class accuracy"
OWN = "the set's own splits"

TWO = {split: {"split": split} for split in ("train", "test")}
THREE = {split: {"split": split} for split in ("train", "val", "test")}
FLAG = {"train": {"train": True}, "test": {"train": False}}


@dataclass(frozen=True, kw_only=True)
class Source:
    """How the files of a set are read.

    Attributes:
        adapter: The reader in `likewise.evaluation.sets.fetch`.
        copy: The class of torchvision.datasets, or the repository on the Hugging Face hub.
        splits: For each of our splits, the arguments that choose the set's own.
        sizes: Where the set has no splits of its own, how many of each class a split takes; None is the rest.
    """

    adapter: str
    copy: str
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"train": {}})
    sizes: Mapping[str, int | None] | None = None


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """What is known of a set before it is there.

    Attributes:
        title: Its name in print.
        classes: How many classes it has.
        images: How many images each split has, by the rule in `note`.
        metric: What is reported for it, as in El Banani et al. 2023 and Radford et al. 2021.
        megabytes: About how much is downloaded, in 10^6 bytes.
        licence: What its home page says of its use.
        homepage: Where it is described.
        source: How its files are read.
        files: What is downloaded, relative to the folder `source` of the set.
        note: How its splits come about.
    """

    title: str
    classes: int
    images: Mapping[str, int]
    megabytes: int
    homepage: str
    source: Source
    files: tuple[str, ...]
    metric: str = ACCURACY
    licence: str = "not stated"
    note: str = OWN


CATALOG: dict[str, KnownSet] = {
    "food101": KnownSet(
        title="Food-101",
        classes=101,
        images={"train": 75_750, "test": 25_250},
        megabytes=4996,
        homepage="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        source=Source(adapter="files", copy="Food101", splits=TWO),
        files=("food-101.tar.gz",),
    ),
    "cifar10": KnownSet(
        title="CIFAR-10",
        classes=10,
        images={"train": 50_000, "test": 10_000},
        megabytes=170,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        source=Source(adapter="arrays", copy="CIFAR10", splits=FLAG),
        files=("cifar-10-python.tar.gz",),
    ),
    "cifar100": KnownSet(
        title="CIFAR-100",
        classes=100,
        images={"train": 50_000, "test": 10_000},
        megabytes=169,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        source=Source(adapter="arrays", copy="CIFAR100", splits=FLAG),
        files=("cifar-100-python.tar.gz",),
        note="the set's own splits; the 100 fine labels",
    ),
    "cub200": KnownSet(
        title="Caltech-UCSD Birds-200-2011",
        classes=200,
        images={"train": 5994, "test": 5794},
        megabytes=1151,
        licence="non-commercial research and education only",
        homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        source=Source(adapter="cub200", copy="CUB_200_2011"),
        files=("CUB_200_2011.tgz",),
    ),
    "sun397": KnownSet(
        title="SUN397",
        classes=397,
        images={"train": 19_850, "test": 19_850},
        megabytes=39_000,
        licence="research purposes only",
        homepage="https://vision.princeton.edu/projects/2010/SUN/",
        source=Source(adapter="sun397", copy="SUN397"),
        files=("SUN397.tar.gz", "Partitions.zip"),
        note="partition 01 of the authors' ten: 50 train and 50 test images a class, the rest unused",
    ),
    "cars": KnownSet(
        title="Stanford Cars",
        classes=196,
        images={"train": 8144, "test": 8041},
        megabytes=1976,
        homepage="https://huggingface.co/datasets/tanganke/stanford_cars",
        source=Source(adapter="parquet", copy="tanganke/stanford_cars", splits=TWO),
        files=("data/train-*.parquet", "data/test-*.parquet"),
    ),
    "aircraft": KnownSet(
        title="FGVC-Aircraft",
        classes=100,
        images={"train": 3334, "val": 3333, "test": 3333},
        megabytes=2754,
        metric=PER_CLASS,
        licence="non-commercial research only",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        source=Source(adapter="aircraft", copy="FGVCAircraft", splits=THREE),
        files=("fgvc-aircraft-2013b.tar.gz",),
        note="the set's own splits; the 100 variants",
    ),
    "dtd": KnownSet(
        title="Describable Textures",
        classes=47,
        images={"train": 1880, "val": 1880, "test": 1880},
        megabytes=625,
        licence="research purposes only",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        source=Source(adapter="files", copy="DTD", splits=THREE),
        files=("dtd/dtd-r1.0.1.tar.gz",),
        note="partition 1 of the authors' ten",
    ),
    "pets": KnownSet(
        title="Oxford-IIIT Pet",
        classes=37,
        images={"train": 3680, "test": 3669},
        megabytes=811,
        metric=PER_CLASS,
        licence="CC BY-SA 4.0",
        homepage="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        source=Source(
            adapter="files",
            copy="OxfordIIITPet",
            splits={"train": {"split": "trainval"}, "test": {"split": "test"}},
        ),
        files=("oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"),
        note="the set's own trainval and test",
    ),
    "caltech101": KnownSet(
        title="Caltech-101",
        classes=102,
        images={"train": 3060, "test": 6084},
        megabytes=137,
        metric=PER_CLASS,
        licence="CC BY 4.0",
        homepage="https://data.caltech.edu/records/mzrjq-6wc02",
        source=Source(adapter="caltech101", copy="Caltech101", sizes={"train": 30, "test": None}),
        files=("caltech101/caltech-101.zip",),
        note="by hash of CLASS/FILE 30 train images a class; 102 classes with the background, as in LGSSL",
    ),
    "flowers102": KnownSet(
        title="Oxford Flowers-102",
        classes=102,
        images={"train": 1020, "val": 1020, "test": 6149},
        megabytes=345,
        metric=PER_CLASS,
        homepage="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        source=Source(adapter="files", copy="Flowers102", splits=THREE),
        files=("flowers-102/102flowers.tgz", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
    ),
    "stl10": KnownSet(
        title="STL-10",
        classes=10,
        images={"train": 5000, "test": 8000},
        megabytes=2640,
        homepage="https://cs.stanford.edu/~acoates/stl10/",
        source=Source(adapter="arrays", copy="STL10", splits=TWO),
        files=("stl10_binary.tar.gz",),
        note="the set's own splits; the unlabelled images are left out",
    ),
    "eurosat": KnownSet(
        title="EuroSAT",
        classes=10,
        images={"train": 5000, "val": 5000, "test": 5000},
        megabytes=94,
        licence="MIT",
        homepage="https://github.com/phelber/EuroSAT",
        source=Source(adapter="eurosat", copy="EuroSAT", sizes={"train": 500, "val": 500, "test": 500}),
        files=("eurosat/EuroSAT.zip",),
        note="by hash of CLASS/FILE 500 images a class and split; sizes as in LGSSL, not its images",
    ),
    "resisc45": KnownSet(
        title="NWPU-RESISC45",
        classes=45,
        images={"train": 3150, "val": 3150, "test": 25_200},
        megabytes=425,
        homepage="https://huggingface.co/datasets/timm/resisc45",
        source=Source(
            adapter="parquet",
            copy="timm/resisc45",
            splits=THREE | {"val": {"split": "validation"}},
            sizes={"train": 70, "val": 70, "test": 560},
        ),
        files=("data/train-*.parquet", "data/validation-*.parquet", "data/test-*.parquet"),
        note="by hash of the bytes 70, 70 and 560 images a class; sizes as in LGSSL, not its images",
    ),
    "patch_camelyon": KnownSet(
        title="PatchCamelyon",
        classes=2,
        images={"train": 262_144, "val": 32_768, "test": 32_768},
        megabytes=8030,
        licence="CC0",
        homepage="https://zenodo.org/records/2546921",
        source=Source(adapter="patch_camelyon", copy="PCAM", splits=THREE),
        files=(
            *(
                f"pcam/camelyonpatch_level_2_split_{split}_{part}.h5.gz"
                for split in ("train", "valid", "test")
                for part in "xy"
            ),
        ),
    ),
    "imagenet": KnownSet(
        title="ImageNet-1k (ILSVRC2012)",
        classes=1000,
        images={"train": 1_281_167, "test": 50_000},
        megabytes=154_600,
        licence="non-commercial research and education only",
        homepage="https://image-net.org/download.php",
        source=Source(
            adapter="imagenet",
            copy="ImageNet",
            splits={"train": {"split": "train"}, "test": {"split": "val"}},
        ),
        files=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"),
        note="its val images are test; never downloaded: a person must accept its terms",
    ),
    "mnist": KnownSet(
        title="MNIST",
        classes=10,
        images={"train": 60_000, "test": 10_000},
        megabytes=12,
        homepage="http://yann.lecun.com/exdb/mnist/",
        source=Source(adapter="arrays", copy="MNIST", splits=FLAG),
        files=(
            "MNIST/raw/train-images-idx3-ubyte.gz",
            "MNIST/raw/train-labels-idx1-ubyte.gz",
            "MNIST/raw/t10k-images-idx3-ubyte.gz",
            "MNIST/raw/t10k-labels-idx1-ubyte.gz",
        ),
    ),
    "clevr_counts": KnownSet(
        title="CLEVR, number of objects",
        classes=8,
        images={"train": 1500, "val": 500, "test": 500},
        megabytes=19_020,
        licence="CC BY 4.0",
        homepage="https://cs.stanford.edu/people/jcjohns/clevr/",
        source=Source(adapter="clevr_counts", copy="CLEVRClassification", splits=THREE),
        files=("clevr/CLEVR_v1.0.zip",),
        note="by hash of FILE: test from its val, the rest from its train; sizes as in LGSSL",
    ),
    "svhn": KnownSet(
        title="Street View House Numbers",
        classes=10,
        images={"train": 73_257, "test": 26_032},
        megabytes=246,
        licence="non-commercial use only",
        homepage="http://ufldl.stanford.edu/housenumbers/",
        source=Source(adapter="arrays", copy="SVHN", splits=TWO),
        files=("train_32x32.mat", "test_32x32.mat"),
        note="the set's own splits; the extra images are left out",
    ),
    "gtsrb": KnownSet(
        title="German Traffic Sign Recognition",
        classes=43,
        images={"train": 26_640, "test": 12_630},
        megabytes=276,
        homepage="https://benchmark.ini.rub.de/",
        source=Source(adapter="files", copy="GTSRB", splits=TWO),
        files=(
            "gtsrb/GTSRB-Training_fixed.zip",
            "gtsrb/GTSRB_Final_Test_Images.zip",
            "gtsrb/GTSRB_Final_Test_GT.zip",
        ),
    ),
    "country211": KnownSet(
        title="Country211",
        classes=211,
        images={"train": 31_650, "val": 10_550, "test": 21_100},
        megabytes=11_000,
        homepage="https://github.com/openai/CLIP/blob/main/data/country211.md",
        source=Source(adapter="files", copy="Country211", splits=THREE | {"val": {"split": "valid"}}),
        files=("country211.tgz",),
    ),
    "rendered_sst2": KnownSet(
        title="Rendered SST2",
        classes=2,
        images={"train": 6920, "val": 872, "test": 1821},
        megabytes=131,
        homepage="https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md",
        source=Source(adapter="files", copy="RenderedSST2", splits=THREE),
        files=("rendered-sst2.tgz",),
    ),
}


def known(name: str) -> KnownSet:
    """Return a set of the catalogue by its name.

    Raises:
        InputError: where there is none of that name; the message lists close ones.
    """
    if name not in CATALOG:
        near = close_matches(name, list(CATALOG))
        raise InputError(f"there is no known set {name!r}; choose from {', '.join(CATALOG)}.{near}")
    return CATALOG[name]


def check_known(name: str, images: LabelledSet) -> None:
    """Compare a set with the catalogue: a set that is incomplete gives figures that mean something else.

    Raises:
        InputError: naming each split and the classes that differ.
    """
    told, counts = known(name), images.counts()
    wrong = [
        f"{counts.get(split, 0):,} of {told.images.get(split, 0):,} {split} images"
        for split in ("train", "val", "test")
        if counts.get(split, 0) != told.images.get(split, 0)
    ]
    if len(images.classes) != told.classes:
        wrong.append(f"{len(images.classes):,} of {told.classes:,} classes")
    if wrong:
        listed = " and ".join(filter(None, (", ".join(wrong[:-1]), wrong[-1])))
        raise InputError(f"{name} has {listed}: it is incomplete; delete {images.root} and run again")
