"""Names of CLIP models and image encoders, resolved without loading them."""

from pathlib import Path

from likewise.artifacts import fingerprint
from likewise.errors import ModelError


def resolve_clip(name: str) -> tuple[str, str, str]:
    """Resolve `ARCH/WEIGHTS`, where the weights are a pretrained tag or a file.

    Returns:
        Short name, name or path, and id of the weights.

    Raises:
        ModelError: if the architecture, the weights or the file is missing.
    """
    arch, _, weights = name.partition("/")
    if not arch or not weights:
        raise ModelError(f"expected clip:ARCH/WEIGHTS, such as clip:ViT-B-32/openai, got clip:{name}")
    weights_path = Path(weights).expanduser()
    if weights_path.is_file():
        return f"{arch}/{weights_path.stem}", f"{arch}/{weights_path}", f"{arch}/{fingerprint(weights_path)}"
    if weights.startswith((".", "/", "~")):
        raise ModelError(f"there are no weights at {weights}", path=weights)
    return name, name, name


def resolve_image(name: str) -> tuple[str, str, str]:
    """Resolve the name of an image encoder, as accepted by `likewise.load_encoder`.

    Returns:
        Short name, name or path, and id of the weights.

    Raises:
        ModelError: if there is no such run, file or kind of encoder.
    """
    scheme, _, rest = name.partition(":")
    if scheme == "clip" and rest:
        short_name, name_or_path, weights_id = resolve_clip(rest)
        return f"clip:{short_name}", f"clip:{name_or_path}", f"clip:{weights_id}"
    path = Path(name).expanduser()
    weights_path = path / "encoder.safetensors" if path.is_dir() else path
    if weights_path.is_file():
        return path.resolve().name, str(path), fingerprint(weights_path)
    if not rest:
        raise ModelError(
            f"{name} is not a complete run, a weights file, timm:NAME, random:NAME or clip:ARCH/WEIGHTS"
        )
    return name, name, name
