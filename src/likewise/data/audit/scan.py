"""The first reading of all records: counts, and 64 bits of each text instead of the text itself."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from likewise.data.audit.config import AuditConfig
from likewise.data.dataset import CaptionDataset
from likewise.progress import Progress

MAX_EXAMPLES = 6


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
    def fraction(self) -> float:
        """The count as a share of the total; 0 where there is nothing to count."""
        return self.count / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return vars(self) | {"fraction": self.fraction, "examples": list(self.examples)}


def make_example(position: int, sample_id: str, caption: str | None) -> dict[str, Any]:
    """Return an example of a finding: where the record stands, its id, and the caption that is meant."""
    return {"position": int(position), "id": sample_id, "caption": caption}


@dataclass
class FindingCounter:
    """Counts by name, with the first examples of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, position: int, sample_id: str, caption: str | None = None) -> None:
        """Count one."""
        self.counts[name] = self.counts.get(name, 0) + 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(make_example(position, sample_id, caption))

    def to_finding(self, name: str, title: str, total: int, unit: str, **kwargs: Any) -> Finding:
        """Return the finding of a name."""
        count, examples = self.counts.get(name, 0), tuple(self.examples.get(name, ()))
        return Finding(
            name=name.replace(" ", "_"),
            title=title,
            count=count,
            total=total,
            unit=unit,
            examples=examples,
            **kwargs,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedCaptions:
    """The images of every text: t texts, ascending by code, each image once.

    Attributes:
        hashes: The texts, (t,) uint64.
        counts: How many images have each, (t,) int64.
        image_indices: The images, text by text, each ascending, (sum of counts,) int64.
    """

    hashes: np.ndarray
    counts: np.ndarray
    image_indices: np.ndarray

    @property
    def offsets(self) -> np.ndarray:
        """Where the images of each text begin in `owners`, (t,) int64."""
        return np.cumsum(self.counts) - self.counts

    def images(self, index: int) -> np.ndarray:
        """Return the images of one text, by its place among the codes."""
        start = int(self.offsets[index])
        return self.image_indices[start : start + int(self.counts[index])]

    def most_frequent(self, min_images: int, max_captions: int) -> list[int]:
        """Return the places of at most so many texts on at least so many images; ties by first image."""
        frequent = np.flatnonzero(self.counts >= min_images)
        order = np.lexsort((self.image_indices[self.offsets[frequent]], -self.counts[frequent]))
        return frequent[order][:max_captions].tolist()


def group_by_caption(hashes: np.ndarray, image_indices: np.ndarray) -> SharedCaptions:
    """Gather the images by text: codes (r,) uint64, of which 0 is no text, and owners (r,) int64."""
    order = np.lexsort((image_indices, hashes))
    hashes, image_indices = hashes[order], image_indices[order]
    is_new = hashes != 0
    is_new[1:] &= (hashes[1:] != hashes[:-1]) | (image_indices[1:] != image_indices[:-1])
    unique_hashes, counts = np.unique(hashes[is_new], return_counts=True)
    return SharedCaptions(hashes=unique_hashes, counts=counts, image_indices=image_indices[is_new])


def caption_for_hash(
    dataset: CaptionDataset, caption_hashes: np.ndarray, image_indices: np.ndarray, caption_hash: int
) -> str:
    """Return the first caption with a code; the arrays are in the order of records and their captions."""
    row = int(np.argmax(caption_hashes == np.uint64(caption_hash)))
    position = int(image_indices[row])
    return dataset[position].captions[row - int(np.searchsorted(image_indices, position))]


NO_LETTERS = "no letters"
URL_ONLY = "web address only"
FILE_NAME_ONLY = "file name only"
FILLER_ONLY = "filler words only"

_LETTERS = re.compile(r"[^\W\d_]+")
_ASCII_WORDS = re.compile(r"[a-z0-9]+")
_DIGITS = re.compile(r"\d+")
_URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_MARKUP = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#\d{2,6}|#x[0-9a-f]{2,6});", re.IGNORECASE)
_IMAGE_SUFFIX = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|svg)$", re.IGNORECASE)
_CAMERA_FILE_NAME = re.compile(
    r"(?:img|dsc[nf]?|pict|pxl|mvimg|gopr|imag|cimg|screenshot|image|photo|picture|p)[ _-]?\d{3,}[\w -]*",
    re.IGNORECASE,
)
# English words that tell nothing of what is to be seen: function words, and what people write of any photo.
_FILLER_TEXT = """
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
FILLER_WORDS = frozenset(_FILLER_TEXT.split())


def canonicalize_caption(caption: str) -> str:
    """Return a caption in one spelling: NFKC, case folded, letters, marks and digits set apart by spaces."""
    folded = unicodedata.normalize("NFKC", caption).casefold()
    if folded.isascii():
        return " ".join(_ASCII_WORDS.findall(folded))
    chars = (c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return " ".join("".join(chars).split())


def mask_digits(text: str) -> str:
    """Return a normalised caption with every number replaced by `#`."""
    return _DIGITS.sub("#", text)


def hash_text(text: str) -> int:
    """Return 64 bits of BLAKE2b of a text."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def count_words(caption: str) -> int:
    """Return the number of words, which are what spaces set apart and hold a letter or digit."""
    return sum(any(c.isalnum() for c in word) for word in caption.split())


def has_url(caption: str) -> bool:
    """Whether a caption holds a web address."""
    return _URL.search(caption) is not None


def has_markup(caption: str) -> bool:
    """Whether a caption holds tags or entities of HTML."""
    return _MARKUP.search(caption) is not None


def is_file_name(caption: str) -> bool:
    """Whether a caption is the name of an image file, or what cameras and phones call one."""
    stem, num_suffixes = _IMAGE_SUFFIX.subn("", caption.strip())
    return bool(num_suffixes and " " not in stem) or _CAMERA_FILE_NAME.fullmatch(stem) is not None


def uninformative_reason(caption: str) -> str | None:
    """Return why a caption says nothing of its image, or None where it says something.

    A symbol such as an emoji says something. Filler words are known in English only.
    """
    text, num_urls = _URL.subn(" ", caption)
    words = set(
        _LETTERS.findall(unicodedata.normalize("NFKC", _IMAGE_SUFFIX.sub("", text.strip())).casefold())
    )
    if words - FILLER_WORDS or any(unicodedata.category(c) == "So" for c in text):
        return None
    if num_urls:
        return URL_ONLY
    if is_file_name(caption):
        return FILE_NAME_ONLY
    return FILLER_ONLY if words else NO_LETTERS


_MAX_PHRASES = 20_000
_MIN_PHRASE_WORDS, _MAX_PHRASE_WORDS = 2, 4
_REDUNDANT_RATIO = 0.8


class Phrase(NamedTuple):
    """The first or last words of a caption."""

    end: str
    text: str


class MisraGriesCounter:
    """Finds what is frequent in a long stream with bounded memory (Misra and Gries 1982).

    A phrase that was pruned away occurs at most `max_undercount` times more than it is counted, and after N
    phrases
    `max_undercount` ≤ N / 20,000.
    """

    def __init__(self) -> None:
        self.counts: Counter[Phrase] = Counter()
        self.max_undercount = 0

    def update(self, phrases: Iterable[Phrase]) -> None:
        """Count the phrases of one caption."""
        self.counts.update(phrases)

    def prune(self) -> None:
        """Forget the rare ones where there are too many."""
        if len(self.counts) <= _MAX_PHRASES:
            return
        threshold = sorted(self.counts.values(), reverse=True)[_MAX_PHRASES]
        self.counts = Counter(
            {phrase: count - threshold for phrase, count in self.counts.items() if count > threshold}
        )
        self.max_undercount += threshold


def extract_phrases(text: str) -> list[Phrase]:
    """Return the first and last 2 to 4 words of a normalised caption that has more words than that."""
    words = text.split()
    max_length = min(_MAX_PHRASE_WORDS, len(words) - 1)
    phrases = []
    for length in range(_MIN_PHRASE_WORDS, max_length + 1):
        phrases.append(Phrase("first", " ".join(words[:length])))
        phrases.append(Phrase("last", " ".join(words[-length:])))
    return phrases


def top_phrases(counts: dict[Phrase, int], min_count: int) -> list[tuple[Phrase, int]]:
    """Return the phrases that occur at least so often, the most frequent first.

    One is left out where a longer one says nearly as often the same: `picture of` beside `a picture of`.
    """
    frequent = {phrase: count for phrase, count in counts.items() if count >= min_count}
    distinct = [
        (phrase, count)
        for phrase, count in frequent.items()
        if not any(
            _contains(other, phrase) and other_count >= _REDUNDANT_RATIO * count
            for other, other_count in frequent.items()
        )
    ]
    return sorted(distinct, key=lambda entry: (-entry[1], entry[0]))


def _contains(longer: Phrase, phrase: Phrase) -> bool:
    if longer.end != phrase.end or len(longer.text) <= len(phrase.text):
        return False
    if phrase.end == "first":
        return longer.text.startswith(phrase.text + " ")
    return longer.text.endswith(" " + phrase.text)


LONG_CAPTION_WORDS = 55  # words that fill the 77 tokens of CLIP's text encoder, at about 1.4 tokens a word
SHORT_CAPTION_WORDS = 2
_SCANNED_COLUMNS = ["id", "captions", "group", "label", "width", "height"]
_MAX_COUNTED_WORDS = 1024  # longer captions are counted as so long


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionScan:
    """What one reading of n records with r captions found.

    Attributes:
        caption_hashes: 64 bits of each caption, (r,) uint64; 0 for one without letters and digits.
        template_hashes: The same with digits masked, (r,) uint64.
        image_indices: The position of the record of each caption, (r,) int64, ascending.
        caption_set_hashes: 64 bits of all captions of a record, (n,) uint64: what copies of an image are
            compared by.
        group_hashes: 64 bits of each record's group, (n,) uint64; 0 where it has none.
        label_hashes: 64 bits of each record's label, (n,) uint64; 0 where it has none.
        length_counts: How many captions have so many words, (1025,) int64.
        counter: Counts and examples of what a caption or record shows by itself.
        frequent_phrases: The most frequent first and last words.
    """

    caption_hashes: np.ndarray
    template_hashes: np.ndarray
    image_indices: np.ndarray
    caption_set_hashes: np.ndarray
    group_hashes: np.ndarray
    label_hashes: np.ndarray
    length_counts: np.ndarray
    counter: FindingCounter
    frequent_phrases: MisraGriesCounter


@dataclass
class _ScanArrays:
    caption_hashes: list[int] = field(default_factory=list)
    template_hashes: list[int] = field(default_factory=list)
    image_indices: list[int] = field(default_factory=list)
    caption_set_hashes: list[int] = field(default_factory=list)
    group_hashes: list[int] = field(default_factory=list)
    label_hashes: list[int] = field(default_factory=list)


def scan_dataset(dataset: CaptionDataset, config: AuditConfig, progress: Progress) -> CaptionScan:
    """Read all records once; what is kept of a caption are 24 bytes."""
    counter, frequent_phrases, length_counts = (
        FindingCounter(),
        MisraGriesCounter(),
        np.zeros(_MAX_COUNTED_WORDS + 1, np.int64),
    )
    shards: list[dict[str, np.ndarray]] = []
    with progress.task("reading", len(dataset), "images") as bar:
        for shard in range(len(dataset.shard_paths)):
            arrays = _ScanArrays()
            for position, row in iter_rows(dataset, shard, _SCANNED_COLUMNS):
                _scan_sample(row, position, arrays, counter, config)
                for caption in row["captions"]:
                    _scan_caption(row["id"], position, caption, arrays, counter)
                    frequent_phrases.update(extract_phrases(mask_digits(canonicalize_caption(caption))))
                    length_counts[min(count_words(caption), _MAX_COUNTED_WORDS)] += 1
            frequent_phrases.prune()
            shards.append({name: _to_array(name, values) for name, values in vars(arrays).items()})
            bar.update(len(arrays.caption_set_hashes))
    merged = {name: np.concatenate([shard_arrays[name] for shard_arrays in shards]) for name in shards[0]}
    return CaptionScan(
        **merged, length_counts=length_counts, counter=counter, frequent_phrases=frequent_phrases
    )


def iter_rows(
    dataset: CaptionDataset, shard: int, column_names: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a shard, with their positions, as some columns tell of them."""
    columns = dataset.read_columns(shard, column_names)
    for row, values in enumerate(zip(*(columns[name] for name in column_names), strict=True)):
        yield dataset.shard_offsets[shard] + row, dict(zip(column_names, values, strict=True))


def _to_array(name: str, values: list[int]) -> np.ndarray:
    return np.array(values, np.int64 if name == "image_indices" else np.uint64)


def _scan_sample(
    row: dict[str, Any], position: int, arrays: _ScanArrays, counter: FindingCounter, config: AuditConfig
) -> None:
    canonical = [canonicalize_caption(caption) for caption in row["captions"]]
    arrays.caption_set_hashes.append(hash_text("\n".join(sorted(canonical))))
    arrays.group_hashes.append(0 if row["group"] is None else hash_text(row["group"]))
    arrays.label_hashes.append(0 if row["label"] is None else hash_text(row["label"]))
    short_side, long_side = sorted((row["width"], row["height"]))
    flags = {
        "without_caption": not canonical,
        "repeated_within": len(set(canonical)) < len(canonical),
        "tiny": short_side < config.min_side,
        "stretched": long_side > config.max_aspect * short_side,
    }
    caption = row["captions"][0] if row["captions"] else None
    for name, is_flagged in flags.items():
        if is_flagged:
            counter.add(name, position, row["id"], caption)


def _scan_caption(
    sample_id: str, position: int, caption: str, arrays: _ScanArrays, counter: FindingCounter
) -> None:
    canonical = canonicalize_caption(caption)
    arrays.caption_hashes.append(hash_text(canonical) if canonical else 0)
    arrays.template_hashes.append(hash_text(mask_digits(canonical)) if canonical else 0)
    arrays.image_indices.append(position)
    reason, num_words = uninformative_reason(caption), count_words(caption)
    flags = {
        reason or "": reason is not None,
        "with_address": has_url(caption),
        "with_markup": has_markup(caption),
        "file_names": is_file_name(caption),
        "short": num_words <= SHORT_CAPTION_WORDS,
        "long": num_words > LONG_CAPTION_WORDS,
    }
    for name, is_flagged in flags.items():
        if is_flagged:
            counter.add(name, position, sample_id, caption)
