"""Strings: lists of names separated by commas, counts with their nouns, and the words of captions."""

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import groupby

# Han characters and kana are written without spaces; each one counts as a word.
_KANA = "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_UNSPACED = _KANA + _HAN


def split_at_commas(text: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def split_unknown_names(names: Iterable[str], is_known: Callable[[str], bool]) -> tuple[str, ...]:
    """Split names at their commas, except those known as a whole, such as the column `caption, en`."""
    return tuple(part for name in names for part in ((name,) if is_known(name) else split_at_commas(name)))


def path_exists(name: str) -> bool:
    """Return whether a name is a path that exists; long lists of names are no paths."""
    return os.path.exists(name)  # noqa: PTH110  # `Path.exists` raises OSError for long names


def count_noun(count: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as `1 image` or `1,045 images`."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def split_words(text: str) -> list[str]:
    """Split a text into words, dropping spaces, punctuation and symbols.

    A word is a sequence of letters, digits and combining marks, such as the vowel signs of Indic scripts.
    Chinese and Japanese are split into characters; other scripts without spaces are not split.
    """
    return _word_pattern().findall(unicodedata.normalize("NFC", text))


@lru_cache(maxsize=1)
def _word_pattern() -> re.Pattern[str]:
    marks = _combining_marks()
    return re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[{marks}]+[^\W{_UNSPACED}]*)*")


def _combining_marks() -> str:
    r"""Return all combining marks as ranges of a character class; `\w` does not match them."""
    code_points = [
        code_point
        for code_point in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code_point)).startswith("M")
    ]
    runs = [
        [code_point for _, code_point in run]
        for _, run in groupby(enumerate(code_points), lambda item: item[1] - item[0])
    ]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)
