"""Findings on captions: uninformative and repeated captions, boilerplate templates, lengths and languages."""

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
from likewise.strings import count_noun, split_words

MIN_TEMPLATE_IMAGES = 20
MIN_TEMPLATE_FRACTION = 0.001
MIN_TEMPLATE_WORDS = 5  # shorter texts may be labels: `dog` describes many dissimilar images
MIN_IMAGE_DIVERSITY = 0.9
MIN_WORD_SPECIFICITY = 0.5
MAX_LABEL_AGREEMENT = 0.9
_MAX_TEMPLATES = 500
_NUM_SAMPLED_IMAGES = 64
_NUM_RANDOM_PAIRS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """A caption text that several images share, with numbers masked."""

    template_hash: int
    """64-bit hash of the text."""
    text: str
    """Canonical text, with numbers replaced by `#`."""
    images: np.ndarray
    """Indices of the images, (m,) int64, ascending."""
    image_diversity: float | None
    """Mean thumbnail difference of two of its images, relative to two random images."""
    word_specificity: float
    """Fraction of the captions with one of its words that are this template; the median over its words."""
    label_agreement: float
    """Fraction of the most frequent label; 0 without labels."""

    @property
    def is_boilerplate(self) -> bool:
        """Whether it is boilerplate, as defined in `find_templates`."""
        is_diverse = self.image_diversity is not None and self.image_diversity >= MIN_IMAGE_DIVERSITY
        is_specific = (
            self.word_specificity >= MIN_WORD_SPECIFICITY
            and len(_template_words(self.text)) >= MIN_TEMPLATE_WORDS
        )
        return is_diverse and is_specific and self.label_agreement < MAX_LABEL_AGREEMENT

    def examples(self, dataset: CaptionDataset, max_examples: int) -> list[dict[str, Any]]:
        """Return evenly spaced images as examples, with the captions of this template."""
        indices = self.images[np.linspace(0, len(self.images) - 1, max_examples).astype(int)]
        return [_template_example(dataset, int(index), self.text) for index in np.unique(indices)]

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


def _template_example(dataset: CaptionDataset, index: int, template_text: str) -> dict[str, Any]:
    sample = dataset[index]
    matches = (
        caption for caption in sample.captions if mask_digits(canonicalize_caption(caption)) == template_text
    )
    return make_example(index, sample.id, next(matches, None))


def _template_words(text: str) -> list[str]:
    """Return the words of a canonical text; the `#` of a number is one, too."""
    return [word for part in text.split() for word in split_words(part) or [part]]


def find_templates(dataset: CaptionDataset, scan: CaptionScan, hashes: PerceptualHashes) -> list[Template]:
    """Return the templates of at least 20 images and 0.1 % of the images, the most frequent first.

    A template is boilerplate if all of these hold:

    - it has at least 5 words; a label has fewer;
    - the thumbnails of its images differ at least 0.9 times as much as those of random images; the images of
      a product title do not;
    - it makes up at least half of the captions with one of its words (median over its words);
    - no label has 90 % of its images.

    Thumbnails capture outlines and colors, not content, so image diversity alone is not sufficient.
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
        dataset, {word for text in texts.values() for word in _template_words(text)}
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
                        for word in set(_template_words(texts[template_hash]))
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
    """Return the images of each frequent template, the most frequent first, ties by the first image."""
    shared_captions = group_by_caption(template_hashes, image_indices)
    frequent = shared_captions.most_frequent(min_images, _MAX_TEMPLATES)
    return {int(shared_captions.hashes[i]): shared_captions.images(i) for i in frequent}


def _document_frequencies(dataset: CaptionDataset, vocabulary: set[str]) -> Counter[str]:
    """Count the captions that contain each word of a vocabulary."""
    counts: Counter[str] = Counter()
    for shard in range(len(dataset.shard_paths) if vocabulary else 0):
        for _, row in iter_rows(dataset, shard, ["captions"]):
            for caption in row["captions"]:
                counts.update(
                    vocabulary.intersection(_template_words(mask_digits(canonicalize_caption(caption))))
                )
    return counts


def _random_pair_difference(hashes: PerceptualHashes) -> float:
    """Return the mean thumbnail difference of random pairs with a fixed seed, or 0 for too few images."""
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
    """Return the mean RMS difference of pairs of thumbnails."""
    squared_error = (hashes.thumbnails(first).astype(np.int32) - hashes.thumbnails(second)) ** 2
    return float(np.sqrt(squared_error.reshape(len(squared_error), -1).mean(1)).mean())


def _label_agreement(label_hashes: np.ndarray) -> float:
    """Return the fraction of the most frequent label in the labeled images."""
    known = label_hashes[label_hashes != 0]
    return float(np.unique(known, return_counts=True)[1].max() / len(known)) if len(known) else 0.0


MIN_LANGUAGE_CHARS = 20
MIN_LANGUAGE_PROB = 0.5
MAX_LANGUAGE_SAMPLES = 20_000
TOO_SHORT = "too short"
UNCERTAIN = "uncertain"


def detect_languages(dataset: CaptionDataset, num_captions: int, progress: Progress) -> dict[str, Any]:
    """Detect the language of up to 20,000 evenly spaced captions.

    Captions below 20 characters are counted as too short, and predictions of py3langid with a probability
    below 0.5 as uncertain, which is common for titles and lists of names.

    Raises:
        DependencyError: if py3langid is not installed.
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
        "total": num_captions,
        "counts": [list(entry) for entry in counts.most_common()],
    }


def _load_language_identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DependencyError(
            "the audit requires py3langid 0.4 or later: pip install 'py3langid>=0.4'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _detect_language(identifier: Any, caption: str) -> str:
    if len(caption) < MIN_LANGUAGE_CHARS:
        return TOO_SHORT
    language, probability = identifier.classify(caption)
    return str(language) if probability >= MIN_LANGUAGE_PROB else UNCERTAIN


_UNINFORMATIVE = (
    (NO_LETTERS, "captions without letters"),
    (URL_ONLY, "captions: URL only"),
    (FILE_NAME_ONLY, "captions: file name only"),
    (FILLER_ONLY, "captions: filler words only"),
)
_NUM_REPEATED = 12


def find_caption_issues(
    dataset: CaptionDataset, scan: CaptionScan, templates: list[Template]
) -> list[Finding]:
    """Return the findings on captions, those that the filter excludes first."""
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
        counter.to_finding("with_url", "captions with a URL", num_captions, "captions"),
        counter.to_finding("with_markup", "captions with HTML markup", num_captions, "captions"),
        _shared_finding(dataset, scan),
        counter.to_finding("repeated_within", "images with a repeated caption", num_images, "images"),
        counter.to_finding(
            "short", f"captions of at most {SHORT_CAPTION_WORDS} words", num_captions, "captions"
        ),
        counter.to_finding(
            "long",
            f"captions of more than {LONG_CAPTION_WORDS} words",
            num_captions,
            "captions",
            note="longer than the 77-token context of CLIP",
        ),
    ]


def _boilerplate_finding(dataset: CaptionDataset, scan: CaptionScan, templates: list[Template]) -> Finding:
    boilerplate = [template for template in templates if template.is_boilerplate]
    template_hashes = np.array([template.template_hash for template in boilerplate], np.uint64)
    count = int(np.isin(scan.template_hashes, template_hashes).sum())
    return Finding(
        name="boilerplate",
        title="boilerplate captions",
        count=count,
        total=len(scan.caption_hashes),
        unit="captions",
        filtered=count,
        note=count_noun(len(template_hashes), "template") if len(template_hashes) else "",
        examples=tuple(example for template in boilerplate for example in template.examples(dataset, 2))[
            :MAX_EXAMPLES
        ],
    )


def _shared_finding(dataset: CaptionDataset, scan: CaptionScan) -> Finding:
    """Return the finding on captions that equal one of another image, up to case, spaces and punctuation."""
    shared_captions = group_by_caption(scan.caption_hashes, scan.image_indices)
    repeated = np.flatnonzero(shared_captions.counts > 1)
    most_frequent = shared_captions.most_frequent(2, MAX_EXAMPLES)
    examples = [
        make_example(
            int(index),
            dataset[int(index)].id,
            _caption_text(dataset, scan, int(shared_captions.hashes[i])),
        )
        for i, index in ((i, shared_captions.images(i)[0]) for i in most_frequent)
    ]
    return Finding(
        name="shared",
        title="captions shared by several images",
        count=int(np.isin(scan.caption_hashes, shared_captions.hashes[repeated]).sum()),
        total=len(scan.caption_hashes),
        unit="captions",
        note=count_noun(len(repeated), "text") if len(repeated) else "",
        examples=tuple(examples),
    )


def _caption_text(dataset: CaptionDataset, scan: CaptionScan, caption_hash: int) -> str:
    return caption_for_hash(dataset, scan.caption_hashes, scan.image_indices, caption_hash)


def repeated_captions(dataset: CaptionDataset, scan: CaptionScan) -> list[dict[str, Any]]:
    """Return the captions that are shared by most images, with the number of images."""
    shared_captions = group_by_caption(scan.caption_hashes, scan.image_indices)
    return [
        {
            "caption": _caption_text(dataset, scan, int(shared_captions.hashes[i])),
            "images": int(shared_captions.counts[i]),
        }
        for i in shared_captions.most_frequent(2, _NUM_REPEATED)
    ]


def summarize_lengths(length_counts: Counter[int]) -> dict[str, Any] | None:
    """Return the distribution of caption lengths in words, or None without captions.

    Args:
        length_counts: Number of captions by length.
    """
    total = length_counts.total()
    if not total:
        return None
    lengths = np.array(sorted(length_counts))
    cumulative = np.cumsum([length_counts[length] for length in lengths.tolist()])
    return {
        "min": int(lengths[0]),
        "median": int(lengths[np.searchsorted(cumulative, (total + 1) // 2)]),
        "p95": int(lengths[np.searchsorted(cumulative, np.ceil(0.95 * total))]),
        "max": int(lengths[-1]),
        "counts": [[length, length_counts[length]] for length in lengths.tolist()],
    }
