"""Optimizer, schedule and collapse metrics against independently computed values."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.training.config import TrainConfig, build_schedule
from likewise.training.optim import build_optimizer, skip_update_where, warmup_cosine_lr
from likewise.training.validation import effective_rank, feature_std, has_collapsed


def test_norms_and_biases_have_no_weight_decay() -> None:
    backbone, _ = build_backbone(BackboneConfig(name="resnet10t", image_size=32))
    optimizer = build_optimizer("adamw", nn.Sequential(backbone, nn.Linear(512, 4)), lr=0.1, weight_decay=0.5)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for module in (*backbone.modules(), nn.Linear(1, 1)):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in decays:
                exempt = isinstance(module, nn.BatchNorm2d) or name == "bias"
                assert decays[id(parameter)] == (0.0 if exempt else 0.5), (module, name)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(backbone.parameters())) + 2


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_masked_updates_are_skipped(name: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(name, model, lr=0.1, weight_decay=0.5)
    for mask, is_updated in ((1.0, False), (0.0, True), (1.0, False)):
        before = [tensor.clone() for tensor in (*model.parameters(), *_optimizer_tensors(optimizer))]
        model(torch.ones(1, 3)).sum().backward()
        skip_update_where(optimizer, torch.tensor(mask))
        optimizer.step()
        after = (*model.parameters(), *_optimizer_tensors(optimizer))
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False)) != is_updated
    with pytest.raises(TypeError, match="fused"):
        skip_update_where(torch.optim.SGD(model.parameters(), lr=0.1), torch.tensor(1.0))


def test_lr_warms_up_and_decays_along_a_cosine() -> None:
    rates = [warmup_cosine_lr(s, total_steps=110, warmup_steps=10, peak_lr=1e-3) for s in range(110)]
    np.testing.assert_allclose(rates[:10], 1e-4 * np.arange(1, 11))
    assert rates[10] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-6)
    middle = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * 50 / 99)) / 2
    assert rates[60] == pytest.approx(middle)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert warmup_cosine_lr(0, total_steps=1, warmup_steps=0, peak_lr=1.0) == 1.0


def test_schedule_is_computed_from_the_config(tmp_path) -> None:  # noqa: ANN001
    schedule = build_schedule(TrainConfig(batch_size=128, epochs=3), 1000, tmp_path)
    assert (schedule.steps, schedule.steps_per_epoch) == (21, 7)
    assert schedule.peak_lr == pytest.approx(1e-3 * 128 / 512)
    # The paper: 12 million images, 250,000 steps, 5,000 of them warm-up.
    paper = build_schedule(TrainConfig(), 12_000_000, tmp_path)
    assert (paper.steps, paper.warmup_steps, paper.peak_lr) == (250_000, 5_000, 1e-3)


def test_effective_rank_of_uniform_directions_is_their_number() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    for rank in (1, 4, 16):
        signs = torch.cat([torch.eye(64)[:rank], -torch.eye(64)[:rank]])
        assert effective_rank(signs @ basis + 5).item() == pytest.approx(rank, rel=1e-3)
    features = torch.randn(50, 8, generator=generator)
    values = np.linalg.svd(features.double().numpy() - features.double().numpy().mean(0), compute_uv=False)
    p = values / values.sum()
    assert effective_rank(features).item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_collapsed_features_are_detected() -> None:
    healthy = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    assert feature_std(healthy).item() == pytest.approx(1, abs=0.1)
    collapsed = torch.ones(200, 32) + 1e-6 * healthy
    assert has_collapsed(rank=float(effective_rank(collapsed)), std=float(feature_std(collapsed)))
    assert not has_collapsed(rank=float(effective_rank(healthy)), std=float(feature_std(healthy)))
    line = torch.linspace(-1, 1, 200)[:, None] * torch.ones(1, 32)
    assert has_collapsed(rank=float(effective_rank(line)), std=float(feature_std(line)))
