"""Text encoder interface and encoder specification."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from likewise.embeddings.config import DEFAULT_OPTIONS, EncoderOptions, Modality

# Returns a new iterator over the captions of all shards; encoders that are fitted may call it repeatedly.
Corpus = Callable[[], Iterator[list[str]]]


@dataclass(frozen=True)
class EncoderSpec:
    """A resolved encoder that is not loaded yet."""

    name: str
    """Display name: scheme, model and non-default options."""
    name_or_path: str
    """Hub name, folder or file."""
    weights_id: str
    """Fingerprint of the weights, or their name on a hub."""
    scheme: str = ""
    """Kind of encoder, such as `hf` or `clip`; empty for sentence-transformers models."""
    options: EncoderOptions = DEFAULT_OPTIONS
    """Options that the encoder is loaded with."""

    @property
    def modality(self) -> Modality:
        """Modality that the encoder embeds."""
        return "images" if self.scheme == "image" else "captions"


class TextEncoder(ABC):
    """Encoder of captions to unit vectors."""

    dim: int
    """Dimension of the embeddings."""

    @abstractmethod
    def encode(self, captions: Sequence[str], batch_size: int) -> Float[np.ndarray, "n d"]:
        """Embed captions: n strings -> (n, d) float32 with unit rows; zero rows without known words."""


def l2_normalize(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Normalize rows to unit length: (n, d) -> (n, d) float32; zero rows and NaN are unchanged."""
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)
