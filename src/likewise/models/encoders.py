"""Anything that turns an image into one vector, opened by what it is called: a run, a timm name, a file."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from likewise.artifacts import open_artifact
from likewise.errors import DependencyError, ModelError, close_matches
from likewise.models.backbones import BackboneSpec, build_backbone, default_stem
from likewise.models.checkpoints import load_encoder, load_state_dict, load_strictly
from likewise.models.external import hub_model, huggingface_model, torchvision_model
from likewise.models.text_tower import Language, embed_captions, load_language
from likewise.models.transforms import Transform

RUN_ENCODER = "encoder.safetensors"
# Pixels of a batch. On a processor the maps of a larger one outgrow the caches, and memory is taken from the
# system and given back at every layer: 4 images of 224 px at a time go four times faster than 64.
_PIXELS = {"cpu": 4 * 224**2, "cuda": 256 * 224**2}


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """A frozen image encoder with its own way of being fed.

    Attributes:
        name: What to call it in tables.
        model: Images (b, 3, size, size) -> features (b, width), in evaluation mode.
        transform: How images are fed.
        width: Features an image.
        identity: A fingerprint of its weights.
        language: How captions come into one space with its features; None where it has no text tower.
    """

    name: str
    model: nn.Module
    transform: Transform
    width: int
    identity: str
    language: Language | None = None

    def at_once(self, device: torch.device) -> int:
        """Return how many images of its size a forward pass on a device should hold, to be fast."""
        return max(1, _PIXELS.get(device.type, _PIXELS["cpu"]) // self.transform.size**2)

    def told(self) -> dict[str, Any]:
        """Return what results say of it."""
        return {
            "name": self.name,
            "weights": self.identity,
            "width": self.width,
            "transform": asdict(self.transform),
        }


KINDS = "timm:NAME, random:NAME, torchvision:NAME, clip:ARCH/WEIGHTS, hub:OWNER/REPO/ENTRY or hf:NAME"


@torch.no_grad()
def operations(encoder: ImageEncoder) -> int | None:
    """Count the multiplications and additions that one image takes; None where torch cannot count them."""
    from torch.utils.flop_counter import FlopCounterMode

    side = encoder.transform.size
    place = next(iter(encoder.model.parameters()), torch.empty(0)).device
    with FlopCounterMode(display=False) as counter:
        encoder.model(torch.zeros(1, 3, side, side, device=place))
    return counter.get_total_flops() or None


def open_encoder(
    target: str,
    *,
    backbone: str | None = None,
    size: int | None = None,
    prefix: str = "",
    drop: Sequence[str] = (),
) -> ImageEncoder:
    """Open an image encoder.

    Args:
        target: A finished run; `timm:NAME` or `torchvision:NAME` (pretrained weights, from their hubs or
            caches); `random:NAME` (a timm model with random weights, as a floor); `clip:ARCH/WEIGHTS` (an
            open_clip model, WEIGHTS being one of its tags or a file); `hub:OWNER/REPO/ENTRY` or
            `hub:FOLDER/ENTRY` (torch.hub, which runs the repository's code); `hf:NAME` (a vision model of
            Hugging Face, or a folder of one); or a file of weights.
        backbone: For a file that does not say so itself: the timm model its weights are for, or
            `torchvision:NAME`.
        size: Side of the input in pixels; by default what the model was trained with.
        prefix: For such a file: what stands before the names of the backbone's weights, as in
            `module.encoder_q.`; weights without it are left out.
        drop: For such a file: beginnings of names that are left out. Everything else must fit.

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
        raise ModelError(f"{target} is no run, no file of weights, and not {KINDS}")
    if backbone is None:
        return _own(path, path.stem, size)
    return _foreign(path, backbone, size, prefix, tuple(drop))


def _own(file: Path, name: str, size: int | None) -> ImageEncoder:
    model, spec, width = load_encoder(file, size)
    transform = Transform(size=spec.size, resize=spec.size)
    return _encoder(name, model, transform, width, load_language(file))


def _foreign(file: Path, backbone: str, size: int | None, prefix: str, drop: tuple[str, ...]) -> ImageEncoder:
    tensors = load_state_dict(file)
    kept = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(drop)
    }
    scheme, _, name = backbone.partition(":")
    if scheme == "torchvision":
        model, transform, head = torchvision_model(name, size, pretrained=False)
        heads = (head,)
    else:
        model, _ = build_backbone(BackboneSpec(name=backbone, size=224 if size is None else size))
        transform = _timm_transform(model, size)
        classifier = timm.get_pretrained_cfg(backbone)
        named = classifier.classifier if classifier is not None else "fc"
        heads = (named,) if isinstance(named, str) else tuple(named or ())
    # A classifier is no part of an encoder; anything else that does not fit is an error.
    kept = {k: v for k, v in kept.items() if not k.startswith(tuple(f"{h}." for h in heads))}
    try:
        load_strictly(model, kept, str(file))
    except ModelError as fault:
        raise ModelError(f"{fault}{_likely_prefix(model, tensors, prefix)}") from fault
    return _encoder(file.stem, model, transform, _width(model, transform.size))


def _likely_prefix(model: nn.Module, tensors: dict[str, Tensor], tried: str) -> str:
    """Say which prefix the names in a file have before those of the model."""
    first = next(iter(model.state_dict()))
    found = [k.removesuffix(first) for k in tensors if k.endswith(first) and k.removesuffix(first) != tried]
    return f"; perhaps they are those of --prefix {found[0]}" if found and found[0] else ""


def _width(model: nn.Module, side: int) -> int:
    with torch.no_grad():
        features = model.eval()(torch.zeros(1, 3, side, side))
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ModelError("this model does not give one vector an image")
    return features.shape[1]


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
    model: Any = load_clip(target, size)
    import open_clip

    tower, tokenizer = model.visual, open_clip.get_tokenizer(target.partition("/")[0])
    asked = tower.preprocess_cfg
    sides = asked["size"] if isinstance(asked["size"], (tuple, list)) else (asked["size"],)
    transform = Transform(
        size=sides[0],
        resize=sides[0],
        interpolation=asked["interpolation"],
        mean=tuple(asked["mean"]),
        std=tuple(asked["std"]),
    )
    language = Language(
        embed=lambda captions: embed_captions(model.encode_text, tokenizer, captions),
        project=lambda features: features,
    )
    return _encoder(f"clip:{target}", tower, transform, _width(tower, sides[0]), language)


def _torchvision(name: str, size: int | None) -> ImageEncoder:
    model, transform, _ = torchvision_model(name, size, pretrained=True)
    return _encoder(f"torchvision:{name}", model, transform, _width(model, transform.size))


def _hub(name: str, size: int | None) -> ImageEncoder:
    model, transform = hub_model(name, size)
    return _encoder(f"hub:{name}", model, transform, _width(model, transform.size))


def _huggingface(name: str, size: int | None) -> ImageEncoder:
    model, transform, language = huggingface_model(name, size)
    return _encoder(f"hf:{name}", model, transform, _width(model, transform.size), language)


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
    "torchvision": _torchvision,
    "hub": _hub,
    "hf": _huggingface,
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


def _encoder(
    name: str, model: nn.Module, transform: Transform, width: int, language: Language | None = None
) -> ImageEncoder:
    model.eval().requires_grad_(False)
    # The printed structure tells strides and pools apart, which hold no weights.
    digest = hashlib.blake2b(str(model).encode(), digest_size=8)
    for key, tensor in model.state_dict().items():
        digest.update(key.encode() + str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return ImageEncoder(
        name=name,
        model=model,
        transform=transform,
        width=width,
        identity=digest.hexdigest(),
        language=language,
    )
