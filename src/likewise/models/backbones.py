"""Backbones: any timm model as a feature extractor, with a stem fit for small images."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from likewise.errors import ModelError, close_matches

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL = 64
_TINY = 40


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """What it takes to build the same backbone again.

    Attributes:
        name: A timm model.
        size: Side of its square input in pixels.
        stem: `standard`, or `small`: keeps the resolution that a stem made for 224 pixels throws away.
    """

    name: str
    size: int
    stem: str = "standard"


def default_stem(size: int) -> str:
    """Return the stem for an input side: `small` up to 64 pixels."""
    return "small" if size <= SMALL else "standard"


def build_backbone(spec: BackboneSpec, *, pretrained: bool = False) -> tuple[nn.Module, int]:
    """Build a timm model that gives pooled features.

    Args:
        spec: Which one.
        pretrained: Whether timm fetches its weights from the hub (needs a network).

    Returns:
        The model, images (b, 3, size, size) -> features (b, d); and d.

    Raises:
        ModelError: for an unknown name (with close matches), an input size that the model refuses, weights
            that cannot be fetched, or features that are not one vector an image.
    """
    if spec.name.split(".")[0] not in timm.list_models():
        raise ModelError(f"unknown backbone {spec.name!r}.{close_matches(spec.name, timm.list_models())}")
    try:
        model = timm.create_model(spec.name, pretrained=pretrained, num_classes=0, **_options(spec))
    except Exception as fault:  # timm and the hub raise a dozen types
        raise ModelError(f"cannot build the backbone {spec.name!r} at {spec.size} px: {fault}") from fault
    if spec.stem == "small" and isinstance(model, ResNet):
        _open_stem(model, tiny=spec.size <= _TINY)
    return model, _feature_width(model, spec)


def _options(spec: BackboneSpec) -> dict[str, Any]:
    """Return what timm must be told so that a model takes this input size."""
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        sketch = timm.create_model(spec.name, pretrained=False, num_classes=0)
    options: dict[str, Any] = {}
    if _has_fixed_size(sketch):
        options["img_size"] = spec.size
    if spec.stem == "small" and isinstance(sketch, VisionTransformer):
        options["patch_size"] = max(2, spec.size // 8)
    return options


def _has_fixed_size(model: nn.Module) -> bool:
    config: Any = model.pretrained_cfg  # timm sets it on every model; torch's types do not know
    return bool(config.get("fixed_input_size", False))


def _open_stem(model: ResNet, *, tiny: bool) -> None:
    """Drop the max-pool, and up to 40 pixels the first stride too, as is usual for CIFAR."""
    model.add_module("maxpool", nn.Identity())
    if tiny:
        first = next(m for m in model.conv1.modules() if isinstance(m, nn.Conv2d))
        first.stride = (1, 1)


@torch.no_grad()
def check_side(model: nn.Module, name: str, side: int) -> None:
    """Make sure that a backbone takes views of another side too.

    Raises:
        ModelError: where it does not.
    """
    try:
        model.eval()(torch.zeros(1, 3, side, side))
    except Exception as fault:  # shape faults deep in somebody else's forward
        raise ModelError(f"the backbone {name!r} does not take {side}x{side} images: {fault}") from fault


@torch.no_grad()
def _feature_width(model: nn.Module, spec: BackboneSpec) -> int:
    check_side(model, spec.name, spec.size)
    features = model(torch.zeros(1, 3, spec.size, spec.size))
    if features.ndim != 2:
        raise ModelError(f"the backbone {spec.name!r} gives {tuple(features.shape)}, not one vector an image")
    return features.shape[1]
