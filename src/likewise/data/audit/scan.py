"""The first reading of all records: counts, and 64 bits of each text instead of the text itself."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from likewise.data.audit.config import AuditSettings
from likewise.data.dataset import Collection
from likewise.progress import Progress

EXAMPLES = 6


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that may be wrong.

    Attributes:
        name: What it is called in files.
        title: What it is called on pages.
        count: How many images, captions or groups it is true of.
        total: Of how many.
        unit: What is counted: `images`, `captions` or `groups`.
        filtered: How many of them the filter leaves out.
        note: A sentence on how it was told.
        examples: Positions, ids and captions, at most `EXAMPLES`.
    """

    name: str
    title: str
    count: int
    total: int
    unit: str
    filtered: int = 0
    note: str = ""
    examples: tuple[dict[str, Any], ...] = ()

    @property
    def share(self) -> float:
        """The count as a share of the total; 0 where there is nothing to count."""
        return self.count / self.total if self.total else 0.0

    def told(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return vars(self) | {"share": self.share, "examples": list(self.examples)}


def example(position: int, identifier: str, caption: str | None) -> dict[str, Any]:
    """Return an example of a finding: where the record stands, its id, and the caption that is meant."""
    return {"position": int(position), "id": identifier, "caption": caption}


@dataclass
class Tally:
    """Counts by name, with the first examples of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, position: int, identifier: str, caption: str | None = None) -> None:
        """Count one."""
        self.counts[name] = self.counts.get(name, 0) + 1
        shown = self.examples.setdefault(name, [])
        if len(shown) < EXAMPLES:
            shown.append(example(position, identifier, caption))

    def finding(self, name: str, title: str, total: int, unit: str, **more: Any) -> Finding:
        """Return the finding of a name."""
        count, shown = self.counts.get(name, 0), tuple(self.examples.get(name, ()))
        return Finding(
            name=name.replace(" ", "_"),
            title=title,
            count=count,
            total=total,
            unit=unit,
            examples=shown,
            **more,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Holders:
    """The images of every text: t texts, ascending by code, each image once.

    Attributes:
        codes: The texts, (t,) uint64.
        counts: How many images have each, (t,) int64.
        owners: The images, text by text, each ascending, (sum of counts,) int64.
    """

    codes: np.ndarray
    counts: np.ndarray
    owners: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where the images of each text begin in `owners`, (t,) int64."""
        return np.cumsum(self.counts) - self.counts

    def images(self, text: int) -> np.ndarray:
        """Return the images of one text, by its place among the codes."""
        start = int(self.starts[text])
        return self.owners[start : start + int(self.counts[text])]

    def most_frequent(self, least: int, most: int) -> list[int]:
        """Return the places of at most so many texts on at least so many images; ties by first image."""
        chosen = np.flatnonzero(self.counts >= least)
        order = np.lexsort((self.owners[self.starts[chosen]], -self.counts[chosen]))
        return chosen[order][:most].tolist()


def holders_of(codes: np.ndarray, owners: np.ndarray) -> Holders:
    """Gather the images by text: codes (r,) uint64, of which 0 is no text, and owners (r,) int64."""
    order = np.lexsort((owners, codes))
    codes, owners = codes[order], owners[order]
    new = codes != 0
    new[1:] &= (codes[1:] != codes[:-1]) | (owners[1:] != owners[:-1])
    named, counts = np.unique(codes[new], return_counts=True)
    return Holders(codes=named, counts=counts, owners=owners[new])


def caption_of_code(collection: Collection, codes: np.ndarray, owners: np.ndarray, code: int) -> str:
    """Return the first caption with a code; the arrays are in the order of records and their captions."""
    row = int(np.argmax(codes == np.uint64(code)))
    position = int(owners[row])
    return collection[position].captions[row - int(np.searchsorted(owners, position))]


NO_LETTERS = "no letters"
WEB_ADDRESS = "web address only"
FILE_NAME = "file name only"
FILLER_ONLY = "filler words only"

_LETTERS = re.compile(r"[^\W\d_]+")
_PLAIN = re.compile(r"[a-z0-9]+")
_DIGITS = re.compile(r"\d+")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_MARKUP = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#\d{2,6}|#x[0-9a-f]{2,6});", re.IGNORECASE)
_SUFFIX = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|svg)$", re.IGNORECASE)
_CAMERA = re.compile(
    r"(?:img|dsc[nf]?|pict|pxl|mvimg|gopr|imag|cimg|screenshot|image|photo|picture|p)[ _-]?\d{3,}[\w -]*",
    re.IGNORECASE,
)
# English words that tell nothing of what is to be seen: function words, and what people write of any photo.
_FILLER = """
    a an the this that these those it its i my me mine we our ours you your yours he his she her hers they
    their theirs one ones and or but of in on at by for from to with as is am are was were be been being do
    does did done has have had not no so too very just only really quite more most some any all both each
    here there now then today yesterday again still also another other what which who when where how why
    s t d ll m re ve
    favourite favorite favourites favorites best better good great nice cool awesome amazing lovely pretty
    beautiful perfect new latest first last thing things stuff something anything lol omg oc itap took taken
    take shot shots pic pics photo photos photograph photographs picture pictures image images img snapshot
    untitled unknown unnamed none null nan na undefined missing empty blank test caption captions title
    description alt text tbd todo example
    dsc dscn dscf pict pxl mvimg gopr imag cimg screenshot p jpg jpeg png gif webp
"""
FILLER = frozenset(_FILLER.split())


def normalised(caption: str) -> str:
    """Return a caption in one spelling: NFKC, case folded, letters, marks and digits set apart by spaces."""
    folded = unicodedata.normalize("NFKC", caption).casefold()
    if folded.isascii():
        return " ".join(_PLAIN.findall(folded))
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return " ".join("".join(kept).split())


def template_of(text: str) -> str:
    """Return a normalised caption with every number replaced by `#`."""
    return _DIGITS.sub("#", text)


def hash_of(text: str) -> int:
    """Return 64 bits of BLAKE2b of a text."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def length_of(caption: str) -> int:
    """Return the number of words, which are what spaces set apart and hold a letter or digit."""
    return sum(any(c.isalnum() for c in word) for word in caption.split())


def has_address(caption: str) -> bool:
    """Whether a caption holds a web address."""
    return _ADDRESS.search(caption) is not None


def has_markup(caption: str) -> bool:
    """Whether a caption holds tags or entities of HTML."""
    return _MARKUP.search(caption) is not None


def is_file_name(caption: str) -> bool:
    """Whether a caption is the name of an image file, or what cameras and phones call one."""
    stem, named = _SUFFIX.subn("", caption.strip())
    return bool(named and " " not in stem) or _CAMERA.fullmatch(stem) is not None


def emptiness_of(caption: str) -> str | None:
    """Return why a caption says nothing of its image, or None where it says something.

    A symbol such as an emoji says something. Filler words are known in English only.
    """
    rest, addresses = _ADDRESS.subn(" ", caption)
    words = set(_LETTERS.findall(unicodedata.normalize("NFKC", _SUFFIX.sub("", rest.strip())).casefold()))
    if words - FILLER or any(unicodedata.category(c) == "So" for c in rest):
        return None
    if addresses:
        return WEB_ADDRESS
    if is_file_name(caption):
        return FILE_NAME
    return FILLER_ONLY if words else NO_LETTERS


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


LONG = 55  # words that fill the 77 tokens of CLIP's text encoder, at about 1.4 tokens a word
SHORT = 2
_COLUMNS = ["id", "captions", "group", "label", "width", "height"]
_LENGTHS = 1024  # longer captions are counted as so long


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What one reading of n records with r captions found.

    Attributes:
        texts: 64 bits of each caption, (r,) uint64; 0 for one without letters and digits.
        templates: The same with digits masked, (r,) uint64.
        owners: The position of the record of each caption, (r,) int64, ascending.
        told: 64 bits of all captions of a record, (n,) uint64: what copies of an image are compared by.
        groups: 64 bits of each record's group, (n,) uint64; 0 where it has none.
        labels: 64 bits of each record's label, (n,) uint64; 0 where it has none.
        lengths: How many captions have so many words, (1025,) int64.
        tally: Counts and examples of what a caption or record shows by itself.
        openings: The most frequent first and last words.
    """

    texts: np.ndarray
    templates: np.ndarray
    owners: np.ndarray
    told: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    tally: Tally
    openings: Frequent


@dataclass
class _Arrays:
    texts: list[int] = field(default_factory=list)
    templates: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def survey(collection: Collection, settings: AuditSettings, progress: Progress) -> Survey:
    """Read all records once; what is kept of a caption are 24 bytes."""
    tally, openings, lengths = Tally(), Frequent(), np.zeros(_LENGTHS + 1, np.int64)
    parts: list[dict[str, np.ndarray]] = []
    with progress.task("reading", len(collection), "images") as task:
        for shard in range(len(collection.shards)):
            arrays = _Arrays()
            for position, row in rows_of(collection, shard, _COLUMNS):
                _look_at_record(row, position, arrays, tally, settings)
                for caption in row["captions"]:
                    _look_at_caption(row["id"], position, caption, arrays, tally)
                    openings.add(openings_of(template_of(normalised(caption))))
                    lengths[min(length_of(caption), _LENGTHS)] += 1
            openings.prune()
            parts.append({name: _packed(name, values) for name, values in vars(arrays).items()})
            task.advance(len(arrays.told))
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Survey(**joined, lengths=lengths, tally=tally, openings=openings)


def rows_of(collection: Collection, shard: int, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a shard, with their positions, as some columns tell of them."""
    columns = collection.columns(shard, names)
    for row, values in enumerate(zip(*(columns[name] for name in names), strict=True)):
        yield collection.starts[shard] + row, dict(zip(names, values, strict=True))


def _packed(name: str, values: list[int]) -> np.ndarray:
    return np.array(values, np.int64 if name == "owners" else np.uint64)


def _look_at_record(
    row: dict[str, Any], position: int, arrays: _Arrays, tally: Tally, settings: AuditSettings
) -> None:
    spelled = [normalised(caption) for caption in row["captions"]]
    arrays.told.append(hash_of("\n".join(sorted(spelled))))
    arrays.groups.append(0 if row["group"] is None else hash_of(row["group"]))
    arrays.labels.append(0 if row["label"] is None else hash_of(row["label"]))
    short, long = sorted((row["width"], row["height"]))
    found = {
        "without_caption": not spelled,
        "repeated_within": len(set(spelled)) < len(spelled),
        "tiny": short < settings.min_side,
        "stretched": long > settings.max_aspect * short,
    }
    caption = row["captions"][0] if row["captions"] else None
    for name, true in found.items():
        if true:
            tally.add(name, position, row["id"], caption)


def _look_at_caption(identifier: str, position: int, caption: str, arrays: _Arrays, tally: Tally) -> None:
    spelled = normalised(caption)
    arrays.texts.append(hash_of(spelled) if spelled else 0)
    arrays.templates.append(hash_of(template_of(spelled)) if spelled else 0)
    arrays.owners.append(position)
    empty, words = emptiness_of(caption), length_of(caption)
    found = {
        empty or "": empty is not None,
        "with_address": has_address(caption),
        "with_markup": has_markup(caption),
        "file_names": is_file_name(caption),
        "short": words <= SHORT,
        "long": words > LONG,
    }
    for name, true in found.items():
        if true:
            tally.add(name, position, identifier, caption)
