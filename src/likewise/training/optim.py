"""Optimizer and learning-rate schedule: AdamW, linear warm-up, cosine decay."""

import math

from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

MIN_LR = 1e-6


def build_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> Optimizer:
    """Build `adamw` (Loshchilov and Hutter 2019) or `adam` (Kingma and Ba 2015).

    Biases and one-dimensional parameters, such as the gains of norms, have no weight decay. (The LGSSL code
    means to exempt them but writes `gain_bias_decay or weight_decay`, which turns its 0.0 into the full
    decay.)
    """
    optimizer_class = {"adamw": AdamW, "adam": Adam}[name]
    return optimizer_class(param_groups_weight_decay(model, weight_decay), lr=lr, fused=True)


def warmup_cosine_lr(step: int, *, total_steps: int, warmup_steps: int, peak_lr: float) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then a cosine down to `MIN_LR`."""
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    fraction = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return MIN_LR + (peak_lr - MIN_LR) * (1 + math.cos(math.pi * min(1.0, fraction))) / 2


def skip_update_where(optimizer: Optimizer, mask: Tensor) -> None:
    """Make the next `optimizer.step()` a no-op if `mask` is 1, without synchronizing with the host.

    Fused optimizers read the attribute `found_inf`, by which `torch.amp.GradScaler` skips steps with
    non-finite gradients; there is no public interface for it.

    Args:
        optimizer: A fused optimizer.
        mask: () float32, 0 or 1, on the device of the parameters.
    """
    if not all(group["fused"] for group in optimizer.param_groups):
        raise TypeError("updates can be skipped in fused optimizers only")
    optimizer.__dict__["found_inf"] = mask
