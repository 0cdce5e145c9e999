"""How captions begin and end: phrases that many of them share, such as `itap of` or `a picture of`."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

_CAPACITY = 20_000
_LEAST, _MOST = 2, 4
_SAME = 0.8


class Phrase(NamedTuple):
    """The first or last words of a caption."""

    end: str
    words: str


class Frequent:
    """Finds what is frequent in a long stream with bounded memory (Misra and Gries 1982).

    A phrase that was pruned away occurs at most `missed` times more than it is counted, and after N phrases
    `missed` ≤ N / 20,000.
    """

    def __init__(self) -> None:
        self.counts: Counter[Phrase] = Counter()
        self.missed = 0

    def add(self, phrases: Iterable[Phrase]) -> None:
        """Count the phrases of one caption."""
        self.counts.update(phrases)

    def prune(self) -> None:
        """Forget the rare ones where there are too many."""
        if len(self.counts) <= _CAPACITY:
            return
        least = sorted(self.counts.values(), reverse=True)[_CAPACITY]
        self.counts = Counter({p: count - least for p, count in self.counts.items() if count > least})
        self.missed += least


def openings_of(text: str) -> list[Phrase]:
    """Return the first and last 2 to 4 words of a normalised caption that has more words than that."""
    words = text.split()
    longest = min(_MOST, len(words) - 1)
    found = []
    for length in range(_LEAST, longest + 1):
        found.append(Phrase("first", " ".join(words[:length])))
        found.append(Phrase("last", " ".join(words[-length:])))
    return found


def telling(counts: dict[Phrase, int], least: int) -> list[tuple[Phrase, int]]:
    """Return the phrases that occur at least so often, the most frequent first.

    One is left out where a longer one says nearly as often the same: `picture of` beside `a picture of`.
    """
    frequent = {phrase: count for phrase, count in counts.items() if count >= least}
    kept = [
        (phrase, count)
        for phrase, count in frequent.items()
        if not any(_contains(other, phrase) and more >= _SAME * count for other, more in frequent.items())
    ]
    return sorted(kept, key=lambda entry: (-entry[1], entry[0]))


def _contains(longer: Phrase, phrase: Phrase) -> bool:
    if longer.end != phrase.end or len(longer.words) <= len(phrase.words):
        return False
    if phrase.end == "first":
        return longer.words.startswith(phrase.words + " ")
    return longer.words.endswith(" " + phrase.words)
