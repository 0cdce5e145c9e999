"""Word vectors averaged: GloVe's and fastText's text formats, read without loading the whole file."""

import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

import numpy as np

from likewise.embeddings.base import CaptionEncoder, Corpus, EncoderChoice, unit_rows
from likewise.embeddings.text import split_words
from likewise.errors import ModelError


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
