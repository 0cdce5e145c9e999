"""Images to batches on one core: our packed cache against reading the files anew, as others do.

    python -m benchmarks.loading [TABLE]

Both give batches of crops of the same distribution (half to all of the area), uint8, side 224 and 64. The
photographs are windows of 500 x 375 pixels, the usual size on Flickr, of those that scikit-learn ships; a
TABLE of one's own has columns that `likewise import` knows.
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

from benchmarks.timing import alternate, told
from likewise.data import image_cache as packed
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.pairs.build import build_pairs
from likewise.pairs.config import PairConfig
from likewise.training.config import ViewSpec
from likewise.training.loader import PairDataset

PHOTOS, PAIRS = 256, 64


def make_photos(folder: Path, count: int = PHOTOS, sides: tuple[int, int] = (375, 500)) -> Path:
    """Write a table of JPEG photographs, each a window of one of scikit-learn's two, which go on round."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    sources = load_sample_images().images
    lines = ["file,caption"]
    for number in range(count):
        pixels = sources[number % 2]
        turned = np.roll(pixels, [int(rng.integers(side)) for side in pixels.shape[:2]], axis=(0, 1))
        Image.fromarray(turned[: sides[0], : sides[1]]).save(folder / f"{number}.jpg", quality=90)
        lines.append(f"{number}.jpg,window {number} of photograph {number % 2}")
    table = folder / "photos.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def run(table: Path | None = None, rounds: int = 5) -> list[str]:
    """Compare with lightly's data set and with torchvision's `read_image`, each followed by a crop.

    The photographs are 500 x 375 pixels, as Flickr shows them, and 640 x 427, or those of a table.
    """
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
        collection = import_dataset(table, Path(folder) / "c", ImportOptions())
        for size, raw_bytes in ((224, packed.RAW_BYTES), (224, 0), (64, 0)):
            yield from _compare(collection, size, raw_bytes, rounds)


def _compare(collection: CaptionDataset, size: int, raw_bytes: int, rounds: int) -> list[str]:
    """Compare with a cache as a collection has it for which `raw_bytes` are enough, or too few."""
    files = [record.image.path or "" for record in collection]
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
    transform: Any = v2.Compose([crop, v2.PILToTensor()])  # lightly's types know those of version 1 alone
    photos = LightlyDataset(str(collection.root), transform=transform)
    places = cycle(range(len(files)))
    with patch.object(packed, "RAW_BYTES", raw_bytes):
        images = packed.build_image_cache(collection, packed.cache_resolution(size, len(collection)))
    # Each image beside another one, so that ours decodes as many as the peers do.
    others = (
        ViewSpec(source=0, augmentation="crop", image_size=size),
        ViewSpec(source=1, augmentation="crop", image_size=size),
    )
    pairs = build_pairs(collection, PairConfig(source="self"), allowed=images.readable_mask)
    pair_dataset = PairDataset(images, pairs, view_specs=others)
    anchors = np.arange(PAIRS)

    def ours() -> object:
        return pair_dataset.collate(anchors, [anchors + PAIRS], epoch=0)

    def lightly() -> object:
        return torch.stack([photos[next(places)][0] for _ in range(2 * PAIRS)])

    def torchvision() -> object:
        return torch.stack([
            crop(read_image(str(collection.root / files[next(places)]), ImageReadMode.RGB))
            for _ in range(2 * PAIRS)
        ])  # fmt: skip

    name = f"{2 * PAIRS} crops of {size} px, packed as {'pixels' if images.is_raw else 'JPEG'}"
    return [
        told(name, "lightly: LightlyDataset + RandomResizedCrop", alternate(ours, lightly, rounds)),
        told(name, "read_image + RandomResizedCrop (LGSSL)", alternate(ours, torchvision, rounds)),
    ]


if __name__ == "__main__":
    for line in run(Path(sys.argv[1]) if len(sys.argv) > 1 else None):
        print(line)
