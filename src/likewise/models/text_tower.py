"""The text tower of CLIP, and how captions become its tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from likewise.errors import DependencyError, ModelError
from likewise.models.checkpoints import LANGUAGE, load_strictly, load_tensors

CONTEXT = 77
VOCABULARY = 49_408
_HEAD = 64


class TextTower(nn.Module):
    """The transformer of CLIP (Radford et al. 2021, section 2.4), as open_clip builds it, untrained."""

    def __init__(self, *, width: int, layers: int, joint: int) -> None:
        """Make a tower of `layers` blocks of `width`, heads of 64, projected to `joint`.

        Raises:
            DependencyError: where open_clip is not installed.
        """
        super().__init__()
        self.made_of = {"width": width, "layers": layers, "joint": joint}
        self.transformer: Any = _open_clip("transformer").TextTransformer(
            context_length=CONTEXT,
            vocab_size=VOCABULARY,
            width=width,
            heads=width // _HEAD,
            layers=layers,
            output_dim=joint,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed captions: tokens (b, t) int64, t at most 77, zero after the end token -> (b, joint).

        open_clip's own forward wants all 77 places; what follows the end token changes nothing behind a
        causal mask, so a batch may be cut to its longest caption.
        """
        tower, t = self.transformer, tokens.shape[1]
        x = tower.token_embedding(tokens) + tower.positional_embedding[:t]
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:t, :t]))
        # The end token has the highest number.
        ends = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]
        return ends @ tower.text_projection


def tokenise(captions: list[str]) -> Tensor:
    """Turn captions into CLIP's tokens: (n, 77) int64, zero after the end token; long captions are cut.

    Raises:
        DependencyError: where open_clip is not installed.
    """
    return _tokenizer()(captions, CONTEXT)


@cache
def _tokenizer() -> Any:
    return _open_clip("tokenizer").SimpleTokenizer()


def _open_clip(part: str) -> Any:
    try:
        return import_module(f"open_clip.{part}")
    except ImportError as fault:
        raise DependencyError(
            "a text tower needs open_clip: pip install 'likewise[clip]', or give --text frozen"
        ) from fault


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
