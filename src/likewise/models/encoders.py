"""Image encoders: runs, weight files and models of other libraries, loaded by name and used by `encode`."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from likewise.artifacts import MANIFEST, Artifact, config_hash
from likewise.data.config import BandSelection
from likewise.data.dataset import CaptionDataset, ImageRef
from likewise.data.images import (
    UnreadableImageError,
    check_image_size,
    convert_image,
    read_image,
)
from likewise.errors import (
    InvalidInputError,
    ModelError,
)
from likewise.models.adapter import AdaptedModel, FeatureAdapter, load_adapter
from likewise.models.backbones import (
    BackboneConfig,
    build_backbone,
    check_input_size,
    classifier_names,
    default_stem,
)
from likewise.models.checkpoints import (
    IMAGE_PROJECTION_PREFIX,
    TEXT_TOWER_PREFIX,
    load_backbone,
    load_encoder_file,
    load_state_dict_strict,
    parse_bands,
    without_prefixes,
)
from likewise.models.external import (
    load_clip,
    load_huggingface_model,
    load_torch_hub_model,
    load_torchvision_model,
)
from likewise.models.text_tower import TextAlignment, encode_captions, load_text_alignment
from likewise.models.transforms import EvalTransform
from likewise.models.weights import load_weights
from likewise.parallel import default_num_workers, prefetch_map, resolve_device
from likewise.progress import NULL_PROGRESS, Progress
from likewise.run_directory import RunDirectory

logger = logging.getLogger(__name__)

ENCODER_FORMATS = (
    "timm:NAME, random:NAME, torchvision:NAME, clip:ARCH/WEIGHTS, hub:OWNER/REPO/ENTRY or hf:NAME"
)
# Pixels per batch. On a CPU the feature maps of larger batches exceed the caches, and memory is allocated and
# freed at every layer: batches of 4 images of 224 px are four times faster than batches of 64.
_PIXELS_PER_BATCH = {"cpu": 4 * 224**2, "cuda": 256 * 224**2}

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A path, a Pillow image, or pixels (h, w, 3) uint8."""
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """A frozen image encoder with its preprocessing."""

    name: str
    """Name in tables."""
    model: nn.Module
    """Images (b, 3, image_size, image_size) -> features (b, d), in evaluation mode."""
    transform: EvalTransform
    """Preprocessing: resize, center crop and normalization."""
    feature_dim: int
    """Number of features per image, d."""
    fingerprint: str
    """Hash of the weights and the structure of the model."""
    text_alignment: TextAlignment | None = None
    """Text tower and projections into the joint space; None for encoders without a text tower."""
    backbone_config: BackboneConfig | None = None
    """Configuration that builds the model without weights; None for models that timm does not build alone."""
    load_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `load_encoder` that load this encoder again."""
    structure_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `load_encoder` that load an encoder of this structure, perhaps with other weights."""

    @property
    def key(self) -> str:
        """Hash of all that the features depend on: weights, structure and preprocessing."""
        return config_hash("encoder", asdict(self.transform), {"model": self.fingerprint})

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(iter(self.model.parameters()), torch.empty(0)).device

    def encode(
        self,
        images: ImageInput | Iterable[ImageInput] | CaptionDataset,
        *,
        batch_size: int | None = None,
        device: str | None = None,
        num_workers: int | None = None,
        progress: Progress = NULL_PROGRESS,
    ) -> Float[Tensor, "n d"]:
        """Compute the features of images.

        Args:
            images: Paths, Pillow images, or pixels (h, w, 3) uint8; a single one of these; or a dataset.
            batch_size: Images per forward pass; defaults to a fast one for the device and image size.
            device: Device of the computation; defaults to that of the model.
            num_workers: Threads that read images; defaults to the number of cores.
            progress: Progress reporter.

        Returns:
            Features (n, d) float32 on the CPU, in the order of `images`.

        Raises:
            UnreadableImageError: for the first image that is missing, damaged or refused, with its `path`.
            InvalidInputError: for pixels of another shape or type.
        """
        if isinstance(images, str | os.PathLike) and Path(images).is_dir():
            images = CaptionDataset(os.fspath(images))
        if isinstance(images, CaptionDataset):
            num_images, root = len(images), images.root
            inputs: Iterable[ImageInput | ImageRef] = (sample.image for sample in images)
        else:
            inputs, root = _as_list(images), Path()
            num_images = len(inputs)
        features, start = torch.empty(num_images, self.feature_dim), 0
        batches = self.encode_batches(
            inputs, root=root, batch_size=batch_size, device=device, num_workers=num_workers
        )
        with progress.task("encoding", num_images, "images") as bar:
            for batch_features, errors in batches:
                for index, error in enumerate(errors, start):
                    if error is not None:
                        raise UnreadableImageError(
                            f"{error.path or f'image {index}'}: {error}", path=error.path
                        ) from error
                features[start : start + len(batch_features)] = torch.from_numpy(batch_features)
                start += len(batch_features)
                bar.update(len(batch_features))
        return features

    def encode_batches(
        self,
        images: Iterable[ImageInput | ImageRef],
        *,
        root: Path = Path(),
        batch_size: int | None = None,
        device: str | None = None,
        num_workers: int | None = None,
    ) -> Iterator[tuple[Float[np.ndarray, "b d"], list[UnreadableImageError | None]]]:
        """Compute features batch by batch, with constant memory.

        Args:
            images: Paths, Pillow images, pixels, or references into a dataset.
            root: Folder of relative paths.
            batch_size: Images per forward pass, as in `encode`.
            device: Device of the computation, as in `encode`.
            num_workers: Threads that read images, as in `encode`.

        Yields:
            Features (b, d) float32, NaN for unreadable images; and for each image its error or None.

        Raises:
            ModelError: if the encoder returns NaN or infinity for a readable image.
        """
        torch_device = self.device if device is None else torch.device(resolve_device(device))
        self.model.to(torch_device).to(memory_format=torch.channels_last)
        batch_size = self.inference_batch_size(torch_device) if batch_size is None else batch_size
        num_workers = default_num_workers() if num_workers is None else num_workers
        for crops, errors in prefetch_map(
            lambda batch: self._load_crops(batch, root), _batched(images, batch_size), num_workers
        ):
            features = self._forward(crops, torch_device)
            is_readable = np.array([error is None for error in errors])
            num_nonfinite = int((~np.isfinite(features[is_readable]).all(axis=1)).sum())
            if num_nonfinite:
                precision = " in half precision" if torch_device.type == "cuda" else ""
                raise ModelError(
                    f"the encoder {self.name} returns NaN or infinity{precision} for {num_nonfinite} of "
                    f"{is_readable.sum()} readable images of a batch; its weights are damaged, or too large "
                    "for this precision",
                    field="encoder",
                )
            features[~is_readable] = np.nan
            yield features, errors

    def inference_batch_size(self, device: torch.device) -> int:
        """Return the number of images per forward pass that is fast on a device."""
        num_pixels = _PIXELS_PER_BATCH.get(device.type, _PIXELS_PER_BATCH["cpu"])
        return max(1, num_pixels // self.transform.image_size**2)

    def to_dict(self) -> dict[str, Any]:
        """Return the description of the encoder in results: name, fingerprint, feature_dim, transform."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "feature_dim": self.feature_dim,
            "transform": asdict(self.transform),
        }

    def _load_crops(
        self, images: Sequence[ImageInput | ImageRef], root: Path
    ) -> tuple[np.ndarray, list[UnreadableImageError | None]]:
        """Return center crops (b, image_size, image_size, 3) uint8, black for unreadable images."""
        image_size = self.transform.image_size
        crops = np.zeros((len(images), image_size, image_size, 3), np.uint8)
        errors: list[UnreadableImageError | None] = [None] * len(images)
        for i, image in enumerate(images):
            try:
                pixels = _load_pixels(image, root, self.transform.resize_size, self.transform.bands)
                crops[i] = self.transform.center_crop(pixels)
            except UnreadableImageError as error:
                errors[i] = UnreadableImageError(str(error), path=_path_of(image, root))
        return crops, errors

    @torch.inference_mode()
    def _forward(self, crops: np.ndarray, device: torch.device) -> np.ndarray:
        images = self.transform.normalize(torch.from_numpy(crops).to(device))
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            features = self.model(images)
        return features.float().cpu().numpy()


def _as_list(images: ImageInput | Iterable[ImageInput]) -> list[ImageInput]:
    if isinstance(images, str | os.PathLike | Image.Image):
        return [images]
    if isinstance(images, np.ndarray | Tensor):
        return [images] if images.ndim == 3 else list(images)
    return list(images)


def _batched(items: Iterable[_Item], batch_size: int) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, batch_size)):
        yield batch


def _load_pixels(
    image: ImageInput | ImageRef, root: Path, short_side: int, bands: BandSelection | None
) -> np.ndarray:
    """Return the pixels of an image, (h, w, 3) uint8; JPEG files may be decoded at a reduced size."""
    if isinstance(image, Image.Image):
        return convert_image(image)
    if isinstance(image, np.ndarray | Tensor):
        pixels = image.cpu().numpy() if isinstance(image, Tensor) else image
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise InvalidInputError(
                f"`images` must hold pixels (h, w, 3) of uint8, got {pixels.shape} of {pixels.dtype}",
                field="images",
            )
        check_image_size(pixels.shape[1], pixels.shape[0])
        return pixels
    ref = image if isinstance(image, ImageRef) else ImageRef(path=os.fspath(image))
    return read_image(ref if ref.bands is not None else replace(ref, bands=bands), root, short_side)


def _path_of(image: ImageInput | ImageRef, root: Path) -> Path | None:
    if isinstance(image, ImageRef):
        return None if image.path is None else root / image.path
    return root / image if isinstance(image, str | os.PathLike) else None


@torch.no_grad()
def count_flops(encoder: ImageEncoder) -> int | None:
    """Return the floating-point operations per image, or None if torch cannot count them."""
    from torch.utils.flop_counter import FlopCounterMode

    image_size = encoder.transform.image_size
    with FlopCounterMode(display=False) as counter:
        encoder.model(torch.zeros(1, 3, image_size, image_size, device=encoder.device))
    return counter.get_total_flops() or None


def load_encoder(
    encoder: str | os.PathLike[str],
    *,
    backbone: str | None = None,
    weights_prefix: str = "",
    weights_exclude: Sequence[str] = (),
    image_size: int | None = None,
    device: str | None = None,
) -> ImageEncoder:
    """Load an image encoder.

    Args:
        encoder: A finished run or its path; a file of weights; or a name: `timm:NAME` or `torchvision:NAME`
            (pretrained weights), `random:NAME` (a timm model with random weights, as a baseline),
            `clip:ARCH/WEIGHTS` (open_clip; WEIGHTS is one of its tags or a file), `hub:OWNER/REPO/ENTRY` or
            `hub:FOLDER/ENTRY` (torch.hub, which executes the code of that repository), `hf:NAME` or
            `hf:FOLDER` (a vision model of Hugging Face).
        backbone: The timm model, or `torchvision:NAME`, of a weight file that does not name it itself.
        weights_prefix: Prefix of the backbone's weights in such a file, such as `module.encoder_q.`; weights
            without it are ignored. By default it is found, if only one prefix fits all weights.
        weights_exclude: Prefixes of weights to ignore in such a file; all others must fit.
        image_size: Side of the input in pixels; defaults to that of training.
        device: Device of the model; defaults to a GPU if there is one.

    Raises:
        ModelError: if there is no such encoder, or its weights are missing or do not fit.
        ArtifactError: if a directory is not a finished run.
        DependencyError: if `clip:` or a text tower needs open_clip, which is not installed.
    """
    name_or_path = os.fspath(encoder)
    device = resolve_device(device)
    loaded = _load(name_or_path, backbone, weights_prefix, tuple(weights_exclude), image_size)
    loaded.model.to(device)
    if device == "cpu":
        loaded.model.float()  # most layers have no half precision on a CPU
    load_args = {
        "encoder": name_or_path,
        "backbone": backbone,
        "weights_prefix": weights_prefix,
        "weights_exclude": list(weights_exclude),
        "image_size": image_size,
    }
    structure_args = loaded.structure_args or resolve_load_args(load_args)
    return replace(loaded, load_args=load_args, structure_args=structure_args)


def resolve_load_args(load_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `load_encoder` with an absolute path: they may be used again in another folder."""
    return {name: _resolve_path(value) if name == "encoder" else value for name, value in load_args.items()}


def _resolve_path(name_or_path: str) -> str:
    if os.path.exists(name_or_path):  # noqa: PTH110  # `Path.exists` raises OSError for long names
        return str(Path(name_or_path).resolve())
    scheme, _, name = name_or_path.partition(":")
    if scheme in ("hf", "hub") and os.path.exists(name):  # noqa: PTH110
        return f"{scheme}:{Path(name).resolve()}"
    if scheme == "hub" and os.path.isdir(os.path.dirname(name)):  # noqa: PTH112, PTH120
        return f"hub:{Path(name).resolve()}"
    arch, _, weights = name.partition("/")
    if scheme == "clip" and os.path.isfile(weights):  # noqa: PTH113
        return f"clip:{arch}/{Path(weights).resolve()}"
    return name_or_path


def _load(
    name_or_path: str,
    backbone: str | None,
    weights_prefix: str,
    weights_exclude: tuple[str, ...],
    image_size: int | None,
) -> ImageEncoder:
    scheme, _, name = name_or_path.partition(":")
    if scheme in _LOADERS and name:
        return _LOADERS[scheme](name, image_size)
    path = Path(name_or_path)
    if os.path.isdir(path):  # noqa: PTH112  # `Path.is_dir` raises OSError for long names
        if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
            raise ModelError(f"{path} is not a run; for a model of Hugging Face, give hf:{path}", path=path)
        Artifact.open(path, "run")
        return _load_saved_encoder(RunDirectory(path).encoder_path, path.resolve().name, image_size)
    if not os.path.isfile(path):  # noqa: PTH113
        raise ModelError(
            f"{name_or_path} is not a run, not a file of weights, and not {ENCODER_FORMATS}", path=path
        )
    if backbone is None:
        return _load_saved_encoder(path, path.stem, image_size)
    return load_weights_encoder(
        path, backbone, prefix=weights_prefix, exclude=weights_exclude, image_size=image_size
    )


def _load_saved_encoder(path: Path, name: str, image_size: int | None) -> ImageEncoder:
    tensors, metadata = load_encoder_file(path)
    adapter = load_adapter(tensors, metadata, path)
    if metadata.get("start") is not None and adapter is not None:
        return _with_adapter(name, _load_start(metadata["start"], path), adapter)
    if metadata.get("start") is not None:
        return _load_trained(name, path, tensors, metadata, image_size)
    model, config, feature_dim = load_backbone(path, image_size)
    transform = EvalTransform(
        image_size=config.image_size, resize_size=config.image_size, bands=parse_bands(metadata)
    )
    if metadata.get("transform") is not None:
        transform = EvalTransform.from_dict(metadata["transform"]).resize_to(config.image_size)
    encoder = _build_encoder(name, model, transform, feature_dim, load_text_alignment(path))
    return _with_adapter(name, replace(encoder, backbone_config=config), adapter)


def _load_trained(
    name: str, path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any], image_size: int | None
) -> ImageEncoder:
    """Load an encoder whose weights are in the file, and whose structure is that of another encoder."""
    load_args = dict(metadata["start"]["load_args"])
    if image_size is not None:
        load_args["image_size"] = image_size
    source = load_encoder(**load_args, device="cpu")
    model = source.model.float()  # some models are stored in half precision
    state_dict = without_prefixes(tensors, (TEXT_TOWER_PREFIX, IMAGE_PROJECTION_PREFIX))
    load_state_dict_strict(model, state_dict, str(path))
    transform = EvalTransform.from_dict(metadata["transform"]).resize_to(source.transform.image_size)
    encoder = _build_encoder(name, model, transform, source.feature_dim, load_text_alignment(path))
    return replace(encoder, structure_args=load_args)


def _load_start(start: Mapping[str, Any], path: Path) -> ImageEncoder:
    """Load the encoder that an adapter belongs to.

    Raises:
        ModelError: if it is no longer the one that was adapted.
    """
    encoder = load_encoder(**start["load_args"])
    if encoder.fingerprint != start["fingerprint"]:
        raise ModelError(
            f"{path} adapts {start['load_args']['encoder']}, whose weights have changed since", path=path
        )
    return encoder


def _with_adapter(name: str, start: ImageEncoder, adapter: FeatureAdapter | None) -> ImageEncoder:
    if adapter is None:
        return start
    return _build_encoder(name, AdaptedModel(start.model, adapter), start.transform, start.feature_dim)


def load_weights_encoder(
    path: Path,
    backbone: str,
    *,
    prefix: str = "",
    exclude: Sequence[str] = (),
    image_size: int | None = None,
    field: str = "weights_prefix",
) -> ImageEncoder:
    """Load the encoder of a weights file that does not name its model; arguments as in `load_encoder`.

    Args:
        path: The file.
        backbone: The timm model, or `torchvision:NAME`.
        prefix: Prefix of the backbone's weights.
        exclude: Prefixes of weights to ignore.
        image_size: Side of the input in pixels; defaults to that of the model.
        field: The config field to which errors about the prefix refer: `weights_prefix` or `init`.

    Raises:
        ModelError: if the model is unknown, or the weights are missing or do not fit.
    """
    scheme, _, name = backbone.partition(":")
    if scheme == "torchvision":
        model, transform, head_name = load_torchvision_model(name, image_size, pretrained=False)
        head_names: tuple[str, ...] = (head_name,)
        config = None
    else:
        config = BackboneConfig(name=backbone, image_size=_timm_image_size(backbone, image_size))
        model, _ = build_backbone(config)
        transform, head_names = _timm_transform(model, config.image_size), classifier_names(backbone)
    load_weights(model, path, prefix=prefix, exclude=exclude, head_names=head_names, field=field)
    encoder = _build_encoder(path.stem, model, transform, _feature_dim(model, transform.image_size))
    return replace(encoder, backbone_config=config)


def _feature_dim(model: nn.Module, image_size: int) -> int:
    check_input_size(model, type(model).__name__, image_size)
    with torch.no_grad():
        features = model(torch.zeros(1, 3, image_size, image_size))
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ModelError("this model does not return one feature vector per image", field="encoder")
    return features.shape[1]


def _load_timm(name: str, image_size: int | None) -> ImageEncoder:
    config = BackboneConfig(name=name, image_size=_timm_image_size(name, image_size))
    model, feature_dim = build_backbone(config, pretrained=True)
    logger.info("timm:%s: the classifier is dropped (%s)", name, ", ".join(classifier_names(name)))
    encoder = _build_encoder(f"timm:{name}", model, _timm_transform(model, image_size), feature_dim)
    return replace(encoder, backbone_config=config)


def _load_random(name: str, image_size: int | None) -> ImageEncoder:
    image_size = _timm_image_size(name, image_size)
    config = BackboneConfig(name=name, image_size=image_size, stem=default_stem(image_size))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, feature_dim = build_backbone(config)
    transform = EvalTransform(image_size=image_size, resize_size=image_size)
    encoder = _build_encoder(f"random:{name}", model, transform, feature_dim)
    return replace(encoder, backbone_config=config)


def _load_clip_encoder(name: str, image_size: int | None) -> ImageEncoder:
    """Load an image tower; models that squash images to a square get a center crop instead."""
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
    model, transform, head_name = load_torchvision_model(name, image_size, pretrained=True)
    logger.info("torchvision:%s: the classifier is dropped (%s)", name, head_name)
    return _build_encoder(f"torchvision:{name}", model, transform, _feature_dim(model, transform.image_size))


def _load_torch_hub(name: str, image_size: int | None) -> ImageEncoder:
    model, transform = load_torch_hub_model(name, image_size)
    return _build_encoder(f"hub:{name}", model, transform, _feature_dim(model, transform.image_size))


def _load_huggingface(name: str, image_size: int | None) -> ImageEncoder:
    model, transform, text_alignment = load_huggingface_model(name, image_size)
    return _build_encoder(
        f"hf:{name}", model, transform, _feature_dim(model, transform.image_size), text_alignment
    )


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
    """Return the preprocessing of a timm model's own configuration."""
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
    # The printed structure covers strides and pooling, which have no weights.
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
