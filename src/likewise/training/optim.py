"""Optimizer and learning-rate schedule: AdamW, linear warm-up, cosine decay."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

logger = logging.getLogger(__name__)

MIN_LR = 1e-6


def build_optimizer(name: str, model: nn.Module, *, lr: float, weight_decay: float) -> Optimizer:
    """Build `adamw` (Loshchilov and Hutter 2019) or `adam` (Kingma and Ba 2015).

    Biases and one-dimensional parameters, such as the gains of norms, have no weight decay. (The LGSSL code
    means to exempt them but writes `gain_bias_decay or weight_decay`, which turns its 0.0 into the full
    decay.)
    """
    optimizer_class = {"adamw": AdamW, "adam": Adam}[name]
    return optimizer_class(param_groups_weight_decay(model, weight_decay), lr=lr, fused=True)


def build_finetune_optimizer(
    backbone: nn.Module,
    head: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float,
    frozen_steps: int,
) -> Optimizer:
    """Build AdamW for a pretrained backbone and a new head.

    Args:
        backbone: The backbone; parameters without gradients are left out.
        head: The head, which is trained from the first step at the full learning rate.
        lr: Peak learning rate.
        weight_decay: Weight decay; biases and one-dimensional parameters have none.
        layer_decay: Factor of the learning rate from each layer to the one before it (layer-wise
            learning-rate decay, as in BEiT, Bao et al. 2022).
        frozen_steps: Steps before the backbone is trained; its learning rate then rises linearly over as many
            steps.
    """
    layer_of = _layer_indices(backbone)
    num_layers = max(layer_of.values(), default=0) + 1
    if num_layers == 1 and layer_decay < 1:
        logger.warning("`layer_decay` has no effect: the names of the weights do not tell the layers apart")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_decay ** (num_layers - 1 - layer_of.get(name, num_layers - 1))
        decay = 0.0 if parameter.ndim <= 1 else weight_decay
        group = groups.setdefault(
            (scale, decay),
            {"params": [], "weight_decay": decay, "lr_scale": scale, "frozen_steps": frozen_steps},
        )
        group["params"].append(parameter)
    return AdamW([*groups.values(), *param_groups_weight_decay(head, weight_decay)], lr=lr, fused=True)


def _layer_indices(model: nn.Module) -> dict[str, int]:
    """Return the index of the layer of each parameter, from the input on.

    Models of timm say which parameters form a layer. In other models a layer is what stands under the first
    number in the names, such as `encoder.layer.3`; parameters without a number belong to the layer before.
    """
    group_matcher: Any = getattr(model, "group_matcher", None)
    if group_matcher is not None:
        layer_of: Any = group_parameters(model, group_matcher(coarse=False), reverse=True)
        return layer_of
    return number_layers(name for name, _ in model.named_parameters())


def number_layers(names: Iterable[str]) -> dict[str, int]:
    """Return the index of the layer of each parameter by its name, in the order of the names.

    A projection of the features, such as `proj` of open_clip, belongs to the last layer.
    """
    indices: dict[str, int] = {}
    index, current = 0, None
    for name in names:
        match = re.match(r"(?:.*?\.)??(?:\w*_)?\d+(?=\.)", name)
        if match is not None and match[0] != current:
            index, current = index + 1, match[0]
        indices[name] = index
    is_projection = re.compile(r"(proj|(\w+_)?projection)\b").match
    return {name: index if is_projection(name) else i for name, i in indices.items()}


def lr_factor(group: Mapping[str, Any], step: int) -> float:
    """Return the factor of the learning rate of a parameter group: 1 unless it has a scale or is frozen."""
    frozen_steps = group.get("frozen_steps", 0)
    if step < frozen_steps:
        return 0.0
    ramp = min(1.0, (step - frozen_steps + 1) / frozen_steps) if frozen_steps else 1.0
    return ramp * group.get("lr_scale", 1.0)


def discard_frozen_gradients(optimizer: Optimizer, step: int) -> None:
    """Remove the gradients of groups that are still frozen, so that an optimizer leaves them unchanged."""
    for group in optimizer.param_groups:
        if step < group.get("frozen_steps", 0):
            for parameter in group["params"]:
                parameter.grad = None


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
