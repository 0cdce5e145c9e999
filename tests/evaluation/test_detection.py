"""Detection: feature maps, training of the detector, stored results and their comparison."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from likewise.errors import ModelError
from likewise.evaluation.datasets.detection import open_detection
from likewise.evaluation.evaluate import evaluate
from likewise.evaluation.protocols import ProtocolConfig
from likewise.evaluation.protocols.detection import (
    DetectionConfig,
    FeatureMapExtractor,
    build_detector,
    run_detection,
)
from likewise.evaluation.results import compare_metrics, read_results
from likewise.models.encoders import load_encoder

CPU = torch.device("cpu")
SMALL = DetectionConfig(image_size=64, pyramid_channels=32, batch_size=4, num_resamples=40)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write gray images with a red or a blue square each, and one unreadable image."""
    root, rng = tmp_path_factory.mktemp("detect") / "squares", np.random.default_rng(0)
    root.mkdir()
    lines = ["broken.png,train,red,0.1,0.1,0.5,0.5"]
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    for i in range(40):
        pixels = rng.integers(90, 130, (64, 80, 3), np.uint8)
        side, (x, y) = int(rng.integers(20, 30)), rng.integers(0, 34, 2)
        pixels[y : y + side, x : x + side] = (230, 20, 20) if i % 2 else (20, 20, 230)
        Image.fromarray(pixels).save(root / f"{i}.png")
        split, label = "train" if i < 28 else "test", ("blue", "red")[i % 2]
        box = ",".join(f"{v:.4f}" for v in (x / 80, y / 64, (x + side) / 80, (y + side) / 64))
        lines.append(f"{i}.png,{split},{label},{box}")
    (root / "boxes.csv").write_text("file,split,label,x0,y0,x1,y1\n" + "\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize(
    "name", ["resnet10t", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto"]
)
def test_feature_maps_have_the_reported_strides(name: str) -> None:
    encoder = load_encoder(f"random:{name}", image_size=224)
    maps = FeatureMapExtractor(encoder.model, encoder.name)
    assert list(maps.strides) == sorted(set(maps.strides))
    with torch.no_grad():
        feature_maps = maps(torch.zeros(1, 3, 224, 224))
    assert [feature_map.shape[1:] for feature_map in feature_maps] == [
        (width, 224 // stride, 224 // stride)
        for width, stride in zip(maps.channels, maps.strides, strict=True)
    ]


def test_model_without_feature_maps_raises(tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text(
        "import torch\n"
        "def flat():\n    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())\n"
    )
    encoder = load_encoder(f"hub:{tmp_path}/flat", image_size=64)
    with pytest.raises(ModelError, match="no feature maps"):
        build_detector(SMALL, encoder, 2)


def test_training_restores_the_global_rng(squares: Path) -> None:
    encoder, dataset = load_encoder("random:resnet10t", image_size=64), open_detection(squares)
    state = torch.get_rng_state()
    run_detection(replace(SMALL, epochs=1), encoder, dataset, device=CPU, num_workers=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_detector_learns_and_does_not_modify_the_encoder(squares: Path) -> None:
    encoder, images = load_encoder("random:resnet10t", image_size=64), open_detection(squares)
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    config = replace(SMALL, epochs=6, finetune_backbone=True)
    steps: list[int] = []
    result = run_detection(config, encoder, images, device=CPU, num_workers=0, update_progress=steps.append)
    # Without training it is 0.
    assert result.values[1] > 0.2
    assert result.skipped == {"truncated": 1}
    assert result.num_images == 12
    assert set(result.per_class) == {"blue", "red"}
    assert sum(steps) == 6 * 29 + 12
    assert result.bootstrap_values.shape == (40, 3)
    after = encoder.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_frozen_encoder_has_no_gradients_and_constant_batch_norm_statistics() -> None:
    encoder = load_encoder("random:resnet10t", image_size=64)
    model = build_detector(SMALL, encoder, 2).train()
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    torch.stack(list(model([torch.rand(3, 64, 80)], [target]).values())).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert any(name.startswith("backbone.extractor") for name in grads)
    assert all(grad is None for name, grad in grads.items() if name.startswith("backbone.extractor"))
    assert any(grad is not None for name, grad in grads.items() if name.startswith("backbone.pyramid"))
    tensors = encoder.model.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone.extractor.model."):
            assert torch.equal(tensor, tensors[name.removeprefix("backbone.extractor.model.")])


def test_detection_results_are_stored_and_compared(squares: Path, tmp_path: Path) -> None:
    config = ProtocolConfig(
        detection=DetectionConfig(
            image_size=64, pyramid_channels=16, batch_size=8, epochs=1, num_resamples=40
        )
    )
    for name in ("resnet10t", "resnet18"):
        encoder = load_encoder(f"random:{name}", image_size=64)
        results = evaluate(encoder, squares, ("detection",), config=config, out=tmp_path / name)
    scores = results.raw[0]["protocols"]["detection"]["scores"]
    assert [score["metric"] for score in scores] == ["AP", "AP50", "AP75"]
    assert scores[0]["n"] == 12
    (first, *_) = compare_metrics([read_results(tmp_path / name) for name in ("resnet10t", "resnet18")])
    assert first.differences[0] is not None
    assert 0 < first.differences[0].p_value <= 1
