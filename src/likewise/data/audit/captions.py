"""What is wrong with the captions, as findings, and how long and how often repeated they are."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from likewise.data.audit.scan import (
    FILE_NAME_ONLY,
    FILLER_ONLY,
    LONG_CAPTION_WORDS,
    MAX_EXAMPLES,
    NO_LETTERS,
    SHORT_CAPTION_WORDS,
    URL_ONLY,
    CaptionScan,
    Finding,
    canonicalize_caption,
    caption_for_hash,
    group_by_caption,
    iter_rows,
    make_example,
    mask_digits,
)
from likewise.data.dataset import CaptionDataset
from likewise.data.perceptual_hash import PerceptualHashes
from likewise.errors import DependencyError
from likewise.progress import Progress

MIN_TEMPLATE_IMAGES = 20  # fewer images are no evidence
MIN_TEMPLATE_FRACTION = 0.001
MIN_TEMPLATE_WORDS = 5  # shorter texts may be labels: `dog` is on many unlike images and says all
MIN_IMAGE_DIVERSITY = 0.9
MIN_WORD_SPECIFICITY = 0.5
MAX_LABEL_AGREEMENT = 0.9
_MAX_TEMPLATES = 500
_NUM_SAMPLED_IMAGES = 64
_NUM_RANDOM_PAIRS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """One wording.

    Attributes:
        template_hash: Its 64 bits.
        text: Its words, numbers as `#`.
        images: The positions of the images with it, ascending.
        image_diversity: Mean difference of the thumbnails of two of its images, relative to two images at
            random.
        word_specificity: The median over its words of the share that it has of all captions with that word.
        label_agreement: The share of its most frequent label; 0 where there are no labels.
    """

    template_hash: int
    text: str
    images: np.ndarray
    image_diversity: float | None
    word_specificity: float
    label_agreement: float

    @property
    def is_boilerplate(self) -> bool:
        """Whether it says nothing: long, in words of its own, on images as unlike as any, of no one label."""
        is_diverse = self.image_diversity is not None and self.image_diversity >= MIN_IMAGE_DIVERSITY
        is_specific = (
            self.word_specificity >= MIN_WORD_SPECIFICITY and len(self.text.split()) >= MIN_TEMPLATE_WORDS
        )
        return is_diverse and is_specific and self.label_agreement < MAX_LABEL_AGREEMENT

    def examples(self, dataset: CaptionDataset, max_examples: int) -> list[dict[str, Any]]:
        """Return some of its images, taken evenly, with the caption that is meant."""
        positions = self.images[np.linspace(0, len(self.images) - 1, max_examples).astype(int)]
        return [_template_example(dataset, int(position), self.text) for position in np.unique(positions)]

    def to_dict(self, dataset: CaptionDataset) -> dict[str, Any]:
        """Return the template as JSON values."""
        return {
            "text": self.text,
            "images": len(self.images),
            "image_diversity": self.image_diversity,
            "word_specificity": self.word_specificity,
            "label_agreement": self.label_agreement,
            "is_boilerplate": self.is_boilerplate,
            "examples": self.examples(dataset, MAX_EXAMPLES),
        }


def _template_example(dataset: CaptionDataset, position: int, template_text: str) -> dict[str, Any]:
    sample = dataset[position]
    matches = (
        caption for caption in sample.captions if mask_digits(canonicalize_caption(caption)) == template_text
    )
    return make_example(position, sample.id, next(matches, None))


def find_templates(dataset: CaptionDataset, scan: CaptionScan, hashes: PerceptualHashes) -> list[Template]:
    """Return the wordings on at least 20 images and 0.1 % of all, the most frequent first.

    A wording is boilerplate where all of this holds: it has at least 5 words; two of its images differ on
    average at least 0.9 times as much as two images at random (thumbnails); of the captions with one of its
    words, it is at least half (the median over its words); where there are labels, no label has 90 % of its
    images. A product title fails the second and third, a label the first.

    Thumbnails tell outlines and colours, not things: that is why looks alone decide nothing.
    """
    min_images = max(MIN_TEMPLATE_IMAGES, int(np.ceil(MIN_TEMPLATE_FRACTION * len(dataset))))
    images_by_template = _frequent_templates(scan.template_hashes, scan.image_indices, min_images)
    first_captions = (
        (template_hash, caption_for_hash(dataset, scan.template_hashes, scan.image_indices, template_hash))
        for template_hash in images_by_template
    )
    texts = {
        template_hash: mask_digits(canonicalize_caption(caption)) for template_hash, caption in first_captions
    }
    document_frequencies = _document_frequencies(
        dataset, {word for text in texts.values() for word in text.split()}
    )
    template_counts = Counter(
        scan.template_hashes[np.isin(scan.template_hashes, list(images_by_template))].tolist()
    )
    random_difference = _random_pair_difference(hashes)
    return [
        Template(
            template_hash=template_hash,
            text=texts[template_hash],
            images=images,
            image_diversity=_image_diversity(hashes, images, random_difference),
            word_specificity=float(
                np.median(
                    [
                        template_counts[template_hash] / document_frequencies[word]
                        for word in set(texts[template_hash].split())
                    ]
                )
            ),
            label_agreement=_label_agreement(scan.label_hashes[images]),
        )
        for template_hash, images in images_by_template.items()
    ]


def _frequent_templates(
    template_hashes: np.ndarray, image_indices: np.ndarray, min_images: int
) -> dict[int, np.ndarray]:
    """Return the images of every text that enough of them share, most frequent first, ties by position."""
    shared_captions = group_by_caption(template_hashes, image_indices)
    frequent = shared_captions.most_frequent(min_images, _MAX_TEMPLATES)
    return {int(shared_captions.hashes[i]): shared_captions.images(i) for i in frequent}


def _document_frequencies(dataset: CaptionDataset, vocabulary: set[str]) -> Counter[str]:
    """Count the captions that hold each of some words."""
    counts: Counter[str] = Counter()
    for shard in range(len(dataset.shard_paths) if vocabulary else 0):
        for _, row in iter_rows(dataset, shard, ["captions"]):
            for caption in row["captions"]:
                counts.update(vocabulary.intersection(mask_digits(canonicalize_caption(caption)).split()))
    return counts


def _random_pair_difference(hashes: PerceptualHashes) -> float:
    """Return the mean difference of two images drawn at random (fixed draws), 0 where there are too few."""
    readable = np.flatnonzero(hashes.readable)
    if len(readable) < MIN_TEMPLATE_IMAGES:
        return 0.0
    pairs = np.random.default_rng(0).choice(readable, (2, _NUM_RANDOM_PAIRS))
    return _mean_rms_difference(hashes, *pairs[:, pairs[0] != pairs[1]])


def _image_diversity(hashes: PerceptualHashes, images: np.ndarray, random_difference: float) -> float | None:
    images = images[hashes.readable[images]]
    if random_difference == 0 or len(images) < 2:
        return None
    sampled = images[np.unique(np.linspace(0, len(images) - 1, _NUM_SAMPLED_IMAGES).astype(int))]
    first, second = np.triu_indices(len(sampled), 1)
    return _mean_rms_difference(hashes, sampled[first], sampled[second]) / random_difference


def _mean_rms_difference(hashes: PerceptualHashes, first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean over pairs of the RMS difference of thumbnails."""
    squared_error = (hashes.thumbnails(first).astype(np.int32) - hashes.thumbnails(second)) ** 2
    return float(np.sqrt(squared_error.reshape(len(squared_error), -1).mean(1)).mean())


def _label_agreement(label_hashes: np.ndarray) -> float:
    """Return the share of the most frequent label among those that have one."""
    known = label_hashes[label_hashes != 0]
    return float(np.unique(known, return_counts=True)[1].max() / len(known)) if len(known) else 0.0


MIN_LANGUAGE_CHARS = 20
MIN_LANGUAGE_PROB = 0.5
MAX_LANGUAGE_SAMPLES = 20_000
TOO_SHORT = "too short to tell"
UNSURE = "unsure"


def detect_languages(dataset: CaptionDataset, num_captions: int, progress: Progress) -> dict[str, Any]:
    """Guess the language of up to 20,000 captions, taken evenly from all.

    Captions under 20 characters are not guessed, and guesses that py3langid holds for less than half
    likely are counted as unsure: titles and lists of names often are.

    Raises:
        DependencyError: where py3langid is missing.
    """
    stride = max(1, -(-num_captions // MAX_LANGUAGE_SAMPLES))
    counts: Counter[str] = Counter()
    identifier = _load_language_identifier() if num_captions else None
    caption_index = 0
    with progress.task("languages", -(-num_captions // stride), "captions") as bar:
        for shard in range(len(dataset.shard_paths)):
            for _, row in iter_rows(dataset, shard, ["captions"]):
                for caption in row["captions"]:
                    if caption_index % stride == 0:
                        counts[_detect_language(identifier, caption)] += 1
                        bar.update()
                    caption_index += 1
    return {
        "captions": counts.total(),
        "of": num_captions,
        "counts": [list(entry) for entry in counts.most_common()],
    }


def _load_language_identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DependencyError(
            "the audit needs py3langid 0.4 or later: pip install 'py3langid>=0.4'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _detect_language(identifier: Any, caption: str) -> str:
    if len(caption) < MIN_LANGUAGE_CHARS:
        return TOO_SHORT
    language, probability = identifier.classify(caption)
    return str(language) if probability >= MIN_LANGUAGE_PROB else UNSURE


_UNINFORMATIVE = (
    (NO_LETTERS, "captions without a letter"),
    (URL_ONLY, "captions: only a web address"),
    (FILE_NAME_ONLY, "captions: only a file name"),
    (FILLER_ONLY, "captions: only filler words"),
)
_NUM_REPEATED = 12


def find_caption_issues(
    dataset: CaptionDataset, scan: CaptionScan, templates: list[Template]
) -> list[Finding]:
    """Return what is wrong with the captions, the filtered kinds first."""
    counter, num_captions, num_images = scan.counter, len(scan.caption_hashes), len(dataset)
    num_dropped = int(dataset.artifact.manifest.counts.get("empty_captions", 0))
    uninformative = [
        counter.to_finding(name, title, num_captions, "captions", filtered=counter.counts.get(name, 0))
        for name, title in _UNINFORMATIVE
    ]
    return [
        counter.to_finding(
            "without_caption",
            "images without a caption",
            num_images,
            "images",
            note=f"the import dropped {num_dropped:,} empty captions" if num_dropped else "",
        ),
        *uninformative,
        _boilerplate_finding(dataset, scan, templates),
        counter.to_finding("file_names", "captions that are file names", num_captions, "captions"),
        counter.to_finding("with_address", "captions with a web address", num_captions, "captions"),
        counter.to_finding("with_markup", "captions with remnants of HTML", num_captions, "captions"),
        _shared_finding(dataset, scan),
        counter.to_finding("repeated_within", "images with one caption twice", num_images, "images"),
        counter.to_finding(
            "short", f"captions of at most {SHORT_CAPTION_WORDS} words", num_captions, "captions"
        ),
        counter.to_finding(
            "long",
            f"captions of more than {LONG_CAPTION_WORDS} words",
            num_captions,
            "captions",
            note="over the 77 tokens that CLIP reads",
        ),
    ]


def _boilerplate_finding(dataset: CaptionDataset, scan: CaptionScan, templates: list[Template]) -> Finding:
    boilerplate = [template for template in templates if template.is_boilerplate]
    template_hashes = np.array([template.template_hash for template in boilerplate], np.uint64)
    count = int(np.isin(scan.template_hashes, template_hashes).sum())
    return Finding(
        name="boilerplate",
        title="captions that are boilerplate",
        count=count,
        total=len(scan.caption_hashes),
        unit="captions",
        filtered=count,
        note=_count_noun(len(template_hashes), "wording"),
        examples=tuple(example for template in boilerplate for example in template.examples(dataset, 2))[
            :MAX_EXAMPLES
        ],
    )


def _count_noun(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}" if count else ""


def _shared_finding(dataset: CaptionDataset, scan: CaptionScan) -> Finding:
    """Return how many captions read like one of another image, but for case, spaces and punctuation."""
    shared_captions = group_by_caption(scan.caption_hashes, scan.image_indices)
    repeated = np.flatnonzero(shared_captions.counts > 1)
    most_frequent = shared_captions.most_frequent(2, MAX_EXAMPLES)
    examples = [
        make_example(
            int(position),
            dataset[int(position)].id,
            _caption_text(dataset, scan, int(shared_captions.hashes[i])),
        )
        for i, position in ((i, shared_captions.images(i)[0]) for i in most_frequent)
    ]
    return Finding(
        name="shared",
        title="captions that other images have too",
        count=int(np.isin(scan.caption_hashes, shared_captions.hashes[repeated]).sum()),
        total=len(scan.caption_hashes),
        unit="captions",
        note=_count_noun(len(repeated), "text"),
        examples=tuple(examples),
    )


def _caption_text(dataset: CaptionDataset, scan: CaptionScan, caption_hash: int) -> str:
    return caption_for_hash(dataset, scan.caption_hashes, scan.image_indices, caption_hash)


def repeated_captions(dataset: CaptionDataset, scan: CaptionScan) -> list[dict[str, Any]]:
    """Return the captions that most images share, with the number of images."""
    shared_captions = group_by_caption(scan.caption_hashes, scan.image_indices)
    return [
        {
            "caption": _caption_text(dataset, scan, int(shared_captions.hashes[i])),
            "images": int(shared_captions.counts[i]),
        }
        for i in shared_captions.most_frequent(2, _NUM_REPEATED)
    ]


def summarize_lengths(length_counts: np.ndarray) -> dict[str, Any] | None:
    """Return the distribution of lengths in words from counts by length, None where there are no captions."""
    total = int(length_counts.sum())
    if not total:
        return None
    observed, cumulative = np.flatnonzero(length_counts), np.cumsum(length_counts)
    return {
        "min": int(observed[0]),
        "median": int(np.searchsorted(cumulative, (total + 1) // 2)),
        "p95": int(np.searchsorted(cumulative, np.ceil(0.95 * total))),
        "max": int(observed[-1]),
        "counts": [[int(length), int(length_counts[length])] for length in observed],
    }
