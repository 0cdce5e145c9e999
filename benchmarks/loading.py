"""Batches of crops on one core: the image cache against decoding the files.

    python -m benchmarks.loading [TABLE]

All variants return batches of random crops (50 to 100 % of the area), uint8, at 224 and 64 pixels. The
photographs are windows of those of scikit-learn, 500 x 375 (the default on Flickr) and 640 x 427 pixels;
TABLE is a table that `likewise import` reads.
"""

import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from lightly.data import LightlyDataset
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms import v2

from benchmarks.timing import alternate, format_result
from likewise.data import image_cache
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.pairs.build import build_pairs
from likewise.pairs.config import PairConfig
from likewise.training.config import ViewSpec
from likewise.training.loader import PairDataset

PHOTOS, PAIRS = 256, 64


def make_photos(folder: Path, count: int = PHOTOS, sides: tuple[int, int] = (375, 500)) -> Path:
    """Write a table of JPEG photographs, windows of scikit-learn's two photographs, wrapped around."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    sources = load_sample_images().images
    lines = ["file,caption"]
    for number in range(count):
        pixels = sources[number % 2]
        rolled = np.roll(pixels, [int(rng.integers(side)) for side in pixels.shape[:2]], axis=(0, 1))
        Image.fromarray(rolled[: sides[0], : sides[1]]).save(folder / f"{number}.jpg", quality=90)
        lines.append(f"{number}.jpg,window {number} of photograph {number % 2}")
    table = folder / "photos.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def run(table: Path | None = None, rounds: int = 5) -> list[str]:
    """Compare with `LightlyDataset` and with torchvision's `read_image`, each followed by a crop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if table is not None:
            return list(_compare_all(table, rounds))
        lines = []
        for sides in ((375, 500), (427, 640)):
            with tempfile.TemporaryDirectory() as folder:
                photos = make_photos(Path(folder) / "photos", sides=sides)
                lines += [f"photographs of {sides[1]} x {sides[0]}:", *_compare_all(photos, rounds)]
        return lines
    finally:
        torch.set_num_threads(threads)


def _compare_all(table: Path, rounds: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        dataset = import_dataset(table, Path(folder) / "dataset", ImportOptions())
        for size, raw_bytes in ((224, image_cache.RAW_BYTES), (224, 0), (64, 0)):
            yield from _compare(dataset, size, raw_bytes, rounds)


def _compare(dataset: CaptionDataset, size: int, raw_bytes: int, rounds: int) -> list[str]:
    """Compare with a cache of pixels, or of JPEGs if `raw_bytes` is too small for pixels."""
    files = [sample.image.path or "" for sample in dataset]
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
    transform: Any = v2.Compose(
        [crop, v2.PILToTensor()]
    )  # lightly's annotations name transforms of version 1
    photos = LightlyDataset(str(dataset.root), transform=transform)
    indices = cycle(range(len(files)))
    with patch.object(image_cache, "RAW_BYTES", raw_bytes):
        cache = image_cache.build_image_cache(dataset, image_cache.cache_resolution(size, len(dataset)))
    # Two different images per pair: the cache decodes as many images as its peers.
    view_specs = (
        ViewSpec(source=0, augmentation="crop", image_size=size),
        ViewSpec(source=1, augmentation="crop", image_size=size),
    )
    pairs = build_pairs(dataset, PairConfig(source="self"), allowed=cache.readable_mask)
    pair_dataset = PairDataset(cache, pairs, view_specs=view_specs)
    anchors = np.arange(PAIRS)

    def ours() -> object:
        return pair_dataset.collate(anchors, [anchors + PAIRS], epoch=0)

    def lightly() -> object:
        return torch.stack([photos[next(indices)][0] for _ in range(2 * PAIRS)])

    def torchvision() -> object:
        return torch.stack([
            crop(read_image(str(dataset.root / files[next(indices)]), ImageReadMode.RGB))
            for _ in range(2 * PAIRS)
        ])  # fmt: skip

    name = f"{2 * PAIRS} crops of {size} px, cached as {'pixels' if cache.is_raw else 'JPEG'}"
    return [
        format_result(name, "lightly: LightlyDataset + RandomResizedCrop", alternate(ours, lightly, rounds)),
        format_result(name, "read_image + RandomResizedCrop (LGSSL)", alternate(ours, torchvision, rounds)),
    ]


if __name__ == "__main__":
    for line in run(Path(sys.argv[1]) if len(sys.argv) > 1 else None):
        print(line)
