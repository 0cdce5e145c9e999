"""What is wrong with the captions, as findings, and how long and how often repeated they are."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from likewise.data.audit import scan as words
from likewise.data.audit.scan import (
    EXAMPLES,
    LONG,
    SHORT,
    Finding,
    Survey,
    caption_of_code,
    example,
    holders_of,
    normalised,
    rows_of,
    template_of,
)
from likewise.data.dataset import Collection
from likewise.data.perceptual_hash import ImageHashes
from likewise.errors import DependencyError
from likewise.progress import Progress

IMAGES = 20  # fewer images are no evidence
SHARE = 0.001
WORDS = 5  # shorter texts may be labels: `dog` is on many unlike images and says all
LOOKS = 0.9
WORDING = 0.5
LABELS = 0.9
_CANDIDATES = 500
_SAMPLE = 64
_RANDOM_PAIRS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """One wording.

    Attributes:
        code: Its 64 bits.
        text: Its words, numbers as `#`.
        images: The positions of the images with it, ascending.
        looks: Mean difference of the thumbnails of two of its images, relative to two images at random.
        wording: The median over its words of the share that it has of all captions with that word.
        agreed: The share of its most frequent label; 0 where there are no labels.
    """

    code: int
    text: str
    images: np.ndarray
    looks: float | None
    wording: float
    agreed: float

    @property
    def boilerplate(self) -> bool:
        """Whether it says nothing: long, in words of its own, on images as unlike as any, of no one label."""
        unlike = self.looks is not None and self.looks >= LOOKS
        own = self.wording >= WORDING and len(self.text.split()) >= WORDS
        return unlike and own and self.agreed < LABELS

    def examples(self, collection: Collection, most: int) -> list[dict[str, Any]]:
        """Return some of its images, taken evenly, with the caption that is meant."""
        spread = self.images[np.linspace(0, len(self.images) - 1, most).astype(int)]
        return [_example(collection, int(position), self.text) for position in np.unique(spread)]

    def told(self, collection: Collection) -> dict[str, Any]:
        """Return the template as JSON values."""
        return {
            "text": self.text,
            "images": len(self.images),
            "looks": self.looks,
            "wording": self.wording,
            "label_agreement": self.agreed,
            "boilerplate": self.boilerplate,
            "examples": self.examples(collection, EXAMPLES),
        }


def _example(collection: Collection, position: int, template: str) -> dict[str, Any]:
    record = collection[position]
    meant = (caption for caption in record.captions if template_of(normalised(caption)) == template)
    return example(position, record.id, next(meant, None))


def find_templates(collection: Collection, found: Survey, hashes: ImageHashes) -> list[Template]:
    """Return the wordings on at least 20 images and 0.1 % of all, the most frequent first.

    A wording is boilerplate where all of this holds: it has at least 5 words; two of its images differ on
    average at least 0.9 times as much as two images at random (thumbnails); of the captions with one of its
    words, it is at least half (the median over its words); where there are labels, no label has 90 % of its
    images. A product title fails the second and third, a label the first.

    Thumbnails tell outlines and colours, not things: that is why looks alone decide nothing.
    """
    least = max(IMAGES, int(np.ceil(SHARE * len(collection))))
    holders = _holders(found.templates, found.owners, least)
    told = ((code, caption_of_code(collection, found.templates, found.owners, code)) for code in holders)
    texts = {code: template_of(normalised(caption)) for code, caption in told}
    words = _document_frequencies(collection, {word for text in texts.values() for word in text.split()})
    captions = Counter(found.templates[np.isin(found.templates, list(holders))].tolist())
    usual = _usual_difference(hashes)
    return [
        Template(
            code=code,
            text=texts[code],
            images=images,
            looks=_looks(hashes, images, usual),
            wording=float(np.median([captions[code] / words[w] for w in set(texts[code].split())])),
            agreed=_agreement(found.labels[images]),
        )
        for code, images in holders.items()
    ]


def _holders(codes: np.ndarray, owners: np.ndarray, least: int) -> dict[int, np.ndarray]:
    """Return the images of every text that enough of them share, most frequent first, ties by position."""
    shared = holders_of(codes, owners)
    chosen = shared.most_frequent(least, _CANDIDATES)
    return {int(shared.codes[i]): shared.images(i) for i in chosen}


def _document_frequencies(collection: Collection, wanted: set[str]) -> Counter[str]:
    """Count the captions that hold each of some words."""
    counts: Counter[str] = Counter()
    for shard in range(len(collection.shards) if wanted else 0):
        for _, row in rows_of(collection, shard, ["captions"]):
            for caption in row["captions"]:
                counts.update(wanted.intersection(template_of(normalised(caption)).split()))
    return counts


def _usual_difference(hashes: ImageHashes) -> float:
    """Return the mean difference of two images drawn at random (fixed draws), 0 where there are too few."""
    readable = np.flatnonzero(hashes.readable)
    if len(readable) < IMAGES:
        return 0.0
    pairs = np.random.default_rng(0).choice(readable, (2, _RANDOM_PAIRS))
    return _difference(hashes, *pairs[:, pairs[0] != pairs[1]])


def _looks(hashes: ImageHashes, images: np.ndarray, usual: float) -> float | None:
    images = images[hashes.readable[images]]
    if usual == 0 or len(images) < 2:
        return None
    sample = images[np.unique(np.linspace(0, len(images) - 1, _SAMPLE).astype(int))]
    first, second = np.triu_indices(len(sample), 1)
    return _difference(hashes, sample[first], sample[second]) / usual


def _difference(hashes: ImageHashes, first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean over pairs of the RMS difference of thumbnails."""
    squares = (hashes.thumbnails(first).astype(np.int32) - hashes.thumbnails(second)) ** 2
    return float(np.sqrt(squares.reshape(len(squares), -1).mean(1)).mean())


def _agreement(labels: np.ndarray) -> float:
    """Return the share of the most frequent label among those that have one."""
    given = labels[labels != 0]
    return float(np.unique(given, return_counts=True)[1].max() / len(given)) if len(given) else 0.0


SHORTEST = 20
SURE = 0.5
SAMPLE = 20_000
TOO_SHORT = "too short to tell"
UNSURE = "unsure"


def language_mix(collection: Collection, captions: int, progress: Progress) -> dict[str, Any]:
    """Guess the language of up to 20,000 captions, taken evenly from all.

    Captions under 20 characters are not guessed, and guesses that py3langid holds for less than half
    likely are counted as unsure: titles and lists of names often are.

    Raises:
        DependencyError: where py3langid is missing.
    """
    every = max(1, -(-captions // SAMPLE))
    counts: Counter[str] = Counter()
    identify = _identifier() if captions else None
    number = 0
    with progress.task("languages", -(-captions // every), "captions") as task:
        for shard in range(len(collection.shards)):
            for _, row in rows_of(collection, shard, ["captions"]):
                for caption in row["captions"]:
                    if number % every == 0:
                        counts[_language(identify, caption)] += 1
                        task.advance()
                    number += 1
    return {
        "captions": counts.total(),
        "of": captions,
        "counts": [list(entry) for entry in counts.most_common()],
    }


def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as fault:
        raise DependencyError(
            "the audit needs py3langid 0.4 or later: pip install 'py3langid>=0.4'"
        ) from fault
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(identify: Any, caption: str) -> str:
    if len(caption) < SHORTEST:
        return TOO_SHORT
    language, probability = identify.classify(caption)
    return str(language) if probability >= SURE else UNSURE


_EMPTY = (
    (words.NO_LETTERS, "captions without a letter"),
    (words.WEB_ADDRESS, "captions: only a web address"),
    (words.FILE_NAME, "captions: only a file name"),
    (words.FILLER_ONLY, "captions: only filler words"),
)
_SHOWN_REPEATED = 12


def caption_findings(collection: Collection, found: Survey, templates: list[Template]) -> list[Finding]:
    """Return what is wrong with the captions, the filtered kinds first."""
    tally, captions, images = found.tally, len(found.texts), len(collection)
    dropped = int(collection.artifact.manifest.counts.get("empty_captions", 0))
    empty = [
        tally.finding(name, title, captions, "captions", filtered=tally.counts.get(name, 0))
        for name, title in _EMPTY
    ]
    return [
        tally.finding(
            "without_caption",
            "images without a caption",
            images,
            "images",
            note=f"the import dropped {dropped:,} empty captions" if dropped else "",
        ),
        *empty,
        _boilerplate(collection, found, templates),
        tally.finding("file_names", "captions that are file names", captions, "captions"),
        tally.finding("with_address", "captions with a web address", captions, "captions"),
        tally.finding("with_markup", "captions with remnants of HTML", captions, "captions"),
        _shared(collection, found),
        tally.finding("repeated_within", "images with one caption twice", images, "images"),
        tally.finding("short", f"captions of at most {SHORT} words", captions, "captions"),
        tally.finding(
            "long",
            f"captions of more than {LONG} words",
            captions,
            "captions",
            note="over the 77 tokens that CLIP reads",
        ),
    ]


def _boilerplate(collection: Collection, found: Survey, templates: list[Template]) -> Finding:
    empty = [template for template in templates if template.boilerplate]
    codes = np.array([template.code for template in empty], np.uint64)
    count = int(np.isin(found.templates, codes).sum())
    return Finding(
        name="boilerplate",
        title="captions that are boilerplate",
        count=count,
        total=len(found.texts),
        unit="captions",
        filtered=count,
        note=_counted(len(codes), "wording"),
        examples=tuple(shown for template in empty for shown in template.examples(collection, 2))[:EXAMPLES],
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if number else ""


def _shared(collection: Collection, found: Survey) -> Finding:
    """Return how many captions read like one of another image, but for case, spaces and punctuation."""
    shared = holders_of(found.texts, found.owners)
    often = np.flatnonzero(shared.counts > 1)
    tops = shared.most_frequent(2, EXAMPLES)
    examples = [
        example(int(owner), collection[int(owner)].id, _text(collection, found, int(shared.codes[i])))
        for i, owner in ((i, shared.images(i)[0]) for i in tops)
    ]
    return Finding(
        name="shared",
        title="captions that other images have too",
        count=int(np.isin(found.texts, shared.codes[often]).sum()),
        total=len(found.texts),
        unit="captions",
        note=_counted(len(often), "text"),
        examples=tuple(examples),
    )


def _text(collection: Collection, found: Survey, code: int) -> str:
    return caption_of_code(collection, found.texts, found.owners, code)


def repeated_texts(collection: Collection, found: Survey) -> list[dict[str, Any]]:
    """Return the captions that most images share, with the number of images."""
    shared = holders_of(found.texts, found.owners)
    return [
        {"caption": _text(collection, found, int(shared.codes[i])), "images": int(shared.counts[i])}
        for i in shared.most_frequent(2, _SHOWN_REPEATED)
    ]


def lengths_told(lengths: np.ndarray) -> dict[str, Any] | None:
    """Return the distribution of lengths in words from counts by length, None where there are no captions."""
    total = int(lengths.sum())
    if not total:
        return None
    present, below = np.flatnonzero(lengths), np.cumsum(lengths)
    return {
        "min": int(present[0]),
        "median": int(np.searchsorted(below, (total + 1) // 2)),
        "p95": int(np.searchsorted(below, np.ceil(0.95 * total))),
        "max": int(present[-1]),
        "counts": [[int(length), int(lengths[length])] for length in present],
    }
