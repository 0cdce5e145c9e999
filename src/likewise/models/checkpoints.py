"""Weight files of the package: written atomically as safetensors, loaded strictly."""

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
from likewise.errors import ArtifactError, ModelError, describe_error
from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.models.weight_files import check_weights_file, is_safetensors

TEXT_TOWER_PREFIX = "text_tower."
IMAGE_PROJECTION_PREFIX = "image_projection."
ADAPTER_PREFIX = "adapter."
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
    check_weights_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(
            f"{path} is not an intact safetensors file ({describe_error(error)}); copy or download it again",
            path=path,
        ) from error
    return tensors, metadata if isinstance(metadata, dict) else {}


def load_state_dict_strict(model: nn.Module, state_dict: dict[str, Tensor], location: str) -> None:
    """Load tensors whose names and shapes must all match those of the model.

    Raises:
        ModelError: naming the first keys that are missing, unexpected, of another shape or not finite.
    """
    mismatch = describe_mismatch(model, state_dict)
    if mismatch:
        raise ModelError(f"the weights in {location} do not fit this model: {mismatch}")
    _check_values(model.state_dict(), state_dict, location)
    model.load_state_dict(state_dict)


def describe_mismatch(model: nn.Module, state_dict: dict[str, Tensor]) -> str:
    """Return the number and first names of tensors that differ from those of a model; empty if none does."""
    expected = model.state_dict()
    shapes = {
        key: f"{key} {tuple(state_dict[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    }
    mismatches = {
        "missing": [key for key in expected if key not in state_dict],
        "unexpected": [key for key in state_dict if key not in expected],
        "with another shape": list(shapes.values()),
    }
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in mismatches.items() if keys
    )


def _check_values(expected: dict[str, Tensor], state_dict: dict[str, Tensor], location: str) -> None:
    """Raise ModelError for weights that are not stored as numbers of the model's kind, or are not finite."""
    for name, tensor in state_dict.items():
        is_stored_as_float = tensor.is_floating_point() and tensor.layout == torch.strided
        if tensor.is_meta or (expected[name].is_floating_point() and not is_stored_as_float):
            raise ModelError(
                f"{name} in {location} is stored as {tensor.dtype}{' without values' * tensor.is_meta}, "
                "not as floating-point numbers; save the weights in float32 or half precision"
            )
    nonfinite = {
        name: int((~tensor.isfinite()).sum())
        for name, tensor in state_dict.items()
        # A model's own buffers may be infinite, such as the mask of causal attention.
        if not tensor.isfinite().all() and expected[name].isfinite().all()
    }
    if nonfinite:
        first = next(iter(nonfinite))
        raise ModelError(
            f"the weights in {location} hold NaN or infinity in {len(nonfinite)} of {len(state_dict)} "
            f"tensors, the first {first} ({nonfinite[first]:,} of {state_dict[first].numel():,} values); the "
            "training diverged, or the file is damaged"
        )


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


def load_encoder_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata of an encoder that this package wrote.

    Raises:
        ModelError: if the file is missing, damaged, or of another program.
    """
    tensors, metadata = load_tensors(path) if is_safetensors(check_weights_file(path)) else ({}, {})
    if metadata.get("kind") != "encoder":
        raise ModelError(f"{path} does not name its backbone; pass `backbone`", field="backbone", path=path)
    return tensors, metadata


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
    tensors, metadata = load_encoder_file(path)
    try:
        config = BackboneConfig(**metadata["backbone"])
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{path} was written by another version of likewise ({describe_error(error)})", path=path
        ) from error
    config = config if image_size is None else replace(config, image_size=image_size)
    model, feature_dim = build_backbone(config)
    other_prefixes = (TEXT_TOWER_PREFIX, IMAGE_PROJECTION_PREFIX, ADAPTER_PREFIX)
    state_dict = {name: tensor for name, tensor in tensors.items() if not name.startswith(other_prefixes)}
    load_state_dict_strict(model, state_dict, str(path))
    return model, config, feature_dim


def parse_bands(metadata: dict[str, Any]) -> BandSelection | None:
    """Return the choice of bands in the metadata of an encoder file; None if it has none."""
    bands = metadata.get("bands")
    return None if bands is None else select_bands(tuple(bands["bands"]), tuple(bands["percentiles"]))
