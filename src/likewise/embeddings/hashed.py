"""The free baselines: words counted into hashed buckets, weighted by how rare they are (TF-IDF) or not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from likewise.embeddings.base import CaptionEncoder, Corpus, unit_rows
from likewise.embeddings.text import split_words

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BUCKETS = 4096


@final
class HashedWords(CaptionEncoder):
    """Signed feature hashing (Weinberger 2009, arXiv 0902.2206) of words into 4,096 buckets.

    With `weighted`, bucket j is weighted by ln((1 + n) / (1 + n_j)) + 1, n captions of which n_j fill it: the
    smoothed inverse document frequency of scikit-learn, fitted in one pass over the collection. Words that
    share a bucket share its weight. Stored rows are dense: 8 KB a caption as float16.
    """

    def __init__(self, corpus: Corpus, *, weighted: bool) -> None:
        """Count, where weighted, in how many captions of the corpus each bucket is filled."""
        self.dimension = BUCKETS
        self.weights = _inverse_document_frequency(corpus) if weighted else np.ones(BUCKETS, np.float32)

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, 4096) float32 of unit length, zero for one without words."""
        return unit_rows(bucket_counts(captions).toarray().astype(np.float32) * self.weights)


def bucket_counts(captions: Sequence[str]) -> "csr_matrix":
    """Count words in signed buckets: n strings -> sparse (n, 4096) float64."""
    from sklearn.feature_extraction.text import HashingVectorizer

    # Its annotations forbid the norm None that its documentation offers.
    settings: dict[str, Any] = {"n_features": BUCKETS, "analyzer": _folded_words, "norm": None}
    counts: Any = HashingVectorizer(**settings, alternate_sign=True).transform(captions)
    return counts


def _folded_words(caption: str) -> list[str]:
    return split_words(caption.casefold())


def _inverse_document_frequency(corpus: Corpus) -> np.ndarray:
    filled, n = np.zeros(BUCKETS, np.int64), 0
    for captions in filter(None, corpus()):  # scikit-learn refuses to count nothing
        filled += np.bincount(bucket_counts(captions).indices, minlength=BUCKETS)
        n += len(captions)
    return (np.log((1 + n) / (1 + filled)) + 1).astype(np.float32)
