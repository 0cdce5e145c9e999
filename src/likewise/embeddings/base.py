"""What every encoder of captions is, and how it is told apart from others before it is loaded."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from likewise.embeddings.config import DEFAULT_OPTIONS, EncoderOptions, Modality

# One pass over all captions of a collection, shard by shard; it can be asked for more than once.
Corpus = Callable[[], Iterator[list[str]]]


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder by name, not loaded yet.

    Attributes:
        name: What tables call it: its scheme and what follows, and options that differ from the default.
        name_or_path: Where it is loaded from: a hub name, a folder, a file.
        weights_id: What identifies its weights in keys.
        scheme: Its kind; empty for sentence-transformers models.
        options: How it is used.
    """

    name: str
    name_or_path: str
    weights_id: str
    scheme: str = ""
    options: EncoderOptions = DEFAULT_OPTIONS

    @property
    def modality(self) -> Modality:
        """What it embeds."""
        return "images" if self.scheme == "image" else "captions"


class TextEncoder(ABC):
    """Captions in, unit vectors out.

    Attributes:
        dim: Length of a vector.
    """

    dim: int

    @abstractmethod
    def encode(self, captions: Sequence[str], batch_size: int) -> Float[np.ndarray, "n d"]:
        """Embed captions: n strings -> (n, d) float32 of unit length, zero for one without direction."""


def l2_normalize(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Scale rows to unit length: (n, d) -> (n, d) float32; zero rows stay zero, NaN stays NaN."""
    vectors = np.asarray(vectors, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms == 0, 1, norms)
