"""Backbones: any timm model as a feature extractor, with an optional stem for small images."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from likewise.errors import ModelError, describe_error, did_you_mean

SMALL_IMAGE = 64
_TINY_IMAGE = 40


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Everything needed to build a backbone again."""

    name: str
    """A timm model."""
    image_size: int
    """Side of the square input in pixels."""
    stem: str = "default"
    """`default`, or `cifar`, which keeps the resolution that a stem for 224 pixels discards."""


def default_stem(image_size: int) -> str:
    """Return the stem for an image size: `cifar` up to 64 pixels."""
    return "cifar" if image_size <= SMALL_IMAGE else "default"


def build_backbone(config: BackboneConfig, *, pretrained: bool = False) -> tuple[nn.Module, int]:
    """Build a timm model that returns pooled features.

    Args:
        config: Name, input size and stem.
        pretrained: Whether to download the weights of the model (needs a network).

    Returns:
        The model, images (b, 3, image_size, image_size) -> features (b, d); and d.

    Raises:
        ModelError: for an unknown name (with close matches), an input size that the model refuses, weights
            that cannot be downloaded, or features that are not one vector per image.
    """
    if config.name.split(".")[0] not in timm.list_models():
        raise ModelError(
            f"unknown backbone {config.name!r}.{did_you_mean(config.name, timm.list_models())}",
            field="backbone",
        )
    try:
        model = timm.create_model(config.name, pretrained=pretrained, num_classes=0, **_timm_options(config))
    except Exception as error:  # timm and the hub raise a dozen types
        raise ModelError(
            f"cannot build the backbone {config.name!r} at {config.image_size} px: {describe_error(error)}",
            field="backbone",
        ) from error
    if config.stem == "cifar" and isinstance(model, ResNet):
        _use_cifar_stem(model, is_tiny=config.image_size <= _TINY_IMAGE)
    return model, _feature_dim(model, config)


def classifier_names(name: str) -> tuple[str, ...]:
    """Return the names of the classifier of a timm model, which a backbone lacks."""
    pretrained_cfg = timm.get_pretrained_cfg(name)
    names = pretrained_cfg.classifier if pretrained_cfg is not None else "fc"
    return (names,) if isinstance(names, str) else tuple(names or ())


def _timm_options(config: BackboneConfig) -> dict[str, Any]:
    """Return the options of `timm.create_model` for this input size and stem."""
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
    """Remove the max-pool and, up to 40 pixels, the first stride, as is common for CIFAR."""
    model.add_module("maxpool", nn.Identity())
    if is_tiny:
        first_conv = next(module for module in model.conv1.modules() if isinstance(module, nn.Conv2d))
        first_conv.stride = (1, 1)


@torch.no_grad()
def check_input_size(model: nn.Module, name: str, image_size: int) -> None:
    """Check that a backbone accepts square images of a size.

    Raises:
        ModelError: if it does not.
    """
    try:
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # shape errors deep in the model's own forward
        raise ModelError(
            f"the backbone {name!r} does not accept {image_size}x{image_size} images: "
            f"{describe_error(error)}",
            field="backbone",
        ) from error


def freeze_unused_parameters(model: nn.Module, image_size: int) -> list[str]:
    """Turn off the gradients of parameters on which the features do not depend, such as a text tower's.

    `DistributedDataParallel` refuses parameters that take part in training and get no gradient.

    Args:
        model: Images (b, 3, h, w) -> features (b, d).
        image_size: Side of the square input in pixels.

    Returns:
        The names of these parameters, among those with gradients.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    images = torch.zeros(2, 3, image_size, image_size, device=next(iter(trained.values())).device)
    with torch.enable_grad():
        model.eval()(images).sum().backward()
    unused = {name: parameter for name, parameter in trained.items() if parameter.grad is None}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return list(unused)


@torch.no_grad()
def _feature_dim(model: nn.Module, config: BackboneConfig) -> int:
    check_input_size(model, config.name, config.image_size)
    features = model(torch.zeros(1, 3, config.image_size, config.image_size))
    if features.ndim != 2:
        raise ModelError(
            f"the backbone {config.name!r} returns {tuple(features.shape)}, not one vector per image",
            field="backbone",
        )
    return features.shape[1]
