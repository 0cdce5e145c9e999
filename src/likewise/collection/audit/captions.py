"""What is wrong with the captions, as findings, and how long and how often repeated they are."""

from typing import Any

import numpy as np

from likewise.collection.audit import words
from likewise.collection.audit.findings import EXAMPLES, Finding, example
from likewise.collection.audit.sharing import caption_of_code, holders_of
from likewise.collection.audit.survey import LONG, SHORT, Survey
from likewise.collection.audit.templates import Template
from likewise.collection.records import Collection

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
