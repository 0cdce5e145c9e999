"""The text tower of CLIP, its tokenizer, and the alignment of captions and images."""

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
        """Build a tower of `layers` blocks of `width`, with heads of 64, projected to `embed_dim`.

        Raises:
            DependencyError: if open_clip is not installed.
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
        """Embed captions: tokens (b, t) int64, t at most 77, zero after the end token -> (b, embed_dim).

        open_clip's own forward requires all 77 tokens. Under a causal mask, tokens after the end token have
        no effect, so a batch may be truncated to its longest caption.
        """
        transformer, length = self.transformer, tokens.shape[1]
        x = transformer.token_embedding(tokens) + transformer.positional_embedding[:length]
        x = transformer.ln_final(
            transformer.transformer(x, attn_mask=transformer.attn_mask[:length, :length])
        )
        # The end token has the largest id.
        end_states = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]
        return end_states @ transformer.text_projection


def tokenize(captions: list[str]) -> Tensor:
    """Tokenize captions for CLIP: (n, 77) int64, zero after the end token; long captions are truncated.

    Raises:
        DependencyError: if open_clip is not installed.
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
            "a text tower needs open_clip: pip install 'likewise[clip]', or set `text_tower` to 'frozen'",
            field="text_tower",
        ) from error


T = TypeVar("T")
_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class TextAlignment:
    """Projections of captions and image features into a joint space, compared by cosine similarity."""

    encode_text: Callable[[Sequence[str]], Tensor]
    """Captions -> (n, embed_dim) float32."""
    project_image: Callable[[Tensor], Tensor]
    """Image features (m, d) -> (m, embed_dim)."""


def text_state_dict(tower: nn.Module, projection: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a text tower and of the image projection, by their names in encoder files."""
    modules = {TEXT_TOWER_PREFIX: tower, IMAGE_PROJECTION_PREFIX: projection}
    return {
        f"{prefix}{name}": tensor
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def load_text_alignment(path: Path) -> TextAlignment | None:
    """Read the text tower and the image projection of a file of `save_encoder`; None if it has none.

    Raises:
        ModelError: if the file is damaged.
        DependencyError: if open_clip is not installed.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("text_tower") is None:
        return None
    tower = TextTower(**metadata["text_tower"])
    projection_weight = tensors.get(f"{IMAGE_PROJECTION_PREFIX}weight")
    if projection_weight is None:
        raise ModelError(f"{path} has a text tower but no image projection", path=path)
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
    """Embed captions in batches, on the device of the tower: n captions -> (n, j) float32 on the CPU."""
    batches = (list(captions[i : i + _BATCH_SIZE]) for i in range(0, len(captions), _BATCH_SIZE))
    return torch.cat([tower(tokenizer(batch)).float().cpu() for batch in batches])
