"""`ImageEncoder.encode`: equal features for every type of input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import likewise
from likewise.data.dataset import CaptionDataset
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.models.encoders import ImageEncoder, load_encoder
from likewise.models.features import extract_features
from likewise.training.train import train
from support import save_png


def test_images_are_encoded_as_features(workdir: Path) -> None:
    """Read this first: load an encoder and compute the features of image files."""
    encoder = likewise.load_encoder("random:resnet10t", image_size=32)
    features = encoder.encode([workdir / "cat.jpg", str(workdir / "dog.jpg")])
    assert features.shape == (2, encoder.feature_dim)
    assert features.dtype == torch.float32
    assert not torch.allclose(features[0], features[1])
    with pytest.raises(likewise.UnreadableImageError, match="cow.jpg") as excinfo:
        encoder.encode([workdir / "cat.jpg", workdir / "cow.jpg"])
    assert excinfo.value.path == workdir / "cow.jpg"


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return load_encoder("random:resnet10t", image_size=32)


def test_paths_images_arrays_and_tensors_have_equal_features(
    encoder: ImageEncoder, dataset: CaptionDataset
) -> None:
    samples = [dataset[i] for i in range(20)]
    paths = [dataset.root / str(sample.image.path) for sample in samples]
    expected = encoder.encode(paths)
    images = [Image.open(path) for path in paths]
    assert torch.equal(encoder.encode(images), expected)
    assert torch.equal(encoder.encode(image for image in images), expected)
    white = [Image.new("RGBA", image.size, "white") for image in images]
    pixels = [
        np.asarray(Image.alpha_composite(background, image.convert("RGBA")).convert("RGB"))
        for background, image in zip(white, images, strict=True)
    ]
    assert torch.equal(encoder.encode(pixels), expected)
    assert torch.equal(encoder.encode([torch.from_numpy(array.copy()) for array in pixels]), expected)
    assert torch.equal(encoder.encode(np.stack(pixels)), expected)
    for single in (paths[3], images[3], pixels[3]):
        torch.testing.assert_close(encoder.encode(single), expected[3:4])
    torch.testing.assert_close(encoder.encode(paths, batch_size=3, num_workers=0), expected)


def test_datasets_are_encoded_in_the_order_of_their_samples(
    encoder: ImageEncoder, dataset: CaptionDataset
) -> None:
    features = encoder.encode(dataset)
    assert features.shape == (len(dataset), encoder.feature_dim)
    paths = [dataset.root / str(sample.image.path) for sample in dataset]
    torch.testing.assert_close(features, encoder.encode(paths))
    assert torch.equal(encoder.encode(str(dataset.path)), features)


def test_extracted_features_equal_encoded_images(encoder: ImageEncoder, emoji: Path, tmp_path: Path) -> None:
    dataset = open_labeled(emoji)
    features = extract_features(encoder, dataset, tmp_path)
    encoded = encoder.encode([dataset.root / file for file in dataset.files])
    torch.testing.assert_close(torch.from_numpy(np.array(features.vectors)), encoded)


def test_invalid_images_raise(encoder: ImageEncoder, tmp_path: Path) -> None:
    save_png(tmp_path / "face.png")
    for pixels in (np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8)):
        with pytest.raises(likewise.InvalidInputError) as excinfo:
            encoder.encode([pixels])
        assert excinfo.value.field == "images"
    with pytest.raises(likewise.UnreadableImageError, match="image 1: aspect ratio"):
        encoder.encode([tmp_path / "face.png", np.zeros((4, 400, 3), np.uint8)])
    with pytest.raises(likewise.ArtifactError):
        encoder.encode(tmp_path)


def test_runs_load_from_object_directory_and_weights_file(dataset: CaptionDataset, tmp_path: Path) -> None:
    config = likewise.TrainConfig(backbone="resnet10t", image_size=32, max_steps=1, batch_size=8)
    run = train(dataset, tmp_path / "run", config, likewise.PairConfig(source="self"))
    encoders = [likewise.load_encoder(run_or_path) for run_or_path in (run, run.path, run.encoder_path)]
    assert len({encoder.fingerprint for encoder in encoders}) == 1
    assert encoders[0].load_args["encoder"] == str(run.path)


def test_loading_a_random_encoder_does_not_change_the_global_rng() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_encoder("random:test_resnet")
    assert torch.equal(torch.rand(1), expected)
