"""Anything that turns an image into one vector, opened by what it is called: a run, a timm name, a file."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from likewise.artifacts import open_artifact
from likewise.errors import DependencyError, ModelError, close_matches
from likewise.models.backbones import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec, build_backbone, default_stem
from likewise.models.checkpoints import load_encoder, load_state_dict, load_strictly

RUN_ENCODER = "encoder.safetensors"


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How an image is fed: short side resized, centre cut out, channels standardised."""

    size: int
    resize: int
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def crop(self, pixels: np.ndarray) -> np.ndarray:
        """Return the centre: (h, w, 3) uint8 -> (size, size, 3) uint8."""
        image = Image.fromarray(pixels)
        scale = self.resize / min(image.size)
        sides = [max(self.resize, round(side * scale)) for side in image.size]
        resized = image.resize((sides[0], sides[1]), Image.Resampling[self.interpolation.upper()])
        left, top = ((side - self.size) // 2 for side in resized.size)
        return np.asarray(resized.crop((left, top, left + self.size, top + self.size)))

    def standardise(self, crops: Tensor) -> Tensor:
        """Turn crops (b, size, size, 3) uint8 into what a model takes: (b, 3, size, size) float32."""
        images = crops.permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """A frozen image encoder with its own way of being fed.

    Attributes:
        name: What to call it in tables.
        model: Images (b, 3, size, size) -> features (b, width), in evaluation mode.
        transform: How images are fed.
        width: Features an image.
        identity: A fingerprint of its weights.
    """

    name: str
    model: nn.Module
    transform: Transform
    width: int
    identity: str

    def told(self) -> dict[str, Any]:
        """Return what results say of it."""
        return {
            "name": self.name,
            "weights": self.identity,
            "width": self.width,
            "transform": asdict(self.transform),
        }


def open_encoder(target: str, *, backbone: str | None = None, size: int | None = None) -> ImageEncoder:
    """Open an image encoder.

    Args:
        target: A finished run; `timm:NAME` (pretrained weights, from the hub or timm's cache); `random:NAME`
            (the same model with random weights, as a floor); `clip:ARCH/WEIGHTS` (the image tower of an
            open_clip model, WEIGHTS being one of its tags or a file); or a file of weights.
        backbone: For a file that does not say so itself: the timm model its weights are for.
        size: Side of the input in pixels; by default what the model was trained with.

    Raises:
        ModelError: where the target is nothing of these, or weights are missing or do not fit.
    """
    scheme, _, name = target.partition(":")
    if scheme in _SCHEMES and name:
        return _SCHEMES[scheme](name, size)
    path = Path(target)
    if path.is_dir():
        open_artifact(path, "run")
        return _own(path / RUN_ENCODER, path.resolve().name, size)
    if not path.is_file():
        raise ModelError(
            f"{target} is no run, no file of weights, and not timm:NAME, random:NAME or clip:ARCH/WEIGHTS"
        )
    if backbone is None:
        return _own(path, path.stem, size)
    return _foreign(path, backbone, size)


def _own(file: Path, name: str, size: int | None) -> ImageEncoder:
    model, spec, width = load_encoder(file, size)
    return _encoder(name, model, Transform(size=spec.size, resize=spec.size), width)


def _foreign(file: Path, backbone: str, size: int | None) -> ImageEncoder:
    side = 224 if size is None else size
    model, width = build_backbone(BackboneSpec(name=backbone, size=side))
    tensors = load_state_dict(file)
    classifier = timm.get_pretrained_cfg(backbone)
    head = classifier.classifier if classifier is not None else "fc"
    heads = (head,) if isinstance(head, str) else tuple(head or ())
    # A classifier is no part of an encoder; anything else that does not fit is an error.
    tensors = {k: v for k, v in tensors.items() if not k.startswith(tuple(f"{h}." for h in heads))}
    load_strictly(model, tensors, str(file))
    return _encoder(file.stem, model, _timm_transform(model, size), width)


def _pretrained(name: str, size: int | None) -> ImageEncoder:
    model, width = build_backbone(BackboneSpec(name=name, size=_timm_size(name, size)), pretrained=True)
    return _encoder(f"timm:{name}", model, _timm_transform(model, size), width)


def _random(name: str, size: int | None) -> ImageEncoder:
    side = _timm_size(name, size)
    torch.manual_seed(0)
    model, width = build_backbone(BackboneSpec(name=name, size=side, stem=default_stem(side)))
    return _encoder(f"random:{name}", model, Transform(size=side, resize=side), width)


def _clip(target: str, size: int | None) -> ImageEncoder:
    """Open an image tower; where its model squeezes images into a square, the centre is cut out instead."""
    tower: Any = load_clip(target, size).visual
    asked = tower.preprocess_cfg
    sides = asked["size"] if isinstance(asked["size"], (tuple, list)) else (asked["size"],)
    transform = Transform(
        size=sides[0],
        resize=sides[0],
        interpolation=asked["interpolation"],
        mean=tuple(asked["mean"]),
        std=tuple(asked["std"]),
    )
    with torch.no_grad():
        features = tower(torch.zeros(1, 3, sides[0], sides[0]))
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ModelError(f"the image tower of clip:{target} does not give one vector an image")
    return _encoder(f"clip:{target}", tower, transform, features.shape[1])


def load_clip(target: str, size: int | None = None) -> nn.Module:
    """Load both towers of an open_clip model, in evaluation mode.

    Args:
        target: `ARCH/WEIGHTS`: an architecture that open_clip knows, and one of its tags or a file.
        size: Side of the image tower's input in pixels; by default what the model was trained with.

    Raises:
        DependencyError: where open_clip is not installed.
        ModelError: for an unknown architecture or tag, or weights that cannot be loaded.
    """
    try:
        import open_clip
    except ImportError as fault:
        raise DependencyError("clip:… needs open_clip: pip install 'likewise[clip]'") from fault
    arch, _, weights = target.partition("/")
    if arch not in open_clip.list_models():
        raise ModelError(f"unknown CLIP model {arch!r}.{close_matches(arch, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if weights not in tags and not Path(weights).is_file():
        raise ModelError(f"{weights!r} is neither a file nor weights of {arch}; it has {', '.join(tags)}")
    try:
        model = open_clip.create_model(arch, pretrained=weights, force_image_size=size)
    except Exception as fault:  # open_clip and the hub raise a dozen types
        raise ModelError(f"cannot load the CLIP model {target}: {fault}") from fault
    return model.eval().requires_grad_(False)


_SCHEMES: dict[str, Callable[[str, int | None], ImageEncoder]] = {
    "timm": _pretrained,
    "random": _random,
    "clip": _clip,
}


def _timm_size(name: str, size: int | None) -> int:
    if size is not None:
        return size
    config = timm.get_pretrained_cfg(name)
    return 224 if config is None else int(config.input_size[-1])


def _timm_transform(model: nn.Module, size: int | None) -> Transform:
    """Return the transform that a timm model's own configuration asks for."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    side = int(config["input_size"][-1]) if size is None else size
    return Transform(
        size=side,
        resize=round(side / float(config["crop_pct"])),
        interpolation=config["interpolation"]
        if config["interpolation"] in ("bicubic", "bilinear")
        else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _encoder(name: str, model: nn.Module, transform: Transform, width: int) -> ImageEncoder:
    model.eval().requires_grad_(False)
    # The printed structure tells strides and pools apart, which hold no weights.
    digest = hashlib.blake2b(str(model).encode(), digest_size=8)
    for key, tensor in model.state_dict().items():
        digest.update(key.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return ImageEncoder(name=name, model=model, transform=transform, width=width, identity=digest.hexdigest())
