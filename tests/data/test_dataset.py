"""The dataset: importing it, and access to its samples."""

from pathlib import Path

import pytest

from helpers.pictures import Picture, write_file, write_images
from likewise.data.dataset import CaptionDataset
from likewise.data.images import decode_image, read_image_bytes
from likewise.data.importing import import_dataset


def test_import_and_read_a_dataset(tmp_path: Path, pictures: list[Picture]) -> None:
    write_images(tmp_path / "photos", pictures)
    for name, _, caption in pictures:
        write_file(tmp_path / "photos" / f"{name}.txt", caption)

    dataset = import_dataset(tmp_path / "photos", tmp_path / "photos.likewise")

    assert len(dataset) == 6
    name, _, caption = min(pictures)
    sample = dataset[0]
    assert (sample.id, sample.captions) == (name, (caption,))
    assert (sample.width, sample.height) == (72, 72)
    pixels = decode_image(read_image_bytes(sample.image, dataset.root))
    assert pixels.shape == (72, 72, 3)
    assert [s.id for s in CaptionDataset(tmp_path / "photos.likewise")] == sorted(n for n, _, _ in pictures)


def test_samples_are_read_by_index(dataset: CaptionDataset) -> None:
    samples = list(dataset)
    assert len(samples) == len(dataset)
    for index in (0, 63, 64, len(dataset) - 1):
        assert dataset[index] == samples[index]
    with pytest.raises(IndexError):
        dataset[len(dataset)]
