"""Levels `full` and `lora` of adaptation: training, resuming, blending of weights, and the encoder file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import likewise
from helpers.methods import InterruptAfter, InterruptedTrainingError
from likewise.data.dataset import CaptionDataset
from likewise.errors import InvalidInputError, TrainingError
from likewise.models.checkpoints import load_tensors
from likewise.training.adapt_config import (
    AdaptConfig,
    FullOptions,
    LoraOptions,
    adapt_config_to_dict,
    parse_adapt_config,
)
from likewise.training.adaptation import adapt
from likewise.training.finetuning import AnchoredSimCLR, add_lora, blend_weights, merge_lora
from likewise.training.methods.base import Batch
from likewise.training.methods.options import SimCLROptions
from likewise.training.optim import build_finetune_optimizer, lr_factor, number_layers
from support import load_cpu_encoder as load_encoder
from support import save_vit

FULL = AdaptConfig(
    level=FullOptions(frozen_fraction=0.5, precision="fp32", ema_momentum=0.5),
    batch_size=16,
    max_steps=4,
    projector_dims=(32, 16),
    num_val_pairs=20,
)
LORA = replace(FULL, level=LoraOptions(frozen_fraction=0.0, precision="fp32", ema_momentum=0.5))
LEVELS = {"full": FULL, "lora": LORA}


@pytest.fixture(scope="module")
def start() -> likewise.ImageEncoder:
    return load_encoder("random:resnet10t", image_size=32)


@pytest.fixture(scope="module")
def runs(
    dataset: CaptionDataset, start: likewise.ImageEncoder, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("levels")
    return {name: adapt(dataset, start, folder / name, config).path for name, config in LEVELS.items()}


def read_outcome(run: Path) -> dict[str, Any]:
    return json.loads((run / "adaptation.json").read_text())


@pytest.mark.parametrize("level", LEVELS)
def test_adapt_the_weights_of_an_encoder(
    level: str, start: likewise.ImageEncoder, runs: dict[str, Path]
) -> None:
    """Read this first: the result is an encoder of the structure and preprocessing of the start."""
    encoder, outcome = load_encoder(str(runs[level])), read_outcome(runs[level])
    assert encoder.transform == start.transform
    assert encoder.backbone_config == start.backbone_config
    assert encoder.model.state_dict().keys() == start.model.state_dict().keys()
    assert [score["blend"] for score in outcome["scores"]] == [0, 0.25, 0.5, 0.75, 1]
    rows = likewise.Run(runs[level]).metrics()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    is_start = all(
        torch.equal(value, start.model.state_dict()[name])
        for name, value in encoder.model.state_dict().items()
    )
    assert is_start == (outcome["blend"] == 0)


def test_the_backbone_is_frozen_first_and_anchored_afterwards(runs: dict[str, Path]) -> None:
    distances = [row["anchor_distance"] for row in likewise.Run(runs["full"]).metrics()]
    assert distances[:3] == [0, 0, pytest.approx(0, abs=1e-6)]
    assert distances[3] > 1e-6
    checkpoint, _ = load_tensors(next(runs["full"].glob("checkpoint-*")))
    start = load_encoder("random:resnet10t", image_size=32).model.state_dict()
    statistics = [name for name in start if "running_" in name or "num_batches" in name]
    assert statistics
    for name in statistics:
        assert torch.equal(checkpoint[f"model.backbone.{name}"], start[name]), name
    assert not torch.equal(checkpoint["model.backbone.conv1.0.weight"], start["conv1.0.weight"])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("steps", [1, 3])
def test_an_interrupted_run_ends_with_the_same_bytes(
    level: str,
    steps: int,
    dataset: CaptionDataset,
    start: likewise.ImageEncoder,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from likewise.training import trainer as trainer_module

    fit = trainer_module.Trainer.fit
    monkeypatch.setattr(trainer_module.Trainer, "fit", lambda self: fit(self, checkpoint_minutes=0.0))
    with pytest.raises(InterruptedTrainingError):
        adapt(dataset, start, tmp_path / "run", LEVELS[level], progress=InterruptAfter(steps))
    adapt(dataset, start, tmp_path / "run", LEVELS[level])
    for name in (
        "encoder.safetensors",
        "adaptation.json",
        "artifact.json",
        "checkpoint-00000004.safetensors",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (runs[level] / name).read_bytes(), name


def test_a_second_call_changes_nothing(
    dataset: CaptionDataset, start: likewise.ImageEncoder, runs: dict[str, Path]
) -> None:
    files = {path: path.stat().st_mtime_ns for path in runs["full"].rglob("*") if path.is_file()}
    adapt(dataset, start, runs["full"], FULL)
    assert {path: path.stat().st_mtime_ns for path in runs["full"].rglob("*") if path.is_file()} == files


def test_damaged_weights_are_rejected_and_the_start_is_unchanged(
    dataset: CaptionDataset, start: likewise.ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in start.model.state_dict().items()}

    def train_collapsed(method: AnchoredSimCLR) -> nn.Module:
        for parameter in method.backbone.parameters():
            nn.init.zeros_(parameter)
        return method.backbone

    monkeypatch.setattr(AnchoredSimCLR, "trained_backbone", train_collapsed)
    run = adapt(dataset, start, tmp_path / "run", replace(FULL, max_retention_loss=0.0), retain=dataset)
    outcome = read_outcome(run.path)
    assert outcome["blend"] == 0
    assert outcome["scores"][-1]["mrr"] < outcome["scores"][0]["mrr"]
    assert outcome["scores"][-1]["retention"] < outcome["scores"][0]["retention"]
    saved = load_encoder(str(run.path)).model.state_dict()
    for name, value in before.items():
        assert torch.equal(saved[name], value), name
        assert torch.equal(start.model.state_dict()[name], value), name


def test_weights_are_blended_linearly() -> None:
    start = {"weight": torch.tensor([0.0, 2.0]), "count": torch.tensor(3)}
    trained = {"weight": torch.tensor([1.0, 6.0]), "count": torch.tensor(9)}
    for blend, expected in ((0.0, [0.0, 2.0]), (0.25, [0.25, 3.0]), (1.0, [1.0, 6.0])):
        blended = blend_weights(start, trained, blend)
        assert blended["weight"].tolist() == expected
        assert blended["count"] == 3


@pytest.mark.parametrize("level", LEVELS)
def test_hugging_face_start(level: str, dataset: CaptionDataset, tmp_path: Path) -> None:
    """The weights are in the file, the structure comes from the source; a pooler without use stays frozen."""
    vit = load_encoder(f"hf:{save_vit(tmp_path / 'vit')}")
    run = adapt(dataset, vit, tmp_path / "run", LEVELS[level], likewise.PairConfig(source="self"))
    encoder = load_encoder(str(run.path))
    assert encoder.transform == vit.transform
    image = [np.full((40, 40, 3), 100, np.uint8)]
    same = torch.allclose(encoder.encode(image), vit.encode(image), atol=1e-6)
    assert same == (read_outcome(run.path)["blend"] == 0)


def test_lora_updates_are_merged_into_the_weights() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=0).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    wrapped = add_lora(model, 32, LoraOptions(lora_rank=2))
    torch.testing.assert_close(wrapped.eval()(images), expected)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.1)
    adapted = wrapped.eval()(images)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    merged = merge_lora(wrapped).eval()
    torch.testing.assert_close(merged(images), adapted, rtol=1e-3, atol=1e-4)
    assert merged.state_dict().keys() == before.keys()
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    modules = dict(model.named_modules())
    for name in changed:
        module = modules[name.removesuffix(".weight")]
        assert type(module) is nn.Conv2d
        assert module.groups == 1
    assert changed


def test_lora_needs_a_layer_to_update() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3)) * self.scale

    with pytest.raises(TrainingError) as error:
        add_lora(Mean(), 32, LoraOptions())
    assert error.value.field == "level"


def test_anchor_equals_the_formula() -> None:
    torch.manual_seed(0)
    std, start, backbone = torch.rand(5) + 0.5, nn.Linear(12, 5), nn.Linear(12, 5)
    backbone, start = (nn.Sequential(nn.Flatten(), layer) for layer in (backbone, start))
    options = FullOptions(anchor_weight=3.0)
    method = AnchoredSimCLR(backbone, 5, SimCLROptions(projector_dims=(4, 4)), options, start, std)
    views = [torch.randn(6, 3, 2, 2) for _ in range(2)]
    output = method(Batch(views=views, rank_sizes=(6,)))
    distance = torch.stack([((backbone(v) - start(v)) / std) ** 2 for v in views]).mean()
    torch.testing.assert_close(output.logs["anchor_distance"], distance.detach())
    without = AnchoredSimCLR(backbone, 5, SimCLROptions(projector_dims=(4, 4)), options, None, std)
    without.load_state_dict(method.state_dict())
    plain = without(Batch(views=views, rank_sizes=(6,)))
    torch.testing.assert_close(output.loss - plain.loss, 3 * distance)


def test_layer_wise_learning_rates() -> None:
    names = ["conv1.weight", "layer1.0.a", "layer1.0.b", "layer1.1.a", "layer2.0.a.3.b", "norm.weight"]
    assert list(number_layers(names).values()) == [0, 1, 1, 2, 3, 3]
    model = timm.create_model("resnet10t", num_classes=0)
    optimizer = build_finetune_optimizer(
        model, nn.Linear(4, 2), lr=0.1, weight_decay=0.2, layer_decay=0.5, frozen_steps=4
    )
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    scales = {name: group_of[id(p)]["lr_scale"] for name, p in model.named_parameters()}
    assert scales["conv1.0.weight"] < scales["layer1.0.conv1.weight"] < scales["layer4.0.conv1.weight"]
    assert scales["layer2.0.conv1.weight"] == scales["layer2.0.bn1.bias"]
    assert max(scales.values()) == 1
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}
    head = optimizer.param_groups[-1]
    assert [lr_factor(head, step) for step in (0, 5)] == [1, 1]
    last = group_of[id(model.get_parameter("layer4.0.conv1.weight"))]
    assert [lr_factor(last, step) for step in (0, 3, 4, 5, 7, 9)] == [0, 0, 0.25, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"level": "full", "hidden_dim": 512}, "hidden_dim"),
        ({"level": "adapter", "layer_decay": 0.85}, "layer_decay"),
        ({"level": "full", "lora_rank": 8}, "lora_rank"),
        ({"level": "lora", "caption_weight": 1.0}, "caption_weight"),
        ({"level": "lora", "lora_rank": 0}, "lora_rank"),
        ({"level": "full", "layer_decay": 0.0}, "layer_decay"),
        ({"level": "full", "frozen_fraction": 1.0}, "frozen_fraction"),
        ({"level": "all"}, "level"),
    ],
)
def test_options_of_another_level_and_ranges(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        parse_adapt_config(settings)
    assert error.value.field == field


@pytest.mark.parametrize("level", ["adapter", "lora", "full"])
def test_settings_round_trip(level: str) -> None:
    config = parse_adapt_config({"level": level, "seed": 3})
    settings = adapt_config_to_dict(config)
    assert adapt_config_to_dict(parse_adapt_config(settings)) == settings
    assert (settings["batch_size"], settings["lr"]) == (config.pairs_per_step, config.peak_lr)


def test_layers_of_names_with_numbers_of_all_kinds() -> None:
    names = ["class_embedding", "proj", "conv1.weight", "resblocks.0.attn.w", "resblocks.1.mlp.0.w", "ln.w"]
    assert number_layers(names) == dict(zip(names, (0, 2, 0, 1, 2, 2), strict=True))
    names = ["conv_proj.w", "encoder_layer_0.ln_1.w", "encoder_layer_0.mlp.0.w", "encoder_layer_1.ln_1.w"]
    assert list(number_layers(names).values())[1:] == [1, 1, 2]


def test_lora_layers_are_selected_by_their_full_name() -> None:
    """`conv` is updated, and the depthwise layer `block.conv`, whose name ends in it, is not."""
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(3, 8, 3))
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(8, 8, 3, groups=8))
    model.add_module("block", block)
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    wrapped = add_lora(model, 32, LoraOptions())
    updated = {name.split("base_model.model.")[-1] for name, _ in wrapped.named_modules() if "lora_A" in name}
    assert {name.split(".lora_A")[0] for name in updated} == {"conv"}


def test_self_pairs_are_validated_on_pairs_by_caption(
    dataset: CaptionDataset, start: likewise.ImageEncoder, tmp_path: Path
) -> None:
    config = AdaptConfig(max_steps=2, batch_size=32, num_val_pairs=20)
    run = adapt(dataset, start, tmp_path / "run", config, likewise.PairConfig(source="self"))
    assert 0 < read_outcome(run.path)["scores"][0]["mrr"] < 1
