"""Compare encoders and pair configs without training: statistics of their pairs, and examples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import Artifact
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import DatasetView, open_view
from likewise.data.perceptual_hash import compute_perceptual_hashes, find_near_duplicate_clusters
from likewise.embeddings.store import ARTIFACT_KIND as EMBEDDINGS_KIND
from likewise.embeddings.store import Embeddings, find_embeddings
from likewise.errors import ArtifactError, InvalidInputError
from likewise.neighbors.config import SearchConfig
from likewise.neighbors.index import find_or_compute_neighbors
from likewise.neighbors.vectors import ImageVectors, caption_hashes, encode_column
from likewise.pairs.build import find_candidates, select_partners
from likewise.pairs.config import NEIGHBOR_SOURCES, PairConfig, parse_pair_config
from likewise.pairs.sampling import Pairs
from likewise.pairs.stats import (
    EncoderAgreement,
    PairDistribution,
    PairSignals,
    PairStats,
    RandomBaseline,
    SampledNeighbors,
    SimilarityHistogram,
    compute_agreement,
    compute_pair_stats,
    pair_distribution,
    random_baseline,
    sample_neighbors,
)
from likewise.progress import NULL_PROGRESS, Progress
from likewise.rng import epoch_permutation


@dataclass(frozen=True, kw_only=True)
class AnalysisRow:
    """One pair config with one encoder.

    Attributes:
        encoder: Name of the encoder; two names for `hybrid`, empty for labels and files.
        pair_config: The pair config as text.
        summary: The pair config in one sentence, with counts of images.
        error: Reason if there are no pairs.
        stats: Statistics of the pairs, unless there are none.
    """

    encoder: str
    pair_config: str
    summary: str
    error: str | None = None
    stats: PairStats | None = None


@dataclass(frozen=True, kw_only=True)
class PartnerExample:
    """The partner of an image by one pair config, in the first epoch with seed 0.

    Attributes:
        row: Index of the pair config in the rows of the analysis.
        position: Position of the partner; None without one.
        similarity: Cosine similarity of the search, if there is one.
    """

    row: int
    position: int | None = None
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class AnchorExample:
    """A random image with its partner by each pair config that has pairs."""

    position: int
    partners: tuple[PartnerExample, ...]


@dataclass(frozen=True, kw_only=True)
class PairAnalysis:
    """Comparison of encoders and pair configs on one dataset.

    Attributes:
        dataset: Path of the dataset.
        num_images: Number of images.
        num_labeled: Number of images with a label.
        image_encoder: Encoder of the image similarity of pairs, if there are image embeddings.
        rows: One row per encoder and pair config.
        random_baseline: The statistics of random pairs.
        similarity_histograms: Similarity to the nearest neighbor, one per encoder.
        agreements: Agreement of each pair of encoders.
        anchors: Random images with their partners.
    """

    dataset: str
    num_images: int
    num_labeled: int
    image_encoder: str | None
    rows: tuple[AnalysisRow, ...]
    random_baseline: RandomBaseline
    similarity_histograms: tuple[SimilarityHistogram, ...]
    agreements: tuple[EncoderAgreement, ...]
    anchors: tuple[AnchorExample, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the analysis as dictionaries, lists and numbers."""
        return asdict(self)


LANGUAGE_PAIR_CONFIGS = (
    "default",
    "k=5",
    "exclude_identical_captions",
    "mutual_k=10",
    "hubness_correction=csls",
    "hubness_correction=mutual-proximity",
    "min_similarity=0.7",
)
NUM_ANCHOR_EXAMPLES = 6
_SEED = 0
_IMAGE_MODALITY = "images"


@dataclass(frozen=True)
class _EncoderNames:
    """Names of the embeddings of captions and of images."""

    caption_encoders: tuple[str, ...]
    image_encoders: tuple[str, ...]


def analyze_pairs(
    dataset: CaptionDataset | str | Path,
    encoders: Sequence[str] | None = None,
    pair_configs: Sequence[str | PairConfig] | None = None,
    *,
    progress: Progress = NULL_PROGRESS,
) -> PairAnalysis:
    """Build the pairs of several encoders and pair configs, and compute their statistics without training.

    Missing neighbors are searched for and stored. A pair config without pairs, or one that requires groups or
    labels that the dataset lacks, is a row with an error.

    Args:
        dataset: A dataset or its path.
        encoders: Names of the embeddings to compare; names that start with `image:` are of image embeddings.
            Defaults to all embeddings of the dataset.
        pair_configs: Pair configs, or their text as `parse_pair_config` reads it. A pair config that names no
            encoder is analyzed with each. Defaults to a standard selection, with labels as the oracle.
        progress: Progress reporter.

    Raises:
        ArtifactError: if embeddings are missing.
        InvalidInputError: if a pair config is invalid.
    """
    dataset = CaptionDataset.open(dataset)
    available = _select_encoders(dataset, None)
    selected = available if encoders is None else _select_encoders(dataset, encoders)
    labels = encode_column(dataset, "label")
    if pair_configs is None:
        pair_configs = _default_configs(selected, has_labels=bool((labels >= 0).any()))
    parsed = [parse_pair_config(config) if isinstance(config, str) else config for config in pair_configs]
    if not pair_configs:
        raise ArtifactError(
            f"{dataset.path} has neither embeddings nor labels; embed the dataset first", path=dataset.path
        )
    configs = list(
        dict.fromkeys(config for pair_config in parsed for config in _expand_encoders(pair_config, selected))
    )
    configs.sort(key=lambda config: _sort_key(config, selected))
    views = _Views(dataset)
    _precompute_neighbors(views, configs, progress)
    image_encoder = next(iter(selected.image_encoders or available.image_encoders), None)
    signals = _load_signals(dataset, labels, image_encoder, progress)
    anchors = epoch_permutation(len(dataset), seed=_SEED, epoch=0)[:NUM_ANCHOR_EXAMPLES]
    rows, examples = _analyze_configs(views, configs, signals, anchors, progress)
    sampled_neighbors = _sample_all_neighbors(dataset, selected, progress)
    return PairAnalysis(
        dataset=str(dataset.path),
        num_images=len(dataset),
        num_labeled=int((labels >= 0).sum()),
        image_encoder=image_encoder,
        rows=tuple(rows),
        random_baseline=random_baseline(signals),
        similarity_histograms=tuple(neighbors.histogram for neighbors in sampled_neighbors),
        agreements=tuple(
            result
            for pair in combinations(sampled_neighbors, 2)
            if (result := compute_agreement(*pair)) is not None
        ),
        anchors=tuple(
            AnchorExample(position=int(position), partners=tuple(partners))
            for position, partners in zip(anchors, examples, strict=True)
        ),
    )


def format_pair_config(pair_config: PairConfig) -> str:
    """Return a pair config as text without its encoders, in the form that `parse_pair_config` reads."""
    parts = [
        field.name + ("" if value is True else f"={value}")
        for field in fields(pair_config)
        if (value := getattr(pair_config, field.name)) != field.default
        and field.name not in ("caption_encoder", "image_encoder")
    ]
    return ",".join(parts) or "default"


def format_encoders(pair_config: PairConfig) -> str:
    """Return the names of the encoders of a pair config; empty if it uses none."""
    caption_encoder, image_encoder = pair_config.caption_encoder or "", pair_config.image_encoder or ""
    return {
        "language": caption_encoder,
        "vision": image_encoder,
        "hybrid": f"{caption_encoder} + {image_encoder}",
    }.get(pair_config.source, "")


def _select_encoders(dataset: CaptionDataset, requested: Sequence[str] | None) -> _EncoderNames:
    """Return the names of the requested embeddings, all by default."""
    if requested is None:
        artifacts = Artifact.find(dataset.path / "embeddings", EMBEDDINGS_KIND)
        embeddings = [Embeddings(artifact.path) for artifact in artifacts]
    else:
        embeddings = [
            find_embeddings(
                dataset, name, modality=_IMAGE_MODALITY if name.startswith("image:") else "captions"
            )
            for name in requested
        ]
    # Embeddings with the same display name but different weights are identified by folder name.
    name_counts = Counter(name for name, _ in {(item.encoder_name, item.path) for item in embeddings})
    names = {
        item.path.name if name_counts[item.encoder_name] > 1 else item.encoder_name: item.modality
        for item in embeddings
    }
    return _EncoderNames(
        tuple(name for name, modality in names.items() if modality != _IMAGE_MODALITY),
        tuple(name for name, modality in names.items() if modality == _IMAGE_MODALITY),
    )


def _default_configs(encoders: _EncoderNames, *, has_labels: bool) -> list[str]:
    return [
        *(LANGUAGE_PAIR_CONFIGS if encoders.caption_encoders else ()),
        *(["source=vision"] if encoders.image_encoders else []),
        *(["source=hybrid"] if encoders.caption_encoders and encoders.image_encoders else []),
        *(["source=label"] if has_labels else []),
    ]


def _expand_encoders(pair_config: PairConfig, encoders: _EncoderNames) -> list[PairConfig]:
    """Return a pair config once per encoder, unless it names one."""
    caption_encoders: Sequence[str | None] = (
        (pair_config.caption_encoder,)
        if pair_config.caption_encoder
        else encoders.caption_encoders or (None,)
    )
    image_encoders: Sequence[str | None] = (
        (pair_config.image_encoder,) if pair_config.image_encoder else encoders.image_encoders or (None,)
    )
    if pair_config.source == "language":
        # Image embeddings only replace missing captions.
        return [
            replace(pair_config, caption_encoder=caption_encoder, image_encoder=image_encoders[0])
            for caption_encoder in caption_encoders
        ]
    if pair_config.source == "vision":
        return [replace(pair_config, image_encoder=image_encoder) for image_encoder in image_encoders]
    if pair_config.source == "hybrid":
        return [
            replace(pair_config, caption_encoder=caption_encoder, image_encoder=image_encoder)
            for caption_encoder, image_encoder in product(caption_encoders, image_encoders)
        ]
    return [pair_config]


def _sort_key(pair_config: PairConfig, encoders: _EncoderNames) -> tuple[int, int, int]:
    """Return the sort key of a row: source and encoders; the requested order is kept within these."""
    rank = {name: i for i, name in enumerate((*encoders.caption_encoders, *encoders.image_encoders))}
    source_rank = (
        NEIGHBOR_SOURCES.index(pair_config.source)
        if pair_config.source in NEIGHBOR_SOURCES
        else len(NEIGHBOR_SOURCES)
    )
    caption_rank, image_rank = (
        rank.get(pair_config.caption_encoder or "", len(rank)),
        rank.get(pair_config.image_encoder or "", len(rank)),
    )
    return (
        (source_rank, image_rank, caption_rank)
        if pair_config.source in ("vision", "hybrid")
        else (source_rank, caption_rank, 0)
    )


class _Views:
    """Views of one dataset, each filter file read once."""

    def __init__(self, dataset: CaptionDataset) -> None:
        self.dataset = dataset
        self._views: dict[Path | None, DatasetView] = {}

    def get(self, filter_path: Path | None) -> DatasetView:
        """Return the view of a filter file, or of the whole dataset."""
        if filter_path not in self._views:
            self._views[filter_path] = open_view(self.dataset, filter_path)
        return self._views[filter_path]


def _precompute_neighbors(views: _Views, pair_configs: Sequence[PairConfig], progress: Progress) -> None:
    """Search once for all pair configs with the same search, with the largest k that any requires."""
    required_k: dict[tuple[str | None, bool, SearchConfig], int] = {}
    for pair_config in pair_configs:
        uses_images = pair_config.source in ("vision", "hybrid") or pair_config.missing_caption in (
            "visual",
            "borrow",
        )
        requested = (
            [(pair_config.caption_encoder, False)] if pair_config.source in ("language", "hybrid") else []
        )
        requested += (
            [(pair_config.image_encoder, True)]
            if uses_images and pair_config.source in NEIGHBOR_SOURCES
            else []
        )
        for encoder, use_image_embeddings in requested:
            key = (encoder, use_image_embeddings, pair_config.search_config)
            required_k[key] = max(required_k.get(key, 0), pair_config.num_candidates)
    for (encoder, use_image_embeddings, search_config), k in required_k.items():
        modality = _IMAGE_MODALITY if use_image_embeddings else "captions"
        try:
            view = views.get(search_config.filter)
            embeddings = find_embeddings(view.dataset, encoder, modality=modality)
            find_or_compute_neighbors(view, embeddings, search_config, k, progress=progress)
        except InvalidInputError:
            continue  # the row has the error


def _load_signals(
    dataset: CaptionDataset, labels: np.ndarray, image_encoder: str | None, progress: Progress
) -> PairSignals:
    hashes = compute_perceptual_hashes(dataset, progress=progress)
    image_vectors = None
    if image_encoder is not None:
        image_vectors = ImageVectors(find_embeddings(dataset, image_encoder, modality="images"), len(dataset))
    return PairSignals(
        caption_hashes=caption_hashes(open_view(dataset), per_caption=False),
        image_hashes=hashes.hashes,
        is_readable=hashes.readable,
        near_duplicate_ids=find_near_duplicate_clusters(hashes),
        labels=labels if (labels >= 0).any() else None,
        image_vectors=image_vectors,
    )


def _analyze_configs(
    views: _Views,
    pair_configs: Sequence[PairConfig],
    signals: PairSignals,
    anchors: np.ndarray,
    progress: Progress,
) -> tuple[list[AnalysisRow], list[list[PartnerExample]]]:
    """Return one row per pair config, and for each anchor its partner by each config with pairs."""
    rows: list[AnalysisRow] = []
    examples: list[list[PartnerExample]] = [[] for _ in anchors]
    with progress.task("analyzing", len(pair_configs), "pair configs") as bar:
        for i, pair_config in enumerate(pair_configs):
            names = {"encoder": format_encoders(pair_config), "pair_config": format_pair_config(pair_config)}
            try:
                view = views.get(pair_config.filter)
                pairs = select_partners(find_candidates(view, pair_config, progress=progress), pair_config)
                if not pairs.has_partner.any():
                    raise InvalidInputError(
                        "no image has a partner other than itself", path=view.dataset.path
                    )
            except InvalidInputError as error:
                rows.append(AnalysisRow(**names, summary=pair_config.summary(), error=str(error)))
            else:
                distribution = pair_distribution(pairs, _candidate_image_ids(view, pair_config))
                stats = compute_pair_stats(distribution, signals, view.dataset)
                rows.append(AnalysisRow(**names, summary=pairs.summary(), stats=stats))
                for anchor_examples, example in zip(
                    examples, _partner_examples(pairs, distribution, anchors, i), strict=True
                ):
                    anchor_examples.append(example)
            bar.update(postfix=f"{names['encoder']} {names['pair_config']}".strip())
    return rows, examples


def _candidate_image_ids(view: DatasetView, pair_config: PairConfig) -> np.ndarray:
    """Return the image of each row of candidates; with `caption_pooling` 'sample' a row is a caption."""
    num_images = len(view.dataset)
    if pair_config.source != "language" or pair_config.caption_pooling != "sample":
        return np.arange(num_images)
    embeddings = find_embeddings(view.dataset, pair_config.caption_encoder, modality="captions")
    return ImageVectors(embeddings, num_images, view.caption_mask).image_ids


def _partner_examples(
    pairs: Pairs, distribution: PairDistribution, anchors: np.ndarray, row: int
) -> list[PartnerExample]:
    partners = pairs.sample_partners(anchors, seed=_SEED, epoch=0)
    examples = []
    for anchor, partner in zip(anchors, partners, strict=True):
        start, stop = np.searchsorted(distribution.anchors, [anchor, anchor + 1])
        match = start + np.flatnonzero(distribution.partners[start:stop] == partner)
        similarity = (
            None
            if distribution.similarity is None or not len(match)
            else float(distribution.similarity[match[0]])
        )
        examples.append(
            PartnerExample(
                row=row, position=None if partner == anchor else int(partner), similarity=similarity
            )
        )
    return examples


def _sample_all_neighbors(
    dataset: CaptionDataset, encoders: _EncoderNames, progress: Progress
) -> list[SampledNeighbors]:
    """Return unconstrained neighbors of a sample by each encoder."""
    results = []
    for use_image_embeddings, names in ((False, encoders.caption_encoders), (True, encoders.image_encoders)):
        for name in names:
            try:
                results.append(
                    sample_neighbors(
                        dataset, name, use_image_embeddings=use_image_embeddings, progress=progress
                    )
                )
            except InvalidInputError:
                continue  # fewer than two images; each row has the error
    return results
