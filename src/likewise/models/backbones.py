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

from likewise.errors import ModelError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL_IMAGE = 64
_TINY_IMAGE = 40


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What it takes to build the same backbone again.

    Attributes:
        name: A timm model.
        image_size: Side of its square input in pixels.
        stem: `standard`, or `small`: keeps the resolution that a stem made for 224 pixels throws away.
    """

    name: str
    image_size: int
    stem: str = "default"


def default_stem(image_size: int) -> str:
    """Return the stem for an input side: `small` up to 64 pixels."""
    return "cifar" if image_size <= SMALL_IMAGE else "default"


def build_backbone(config: BackboneConfig, *, pretrained: bool = False) -> tuple[nn.Module, int]:
    """Build a timm model that gives pooled features.

    Args:
        config: Which one.
        pretrained: Whether timm fetches its weights from the hub (needs a network).

    Returns:
        The model, images (b, 3, size, size) -> features (b, d); and d.

    Raises:
        ModelError: for an unknown name (with close matches), an input size that the model refuses, weights
            that cannot be fetched, or features that are not one vector an image.
    """
    if config.name.split(".")[0] not in timm.list_models():
        raise ModelError(f"unknown backbone {config.name!r}.{did_you_mean(config.name, timm.list_models())}")
    try:
        model = timm.create_model(config.name, pretrained=pretrained, num_classes=0, **_timm_options(config))
    except Exception as error:  # timm and the hub raise a dozen types
        raise ModelError(
            f"cannot build the backbone {config.name!r} at {config.image_size} px: {error}"
        ) from error
    if config.stem == "cifar" and isinstance(model, ResNet):
        _use_cifar_stem(model, is_tiny=config.image_size <= _TINY_IMAGE)
    return model, _feature_dim(model, config)


def _timm_options(config: BackboneConfig) -> dict[str, Any]:
    """Return what timm must be told so that a model takes this input size."""
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        meta_model = timm.create_model(config.name, pretrained=False, num_classes=0)
    options: dict[str, Any] = {}
    if _has_fixed_size(meta_model):
        options["img_size"] = config.image_size
    if config.stem == "cifar" and isinstance(meta_model, VisionTransformer):
        options["patch_size"] = max(2, config.image_size // 8)
    return options


def _has_fixed_size(model: nn.Module) -> bool:
    pretrained_cfg: Any = model.pretrained_cfg  # timm sets it on every model; torch's types do not know
    return bool(pretrained_cfg.get("fixed_input_size", False))


def _use_cifar_stem(model: ResNet, *, is_tiny: bool) -> None:
    """Drop the max-pool, and up to 40 pixels the first stride too, as is usual for CIFAR."""
    model.add_module("maxpool", nn.Identity())
    if is_tiny:
        first_conv = next(module for module in model.conv1.modules() if isinstance(module, nn.Conv2d))
        first_conv.stride = (1, 1)


@torch.no_grad()
def check_input_size(model: nn.Module, name: str, image_size: int) -> None:
    """Make sure that a backbone takes views of another side too.

    Raises:
        ModelError: where it does not.
    """
    try:
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # shape faults deep in somebody else's forward
        raise ModelError(
            f"the backbone {name!r} does not take {image_size}x{image_size} images: {error}"
        ) from error


@torch.no_grad()
def _feature_dim(model: nn.Module, config: BackboneConfig) -> int:
    check_input_size(model, config.name, config.image_size)
    features = model(torch.zeros(1, 3, config.image_size, config.image_size))
    if features.ndim != 2:
        raise ModelError(
            f"the backbone {config.name!r} gives {tuple(features.shape)}, not one vector an image"
        )
    return features.shape[1]
