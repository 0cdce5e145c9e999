"""Weights on disk: saved whole, loaded strictly, never unpickled beyond tensors."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from likewise.artifacts import atomic
from likewise.errors import ArtifactError, ModelError
from likewise.models.backbones import BackboneSpec, build_backbone

LANGUAGE = "language."
_META = "likewise"


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and a JSON-able note about them as safetensors, whole or not at all."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with atomic(path) as temporary:
            save_file(held, temporary, metadata={_META: json.dumps(meta, sort_keys=True)})
    except SafetensorError as fault:
        # It reports a full disk without the number that `atomic` knows it by.
        raise ArtifactError(f"cannot write {path}: {fault}; is the disk full?") from fault


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a safetensors file and the note that `save_tensors` left in it (empty for others' files).

    Raises:
        ModelError: where the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(_META, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118  # no mapping
    except FileNotFoundError as fault:
        raise ModelError(f"there are no weights at {path}") from fault
    except (SafetensorError, OSError, json.JSONDecodeError) as fault:
        raise ModelError(f"{path} is no intact safetensors file: {fault}") from fault


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Fill a model with tensors whose names and shapes must all match.

    Raises:
        ModelError: naming the first keys that are missing, unexpected, or of another shape.
    """
    wanted = model.state_dict()
    faults = {
        "missing": [k for k in wanted if k not in tensors],
        "unexpected": [k for k in tensors if k not in wanted],
        "of another shape": [k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape],
    }
    told = [f"{len(keys)} {fault} ({', '.join(keys[:3])})" for fault, keys in faults.items() if keys]
    if told:
        raise ModelError(f"the weights in {where} do not fit this model: {'; '.join(told)}")
    model.load_state_dict(tensors)


def save_encoder(
    path: Path,
    backbone: nn.Module,
    spec: BackboneSpec,
    language: tuple[dict[str, Tensor], dict[str, int]] | None = None,
) -> None:
    """Write a trained backbone with all it takes to build and feed it again.

    `language` is what `likewise.models.language` needs besides: its weights, and what its tower is made of.
    """
    tensors, tower = language or ({}, None)
    meta = {"kind": "encoder", "backbone": asdict(spec), "language": tower}
    save_tensors(path, backbone.state_dict() | tensors, meta)


def load_encoder(path: Path, size: int | None = None) -> tuple[nn.Module, BackboneSpec, int]:
    """Read a backbone that `save_encoder` wrote: the model, its spec, and the width of its features.

    `size` builds it for another side of the input than it was trained with, where its weights allow that.

    Raises:
        ModelError: where the file is missing, damaged, or not written by `save_encoder`.
    """
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "encoder":
        raise ModelError(f"{path} does not say which backbone it is for; name it with --backbone")
    spec = BackboneSpec(**meta["backbone"])
    spec = spec if size is None else replace(spec, size=size)
    model, width = build_backbone(spec)
    load_strictly(model, {k: v for k, v in tensors.items() if not k.startswith(LANGUAGE)}, str(path))
    return model, spec, width


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
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # unpickling faults come in many types
        raise ModelError(
            f"{path} holds no plain tensors that are safe to load ({type(fault).__name__})"
        ) from fault
    for name in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelError(f"{path} holds no state dict: a mapping of names to tensors is needed")
    return loaded
