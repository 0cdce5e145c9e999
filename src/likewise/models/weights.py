"""Weights of other programs: found in a file by the names of a backbone, and loaded strictly."""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from likewise.artifacts import read_json
from likewise.errors import ModelError
from likewise.models.checkpoints import (
    IMAGE_PROJECTION_PREFIX,
    TEXT_TOWER_PREFIX,
    check_weights_file,
    describe_mismatch,
    is_safetensors,
    load_state_dict_strict,
    load_tensors,
    read_pickled,
)

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.json"
# Counts the batches of a batch normalization; files of torch before 0.4.1 lack it, and inference ignores it.
_OPTIONAL_NAME = "num_batches_tracked"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file."""

    path: Path
    tensors: dict[str, Tensor]
    """Tensors by name; dictionaries in dictionaries, such as `{"student": {...}}`, are joined by dots."""
    containers: tuple[str, ...]
    """Prefixes of the dictionaries inside the file, such as `student.`."""


def read_weights(path: Path) -> WeightsFile:
    """Read all tensors of a file of safetensors or `torch.save`, or of the shards in a `*.index.json`.

    Raises:
        ModelError: if the file is missing or damaged, or holds no named tensors or objects besides tensors.
    """
    content: Any
    if path.name.endswith(INDEX_SUFFIX) and path.is_file():
        content = _read_shards(path)
    elif is_safetensors(check_weights_file(path)):
        content, metadata = load_tensors(path)
        if metadata.get("adapter") is not None:
            raise ModelError(
                f"{path} is an adapted encoder, whose adapter is not part of a backbone; use its start, or "
                "adapt it again",
                path=path,
            )
        if metadata.get("kind") == "encoder":  # a file of `save_encoder`
            towers = (TEXT_TOWER_PREFIX, IMAGE_PROJECTION_PREFIX)
            content = {name: tensor for name, tensor in content.items() if not name.startswith(towers)}
    else:
        content = read_pickled(path)
    containers: list[str] = []
    tensors = dict(_flatten(content, "", containers)) if isinstance(content, Mapping) else {}
    if not tensors:
        raise ModelError(
            f"{path} holds no state dict (names and tensors), but {_describe_content(content)}", path=path
        )
    return WeightsFile(path, tensors, tuple(containers))


def load_weights(
    model: nn.Module,
    path: Path,
    *,
    prefix: str = "",
    exclude: Sequence[str] = (),
    head_names: Sequence[str] = (),
    field: str = "weights_prefix",
) -> None:
    """Load the weights of a backbone from a file; all names and shapes must match.

    The names in a file may have a prefix, such as `module.` or `teacher.backbone.`; it is found if only one
    fits all weights of the model. Weights outside it are ignored, and the classifier is dropped; both are
    logged.

    Args:
        model: The backbone, which gets the weights.
        path: A file of safetensors or `torch.save`, or the `*.index.json` of a model in shards.
        prefix: The prefix, with or without the names of the dictionaries that hold the weights.
        exclude: Prefixes of names to ignore, with or without the names of the dictionaries and `prefix`.
        head_names: Names of the classifier, such as `fc`.
        field: The config field to which errors about the prefix refer: `weights_prefix` or `init`.

    Raises:
        ModelError: if the file cannot be read, several prefixes fit, none does, or values are not finite.
    """
    file = read_weights(path)
    file = _remove_excluded(file, prefix, tuple(exclude))
    required = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not name.endswith(f".{_OPTIONAL_NAME}")
    }
    found_prefix = _find_prefix(file, required, prefix, field)
    state_dict = {
        name.removeprefix(found_prefix): tensor
        for name, tensor in file.tensors.items()
        if name.startswith(found_prefix)
    }
    _log_ignored(file, found_prefix, prefix)
    state_dict = _drop_classifier(model, state_dict, head_names, path)
    _add_batch_counts(model, state_dict, path)
    location = f"{path}, under {found_prefix}" if found_prefix else str(path)
    mismatch = describe_mismatch(model, state_dict)
    if mismatch:
        hint = _suggest(file, required, found_prefix, field)
        raise ModelError(f"the weights in {location} do not fit this model: {mismatch}{hint}", path=path)
    try:
        load_state_dict_strict(model, state_dict, location)
    except ModelError as error:
        raise ModelError(str(error), path=path) from error


def _read_shards(path: Path) -> dict[str, Tensor]:
    """Read the files that the `weight_map` of an index lists, beside it."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} lists no shards: it has no weight_map", path=path)
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(file) for file in weight_map.values()}):
        if Path(name).name != name or name.endswith(INDEX_SUFFIX):
            raise ModelError(f"{path} lists {name!r}, which is not a file beside it", path=path)
        tensors |= read_weights(path.with_name(name)).tensors
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise ModelError(
            f"the shards of {path} lack {len(absent)} of its tensors ({', '.join(absent[:3])})", path=path
        )
    return tensors


def _flatten(content: Mapping[Any, Any], prefix: str, containers: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries by their joined names; record the dictionaries."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            containers.append(f"{prefix}{key}.")
            yield from _flatten(value, f"{prefix}{key}.", containers)


def _describe_content(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return f"keys without tensors: {', '.join(map(str, list(content)[:5]))}" if content else "nothing"


def _remove_excluded(file: WeightsFile, prefix: str, exclude: tuple[str, ...]) -> WeightsFile:
    """Remove tensors whose name in the file, in its dictionary or after the prefix starts as in `exclude`."""
    if not exclude:
        return file
    containers = ("", *file.containers)
    starts = tuple(f"{container}{inner}" for container in containers for inner in dict.fromkeys(("", prefix)))
    excluded = tuple(f"{start}{name}" for start in starts for name in exclude)
    tensors = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(excluded)}
    return WeightsFile(file.path, tensors, file.containers)


def _find_prefix(file: WeightsFile, required: Mapping[str, torch.Size], prefix: str, field: str) -> str:
    """Return the prefix of the model's names in the file: the one that fits, else the nearest.

    Raises:
        ModelError: if several prefixes fit and their weights differ, or no name has the given prefix.
    """
    counts = _count_matches(file, required)
    candidates = list(counts)
    if prefix:
        candidates = [prefix] if any(name.startswith(prefix) for name in file.tensors) else []
        candidates = candidates or [
            f"{container}{prefix}"
            for container in file.containers
            if any(name.startswith(f"{container}{prefix}") for name in file.tensors)
        ]
        if not candidates:
            raise ModelError(
                f"no name in {file.path} starts with `weights_prefix` {prefix}; names are "
                f"{', '.join(list(file.tensors)[:3])}{_suggest(file, required, prefix, field)}",
                field="weights_prefix",
                path=file.path,
            )
    fitting = [candidate for candidate in candidates if _fits(file, required, candidate)]
    distinct = [
        candidate
        for i, candidate in enumerate(fitting)
        if not any(_have_equal_weights(file, required, candidate, earlier) for earlier in fitting[:i])
    ]
    if len(distinct) > 1:
        raise ModelError(_describe_ambiguity(file.path, distinct, field), field=field, path=file.path)
    if distinct:
        return distinct[0]
    if prefix:
        return candidates[0]
    return max(counts, key=lambda candidate: counts[candidate], default="")


def _count_matches(file: WeightsFile, required: Mapping[str, torch.Size]) -> Counter[str]:
    """Count, for each prefix that ends at a dot, the names of the model that follow it in the file."""
    counts = Counter[str]()
    for name in file.tensors:
        starts = (0, *(match.end() for match in re.finditer(r"\.", name)))
        counts.update(name[:start] for start in starts if name[start:] in required)
    return counts


def _fits(file: WeightsFile, required: Mapping[str, torch.Size], prefix: str) -> bool:
    return all(
        f"{prefix}{name}" in file.tensors and file.tensors[f"{prefix}{name}"].shape == shape
        for name, shape in required.items()
    )


def _have_equal_weights(
    file: WeightsFile, required: Mapping[str, torch.Size], first: str, second: str
) -> bool:
    return all(
        file.tensors[f"{first}{name}"].dtype == file.tensors[f"{second}{name}"].dtype
        and torch.equal(file.tensors[f"{first}{name}"], file.tensors[f"{second}{name}"])
        for name in required
    )


def _describe_ambiguity(path: Path, prefixes: Sequence[str], field: str) -> str:
    named = " and ".join(prefix or "names without a prefix" for prefix in prefixes)
    message = f"{path} holds {len(prefixes)} different sets of weights that fit this model: {named}"
    if field == "init":
        return f"{message}; give `init` a file that holds only one of them"
    remedy = f"{message}; set `weights_prefix` to one of them"
    if "" in prefixes:
        others = ", ".join(prefix for prefix in prefixes if prefix)
        remedy += f", or `weights_exclude` to {others} for those without a prefix"
    return remedy


def _suggest(file: WeightsFile, required: Mapping[str, torch.Size], prefix: str, field: str) -> str:
    """Return a hint at the cause of a mismatch."""
    fitting = [each for each in _count_matches(file, required) if each != prefix]
    fitting = [each for each in fitting if _fits(file, required, each)]
    if fitting and field == "weights_prefix":
        return (
            f"; `weights_prefix` {fitting[0]} fits" if fitting[0] else "; without `weights_prefix` they fit"
        )
    if _SHARD.search(file.path.name):
        return f"; the file is one of several shards: give the file *{INDEX_SUFFIX} beside it"
    if not any(f"{prefix}{name}" in file.tensors for name in required):
        return "; is `backbone` the model that these weights are of?"
    if _fits(file, required, prefix):
        return (
            "; give `init` a file without them" if field == "init" else "; set `weights_exclude` to skip them"
        )
    return ""


def _log_ignored(file: WeightsFile, found_prefix: str, prefix: str) -> None:
    ignored = [name for name in file.tensors if not name.startswith(found_prefix)]
    if found_prefix != prefix:
        logger.info("%s: the weights under %s are used", file.path, found_prefix)
    if ignored:
        names = ", ".join(ignored[:3])
        logger.info(
            "%s: %d tensors outside %s are ignored (%s)", file.path, len(ignored), found_prefix, names
        )


def _drop_classifier(
    model: nn.Module, state_dict: dict[str, Tensor], head_names: Sequence[str], path: Path
) -> dict[str, Tensor]:
    """Remove the weights of the classifier, which is not part of an encoder."""
    expected, starts = model.state_dict(), tuple(f"{head_name}." for head_name in head_names)
    dropped = [name for name in state_dict if name.startswith(starts) and name not in expected]
    if dropped:
        logger.info("%s: the classifier is dropped (%s)", path, ", ".join(dropped[:3]))
    return {name: tensor for name, tensor in state_dict.items() if name not in dropped}


def _add_batch_counts(model: nn.Module, state_dict: dict[str, Tensor], path: Path) -> None:
    """Set the batch counts that a file lacks to those of the model, zero."""
    absent = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.endswith(f".{_OPTIONAL_NAME}") and name not in state_dict
    }
    if absent:
        logger.info("%s: %d %s are absent and set to 0", path, len(absent), _OPTIONAL_NAME)
    state_dict.update(absent)
