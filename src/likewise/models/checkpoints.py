"""Weight files: recognized by their first bytes, read without running code, written atomically."""

import json
import os
import re
import shlex
import struct
import zipfile
from collections.abc import Mapping
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
from likewise.models.transforms import EvalTransform

_PAGE_OR_POINTER = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights; run `git lfs pull` in its repository",
    b"<": "is a web page (HTML or XML), not weights; the download was refused, so download it again",
    b"{": "is JSON text, not weights; a list of shards must be named *.index.json",
}
_OTHER_FORMATS = {
    b"\x1f\x8b": "is compressed by gzip; decompress it first",
    b"BZh": "is compressed by bzip2; decompress it first",
    b"\xfd7zXZ\x00": "is compressed by xz; decompress it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; decompress it first",
    b"\x89HDF\r\n": "is an HDF5 file (Keras or TensorFlow); save its weights by safetensors or torch.save",
    b"\x93NUMPY": "is a NumPy array; save named weights by safetensors or torch.save",
    b"GGUF": "is a GGUF file; save its weights by safetensors or torch.save",
}
_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number before torch 1.6
_PICKLE = b"\x80"
# Keeps the tensors of nested dictionaries and of modules, and nothing else.
_CONVERT = (
    "import sys, torch; "
    "f = lambda v: v if torch.is_tensor(v) else {k: f(x) for k, x in "
    "(v.state_dict() if isinstance(v, torch.nn.Module) else v).items() "
    "if isinstance(x, (dict, torch.Tensor, torch.nn.Module))}; "
    "torch.save(f(torch.load(sys.argv[1], map_location='cpu', weights_only=False)), sys.argv[2])"
)
TEXT_TOWER_PREFIX = "text_tower."
IMAGE_PROJECTION_PREFIX = "image_projection."
ADAPTER_PREFIX = "adapter."
_METADATA_KEY = "likewise"


def check_weights_file(path: Path) -> bytes:
    """Return the first bytes of a file that may hold weights.

    Raises:
        ModelError: if the file is missing, empty, truncated or of a format that holds no weights; the message
            says what it is and what to do.
    """
    if not path.is_file():
        raise ModelError(f"there are no weights at {path}", path=path)
    with path.open("rb") as stream:
        head = stream.read(512)
    if not head:
        raise ModelError(f"{path} is empty (0 bytes); copy or download it again", path=path)
    if is_safetensors(head):
        return head
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, signatures in ((text, _PAGE_OR_POINTER), (head, _OTHER_FORMATS)):
        for signature, reason in signatures.items():
            if start.startswith(signature):
                raise ModelError(f"{path} {reason}", path=path)
    if head[257:262] == b"ustar":
        raise ModelError(f"{path} is a tar archive; extract the weights first", path=path)
    if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
        raise ModelError(
            f"{path} is truncated ({path.stat().st_size:,} bytes, without the end of the archive); copy or "
            "download it again",
            path=path,
        )
    return head


def is_safetensors(head: bytes) -> bool:
    """Return whether a file starts as safetensors do: the length of a JSON header below 4 GiB, then JSON."""
    return head[4:9] == b"\0\0\0\0{"


def read_pickled(path: Path) -> Any:
    """Read a file of `torch.save` that holds tensors and plain Python values only.

    Raises:
        ModelError: if the file is not of `torch.save`, is damaged, or holds objects of other classes.
    """
    head = check_weights_file(path)
    if not head.startswith((_ZIP, _TORCH_LEGACY)):
        kind = "a pickle, which is never loaded because that can run code" if head[:1] == _PICKLE else ""
        raise ModelError(
            f"{path} is {kind or 'neither of safetensors nor of torch.save'}; save its weights by "
            "safetensors or torch.save",
            path=path,
        )
    if head.startswith(_ZIP):
        _check_archive(path)
    try:
        # A stream, because torch chooses the format of a path by its suffix.
        with path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # unpickling raises many types
        unsafe_class = re.search(
            r"Unsupported (?:global|class|operand).*?(?:GLOBAL )?([\w.]+\.\w+)", str(error)
        )
        if unsafe_class is not None:
            target = path.with_name(f"{path.name.partition('.')[0]}-tensors.pth")
            message = (
                f"{path} holds objects besides tensors ({unsafe_class[1]}), which are never loaded because "
                "that can run code; if you trust the file, write its tensors to a new one: "
                f'python -c "{_CONVERT}" {shlex.quote(str(path))} {shlex.quote(str(target))}'
            )
        else:
            message = (
                f"{path} is damaged or truncated, or no file of torch.save ({describe_error(error)}); copy "
                "or download it again"
            )
        raise ModelError(message, path=path) from error


def _check_archive(path: Path) -> None:
    """Raise ModelError for a zip archive that is not of `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, struct.error):
        return  # `torch.load` reports the damage
    if "constants.pkl" in names:
        raise ModelError(
            f"{path} is a TorchScript program, which is never loaded; save its state_dict() by torch.save",
            path=path,
        )
    if "data.pkl" not in names:
        raise ModelError(
            f"{path} is a zip archive, but not of torch.save; extract it, or save its weights by safetensors "
            "or torch.save",
            path=path,
        )


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
    structure: BackboneConfig | Mapping[str, Any],
    text_state: tuple[dict[str, Tensor], dict[str, int]] | None = None,
    bands: BandSelection | None = None,
    transform: EvalTransform | None = None,
) -> None:
    """Write a trained backbone with its weights and what builds it again.

    Args:
        path: A `.safetensors` file.
        backbone: The backbone.
        structure: Its configuration or, for a structure that timm does not build alone, the arguments of
            `load_encoder` for an encoder of this structure.
        text_state: Weights of the text tower and the image projection, from `text_state_dict`, and the
            configuration of the text tower.
        bands: Choice of the bands of TIFF images of several bands in training.
        transform: The preprocessing; by default a resize to the input size and ImageNet's normalization.
    """
    tensors, tower_config = text_state or ({}, None)
    metadata: dict[str, Any] = {
        "kind": "encoder",
        "text_tower": tower_config,
        "bands": None if bands is None else asdict(bands),
    }
    if isinstance(structure, BackboneConfig):
        metadata["backbone"] = asdict(structure)
    else:
        metadata["start"] = {"load_args": dict(structure)}
    if transform is not None:
        metadata["transform"] = asdict(transform if bands is None else replace(transform, bands=bands))
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
    load_state_dict_strict(model, without_prefixes(tensors, other_prefixes), str(path))
    return model, config, feature_dim


def without_prefixes(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors whose names start with none of the prefixes."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def parse_bands(metadata: dict[str, Any]) -> BandSelection | None:
    """Return the choice of bands in the metadata of an encoder file; None if it has none."""
    bands = metadata.get("bands")
    return None if bands is None else select_bands(tuple(bands["bands"]), tuple(bands["percentiles"]))
