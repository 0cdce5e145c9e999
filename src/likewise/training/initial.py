"""The backbone with its initial weights."""

from pathlib import Path

import torch
from torch import nn

from likewise.errors import ModelError
from likewise.models.backbones import BackboneConfig, build_backbone, classifier_names, default_stem
from likewise.models.checkpoints import save_encoder
from likewise.models.weights import load_weights
from likewise.run_directory import RunDirectory
from likewise.training.config import TrainConfig


def get_backbone_config(config: TrainConfig) -> BackboneConfig:
    """Return the config of the backbone of a run."""
    stem = config.stem or default_stem(config.image_size)
    return BackboneConfig(name=config.backbone, image_size=config.image_size, stem=stem)


def init_backbone(config: TrainConfig, backbone_config: BackboneConfig) -> tuple[nn.Module, int]:
    """Build the backbone with its initial weights; random ones are a function of the seed.

    Returns:
        The backbone and the number of its features.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        backbone, feature_dim = build_backbone(backbone_config, pretrained=config.init == "pretrained")
    weights_path = resolve_init_weights(config.init)
    if weights_path is not None:
        head_names = classifier_names(config.backbone)
        load_weights(backbone, weights_path, head_names=head_names, field="init")
    return backbone, feature_dim


def resolve_init_weights(init: str) -> Path | None:
    """Return the file of the initial weights; None for `scratch` and `pretrained`.

    Raises:
        ModelError: if `init` is neither a file nor a run with an encoder.
    """
    if init in ("scratch", "pretrained"):
        return None
    path = Path(init)
    weights_path = RunDirectory(path).encoder_path if path.is_dir() else path
    if not weights_path.is_file():
        raise ModelError(
            f"`init` is {init!r}, which has no weights; give 'scratch', 'pretrained', a weights file or a "
            "finished run",
            field="init",
            path=path,
        )
    return weights_path


def save_untrained_encoder(config: TrainConfig, path: Path) -> Path:
    """Write the encoder from which a run with this config starts, as a baseline."""
    backbone_config = get_backbone_config(config)
    save_encoder(path, init_backbone(config, backbone_config)[0], backbone_config)
    return path
