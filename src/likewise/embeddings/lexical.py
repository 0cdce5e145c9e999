"""The free baselines: words counted into 4,096 columns, weighted by how rare they are (TF-IDF) or not."""

import gzip
import io
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from likewise.embeddings.base import CaptionEncoder, Corpus, EncoderChoice, unit_rows
from likewise.errors import ModelError

# Han characters and kana are written without spaces; each counts as a word.
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_UNSPACED = _KANA + _HAN


def split_words(text: str) -> list[str]:
    """Cut a text into words as written, without spaces, punctuation and symbols.

    A word is a run of letters, digits and combining marks (vowel signs of Indic scripts among them); of
    scripts written without spaces, Chinese and Japanese are cut into characters, others stay whole.
    """
    return _pattern().findall(unicodedata.normalize("NFC", text))


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    marks = _marks()
    return re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[{marks}]+[^\W{_UNSPACED}]*)*")


def _marks() -> str:
    """Return all combining marks as ranges of a character class; Python's word characters lack them."""
    codes = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("M")]
    runs = [[c for _, c in run] for _, run in groupby(enumerate(codes), lambda at: at[1] - at[0])]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)


@final
class WordVectors(CaptionEncoder):
    """The mean of the vectors of a caption's words; a word is looked up as written, else in lower case.

    Only words that occur in the collection are kept in memory. A caption of which no word is known gets the
    zero vector.
    """

    def __init__(self, choice: EncoderChoice, corpus: Corpus) -> None:
        """Read the vectors of the corpus's words; raises ModelError for a file that holds none."""
        words = {word for captions in corpus() for caption in captions for word in split_words(caption)}
        self._places, self._vectors = _read(Path(choice.source), words | {word.lower() for word in words})
        self.dimension = self._vectors.shape[1]

    def encode(self, captions: Sequence[str], batch_size: int) -> np.ndarray:
        """Embed captions: n strings -> (n, d) float32 of unit length, zero where no word is known."""
        sums = np.zeros((len(captions), self.dimension), np.float32)
        for row, caption in enumerate(captions):
            known = [place for word in split_words(caption) if (place := self._place(word)) is not None]
            if known:
                sums[row] = self._vectors[known].mean(axis=0)
        return unit_rows(sums)

    def _place(self, word: str) -> int | None:
        exact = self._places.get(word)
        return self._places.get(word.lower()) if exact is None else exact


def _read(path: Path, wanted: set[str]) -> tuple[dict[str, int], np.ndarray]:
    """Return the wanted words' places and their vectors, (m, d) float32."""
    places: dict[str, int] = {}
    rows: list[np.ndarray] = []
    try:
        with _open(path) as lines:
            dimension, first = _begin(path, next(lines, ""))
            for number, line in _numbered(first, lines):
                word = line.partition(" ")[0]
                if word not in wanted or word in places:
                    continue
                values = _values(line, dimension, f"{path}, line {number}")
                if values is not None:
                    places[word] = len(rows)
                    rows.append(values)
    except (OSError, EOFError) as fault:
        raise ModelError(f"{path} cannot be read as word vectors: {fault}") from fault
    if not rows:
        raise ModelError(f"{path} has a vector for no word of this collection; is it of another language?")
    return places, np.stack(rows)


def _open(path: Path) -> io.TextIOWrapper:
    # Lines end at "\n" alone: a vector's word may itself be another kind of line break.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors="replace", newline="\n")
    return path.open(encoding="utf-8", errors="replace", newline="\n")


def _begin(path: Path, line: str) -> tuple[int, str | None]:
    """Return the dimension, and the first line unless it is fastText's header (words, dimension)."""
    fields = line.rstrip().split(" ")
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        return int(fields[1]), None
    if len(fields) < 3 or _floats(fields[1:]) is None:
        raise ModelError(
            f"{path} holds no word vectors: its first line is neither `count dimension` nor a word and "
            "numbers"
        )
    return len(fields) - 1, line


def _numbered(first: str | None, rest: Iterator[str]) -> Iterator[tuple[int, str]]:
    if first is not None:
        yield 1, first
    yield from enumerate(rest, start=2)


def _values(line: str, dimension: int, where: str) -> np.ndarray | None:
    """Return the numbers of a line, or None where its key is a phrase of which the word is the beginning."""
    fields = line.rstrip().split(" ")
    if len(fields) > dimension + 1:
        return None
    values = _floats(fields[1:])
    if values is None or len(values) != dimension:
        raise ModelError(f"{where} does not hold {dimension} numbers after its word: the file is damaged")
    return values


def _floats(fields: list[str]) -> np.ndarray | None:
    try:
        return np.array(fields, np.float32)
    except ValueError:
        return None


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
