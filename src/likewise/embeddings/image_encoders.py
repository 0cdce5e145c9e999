"""Images instead of captions as what is embedded: one row an image, by a frozen image encoder."""

from pathlib import Path

from likewise.artifacts import fingerprint
from likewise.errors import ModelError


def choose_clip(target: str) -> tuple[str, str, str]:
    """Return the short name, source and identity of `ARCH/WEIGHTS`, weights being a tag or a file.

    Raises:
        ModelError: where one of the two is missing, or a path holds no file.
    """
    arch, _, weights = target.partition("/")
    if not arch or not weights:
        raise ModelError(f"clip:{target} lacks its weights: clip:ARCH/WEIGHTS, as in clip:ViT-B-32/openai")
    file = Path(weights).expanduser()
    if file.is_file():
        return f"{arch}/{file.stem}", f"{arch}/{file}", f"{arch}/{fingerprint(file)}"
    if weights.startswith((".", "/", "~")):
        raise ModelError(f"there are no weights at {weights}")
    return target, target, target


def choose_image(target: str) -> tuple[str, str, str]:
    """Return the short name, source and identity of an image encoder, by what `open_encoder` takes.

    Raises:
        ModelError: where it is nothing of these.
    """
    scheme, _, rest = target.partition(":")
    if scheme == "clip" and rest:
        name, source, identity = choose_clip(rest)
        return f"clip:{name}", f"clip:{source}", f"clip:{identity}"
    path = Path(target).expanduser()
    file = path / "encoder.safetensors" if path.is_dir() else path
    if file.is_file():
        return path.resolve().name, str(path), fingerprint(file)
    if not rest:
        raise ModelError(
            f"{target} is no finished run and no file of weights, and not timm:NAME, random:NAME or "
            "clip:ARCH/WEIGHTS"
        )
    return target, target, target
