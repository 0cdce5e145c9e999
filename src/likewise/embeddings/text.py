"""Captions cut into words, in whatever script they are written."""

import re
import sys
import unicodedata
from functools import lru_cache
from itertools import groupby

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
