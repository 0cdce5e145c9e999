"""Weight files: written atomically, loaded strictly, never unpickled beyond tensors."""

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from likewise.artifacts import atomic_write
from likewise.data.config import BandSelection, select_bands
from likewise.errors import ArtifactError, ModelError
from likewise.models.backbones import BackboneConfig, build_backbone

TEXT_TOWER_PREFIX = "text_tower."
IMAGE_PROJECTION_PREFIX = "image_projection."
_METADATA_KEY = "likewise"


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and JSON metadata to a safetensors file, atomically."""
    cpu_tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as tmp_path:
        try:
            save_file(cpu_tensors, tmp_path, metadata={_METADATA_KEY: json.dumps(metadata, sort_keys=True)})
        except SafetensorError as error:
            # safetensors reports a full disk without the errno that `atomic_write` recognizes.
            code = re.search(r"os error (\d+)", str(error))
            if code:
                raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
            raise ArtifactError(f"cannot write {path}: {error}", path=path) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and the metadata of `save_tensors` (empty for files of other programs).

    Raises:
        ModelError: if the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  # no mapping
    except FileNotFoundError as error:
        raise ModelError(f"there are no weights at {path}", path=path) from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is not an intact safetensors file: {error}", path=path) from error


def load_state_dict_strict(model: nn.Module, state_dict: dict[str, Tensor], location: str) -> None:
    """Load tensors whose names and shapes must all match those of the model.

    Raises:
        ModelError: naming the first keys that are missing, unexpected, or of another shape.
    """
    expected = model.state_dict()
    mismatches = {
        "missing": [k for k in expected if k not in state_dict],
        "unexpected": [k for k in state_dict if k not in expected],
        "with another shape": [
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
    bands: BandSelection | None = None,
) -> None:
    """Write a trained backbone with its configuration.

    Args:
        path: A `.safetensors` file.
        backbone: The backbone.
        config: Its configuration.
        text_state: Weights of the text tower and the image projection, from `text_state_dict`, and the
            configuration of the text tower.
        bands: Choice of the bands of TIFF images of several bands in training.
    """
    tensors, tower_config = text_state or ({}, None)
    metadata = {
        "kind": "encoder",
        "backbone": asdict(config),
        "text_tower": tower_config,
        "bands": None if bands is None else asdict(bands),
    }
    save_tensors(path, backbone.state_dict() | tensors, metadata)


def load_backbone(path: Path, image_size: int | None = None) -> tuple[nn.Module, BackboneConfig, int]:
    """Read a backbone from a file of `save_encoder`.

    Args:
        path: The file.
        image_size: Side of the input in pixels; defaults to that of training. The weights must allow it.

    Returns:
        The backbone, its configuration, and the number of features.

    Raises:
        ModelError: if the file is missing, damaged, or not written by `save_encoder`.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "encoder":
        raise ModelError(f"{path} does not name its backbone; pass `backbone`", field="backbone", path=path)
    config = BackboneConfig(**metadata["backbone"])
    config = config if image_size is None else replace(config, image_size=image_size)
    model, feature_dim = build_backbone(config)
    load_state_dict_strict(
        model,
        {k: v for k, v in tensors.items() if not k.startswith((TEXT_TOWER_PREFIX, IMAGE_PROJECTION_PREFIX))},
        str(path),
    )
    return model, config, feature_dim


def load_bands(path: Path) -> BandSelection | None:
    """Read the choice of bands from a file of `save_encoder`.

    Raises:
        ModelError: if the file is missing or damaged.
    """
    bands = load_tensors(path)[1].get("bands")
    return None if bands is None else select_bands(tuple(bands["bands"]), tuple(bands["percentiles"]))


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a plain state dict from `.safetensors`, `.pt` or `.pth`, tensors only.

    A state dict nested under `state_dict` or `model`, as many training scripts write it, is used.

    Raises:
        ModelError: if the file is missing, damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    if not path.is_file():
        raise ModelError(f"there are no weights at {path}", path=path)
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises many types
        raise ModelError(
            f"{path} holds no plain tensors that are safe to load ({type(error).__name__})", path=path
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state_dict, dict) and isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    if not isinstance(state_dict, dict) or not all(isinstance(v, Tensor) for v in state_dict.values()):
        raise ModelError(f"{path} holds no state dict (a mapping of names to tensors)", path=path)
    return state_dict
