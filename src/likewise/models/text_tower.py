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
from likewise.models.checkpoints import (
    IMAGE_PROJECTION_PREFIX,
    TEXT_TOWER_PREFIX,
    load_state_dict_strict,
    load_tensors,
)

CONTEXT_LENGTH = 77
VOCAB_SIZE = 49_408
_HEAD_DIM = 64


class TextTower(nn.Module):
    """The transformer of CLIP (Radford et al. 2021, section 2.4), as open_clip builds it, untrained."""

    def __init__(self, *, width: int, layers: int, embed_dim: int) -> None:
        """Make a tower of `layers` blocks of `width`, heads of 64, projected to `embed_dim`.

        Raises:
            DependencyError: where open_clip is not installed.
        """
        super().__init__()
        self.config = {"width": width, "layers": layers, "embed_dim": embed_dim}
        self.transformer: Any = _import_open_clip("transformer").TextTransformer(
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            width=width,
            heads=width // _HEAD_DIM,
            layers=layers,
            output_dim=embed_dim,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed captions: tokens (b, t) int64, t at most 77, zero after the end token -> (b, joint).

        open_clip's own forward wants all 77 places; what follows the end token changes nothing behind a
        causal mask, so a batch may be cut to its longest caption.
        """
        transformer, length = self.transformer, tokens.shape[1]
        x = transformer.token_embedding(tokens) + transformer.positional_embedding[:length]
        x = transformer.ln_final(
            transformer.transformer(x, attn_mask=transformer.attn_mask[:length, :length])
        )
        # The end token has the highest number.
        end_states = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]
        return end_states @ transformer.text_projection


def tokenize(captions: list[str]) -> Tensor:
    """Turn captions into CLIP's tokens: (n, 77) int64, zero after the end token; long captions are cut.

    Raises:
        DependencyError: where open_clip is not installed.
    """
    return _tokenizer()(captions, CONTEXT_LENGTH)


@cache
def _tokenizer() -> Any:
    return _import_open_clip("tokenizer").SimpleTokenizer()


def _import_open_clip(module: str) -> Any:
    try:
        return import_module(f"open_clip.{module}")
    except ImportError as error:
        raise DependencyError(
            "a text tower needs open_clip: pip install 'likewise[clip]', or give --text frozen"
        ) from error


T = TypeVar("T")
_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class TextAlignment:
    """How captions and an encoder's features come into one space, where cosine similarity compares them.

    Attributes:
        encode_text: Captions -> (n, joint) float32.
        project_image: Features (m, width) -> (m, joint).
    """

    encode_text: Callable[[Sequence[str]], Tensor]
    project_image: Callable[[Tensor], Tensor]


def text_state_dict(tower: nn.Module, projection: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a text tower and of the projection of images, by the names they are kept."""
    modules = {TEXT_TOWER_PREFIX: tower, IMAGE_PROJECTION_PREFIX: projection}
    return {
        f"{prefix}{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def load_text_alignment(path: Path) -> TextAlignment | None:
    """Read the language side from a file of `save_encoder`; None where it was trained without a text tower.

    Raises:
        ModelError: where the file is damaged.
        DependencyError: where open_clip is not installed.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("text_tower") is None:
        return None
    tower = TextTower(**metadata["text_tower"])
    projection_weight = tensors.get(f"{IMAGE_PROJECTION_PREFIX}weight")
    if projection_weight is None:
        raise ModelError(f"{path} has a text tower but no projection of images")
    load_state_dict_strict(tower, _strip_prefix(tensors, TEXT_TOWER_PREFIX), str(path))
    tower.eval().requires_grad_(False)
    return TextAlignment(
        encode_text=lambda captions: encode_captions(tower, tokenize, captions),
        project_image=lambda features: features @ projection_weight.T,
    )


def _strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.inference_mode()
def encode_captions(
    tower: Callable[[T], Tensor], tokenizer: Callable[[list[str]], T], captions: Sequence[str]
) -> Float[Tensor, "n j"]:
    """Embed captions, a few hundred at a time."""
    batches = (list(captions[i : i + _BATCH_SIZE]) for i in range(0, len(captions), _BATCH_SIZE))
    return torch.cat([tower(tokenizer(batch)).float() for batch in batches])
