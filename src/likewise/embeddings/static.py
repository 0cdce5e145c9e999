"""Static embeddings of tokens, averaged: model2vec."""

from collections.abc import Sequence
from typing import final

import numpy as np

from likewise.embeddings.base import CaptionEncoder, EncoderChoice, unit_rows
from likewise.embeddings.sentence import first_line
from likewise.errors import DependencyError, ModelError


@final
class StaticTokens(CaptionEncoder):
    """A model2vec model: the mean of a caption's token vectors; no transformer runs."""

    def __init__(self, choice: EncoderChoice) -> None:
        """Load the model; raises ModelError where it is not found here or on the hub."""
        try:
            from model2vec import StaticModel
        except ImportError as fault:
            raise DependencyError("model2vec:… needs model2vec: pip install 'likewise[model2vec]'") from fault
        try:
            self._model = StaticModel.from_pretrained(choice.source, force_download=False)
        except Exception as fault:  # hub and file faults come in a dozen types
            raise ModelError(
                f"cannot load {choice.name} ({type(fault).__name__}: {first_line(fault)}); "
                "give a model2vec folder or a name on the Hugging Face hub (needs a network)"
            ) from fault
        self.dimension = self._model.dim

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length, zero for one without tokens."""
        return unit_rows(self._model.encode(list(captions), batch_size=batch_size, use_multiprocessing=False))
