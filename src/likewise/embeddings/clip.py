"""Text towers of CLIP models, through open_clip."""

from collections.abc import Sequence
from typing import Any, final

import numpy as np

from likewise.embeddings.base import CaptionEncoder, EncoderChoice, unit_rows
from likewise.errors import ModelError
from likewise.launch import resolve_device


@final
class ClipText(CaptionEncoder):
    """An open_clip text tower; longer captions are cut to its context (77 tokens) with the end token kept."""

    def __init__(self, choice: EncoderChoice, device: str | None) -> None:
        """Load the model and its tokenizer; raises ModelError where one of them cannot be had."""
        from likewise.models.encoders import load_clip

        model = load_clip(choice.source)
        import open_clip

        try:
            self._tokenize = open_clip.get_tokenizer(choice.source.partition("/")[0])
        except Exception as fault:  # tokenizers that lie on a hub fail in many ways
            raise ModelError(f"cannot load the tokenizer of {choice.name}: {fault}") from fault
        del model.visual  # only the text tower is used
        self._device = resolve_device(device)
        self._model: Any = model.to(self._device)
        self.dimension = self.encode([""], 1).shape[1]

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length."""
        import torch

        rows = []
        with torch.inference_mode():
            for start in range(0, len(captions), batch_size):
                tokens = self._tokenize(list(captions[start : start + batch_size])).to(self._device)
                rows.append(self._model.encode_text(tokens).float().cpu().numpy())
        return unit_rows(np.concatenate(rows))
