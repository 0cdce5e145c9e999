"""Backbones of several families, stems for small images, and weights that must fit exactly."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from likewise.errors import ArtifactError, ModelError
from likewise.models.backbones import BackboneConfig, build_backbone, default_stem
from likewise.models.checkpoints import load_backbone, load_state_dict, load_state_dict_strict, save_encoder
from likewise.models.encoders import load_encoder
from likewise.training.methods.modules import projection_head


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet10t", 48),
        ("resnet18", 32),
        ("vit_tiny_patch16_224", 64),
        ("convnext_atto", 64),
        ("mobilenetv3_small_050", 64),
    ],
)
def test_any_family_gives_one_vector_an_image(name: str, size: int) -> None:
    model, width = build_backbone(BackboneConfig(name=name, image_size=size, stem=default_stem(size)))
    assert model(torch.randn(3, 3, size, size)).shape == (3, width)


def features(model: Any, size: int) -> torch.Tensor:
    return model.forward_features(torch.zeros(1, 3, size, size))


@pytest.mark.parametrize(("size", "side"), [(64, 4), (48, 3), (32, 4)])
def test_small_stem_keeps_resolution(size: int, side: int) -> None:
    small, _ = build_backbone(BackboneConfig(name="resnet18", image_size=size, stem="cifar"))
    usual, _ = build_backbone(BackboneConfig(name="resnet18", image_size=size))
    assert features(small, size).shape[-1] == side
    assert features(usual, size).shape[-1] == size // 32 + (size % 32 > 0)
    assert small.state_dict().keys() == usual.state_dict().keys()
    assert default_stem(64) == "cifar"
    assert default_stem(65) == "default"


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ModelError, match="unknown backbone 'resnet5O'.*Did you mean.*resnet50"):
        build_backbone(BackboneConfig(name="resnet5O", image_size=64))


def test_projector_is_the_papers() -> None:
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


def test_saved_encoder_comes_back_the_same(tmp_path: Path) -> None:
    spec = BackboneConfig(name="resnet10t", image_size=48, stem="cifar")
    model, width = build_backbone(spec)
    save_encoder(tmp_path / "e.safetensors", model, spec)
    again, found, found_width = load_backbone(tmp_path / "e.safetensors")
    assert (found, found_width) == (spec, width)
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(again.eval()(images), model.eval()(images))


def test_weights_that_do_not_fit_name_the_keys() -> None:
    model, _ = build_backbone(BackboneConfig(name="resnet10t", image_size=48))
    tensors = model.state_dict()
    first = next(iter(tensors))
    broken = {k: v for k, v in tensors.items() if k != first} | {
        "extra": torch.zeros(1),
        "bn1.weight": torch.zeros(3),
    }
    with pytest.raises(
        ModelError, match=rf"1 missing \({first}\).*1 unexpected \(extra\).*with another shape \(bn1.weight\)"
    ):
        load_state_dict_strict(model, broken, "here")


def test_plain_state_dict_of_a_timm_model_loads_without_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(3)
    full: Any = timm.create_model("resnet10t", num_classes=7)
    torch.save({"state_dict": full.state_dict()}, tmp_path / "w.pth")
    save_file(full.state_dict(), tmp_path / "w.safetensors")
    images = torch.randn(2, 3, 64, 64)
    expected = full.eval().forward_head(full.forward_features(images), pre_logits=True)
    for name in ("w.pth", "w.safetensors"):
        encoder = load_encoder(str(tmp_path / name), backbone="resnet10t", image_size=64)
        torch.testing.assert_close(encoder.model(images), expected)
        assert not encoder.model.training
    with pytest.raises(ModelError, match="does not name its backbone") as error:
        load_encoder(str(tmp_path / "w.safetensors"))
    assert error.value.field == "backbone"
    with pytest.raises(ModelError, match="do not fit"):
        load_encoder(str(tmp_path / "w.pth"), backbone="resnet18")


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"no weights")
    (tmp_path / "w.pth").write_bytes(b"no weights")
    torch.save({"note": object}, tmp_path / "code.pth")
    for name in ("w.safetensors", "w.pth", "code.pth"):
        with pytest.raises(ModelError):
            load_state_dict(tmp_path / name)
    with pytest.raises(ModelError, match="not a run, not a file of weights"):
        load_encoder("nowhere")
    with pytest.raises(ArtifactError, match="is not a run"):
        load_encoder(str(tmp_path))


def test_clip_image_tower_sees_what_open_clip_sees(tmp_path: Path) -> None:
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
    made: Any = open_clip.create_model_and_transforms("likewise-tower")
    model, _, prepare = made
    torch.save(model.state_dict(), tmp_path / "w.pt")
    save_png(tmp_path / "face.png")
    image = Image.open(tmp_path / "face.png").convert("RGBA").convert("RGB").resize((90, 60))
    encoder = load_encoder(f"clip:likewise-tower/{tmp_path / 'w.pt'}")
    crop = encoder.transform.center_crop(np.asarray(image))
    with torch.no_grad():
        expected = model.eval().encode_image(prepare(image)[None])
    found = encoder.model(encoder.transform.normalize(torch.from_numpy(crop[None].copy())))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert encoder.feature_dim == 24
    with pytest.raises(ModelError, match="is neither a file nor a tag of likewise-tower"):
        load_encoder("clip:likewise-tower/nowhere.pt")


def test_identity_tells_weights_and_stems_apart() -> None:
    same = [load_encoder("random:resnet10t", image_size=48).fingerprint for _ in range(2)]
    assert same[0] == same[1]
    # At 96 pixels the stem is the standard one: the weights are equal, the forward pass is not.
    assert load_encoder("random:resnet10t", image_size=96).fingerprint != same[0]
