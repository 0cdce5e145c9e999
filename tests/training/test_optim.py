"""The optimizer's schedule and groups, and the monitor's figures, against values worked out apart."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.training.config import TrainConfig, build_schedule
from likewise.training.optim import build_optimizer, warmup_cosine_lr
from likewise.training.run_dir import effective_rank, feature_std, has_collapsed


def test_norms_and_biases_do_not_decay() -> None:
    backbone, _ = build_backbone(BackboneConfig(name="resnet10t", image_size=32))
    optimizer = build_optimizer("adamw", nn.Sequential(backbone, nn.Linear(512, 4)), lr=0.1, weight_decay=0.5)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for module in (*backbone.modules(), nn.Linear(1, 1)):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in decays:
                exempt = isinstance(module, nn.BatchNorm2d) or name == "bias"
                assert decays[id(parameter)] == (0.0 if exempt else 0.5), (module, name)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(backbone.parameters())) + 2


def test_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates = [warmup_cosine_lr(s, total_steps=110, warmup_steps=10, peak_lr=1e-3) for s in range(110)]
    np.testing.assert_allclose(rates[:10], 1e-4 * np.arange(1, 11))
    assert rates[10] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-6)
    middle = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * 50 / 99)) / 2
    assert rates[60] == pytest.approx(middle)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert warmup_cosine_lr(0, total_steps=1, warmup_steps=0, peak_lr=1.0) == 1.0


def test_plan_follows_from_settings(tmp_path) -> None:  # noqa: ANN001
    made = build_schedule(TrainConfig(batch_size=128, epochs=3), 1000, tmp_path)
    assert (made.steps, made.steps_per_epoch) == (21, 7)
    assert made.peak_lr == pytest.approx(1e-3 * 128 / 512)
    # The paper's own: 12 million images, 250,000 steps, 5,000 of them warm-up.
    paper = build_schedule(TrainConfig(), 12_000_000, tmp_path)
    assert (paper.steps, paper.warmup_steps, paper.peak_lr) == (250_000, 5_000, 1e-3)


def test_effective_rank_counts_even_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    for rank in (1, 4, 16):
        signs = torch.cat([torch.eye(64)[:rank], -torch.eye(64)[:rank]])
        assert effective_rank(signs @ basis + 5).item() == pytest.approx(rank, rel=1e-3)
    features = torch.randn(50, 8, generator=generator)
    values = np.linalg.svd(features.double().numpy() - features.double().numpy().mean(0), compute_uv=False)
    share = values / values.sum()
    assert effective_rank(features).item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


def test_collapse_is_seen() -> None:
    healthy = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    assert feature_std(healthy).item() == pytest.approx(1, abs=0.1)
    dead = torch.ones(200, 32) + 1e-6 * healthy
    assert has_collapsed(rank=float(effective_rank(dead)), std=float(feature_std(dead)))
    assert not has_collapsed(rank=float(effective_rank(healthy)), std=float(feature_std(healthy)))
    line = torch.linspace(-1, 1, 200)[:, None] * torch.ones(1, 32)
    assert has_collapsed(rank=float(effective_rank(line)), std=float(feature_std(line)))
