"""One pass over all captions: counts of findings, and 64-bit hashes of the captions."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from likewise.data.config import AuditConfig
from likewise.data.dataset import CaptionDataset
from likewise.progress import Progress
from likewise.strings import split_words

MAX_EXAMPLES = 6


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A possible problem of a dataset."""

    name: str
    """Name in files."""
    title: str
    """Name in reports."""
    count: int
    """Number of affected images, captions or groups."""
    total: int
    """Number of all images, captions or groups."""
    unit: str
    """`images`, `captions` or `groups`."""
    filtered: int = 0
    """Number that the filter excludes."""
    note: str = ""
    """Additional details."""
    examples: tuple[dict[str, Any], ...] = ()
    """Indices, ids and captions, at most `MAX_EXAMPLES`."""

    @property
    def fraction(self) -> float:
        """The count divided by the total; 0 if the total is 0."""
        return self.count / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return vars(self) | {"fraction": self.fraction, "examples": list(self.examples)}


def make_example(index: int, sample_id: str, caption: str | None) -> dict[str, Any]:
    """Return an example of a finding: index and id of the sample, and the affected caption."""
    return {"index": int(index), "id": sample_id, "caption": caption}


@dataclass
class FindingCounter:
    """Counts of findings by name, with the first examples of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, index: int, sample_id: str, caption: str | None = None) -> None:
        """Count one sample or caption."""
        self.counts[name] = self.counts.get(name, 0) + 1
        examples = self.examples.setdefault(name, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(make_example(index, sample_id, caption))

    def to_finding(self, name: str, title: str, total: int, unit: str, **kwargs: Any) -> Finding:
        """Return the finding of a name."""
        count, examples = self.counts.get(name, 0), tuple(self.examples.get(name, ()))
        return Finding(
            name=name.replace(" ", "_").lower(),
            title=title,
            count=count,
            total=total,
            unit=unit,
            examples=examples,
            **kwargs,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedCaptions:
    """The distinct images of each of t distinct captions."""

    hashes: np.ndarray
    """Hashes of the captions, (t,) uint64, ascending."""
    counts: np.ndarray
    """Number of images of each caption, (t,) int64."""
    image_indices: np.ndarray
    """Image indices grouped by caption, ascending within a group, (sum of counts,) int64."""

    @property
    def offsets(self) -> np.ndarray:
        """Start of each caption in `image_indices`, (t,) int64."""
        return np.cumsum(self.counts) - self.counts

    def images(self, index: int) -> np.ndarray:
        """Return the images of one caption, by its index in `hashes`."""
        start = int(self.offsets[index])
        return self.image_indices[start : start + int(self.counts[index])]

    def most_frequent(self, min_images: int, max_captions: int) -> list[int]:
        """Return indices into `hashes` of the most frequent captions; ties are broken by the first image."""
        frequent = np.flatnonzero(self.counts >= min_images)
        order = np.lexsort((self.image_indices[self.offsets[frequent]], -self.counts[frequent]))
        return frequent[order][:max_captions].tolist()


def group_by_caption(hashes: np.ndarray, image_indices: np.ndarray) -> SharedCaptions:
    """Group images by caption.

    Args:
        hashes: Hash of each caption, (r,) uint64; 0 is ignored.
        image_indices: Image of each caption, (r,) int64.
    """
    order = np.lexsort((image_indices, hashes))
    hashes, image_indices = hashes[order], image_indices[order]
    is_new = hashes != 0
    is_new[1:] &= (hashes[1:] != hashes[:-1]) | (image_indices[1:] != image_indices[:-1])
    unique_hashes, counts = np.unique(hashes[is_new], return_counts=True)
    return SharedCaptions(hashes=unique_hashes, counts=counts, image_indices=image_indices[is_new])


def caption_for_hash(
    dataset: CaptionDataset, caption_hashes: np.ndarray, image_indices: np.ndarray, caption_hash: int
) -> str:
    """Return the first caption with a hash; the arrays are in the order of samples and their captions."""
    row = int(np.argmax(caption_hashes == np.uint64(caption_hash)))
    index = int(image_indices[row])
    return dataset[index].captions[row - int(np.searchsorted(image_indices, index))]


NO_LETTERS = "no letters"
URL_ONLY = "URL only"
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
# English words without visual content: function words, and words that are common for any photo.
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
    """Return the canonical form of a caption: NFKC, case-folded, letters, marks and digits only."""
    folded = unicodedata.normalize("NFKC", caption).casefold()
    if folded.isascii():
        return " ".join(_ASCII_WORDS.findall(folded))
    chars = (c if unicodedata.category(c)[0] in "LMN" else " " for c in folded)
    return " ".join("".join(chars).split())


def mask_digits(text: str) -> str:
    """Replace each number in a canonical caption by `#`."""
    return _DIGITS.sub("#", text)


def hash_text(text: str) -> int:
    """Return the 64-bit BLAKE2b hash of a text."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def count_words(caption: str) -> int:
    """Return the number of words, as the lexical encoders count them; Chinese and Japanese by character."""
    return len(split_words(caption))


def has_url(caption: str) -> bool:
    """Return whether a caption contains a URL."""
    return _URL.search(caption) is not None


def has_markup(caption: str) -> bool:
    """Return whether a caption contains HTML tags or entities."""
    return _MARKUP.search(caption) is not None


def is_file_name(caption: str) -> bool:
    """Return whether a caption is an image file name, or the name that a camera assigns."""
    stem, num_suffixes = _IMAGE_SUFFIX.subn("", caption.strip())
    return bool(num_suffixes and " " not in stem) or _CAMERA_FILE_NAME.fullmatch(stem) is not None


def uninformative_reason(caption: str) -> str | None:
    """Return the reason why a caption is uninformative, or None if it is informative.

    Symbols such as emoji are informative. Filler words are English only.
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

    position: str
    """`first` or `last`."""
    text: str


class MisraGriesCounter:
    """Counts frequent phrases of a stream in bounded memory (Misra and Gries 1982).

    The true count of a phrase exceeds its count by at most `max_undercount`, which is at most N / 20,000
    after N phrases.
    """

    def __init__(self) -> None:
        self.counts: Counter[Phrase] = Counter()
        self.max_undercount = 0

    def update(self, phrases: Iterable[Phrase]) -> None:
        """Count the phrases of one caption."""
        self.counts.update(phrases)

    def prune(self) -> None:
        """Drop rare phrases if there are too many."""
        if len(self.counts) <= _MAX_PHRASES:
            return
        threshold = sorted(self.counts.values(), reverse=True)[_MAX_PHRASES]
        self.counts = Counter(
            {phrase: count - threshold for phrase, count in self.counts.items() if count > threshold}
        )
        self.max_undercount += threshold


def extract_phrases(text: str) -> list[Phrase]:
    """Return the first and last 2 to 4 words of a longer canonical caption."""
    words = text.split()
    max_length = min(_MAX_PHRASE_WORDS, len(words) - 1)
    phrases = []
    for length in range(_MIN_PHRASE_WORDS, max_length + 1):
        phrases.append(Phrase("first", " ".join(words[:length])))
        phrases.append(Phrase("last", " ".join(words[-length:])))
    return phrases


def top_phrases(counts: dict[Phrase, int], min_count: int) -> list[tuple[Phrase, int]]:
    """Return the phrases with at least `min_count` occurrences, the most frequent first.

    A phrase is dropped if a longer one with nearly the same count contains it (`picture of` in
    `a picture of`).
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
    if longer.position != phrase.position or len(longer.text) <= len(phrase.text):
        return False
    if phrase.position == "first":
        return longer.text.startswith(phrase.text + " ")
    return longer.text.endswith(" " + phrase.text)


LONG_CAPTION_WORDS = 55  # about 77 tokens, the context length of CLIP, at 1.4 tokens per word
SHORT_CAPTION_WORDS = 2
_SCANNED_COLUMNS = ["id", "captions", "group", "label", "width", "height"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionScan:
    """Result of one pass over n samples with r captions."""

    caption_hashes: np.ndarray
    """Hash of each canonical caption, (r,) uint64; 0 without letters and digits."""
    template_hashes: np.ndarray
    """Hash of each canonical caption with masked numbers, (r,) uint64."""
    image_indices: np.ndarray
    """Sample index of each caption, (r,) int64, ascending."""
    caption_set_hashes: np.ndarray
    """Hash of all captions of each sample, (n,) uint64."""
    group_hashes: np.ndarray
    """Hash of the group of each sample, (n,) uint64; 0 without a group."""
    label_hashes: np.ndarray
    """Hash of the label of each sample, (n,) uint64; 0 without a label."""
    length_counts: Counter[int]
    """Number of captions by length in words."""
    counter: FindingCounter
    """Counts and examples of findings on single captions and samples."""
    frequent_phrases: MisraGriesCounter
    """Counts of the most frequent first and last words."""


@dataclass
class _ScanArrays:
    caption_hashes: list[int] = field(default_factory=list)
    template_hashes: list[int] = field(default_factory=list)
    image_indices: list[int] = field(default_factory=list)
    caption_set_hashes: list[int] = field(default_factory=list)
    group_hashes: list[int] = field(default_factory=list)
    label_hashes: list[int] = field(default_factory=list)


def scan_dataset(dataset: CaptionDataset, config: AuditConfig, progress: Progress) -> CaptionScan:
    """Scan all samples once; the result takes 24 bytes per caption."""
    counter, frequent_phrases, length_counts = (
        FindingCounter(),
        MisraGriesCounter(),
        Counter[int](),
    )
    shards: list[dict[str, np.ndarray]] = []
    with progress.task("scanning", len(dataset), "images") as bar:
        for shard in range(len(dataset.shard_paths)):
            arrays = _ScanArrays()
            for index, row in iter_rows(dataset, shard, _SCANNED_COLUMNS):
                _scan_sample(row, index, arrays, counter, config)
                for caption in row["captions"]:
                    _scan_caption(row["id"], index, caption, arrays, counter)
                    frequent_phrases.update(extract_phrases(mask_digits(canonicalize_caption(caption))))
                    length_counts[count_words(caption)] += 1
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
    """Yield the index and the columns of each sample of a shard."""
    columns = dataset.read_columns(shard, column_names)
    for row, values in enumerate(zip(*(columns[name] for name in column_names), strict=True)):
        yield dataset.shard_offsets[shard] + row, dict(zip(column_names, values, strict=True))


def _to_array(name: str, values: list[int]) -> np.ndarray:
    return np.array(values, np.int64 if name == "image_indices" else np.uint64)


def _scan_sample(
    row: dict[str, Any], index: int, arrays: _ScanArrays, counter: FindingCounter, config: AuditConfig
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
            counter.add(name, index, row["id"], caption)


def _scan_caption(
    sample_id: str, index: int, caption: str, arrays: _ScanArrays, counter: FindingCounter
) -> None:
    canonical = canonicalize_caption(caption)
    arrays.caption_hashes.append(hash_text(canonical) if canonical else 0)
    arrays.template_hashes.append(hash_text(mask_digits(canonical)) if canonical else 0)
    arrays.image_indices.append(index)
    reason, num_words = uninformative_reason(caption), count_words(caption)
    flags = {
        reason or "": reason is not None,
        "with_url": has_url(caption),
        "with_markup": has_markup(caption),
        "file_names": is_file_name(caption),
        "short": num_words <= SHORT_CAPTION_WORDS,
        "long": num_words > LONG_CAPTION_WORDS,
    }
    for name, is_flagged in flags.items():
        if is_flagged:
            counter.add(name, index, sample_id, caption)
