"""The text tower of CLIP, and how captions become its tokens."""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from likewise.errors import DependencyError

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
