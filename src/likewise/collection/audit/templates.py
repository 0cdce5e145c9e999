"""Wordings that many images share, numbers aside, and which of them say nothing of what is to be seen."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from likewise.collection.audit.findings import EXAMPLES, example
from likewise.collection.audit.sharing import caption_of_code, holders_of
from likewise.collection.audit.survey import Survey, rows_of
from likewise.collection.audit.words import normalised, template_of
from likewise.collection.duplicates import ImageHashes
from likewise.collection.records import Collection

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
