"""The paper's optimizer: AdamW, linear warm-up, cosine decay, and truly no decay on norms and biases."""

import math

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

MIN_LR = 1e-6


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split parameters into those that decay and those that must not: norms' gains and all biases.

    One-dimensional parameters are just these. (The LGSSL code means to exempt them but writes
    `gain_bias_decay or weight_decay`, which turns its 0.0 into the full decay.)
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> Optimizer:
    """Build `adamw` (Loshchilov and Hutter 2019) or `adam` (Kingma and Ba 2015) over parameter groups."""
    optimizer_class = {"adamw": AdamW, "adam": Adam}[name]
    return optimizer_class(parameter_groups(model, weight_decay), lr=lr, fused=True)


def warmup_cosine_lr(step: int, *, total_steps: int, warmup_steps: int, peak_lr: float) -> float:
    """Return the learning rate of a step counted from 0: linear up to the peak, then cosine to 1e-6."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    fraction = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return MIN_LR + (peak_lr - MIN_LR) * (1 + math.cos(math.pi * min(1.0, fraction))) / 2
