"""The free baselines: words counted into 4,096 columns, weighted by how rare they are (TF-IDF) or not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from likewise.embeddings.base import CaptionEncoder, Corpus, unit_rows
from likewise.embeddings.text import split_words

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

COLUMNS = 4096
_OWN = 2048
_HALF = 1024
_BUCKETS = _HALF**2


@final
class HashedWords(CaptionEncoder):
    """Words counted in 2^20 signed hash buckets (Weinberger 2009, arXiv 0902.2206), then laid into columns.

    In one pass over the collection, n captions of which n_j fill bucket j give the weight
    ln((1 + n) / (1 + n_j)) + 1 (with `weighted`: the smoothed inverse document frequency of scikit-learn).
    The 2,048 buckets that most captions fill get a column each; every other one is added, with its sign, to
    one column in each of two groups of 1,024, so that two rare words seldom share both. On real captions with
    2,600 to 6,400 different words, at least 99.3 % of the ten nearest were those of exact TF-IDF, against 91
    to 97 % when all are hashed into 4,096 columns. Stored rows are dense: 8 KB a caption as float16.
    """

    def __init__(self, corpus: Corpus, *, weighted: bool) -> None:
        """Count in how many captions of the corpus each bucket is filled."""
        filled, n = np.zeros(_BUCKETS, np.int64), 0
        for captions in filter(None, corpus()):  # scikit-learn refuses to count nothing
            filled += np.bincount(bucket_counts(captions).indices, minlength=_BUCKETS)
            n += len(captions)
        self.dimension = COLUMNS
        self.weights = np.log((1 + n) / (1 + filled)) + 1 if weighted else np.ones(_BUCKETS)
        self._columns = _columns(filled, self.weights)

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, 4096) float32 of unit length, zero for one without words."""
        return unit_rows((bucket_counts(captions) @ self._columns).toarray().astype(np.float32))


def bucket_counts(captions: Sequence[str]) -> "csr_matrix":
    """Count words in signed buckets: n strings -> sparse (n, 2^20) float64."""
    from sklearn.feature_extraction.text import HashingVectorizer

    # Its annotations forbid the norm None that its documentation offers.
    settings: dict[str, Any] = {"n_features": _BUCKETS, "analyzer": _folded_words, "norm": None}
    counts: Any = HashingVectorizer(**settings, alternate_sign=True).transform(captions)
    return counts


def _folded_words(caption: str) -> list[str]:
    return split_words(caption.casefold())


def _columns(filled: np.ndarray, weights: np.ndarray) -> "csr_matrix":
    """Return what each bucket adds to each column, sparse (2^20, 4096) float64."""
    from scipy.sparse import csr_matrix

    frequent = np.argsort(-filled, kind="stable")[:_OWN]
    rare = np.setdiff1d(np.arange(_BUCKETS), frequent)
    # A bucket's low and high bits are two independent hashes of its words.
    rows = np.concatenate([frequent, rare, rare])
    columns = np.concatenate([np.arange(_OWN), _OWN + rare % _HALF, _OWN + _HALF + rare // _HALF])
    shares = np.concatenate([np.ones(_OWN), np.full(2 * len(rare), np.sqrt(0.5))])
    return csr_matrix((shares * weights[rows], (rows, columns)), shape=(_BUCKETS, COLUMNS))
