"""Backbones of several families, stems for small images, and strict loading of weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from likewise.errors import ArtifactError, ModelError
from likewise.models.backbones import BackboneConfig, build_backbone, default_stem
from likewise.models.checkpoints import load_backbone, load_state_dict_strict, save_encoder
from likewise.training.methods.base import projection_head
from support import load_cpu_encoder as load_encoder


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("resnet10t", 48),
        ("resnet18", 32),
        ("vit_tiny_patch16_224", 64),
        ("convnext_atto", 64),
        ("mobilenetv3_small_050", 64),
    ],
)
def test_every_backbone_family_returns_one_vector_per_image(name: str, image_size: int) -> None:
    config = BackboneConfig(name=name, image_size=image_size, stem=default_stem(image_size))
    model, feature_dim = build_backbone(config)
    assert model(torch.randn(3, 3, image_size, image_size)).shape == (3, feature_dim)


def feature_map_size(model: Any, image_size: int) -> int:
    return model.forward_features(torch.zeros(1, 3, image_size, image_size)).shape[-1]


@pytest.mark.parametrize(("image_size", "map_size"), [(64, 4), (48, 3), (32, 4)])
def test_cifar_stem_keeps_resolution(image_size: int, map_size: int) -> None:
    cifar, _ = build_backbone(BackboneConfig(name="resnet18", image_size=image_size, stem="cifar"))
    default, _ = build_backbone(BackboneConfig(name="resnet18", image_size=image_size))
    assert feature_map_size(cifar, image_size) == map_size
    assert feature_map_size(default, image_size) == image_size // 32 + (image_size % 32 > 0)
    assert cifar.state_dict().keys() == default.state_dict().keys()
    assert default_stem(64) == "cifar"
    assert default_stem(65) == "default"


def test_unknown_backbones_raise_with_close_matches() -> None:
    with pytest.raises(ModelError, match="'resnet5O'.*resnet50"):
        build_backbone(BackboneConfig(name="resnet5O", image_size=64))


def test_projection_head_has_the_layers_of_the_paper() -> None:
    head = projection_head(512, (2048, 2048, 128))
    assert [type(m) for m in head] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Linear,
    ]
    assert [m.out_features for m in head if isinstance(m, nn.Linear)] == [2048, 2048, 128]
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))


def test_saved_encoder_loads_unchanged(tmp_path: Path) -> None:
    config = BackboneConfig(name="resnet10t", image_size=48, stem="cifar")
    model, feature_dim = build_backbone(config)
    save_encoder(tmp_path / "e.safetensors", model, config)
    loaded, loaded_config, loaded_dim = load_backbone(tmp_path / "e.safetensors")
    assert (loaded_config, loaded_dim) == (config, feature_dim)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images))


def test_mismatched_weights_raise_naming_the_keys() -> None:
    model, _ = build_backbone(BackboneConfig(name="resnet10t", image_size=48))
    tensors = model.state_dict()
    first_key = next(iter(tensors))
    broken = {k: v for k, v in tensors.items() if k != first_key} | {
        "extra": torch.zeros(1),
        "bn1.weight": torch.zeros(3),
    }
    with pytest.raises(
        ModelError,
        match=rf"1 missing \({first_key}\).*1 unexpected \(extra\).*shape \(bn1.weight \(3,\), not \(64,\)",
    ):
        load_state_dict_strict(model, broken, "here")


def test_state_dict_of_a_timm_model_loads_without_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(3)
    classifier: Any = timm.create_model("resnet10t", num_classes=7)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "w.pth")
    save_file(classifier.state_dict(), tmp_path / "w.safetensors")
    images = torch.randn(2, 3, 64, 64)
    expected = classifier.eval().forward_head(classifier.forward_features(images), pre_logits=True)
    for name in ("w.pth", "w.safetensors"):
        encoder = load_encoder(str(tmp_path / name), backbone="resnet10t", image_size=64)
        torch.testing.assert_close(encoder.model(images), expected)
        assert not encoder.model.training
    with pytest.raises(ModelError, match="backbone") as excinfo:
        load_encoder(str(tmp_path / "w.safetensors"))
    assert excinfo.value.field == "backbone"
    with pytest.raises(ModelError, match="do not fit"):
        load_encoder(str(tmp_path / "w.pth"), backbone="resnet18")


def test_missing_encoders_raise(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a run, not a file of weights"):
        load_encoder("nowhere")
    with pytest.raises(ArtifactError, match="not a run"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"is not a run; for a model of Hugging Face, give hf:{tmp_path}"):
        load_encoder(str(tmp_path))


def test_clip_image_tower_matches_open_clip(tmp_path: Path) -> None:
    import json

    import numpy as np
    import open_clip
    from PIL import Image

    from support import save_png

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "likewise-tower.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    created: Any = open_clip.create_model_and_transforms("likewise-tower")
    model, _, preprocess = created
    torch.save(model.state_dict(), tmp_path / "w.pt")
    save_png(tmp_path / "face.png")
    image = Image.open(tmp_path / "face.png").convert("RGBA").convert("RGB").resize((90, 60))
    encoder = load_encoder(f"clip:likewise-tower/{tmp_path / 'w.pt'}")
    crop = encoder.transform.center_crop(np.asarray(image))
    with torch.no_grad():
        expected = model.eval().encode_image(preprocess(image)[None])
    features = encoder.model(encoder.transform.normalize(torch.from_numpy(crop[None].copy())))
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    assert encoder.feature_dim == 24
    with pytest.raises(ModelError, match=r"nowhere\.pt"):
        load_encoder("clip:likewise-tower/nowhere.pt")


def test_fingerprint_depends_on_weights_and_stem() -> None:
    fingerprints = [load_encoder("random:resnet10t", image_size=48).fingerprint for _ in range(2)]
    assert fingerprints[0] == fingerprints[1]
    # At 96 pixels the stem is the default one: the weights are equal, the forward pass is not.
    assert load_encoder("random:resnet10t", image_size=96).fingerprint != fingerprints[0]
