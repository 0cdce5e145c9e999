"""Encoders that other libraries keep, torchvision, torch.hub and Hugging Face, fed as they ask to be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from likewise.errors import ModelError, close_matches
from likewise.models.text_tower import Language, embed_captions
from likewise.models.transforms import Transform

_HEADS = ("fc", "classifier", "heads", "head")
# Pillow's numbers, which Hugging Face's configurations use.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}


def torchvision_model(name: str, size: int | None, *, pretrained: bool) -> tuple[nn.Module, Transform, str]:
    """Build a torchvision classifier without its last layer.

    Returns:
        Images (b, 3, side, side) -> features (b, width); how it is fed; and what its last layer was called.

    Raises:
        ModelError: for an unknown name, weights that cannot be fetched, or a model that is no classifier.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(f"unknown torchvision model {name!r}.{close_matches(name, known)}")
    weights = torchvision.models.get_model_weights(name)["DEFAULT"]
    try:
        model = torchvision.models.get_model(name, weights=weights if pretrained else None)
    except Exception as fault:  # the download raises a dozen types
        raise ModelError(f"cannot load torchvision:{name}: {fault}") from fault
    asked: Any = weights.transforms()
    side = asked.crop_size[0] if size is None else size
    transform = Transform(
        size=side,
        resize=round(side * asked.resize_size[0] / asked.crop_size[0]),
        interpolation=asked.interpolation.value,
        mean=tuple(asked.mean),
        std=tuple(asked.std),
    )
    return model, transform, _behead(model, name)


def _behead(model: nn.Module, name: str) -> str:
    """Put nothing in the place of a classifier's last layer, and return what that was called."""
    for head in _HEADS:
        part = getattr(model, head, None)
        if isinstance(part, nn.Linear):
            setattr(model, head, nn.Identity())
            return head
        if isinstance(part, nn.Sequential):
            last = max(i for i, layer in enumerate(part) if isinstance(layer, nn.Linear))
            inner = [key for key, _ in part.named_children()][last]
            part.add_module(inner, nn.Identity())
            return f"{head}.{inner}"
    raise ModelError(f"torchvision:{name} is no image classifier whose last layer can be taken off")


def hub_model(name: str, size: int | None) -> tuple[nn.Module, Transform]:
    """Load `OWNER/REPO/ENTRY` or `FOLDER/ENTRY` by torch.hub; this runs the code that stands there.

    Nothing in torch.hub says how a model is fed: unless it carries a timm configuration, it is fed as models
    for ImageNet usually are.

    Raises:
        ModelError: where there is no such entry, or it is no model.
    """
    where, _, entry = name.rpartition("/")
    source = "local" if Path(where).is_dir() else "github"
    try:
        model: Any = torch.hub.load(where, entry, source=source, trust_repo=True)
    except Exception as fault:  # somebody else's code
        raise ModelError(f"cannot load {entry!r} from {where!r} by torch.hub: {fault}") from fault
    if not isinstance(model, nn.Module):
        raise ModelError(f"{entry!r} of {where!r} gives {type(model).__name__}, no torch module")
    side = 224 if size is None else size
    return model, Transform(size=side, resize=round(side / 0.875))


class _Pooled(nn.Module):
    """A Hugging Face vision model that gives one vector an image."""

    def __init__(self, model: Any, *, joint: bool, pooler: bool) -> None:
        super().__init__()
        self.model, self.joint, self.pooler = model, joint, pooler

    def forward(self, images: Tensor) -> Tensor:
        if self.joint:
            found = self.model.get_image_features(pixel_values=images)
            return found if isinstance(found, Tensor) else found.pooler_output
        output = self.model(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.pooler:
            return pooled.flatten(1)
        last = output.last_hidden_state
        # The first token of a transformer stands for the whole image; maps are averaged.
        return last[:, 0] if last.ndim == 3 else last.mean(dim=(2, 3))


def huggingface_model(name: str, size: int | None) -> tuple[nn.Module, Transform, Language | None]:
    """Load a vision model of Hugging Face by its name or folder: pooled output, else first token, else mean.

    A model with an image and a text tower (CLIP, SigLIP) gives its projected image features, and its
    language side.

    Raises:
        ModelError: where it cannot be loaded, or lacks weights.
    """
    from transformers import AutoModel

    try:
        model: Any
        model, told = AutoModel.from_pretrained(name, output_loading_info=True)
    except Exception as fault:  # the hub raises a dozen types
        raise ModelError(f"cannot load hf:{name}: {str(fault).splitlines()[0]}") from fault
    # What a file lacks is filled with random numbers and no error; only a pooling layer can be done without.
    missing = [key for key in told["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise ModelError(f"hf:{name} lacks {len(missing)} weights ({', '.join(sorted(missing)[:3])})")
    joint = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    transform = _huggingface_transform(name, size)
    return (
        _Pooled(model, joint=joint, pooler=not told["missing_keys"]),
        transform,
        _language(model, name) if joint else None,
    )


def _huggingface_transform(name: str, size: int | None) -> Transform:
    from transformers import ImageProcessingMixin

    try:
        asked, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError as fault:
        raise ModelError(f"hf:{name} does not say how images are fed (preprocessor_config.json)") from fault
    short = _side(asked.get("size"), 224)
    side = _side(asked.get("crop_size"), short) if asked.get("do_center_crop", False) else short
    given = side if size is None else size
    default = Transform(size=given, resize=round(given * short / side))
    return Transform(
        size=default.size,
        resize=default.resize,
        interpolation=_RESAMPLE.get(asked.get("resample", 3), "bicubic"),
        mean=tuple(asked.get("image_mean") or default.mean),
        std=tuple(asked.get("image_std") or default.std),
    )


def _side(asked: int | dict[str, int] | None, usual: int) -> int:
    if isinstance(asked, dict):
        return asked.get("shortest_edge", asked.get("height", usual))
    return usual if asked is None else asked


def _language(model: Any, name: str) -> Language:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(name)

    def tower(tokens: Any) -> Tensor:
        found = model.get_text_features(**tokens)
        return found if isinstance(found, Tensor) else found.pooler_output

    def embed(captions: Sequence[str]) -> Tensor:
        return embed_captions(
            tower, lambda part: tokenizer(part, padding=True, truncation=True, return_tensors="pt"), captions
        )

    return Language(embed=embed, project=lambda features: features)
