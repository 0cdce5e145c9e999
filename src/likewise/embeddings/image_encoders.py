"""Images instead of captions as what is embedded: one row an image, by a frozen image encoder."""

from pathlib import Path

from likewise.artifacts import fingerprint
from likewise.errors import ModelError


def resolve_clip(name: str) -> tuple[str, str, str]:
    """Return the short name, source and identity of `ARCH/WEIGHTS`, weights being a tag or a file.

    Raises:
        ModelError: where one of the two is missing, or a path holds no file.
    """
    arch, _, weights = name.partition("/")
    if not arch or not weights:
        raise ModelError(f"clip:{name} lacks its weights: clip:ARCH/WEIGHTS, as in clip:ViT-B-32/openai")
    weights_path = Path(weights).expanduser()
    if weights_path.is_file():
        return f"{arch}/{weights_path.stem}", f"{arch}/{weights_path}", f"{arch}/{fingerprint(weights_path)}"
    if weights.startswith((".", "/", "~")):
        raise ModelError(f"there are no weights at {weights}")
    return name, name, name


def resolve_image(name: str) -> tuple[str, str, str]:
    """Return the short name, source and identity of an image encoder, by what `open_encoder` takes.

    Raises:
        ModelError: where it is nothing of these.
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
            f"{name} is no finished run and no file of weights, and not timm:NAME, random:NAME or "
            "clip:ARCH/WEIGHTS"
        )
    return name, name, name
