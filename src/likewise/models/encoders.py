"""Anything that turns an image into one vector, opened by what it is called: a run, a timm name, a file."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from likewise.artifacts import Artifact
from likewise.errors import DependencyError, ModelError, did_you_mean
from likewise.models.backbones import BackboneConfig, build_backbone, default_stem
from likewise.models.checkpoints import load_backbone, load_state_dict, load_state_dict_strict
from likewise.models.external import load_huggingface_model, load_torch_hub_model, load_torchvision_model
from likewise.models.text_tower import TextAlignment, encode_captions, load_text_alignment
from likewise.models.transforms import EvalTransform

ENCODER_FILE = "encoder.safetensors"
# Pixels of a batch. On a processor the maps of a larger one outgrow the caches, and memory is taken from the
# system and given back at every layer: 4 images of 224 px at a time go four times faster than 64.
_PIXELS_PER_BATCH = {"cpu": 4 * 224**2, "cuda": 256 * 224**2}


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """A frozen image encoder with its own way of being fed.

    Attributes:
        name: What to call it in tables.
        model: Images (b, 3, size, size) -> features (b, width), in evaluation mode.
        transform: How images are fed.
        feature_dim: Features an image.
        fingerprint: A fingerprint of its weights.
        text_alignment: How captions come into one space with its features; None where it has no text tower.
    """

    name: str
    model: nn.Module
    transform: EvalTransform
    feature_dim: int
    fingerprint: str
    text_alignment: TextAlignment | None = None

    def inference_batch_size(self, device: torch.device) -> int:
        """Return how many images of its size a forward pass on a device should hold, to be fast."""
        return max(
            1, _PIXELS_PER_BATCH.get(device.type, _PIXELS_PER_BATCH["cpu"]) // self.transform.image_size**2
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what results say of it."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "feature_dim": self.feature_dim,
            "transform": asdict(self.transform),
        }


ENCODER_FORMATS = (
    "timm:NAME, random:NAME, torchvision:NAME, clip:ARCH/WEIGHTS, hub:OWNER/REPO/ENTRY or hf:NAME"
)


@torch.no_grad()
def count_flops(encoder: ImageEncoder) -> int | None:
    """Count the multiplications and additions that one image takes; None where torch cannot count them."""
    from torch.utils.flop_counter import FlopCounterMode

    image_size = encoder.transform.image_size
    device = next(iter(encoder.model.parameters()), torch.empty(0)).device
    with FlopCounterMode(display=False) as counter:
        encoder.model(torch.zeros(1, 3, image_size, image_size, device=device))
    return counter.get_total_flops() or None


def load_encoder(
    name_or_path: str,
    *,
    backbone: str | None = None,
    image_size: int | None = None,
    prefix: str = "",
    exclude: Sequence[str] = (),
) -> ImageEncoder:
    """Open an image encoder.

    Args:
        name_or_path: A finished run; `timm:NAME` or `torchvision:NAME` (pretrained weights, from their hubs
            or
            caches); `random:NAME` (a timm model with random weights, as a floor); `clip:ARCH/WEIGHTS` (an
            open_clip model, WEIGHTS being one of its tags or a file); `hub:OWNER/REPO/ENTRY` or
            `hub:FOLDER/ENTRY` (torch.hub, which runs the repository's code); `hf:NAME` (a vision model of
            Hugging Face, or a folder of one); or a file of weights.
        backbone: For a file that does not say so itself: the timm model its weights are for, or
            `torchvision:NAME`.
        image_size: Side of the input in pixels; by default what the model was trained with.
        prefix: For such a file: what stands before the names of the backbone's weights, as in
            `module.encoder_q.`; weights without it are left out.
        exclude: For such a file: beginnings of names that are left out. Everything else must fit.

    Raises:
        ModelError: where the target is nothing of these, or weights are missing or do not fit.
    """
    scheme, _, name = name_or_path.partition(":")
    if scheme in _LOADERS and name:
        return _LOADERS[scheme](name, image_size)
    path = Path(name_or_path)
    if path.is_dir():
        Artifact.open(path, "run")
        return _load_saved_encoder(path / ENCODER_FILE, path.resolve().name, image_size)
    if not path.is_file():
        raise ModelError(f"{name_or_path} is no run, no file of weights, and not {ENCODER_FORMATS}")
    if backbone is None:
        return _load_saved_encoder(path, path.stem, image_size)
    return _load_weights(path, backbone, image_size, prefix, tuple(exclude))


def _load_saved_encoder(path: Path, name: str, image_size: int | None) -> ImageEncoder:
    model, config, feature_dim = load_backbone(path, image_size)
    transform = EvalTransform(image_size=config.image_size, resize_size=config.image_size)
    return _build_encoder(name, model, transform, feature_dim, load_text_alignment(path))


def _load_weights(
    path: Path, backbone: str, image_size: int | None, prefix: str, exclude: tuple[str, ...]
) -> ImageEncoder:
    tensors = load_state_dict(path)
    state_dict = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(exclude)
    }
    scheme, _, name = backbone.partition(":")
    if scheme == "torchvision":
        model, transform, head_name = load_torchvision_model(name, image_size, pretrained=False)
        head_names = (head_name,)
    else:
        model, _ = build_backbone(
            BackboneConfig(name=backbone, image_size=224 if image_size is None else image_size)
        )
        transform = _timm_transform(model, image_size)
        pretrained_cfg = timm.get_pretrained_cfg(backbone)
        classifier = pretrained_cfg.classifier if pretrained_cfg is not None else "fc"
        head_names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    # A classifier is no part of an encoder; anything else that does not fit is an error.
    state_dict = {
        k: v
        for k, v in state_dict.items()
        if not k.startswith(tuple(f"{head_name}." for head_name in head_names))
    }
    try:
        load_state_dict_strict(model, state_dict, str(path))
    except ModelError as error:
        raise ModelError(f"{error}{_suggest_prefix(model, tensors, prefix)}") from error
    return _build_encoder(path.stem, model, transform, _feature_dim(model, transform.image_size))


def _suggest_prefix(model: nn.Module, tensors: dict[str, Tensor], prefix: str) -> str:
    """Say which prefix the names in a file have before those of the model."""
    first_key = next(iter(model.state_dict()))
    prefixes = [
        key.removesuffix(first_key)
        for key in tensors
        if key.endswith(first_key) and key.removesuffix(first_key) != prefix
    ]
    return f"; perhaps they are those of --prefix {prefixes[0]}" if prefixes and prefixes[0] else ""


def _feature_dim(model: nn.Module, image_size: int) -> int:
    with torch.no_grad():
        features = model.eval()(torch.zeros(1, 3, image_size, image_size))
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ModelError("this model does not give one vector an image")
    return features.shape[1]


def _load_timm(name: str, image_size: int | None) -> ImageEncoder:
    model, feature_dim = build_backbone(
        BackboneConfig(name=name, image_size=_timm_image_size(name, image_size)), pretrained=True
    )
    return _build_encoder(f"timm:{name}", model, _timm_transform(model, image_size), feature_dim)


def _load_random(name: str, image_size: int | None) -> ImageEncoder:
    image_size = _timm_image_size(name, image_size)
    torch.manual_seed(0)
    model, feature_dim = build_backbone(
        BackboneConfig(name=name, image_size=image_size, stem=default_stem(image_size))
    )
    return _build_encoder(
        f"random:{name}", model, EvalTransform(image_size=image_size, resize_size=image_size), feature_dim
    )


def _load_clip_encoder(name: str, image_size: int | None) -> ImageEncoder:
    """Open an image tower; where its model squeezes images into a square, the centre is cut out instead."""
    model: Any = load_clip(name, image_size)
    import open_clip

    tower, tokenizer = model.visual, open_clip.get_tokenizer(name.partition("/")[0])
    preprocess_cfg = tower.preprocess_cfg
    input_size = (
        preprocess_cfg["size"]
        if isinstance(preprocess_cfg["size"], (tuple, list))
        else (preprocess_cfg["size"],)
    )
    transform = EvalTransform(
        image_size=input_size[0],
        resize_size=input_size[0],
        interpolation=preprocess_cfg["interpolation"],
        mean=tuple(preprocess_cfg["mean"]),
        std=tuple(preprocess_cfg["std"]),
    )
    text_alignment = TextAlignment(
        encode_text=lambda captions: encode_captions(model.encode_text, tokenizer, captions),
        project_image=lambda features: features,
    )
    return _build_encoder(
        f"clip:{name}", tower, transform, _feature_dim(tower, input_size[0]), text_alignment
    )


def _load_torchvision(name: str, image_size: int | None) -> ImageEncoder:
    model, transform, _ = load_torchvision_model(name, image_size, pretrained=True)
    return _build_encoder(f"torchvision:{name}", model, transform, _feature_dim(model, transform.image_size))


def _load_torch_hub(name: str, image_size: int | None) -> ImageEncoder:
    model, transform = load_torch_hub_model(name, image_size)
    return _build_encoder(f"hub:{name}", model, transform, _feature_dim(model, transform.image_size))


def _load_huggingface(name: str, image_size: int | None) -> ImageEncoder:
    model, transform, text_alignment = load_huggingface_model(name, image_size)
    return _build_encoder(
        f"hf:{name}", model, transform, _feature_dim(model, transform.image_size), text_alignment
    )


def load_clip(name: str, image_size: int | None = None) -> nn.Module:
    """Load both towers of an open_clip model, in evaluation mode.

    Args:
        name: `ARCH/WEIGHTS`: an architecture that open_clip knows, and one of its tags or a file.
        image_size: Side of the image tower's input in pixels; by default what the model was trained with.

    Raises:
        DependencyError: where open_clip is not installed.
        ModelError: for an unknown architecture or tag, or weights that cannot be loaded.
    """
    try:
        import open_clip
    except ImportError as error:
        raise DependencyError("clip:… needs open_clip: pip install 'likewise[clip]'") from error
    arch, _, weights = name.partition("/")
    if arch not in open_clip.list_models():
        raise ModelError(f"unknown CLIP model {arch!r}.{did_you_mean(arch, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if weights not in tags and not Path(weights).is_file():
        raise ModelError(f"{weights!r} is neither a file nor weights of {arch}; it has {', '.join(tags)}")
    try:
        model = open_clip.create_model(arch, pretrained=weights, force_image_size=image_size)
    except Exception as error:  # open_clip and the hub raise a dozen types
        raise ModelError(f"cannot load the CLIP model {name}: {error}") from error
    return model.eval().requires_grad_(False)


_LOADERS: dict[str, Callable[[str, int | None], ImageEncoder]] = {
    "timm": _load_timm,
    "random": _load_random,
    "clip": _load_clip_encoder,
    "torchvision": _load_torchvision,
    "hub": _load_torch_hub,
    "hf": _load_huggingface,
}


def _timm_image_size(name: str, image_size: int | None) -> int:
    if image_size is not None:
        return image_size
    pretrained_cfg = timm.get_pretrained_cfg(name)
    return 224 if pretrained_cfg is None else int(pretrained_cfg.input_size[-1])


def _timm_transform(model: nn.Module, image_size: int | None) -> EvalTransform:
    """Return the transform that a timm model's own configuration asks for."""
    data_config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    image_size = int(data_config["input_size"][-1]) if image_size is None else image_size
    return EvalTransform(
        image_size=image_size,
        resize_size=round(image_size / float(data_config["crop_pct"])),
        interpolation=data_config["interpolation"]
        if data_config["interpolation"] in ("bicubic", "bilinear")
        else "bicubic",
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
    )


def _build_encoder(
    name: str,
    model: nn.Module,
    transform: EvalTransform,
    feature_dim: int,
    text_alignment: TextAlignment | None = None,
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
        feature_dim=feature_dim,
        fingerprint=digest.hexdigest(),
        text_alignment=text_alignment,
    )
