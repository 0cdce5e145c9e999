"""The language side of an image encoder: captions and images in one space."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from likewise.errors import ModelError
from likewise.models.checkpoints import LANGUAGE, load_strictly, load_tensors
from likewise.models.text import TextTower, tokenise

T = TypeVar("T")
_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Language:
    """How captions and an encoder's features come into one space, where cosine similarity compares them.

    Attributes:
        embed: Captions -> (n, joint) float32.
        project: Features (m, width) -> (m, joint).
    """

    embed: Callable[[Sequence[str]], Tensor]
    project: Callable[[Tensor], Tensor]


def language_tensors(tower: nn.Module, projection: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a text tower and of the projection of images, by the names they are kept."""
    parts = {"tower": tower, "projection": projection}
    return {
        f"{LANGUAGE}{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def load_language(path: Path) -> Language | None:
    """Read the language side from a file of `save_encoder`; None where it was trained without a text tower.

    Raises:
        ModelError: where the file is damaged.
        DependencyError: where open_clip is not installed.
    """
    tensors, meta = load_tensors(path)
    if meta.get("language") is None:
        return None
    tower = TextTower(**meta["language"])
    weight = tensors.get(f"{LANGUAGE}projection.weight")
    if weight is None:
        raise ModelError(f"{path} has a text tower but no projection of images")
    load_strictly(tower, _under(tensors, f"{LANGUAGE}tower."), str(path))
    tower.eval().requires_grad_(False)
    return Language(
        embed=lambda captions: embed_captions(tower, tokenise, captions), project=lambda x: x @ weight.T
    )


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


@torch.inference_mode()
def embed_captions(
    tower: Callable[[T], Tensor], tokenizer: Callable[[list[str]], T], captions: Sequence[str]
) -> Float[Tensor, "n j"]:
    """Embed captions, a few hundred at a time."""
    parts = (list(captions[i : i + _AT_ONCE]) for i in range(0, len(captions), _AT_ONCE))
    return torch.cat([tower(tokenizer(part)).float() for part in parts])
