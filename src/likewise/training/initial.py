"""The backbone with its initial weights: random, pretrained, or those of any image encoder."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from likewise.errors import InvalidInputError, ModelError
from likewise.models.backbones import (
    BackboneConfig,
    build_backbone,
    default_stem,
    freeze_unused_parameters,
)
from likewise.models.checkpoints import load_state_dict_strict, save_encoder
from likewise.models.encoders import ImageEncoder, load_encoder, load_weights_encoder
from likewise.models.transforms import EvalTransform
from likewise.training.config import (
    BACKBONE_INITS,
    DEFAULT_BACKBONE,
    DEFAULT_IMAGE_SIZE,
    DEFAULT_PREPROCESSING,
    Preprocessing,
    TrainConfig,
    with_default_backbone,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Start:
    """A backbone with its initial weights, its preprocessing, and what builds it again."""

    backbone: nn.Module
    """Images (b, 3, image_size, image_size) -> features (b, d)."""
    feature_dim: int
    """Number of features per image, d."""
    structure: BackboneConfig | Mapping[str, Any]
    """Configuration of the backbone or, for a structure that timm does not build alone, the arguments of
    `load_encoder` for an encoder of this structure."""
    transform: EvalTransform | None = None
    """Preprocessing of the encoder whose weights these are; None for `scratch` and `pretrained`."""
    fingerprint: str | None = None
    """Hash of weights, structure and preprocessing of this encoder; None for `scratch` and `pretrained`."""

    @property
    def stem(self) -> str:
        """The stem of the backbone; `default` for structures that timm does not build alone."""
        return self.structure.stem if isinstance(self.structure, BackboneConfig) else "default"

    @property
    def preprocessing(self) -> Preprocessing:
        """Interpolation and normalization of views; for random weights bilinear, and ImageNet's."""
        if self.transform is None:
            return DEFAULT_PREPROCESSING
        transform = self.transform
        return Preprocessing(interpolation=transform.interpolation, mean=transform.mean, std=transform.std)


def load_start(config: TrainConfig) -> tuple[Start, TrainConfig]:
    """Build the backbone with its initial weights; random ones are a function of the seed.

    Returns:
        The start, and the config with its backbone and image size.

    Raises:
        InvalidInputError: if `stem` changes a model that timm does not build alone.
        ModelError: if there is no such encoder, its weights do not fit, or it is no `backbone`.
    """
    if config.init not in BACKBONE_INITS:
        return _load_encoder_start(config)
    config = with_default_backbone(config)
    backbone_config = get_backbone_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        backbone, feature_dim = build_backbone(backbone_config, pretrained=config.init == "pretrained")
    return Start(backbone=backbone, feature_dim=feature_dim, structure=backbone_config), config


def get_backbone_config(config: TrainConfig) -> BackboneConfig:
    """Return the config of a backbone with random or timm's weights."""
    name = DEFAULT_BACKBONE if config.backbone is None else config.backbone
    image_size = DEFAULT_IMAGE_SIZE if config.image_size is None else config.image_size
    stem = config.stem or default_stem(image_size)
    return BackboneConfig(name=name, image_size=image_size, stem=stem)


def make_start(encoder: ImageEncoder) -> Start:
    """Return a start with the weights of an encoder, whose model is trained in place."""
    # Some models are stored in half precision. torch's own name of the argument is positional.
    model = encoder.model.float().requires_grad_(True)
    unused = freeze_unused_parameters(model, encoder.transform.image_size)
    if unused:
        logger.info(
            "%s: %d weights do not take part in its features and are not trained (%s)",
            encoder.name,
            len(unused),
            ", ".join(unused[:3]),
        )
    structure = encoder.structure_args if encoder.backbone_config is None else encoder.backbone_config
    return Start(
        backbone=model,
        feature_dim=encoder.feature_dim,
        structure=structure,
        transform=encoder.transform,
        fingerprint=encoder.key,
    )


def _load_encoder_start(config: TrainConfig) -> tuple[Start, TrainConfig]:
    encoder = _with_stem(_load_init(config), config)
    backbone_config = encoder.backbone_config
    name = encoder.name if backbone_config is None else backbone_config.name
    if config.backbone is not None and config.backbone not in (name, f"timm:{name}"):
        raise ModelError(
            f"`backbone` is {config.backbone!r}, but `init` {config.init} has the weights of {name!r}; "
            "leave `backbone` out",
            field="backbone",
        )
    return make_start(encoder), replace(config, backbone=name, image_size=encoder.transform.image_size)


def _load_init(config: TrainConfig) -> ImageEncoder:
    """Load the encoder from which training starts, on the CPU."""
    path = Path(config.init)
    is_file = os.path.isfile(path)  # noqa: PTH113  # `Path.is_file` raises OSError for long names
    try:
        if not is_file or config.backbone is None:
            return load_encoder(config.init, image_size=config.image_size, device="cpu")
        try:
            return load_encoder(path, image_size=config.image_size, device="cpu")
        except ModelError as error:
            if error.field != "backbone":
                raise
        # A file of another program, which does not name its model.
        encoder = load_weights_encoder(path, config.backbone, image_size=config.image_size, field="init")
        load_args = {
            "encoder": str(path.resolve()),
            "backbone": config.backbone,
            "image_size": config.image_size,
        }
        named = encoder if encoder.backbone_config else replace(encoder, name=config.backbone)
        return replace(named, structure_args=load_args)
    except ModelError as error:
        # The name of an encoder includes that of its backbone; a file may lack the latter.
        if error.field not in (None, "encoder") and (is_file or error.field != "backbone"):
            raise
        raise ModelError(f"`init`: {error}", field="init", path=error.path) from error


def _with_stem(encoder: ImageEncoder, config: TrainConfig) -> ImageEncoder:
    """Return the encoder with another stem, if the config asks for one."""
    backbone_config = encoder.backbone_config
    if config.stem is None or (backbone_config is not None and backbone_config.stem == config.stem):
        return encoder
    if backbone_config is None:
        raise InvalidInputError(
            f"`stem` changes models that timm builds; leave it out for `init` {config.init}", field="stem"
        )
    backbone_config = replace(backbone_config, stem=config.stem)
    model, _ = build_backbone(backbone_config)
    load_state_dict_strict(model, encoder.model.state_dict(), config.init)
    return replace(encoder, model=model, backbone_config=backbone_config)


def save_untrained_encoder(config: TrainConfig, path: Path) -> Path:
    """Write the encoder from which a run with this config starts, as a baseline."""
    start, _ = load_start(config)
    save_encoder(path, start.backbone, start.structure, transform=start.transform)
    return path
