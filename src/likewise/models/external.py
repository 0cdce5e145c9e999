"""Models of torchvision, torch.hub, Hugging Face and open_clip, with their own preprocessing."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from likewise.errors import DependencyError, ModelError, describe_error, did_you_mean
from likewise.models.checkpoints import check_weights_file
from likewise.models.text_tower import TextAlignment, encode_captions
from likewise.models.transforms import EvalTransform

logger = logging.getLogger(__name__)

_HEAD_NAMES = ("fc", "classifier", "heads", "head")
# Pillow's enum values, which Hugging Face's configurations use.
_PIL_INTERPOLATION = {2: "bilinear", 3: "bicubic"}


def load_torchvision_model(
    name: str, image_size: int | None, *, pretrained: bool
) -> tuple[nn.Module, EvalTransform, str]:
    """Build a torchvision classifier without its last layer.

    Returns:
        The model, images (b, 3, image_size, image_size) -> features (b, d); its preprocessing; and the name
        of the removed layer.

    Raises:
        ModelError: for an unknown name, weights that cannot be downloaded, or a model without a classifier.
    """
    model_names = torchvision.models.list_models(module=torchvision.models)
    if name not in model_names:
        raise ModelError(
            f"unknown torchvision model {name!r}.{did_you_mean(name, model_names)}", field="encoder"
        )
    weights = torchvision.models.get_model_weights(name)["DEFAULT"]
    try:
        model = torchvision.models.get_model(name, weights=weights if pretrained else None)
    except Exception as error:  # the download raises a dozen types
        raise ModelError(
            f"cannot load torchvision:{name}: {describe_error(error)}", field="encoder"
        ) from error
    preset: Any = weights.transforms()
    image_size = preset.crop_size[0] if image_size is None else image_size
    transform = EvalTransform(
        image_size=image_size,
        resize_size=round(image_size * preset.resize_size[0] / preset.crop_size[0]),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
    return model, transform, _remove_classifier(model, name)


def _remove_classifier(model: nn.Module, name: str) -> str:
    """Replace the last layer of a classifier by the identity, and return the name of that layer."""
    for head_name in _HEAD_NAMES:
        module: Any = getattr(model, head_name, None)
        if isinstance(module, nn.Linear):
            setattr(model, head_name, nn.Identity())
            return head_name
        layers = list(module.named_children()) if isinstance(module, nn.Sequential) else []
        linear_names = [key for key, layer in layers if isinstance(layer, nn.Linear)]
        if linear_names:
            layer_name = linear_names[-1]
            module.add_module(layer_name, nn.Identity())
            return f"{head_name}.{layer_name}"
    raise ModelError(
        f"torchvision:{name} is not an image classifier with a removable last layer", field="encoder"
    )


def load_torch_hub_model(name: str, image_size: int | None) -> tuple[nn.Module, EvalTransform]:
    """Load `OWNER/REPO/ENTRY` or `FOLDER/ENTRY` by torch.hub; this executes the code of the repository.

    torch.hub does not define the preprocessing, so that of ImageNet models is used: 224 pixels, resized to
    256, normalized.

    Raises:
        ModelError: if there is no such entry, or it is not a model.
    """
    repo, _, entry_point = name.rpartition("/")
    source = "local" if Path(repo).is_dir() else "github"
    try:
        model: Any = torch.hub.load(repo, entry_point, source=source, trust_repo=True)
    except Exception as error:  # the repository's own code
        raise ModelError(
            f"cannot load {entry_point!r} from {repo!r} by torch.hub: {describe_error(error)}",
            field="encoder",
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{entry_point!r} of {repo!r} returns {type(model).__name__}, not a torch module", field="encoder"
        )
    image_size = 224 if image_size is None else image_size
    return model, EvalTransform(image_size=image_size, resize_size=round(image_size / 0.875))


class PooledVisionModel(nn.Module):
    """A Hugging Face vision model that returns one vector per image."""

    def __init__(self, model: Any, *, projected: bool, use_pooler: bool) -> None:
        super().__init__()
        self.model, self.projected, self.use_pooler = model, projected, use_pooler

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (b, d) of images (b, 3, h, w)."""
        if self.projected:
            features = self.model.get_image_features(pixel_values=images)
            return features if isinstance(features, Tensor) else features.pooler_output
        output = self.model(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.use_pooler:
            return pooled.flatten(1)
        hidden_states = output.last_hidden_state
        # The first token of a transformer represents the image; feature maps are averaged.
        return hidden_states[:, 0] if hidden_states.ndim == 3 else hidden_states.mean(dim=(2, 3))


def load_huggingface_model(
    name: str, image_size: int | None
) -> tuple[nn.Module, EvalTransform, TextAlignment | None]:
    """Load a vision model of Hugging Face by its name or folder.

    Its features are the pooled output, else the first token, else the mean over positions. A model with two
    towers (CLIP, SigLIP) returns its projected image features and its text tower.

    Raises:
        ModelError: if it cannot be loaded or lacks weights.
    """
    from transformers import AutoModel

    try:
        model: Any
        model, loading_info = AutoModel.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # the hub raises a dozen types
        raise ModelError(f"cannot load hf:{name}: {describe_error(error)}", field="encoder") from error
    # transformers initializes missing weights at random, without an error; only a pooling layer is optional.
    missing_keys = [key for key in loading_info["missing_keys"] if not key.startswith("pooler.")]
    if missing_keys:
        raise ModelError(
            f"hf:{name} lacks {len(missing_keys)} weights ({', '.join(sorted(missing_keys)[:3])})",
            field="encoder",
        )
    for key in loading_info["missing_keys"]:
        # Not used below; random values would give the same model another fingerprint in every process.
        nn.init.zeros_(model.get_parameter(key))
    if loading_info["unexpected_keys"]:
        dropped = sorted(loading_info["unexpected_keys"])
        logger.info("hf:%s: the weights of its head are dropped (%s)", name, ", ".join(dropped[:3]))
    has_text_tower = hasattr(model, "get_image_features") and hasattr(model, "get_text_features")
    transform = _huggingface_transform(name, image_size)
    return (
        PooledVisionModel(model, projected=has_text_tower, use_pooler=not loading_info["missing_keys"]),
        transform,
        _build_text_alignment(model, name) if has_text_tower else None,
    )


def _huggingface_transform(name: str, image_size: int | None) -> EvalTransform:
    from transformers import ImageProcessingMixin

    try:
        processor_config, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except Exception as error:  # the hub raises a dozen types
        raise ModelError(
            f"hf:{name} has no readable preprocessor_config.json: {describe_error(error)}", field="encoder"
        ) from error
    short_side = _parse_size(processor_config.get("size"), 224)
    crop_size = (
        _parse_size(processor_config.get("crop_size"), short_side)
        if processor_config.get("do_center_crop", False)
        else short_side
    )
    image_size = crop_size if image_size is None else image_size
    default = EvalTransform(image_size=image_size, resize_size=round(image_size * short_side / crop_size))
    return EvalTransform(
        image_size=default.image_size,
        resize_size=default.resize_size,
        interpolation=_PIL_INTERPOLATION.get(processor_config.get("resample", 3), "bicubic"),
        mean=tuple(processor_config.get("image_mean") or default.mean),
        std=tuple(processor_config.get("image_std") or default.std),
    )


def _parse_size(size: int | dict[str, int] | None, default: int) -> int:
    if isinstance(size, dict):
        return size.get("shortest_edge", size.get("height", default))
    return default if size is None else size


def _build_text_alignment(model: Any, name: str) -> TextAlignment:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub raises a dozen types
        raise ModelError(
            f"cannot load the tokenizer of hf:{name}: {describe_error(error)}", field="encoder"
        ) from error

    def encode_tokens(tokens: Any) -> Tensor:
        features = model.get_text_features(**tokens.to(model.device))
        return features if isinstance(features, Tensor) else features.pooler_output

    def encode_text(captions: Sequence[str]) -> Tensor:
        return encode_captions(
            encode_tokens,
            lambda batch: tokenizer(batch, padding=True, truncation=True, return_tensors="pt"),
            captions,
        )

    return TextAlignment(encode_text=encode_text, project_image=lambda features: features)


def load_clip(name: str, image_size: int | None = None) -> nn.Module:
    """Load both towers of an open_clip model, in evaluation mode.

    Args:
        name: `ARCH/WEIGHTS`: an architecture of open_clip, and one of its tags or a file.
        image_size: Side of the image tower's input in pixels; defaults to that of training.

    Raises:
        DependencyError: if open_clip is not installed.
        ModelError: for an unknown architecture or tag, or weights that cannot be loaded.
    """
    try:
        import open_clip
    except ImportError as error:
        raise DependencyError("`clip:` encoders need open_clip: pip install 'likewise[clip]'") from error
    arch, _, weights = name.partition("/")
    if arch not in open_clip.list_models():
        raise ModelError(
            f"unknown CLIP model {arch!r}.{did_you_mean(arch, open_clip.list_models())}", field="encoder"
        )
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if weights not in tags and not Path(weights).is_file():
        raise ModelError(
            f"{weights!r} is neither a file nor a tag of {arch}; its tags: {', '.join(tags)}", field="encoder"
        )
    if weights not in tags:
        check_weights_file(Path(weights))
    try:
        model = open_clip.create_model(arch, pretrained=weights, force_image_size=image_size)
    except Exception as error:  # open_clip and the hub raise a dozen types
        raise ModelError(
            f"cannot load the CLIP model {name}: {describe_error(error)}", field="encoder"
        ) from error
    return model.eval().requires_grad_(False)
