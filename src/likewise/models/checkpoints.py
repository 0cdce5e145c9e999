"""Weights on disk: saved whole, loaded strictly, never unpickled beyond tensors."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from likewise.artifacts import atomic_write
from likewise.errors import ArtifactError, ModelError
from likewise.models.backbones import BackboneConfig, build_backbone

TEXT_TOWER_PREFIX = "text_tower."
IMAGE_PROJECTION_PREFIX = "image_projection."
_METADATA_KEY = "likewise"


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and a JSON-able note about them as safetensors, whole or not at all."""
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic_write(path) as tmp_path:
            save_file(cpu_tensors, tmp_path, metadata={_METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    except SafetensorError as error:
        # It reports a full disk without the number that `atomic` knows it by.
        raise ArtifactError(f"cannot write {path}: {error}; is the disk full?") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and the note that `save_tensors` left in it (empty for others' files).

    Raises:
        ModelError: where the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  # no mapping
    except FileNotFoundError as error:
        raise ModelError(f"there are no weights at {path}") from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is no intact safetensors file: {error}") from error


def load_state_dict_strict(model: nn.Module, state_dict: dict[str, Tensor], location: str) -> None:
    """Fill a model with tensors whose names and shapes must all match.

    Raises:
        ModelError: naming the first keys that are missing, unexpected, or of another shape.
    """
    expected = model.state_dict()
    mismatches = {
        "missing": [k for k in expected if k not in state_dict],
        "unexpected": [k for k in state_dict if k not in expected],
        "of another shape": [
            k for k in expected if k in state_dict and state_dict[k].shape != expected[k].shape
        ],
    }
    messages = [f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in mismatches.items() if keys]
    if messages:
        raise ModelError(f"the weights in {location} do not fit this model: {'; '.join(messages)}")
    model.load_state_dict(state_dict)


def save_encoder(
    path: Path,
    backbone: nn.Module,
    config: BackboneConfig,
    text_state: tuple[dict[str, Tensor], dict[str, int]] | None = None,
) -> None:
    """Write a trained backbone with all it takes to build and feed it again.

    `text_state` is what `likewise.models.language` needs besides: its weights, and what its tower is made of.
    """
    tensors, tower_config = text_state or ({}, None)
    metadata = {"kind": "encoder", "backbone": asdict(config), "text_tower": tower_config}
    save_tensors(path, backbone.state_dict() | tensors, metadata)


def load_backbone(path: Path, image_size: int | None = None) -> tuple[nn.Module, BackboneConfig, int]:
    """Read a backbone that `save_encoder` wrote: the model, its spec, and the width of its features.

    `image_size` builds it for another side of the input than it was trained with, where its weights allow
    that.

    Raises:
        ModelError: where the file is missing, damaged, or not written by `save_encoder`.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "encoder":
        raise ModelError(f"{path} does not say which backbone it is for; name it with --backbone")
    config = BackboneConfig(**metadata["backbone"])
    config = config if image_size is None else replace(config, image_size=image_size)
    model, feature_dim = build_backbone(config)
    load_state_dict_strict(
        model,
        {k: v for k, v in tensors.items() if not k.startswith((TEXT_TOWER_PREFIX, IMAGE_PROJECTION_PREFIX))},
        str(path),
    )
    return model, config, feature_dim


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a plain state dict from `.safetensors`, `.pt` or `.pth`, tensors only.

    A dict under `state_dict` or `model`, as many training scripts write it, is found.

    Raises:
        ModelError: where the file is missing, damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    if not path.is_file():
        raise ModelError(f"there are no weights at {path}")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling faults come in many types
        raise ModelError(
            f"{path} holds no plain tensors that are safe to load ({type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state_dict, dict) and isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if not isinstance(state_dict, dict) or not all(isinstance(v, Tensor) for v in state_dict.values()):
        raise ModelError(f"{path} holds no state dict: a mapping of names to tensors is needed")
    return state_dict
