"""Build pairs: find candidates once (searches), then select partners as often as needed (cheap)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from likewise.artifacts import config_hash, fingerprint
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import DatasetView, open_view
from likewise.embeddings.store import find_embeddings
from likewise.errors import InvalidInputError
from likewise.neighbors.index import Neighbors, find_or_compute_neighbors
from likewise.neighbors.vectors import ImageVectors, encode_column
from likewise.pairs.candidates import (
    Candidates,
    csls_scores,
    filter_min_similarity,
    filter_mutual,
    mutual_proximity_scores,
    ratio_test,
    read_pairs_file,
    reciprocal_rank_fusion,
    restrict_to,
    union,
)
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import CandidateSampler, LabelSampler, NullSampler, Pairs, PartnerSampler
from likewise.progress import NULL_PROGRESS, Progress

T = TypeVar("T")
# Paths and names, and how neighbors are searched: what they refer to, or result in, is hashed.
_NON_HASHED = ("filter", "pairs_file", "caption_encoder", "image_encoder", "index", "target_recall")


@dataclass(frozen=True)
class NeighborTable:
    """Nearest neighbors of all images by one encoder.

    Attributes:
        neighbors: The artifact.
        candidates: The neighbors of each image, nearest first.
        vectors: The embeddings that were searched, one vector per image.
    """

    neighbors: Neighbors
    candidates: Candidates
    vectors: ImageVectors


@dataclass(frozen=True)
class CandidateSet:
    """Everything that partners are selected from; which fields are set depends on the source of pairs.

    Attributes:
        view: The dataset and what its filter leaves.
        by_caption: Neighbors by caption embeddings, for `language` and `hybrid`.
        by_image: Neighbors by image embeddings, for `vision`, `hybrid` and images without a caption.
        from_file: Partners from a file, for `file`.
        label_ids: Labels as integers, (n,) int64, -1 without a label, for `label`.
    """

    view: DatasetView
    by_caption: NeighborTable | None = None
    by_image: NeighborTable | None = None
    from_file: Candidates | None = None
    label_ids: np.ndarray | None = None


@dataclass(frozen=True)
class _Selection:
    """Partners of one source, before images without a partner are handled.

    Attributes:
        sampler: The partners.
        inputs: Fingerprints of the inputs of the selection.
        is_uncaptioned: Images that the source cannot compare, (n,) bool.
        neighbors: The neighbors artifacts that were used.
        messages: Additions to the summary of the pairs.
    """

    sampler: PartnerSampler
    inputs: dict[str, str]
    is_uncaptioned: np.ndarray
    neighbors: tuple[Neighbors, ...] = ()
    messages: tuple[str, ...] = ()


def build_pairs(
    dataset: CaptionDataset | str | Path,
    pair_config: PairConfig | None = None,
    *,
    allowed: np.ndarray | None = None,
    device: str | None = None,
    progress: Progress = NULL_PROGRESS,
) -> Pairs:
    """Build the pairs of a dataset; missing neighbors are searched for.

    Args:
        dataset: A dataset or its path.
        pair_config: The pair sampling; the nearest caption (the paper's) by default.
        allowed: Images that may be anchors and partners, (n,) bool; all by default.
        device: Device of the neighbor search; chosen automatically by default.
        progress: Progress reporter.

    Raises:
        ArtifactError: if embeddings are missing.
        InvalidInputError: if no image has a partner, or files of the config do not fit the dataset.
    """
    config = PairConfig() if pair_config is None else pair_config
    view = open_view(CaptionDataset.open(dataset), config.filter)
    candidates = find_candidates(view, config, device=device, progress=progress)
    return select_partners(candidates, config, allowed)


def find_candidates(
    view: DatasetView,
    pair_config: PairConfig,
    *,
    device: str | None = None,
    progress: Progress = NULL_PROGRESS,
) -> CandidateSet:
    """Find everything that partners may be selected from: this is where neighbors are searched for.

    Raises:
        ArtifactError: if embeddings are missing.
        InvalidInputError: if the dataset has no labels or too few images to compare, or a pairs file does not
            fit the dataset.
    """
    source = pair_config.source
    if source == "label":
        label_ids = encode_column(view.dataset, "label")
        if (label_ids < 0).all():
            raise InvalidInputError(
                f"no image of {view.dataset.path} has a label; import it with `label_column`",
                field="label_column",
            )
        return CandidateSet(view, label_ids=label_ids)
    if source == "file":
        if pair_config.pairs_file is None:
            raise InvalidInputError("`source` 'file' requires `pairs_file`", field="pairs_file")
        return CandidateSet(view, from_file=read_pairs_file(pair_config.pairs_file, view.dataset))
    by_caption = by_image = None
    if source in ("language", "hybrid"):
        by_caption = _find_neighbors(view, pair_config, "captions", device, progress)
    if source in ("vision", "hybrid") or (
        by_caption is not None and _needs_image_neighbors(by_caption, pair_config)
    ):
        by_image = _find_neighbors(view, pair_config, "images", device, progress)
    return CandidateSet(view, by_caption=by_caption, by_image=by_image)


def _find_neighbors(
    view: DatasetView, pair_config: PairConfig, modality: str, device: str | None, progress: Progress
) -> NeighborTable:
    is_image = modality == "images"
    encoder = pair_config.image_encoder if is_image else pair_config.caption_encoder
    embeddings = find_embeddings(view.dataset, encoder, modality="images" if is_image else "captions")
    neighbors = find_or_compute_neighbors(
        view,
        embeddings,
        pair_config.search_config,
        pair_config.num_candidates,
        device=device,
        progress=progress,
    )
    vectors = ImageVectors(embeddings, len(view.dataset), None if is_image else view.caption_mask)
    return NeighborTable(neighbors, Candidates(*neighbors.topk()), vectors)


def _needs_image_neighbors(by_caption: NeighborTable, pair_config: PairConfig) -> bool:
    """Return whether images without a caption are to be paired by image embeddings."""
    has_uncaptioned = bool((by_caption.vectors.captions_per_image == 0).any())
    if pair_config.missing_caption not in ("visual", "borrow") or not has_uncaptioned:
        return False
    if pair_config.caption_pooling == "sample":
        raise InvalidInputError(
            "`missing_caption` must be 'self' or 'drop' with `caption_pooling` 'sample', "
            "which has no row for an image without a caption",
            field="missing_caption",
        )
    return True


def select_partners(
    candidates: CandidateSet, pair_config: PairConfig, allowed: np.ndarray | None = None
) -> Pairs:
    """Select the partners of each image from the candidates.

    Args:
        candidates: The result of `find_candidates` for the same config.
        pair_config: The pair sampling.
        allowed: Images that may be anchors and partners, (n,) bool; those of the view by default. Images
            outside of the view never are.

    Raises:
        InvalidInputError: if no image has a partner.
    """
    view = candidates.view
    allowed = view.image_mask if allowed is None else view.image_mask & allowed
    selection = _SELECTORS[pair_config.source](candidates, pair_config, allowed)
    has_partner = selection.sampler.has_partner & allowed
    if pair_config.source != "self" and not has_partner.any():
        raise InvalidInputError(
            f"no image of {view.dataset.path} has a partner ({pair_config.summary()}); relax the constraints",
            path=view.dataset.path,
        )
    is_unpaired = allowed & ~has_partner & (pair_config.source != "self")
    excluded = ~allowed
    excluded |= is_unpaired & np.where(
        selection.is_uncaptioned, pair_config.missing_caption == "drop", pair_config.fallback == "drop"
    )
    return Pairs(
        pair_config,
        selection.sampler,
        _pairs_key(pair_config, selection, view),
        excluded=excluded,
        neighbors=tuple(neighbors.artifact for neighbors in selection.neighbors),
        messages=_collect_messages(pair_config, selection, is_unpaired, excluded & allowed, view),
    )


def _pairs_key(pair_config: PairConfig, selection: _Selection, view: DatasetView) -> str:
    settings = {name: value for name, value in asdict(pair_config).items() if name not in _NON_HASHED}
    inputs = selection.inputs if view.filter is None else selection.inputs | {"filter": view.filter.key}
    return config_hash("pairs", settings, inputs)


def _collect_messages(
    pair_config: PairConfig,
    selection: _Selection,
    is_unpaired: np.ndarray,
    excluded: np.ndarray,
    view: DatasetView,
) -> tuple[str, ...]:
    """Return phrases that count images without a partner, with the reason."""
    messages = list(selection.messages)
    if pair_config.k is not None and isinstance(selection.sampler, CandidateSampler):
        max_partners = int(selection.sampler.candidates.mask.sum(axis=1).max())
        if max_partners < pair_config.k:
            messages.append(f"no image has more than {max_partners:,} partners")
    num_uncaptioned = int((is_unpaired & selection.is_uncaptioned).sum())
    if num_uncaptioned:
        messages.append(f"{num_uncaptioned:,} of those without a partner have no caption")
    if excluded.any():
        messages.append(f"{int(excluded.sum()):,} without a partner are excluded")
    if view.filter is not None and view.filter.excluded_images.any():
        messages.append(f"{int(view.filter.excluded_images.sum()):,} excluded by the filter")
    return tuple(messages)


def _select_self(_: CandidateSet, __: PairConfig, allowed: np.ndarray) -> _Selection:
    return _Selection(NullSampler(len(allowed)), {}, np.zeros(len(allowed), bool))


def _select_by_label(candidates: CandidateSet, _: PairConfig, allowed: np.ndarray) -> _Selection:
    label_ids = _require(candidates.label_ids)
    allowed_labels = np.where(allowed, label_ids, -1)
    inputs = {"labels": candidates.view.dataset.key, "allowed": _mask_key(allowed)}
    num_unlabeled = int((label_ids < 0).sum())
    messages = (f"{num_unlabeled:,} have no label",) if num_unlabeled else ()
    return _Selection(LabelSampler(allowed_labels), inputs, np.zeros(len(allowed), bool), messages=messages)


def _select_from_file(candidates: CandidateSet, pair_config: PairConfig, allowed: np.ndarray) -> _Selection:
    inputs = {"pairs": fingerprint(_require(pair_config.pairs_file)), "allowed": _mask_key(allowed)}
    base = restrict_to(_require(candidates.from_file), allowed)
    selected = _select_topk(_apply_thresholds(base, pair_config), base, pair_config)
    sampler = CandidateSampler(selected, pair_config.sampling_temperature)
    return _Selection(sampler, inputs, np.zeros(len(allowed), bool))


def _select_by_caption(candidates: CandidateSet, pair_config: PairConfig, allowed: np.ndarray) -> _Selection:
    caption_neighbors, by_image = _require(candidates.by_caption), None
    is_uncaptioned = caption_neighbors.vectors.captions_per_image == 0
    if _needs_image_neighbors(caption_neighbors, pair_config):
        by_image = candidates.by_image
    caption_offsets = None
    if pair_config.caption_pooling == "sample":
        caption_offsets = np.concatenate([[0], np.cumsum(caption_neighbors.vectors.captions_per_image)])
    base = _nearest(caption_neighbors, pair_config, allowed)
    inputs = {"neighbors": caption_neighbors.neighbors.order_key, "allowed": _mask_key(allowed)}
    visual_candidates = None
    if by_image is not None:
        inputs["image_neighbors"] = by_image.neighbors.order_key
        visual_candidates = restrict_to(by_image.candidates, allowed)
    if visual_candidates is not None and pair_config.missing_caption == "borrow":
        base = _borrow_captions(base, visual_candidates, is_uncaptioned)
    selected = _select_topk(
        _filter_and_rerank(base, pair_config, caption_neighbors.vectors), base, pair_config
    )
    if visual_candidates is not None and pair_config.missing_caption == "visual":
        selected = _fill_visual(selected, visual_candidates, is_uncaptioned)
    if caption_offsets is None:
        is_uncaptioned = is_uncaptioned & ~selected.mask.any(axis=1)
    return _Selection(
        CandidateSampler(selected, pair_config.sampling_temperature, caption_offsets),
        inputs,
        is_uncaptioned,
        (caption_neighbors.neighbors,)
        if by_image is None
        else (caption_neighbors.neighbors, by_image.neighbors),
    )


def _select_by_image(candidates: CandidateSet, pair_config: PairConfig, allowed: np.ndarray) -> _Selection:
    image_neighbors = _require(candidates.by_image)
    base = _nearest(image_neighbors, pair_config, allowed)
    selected = _select_topk(_filter_and_rerank(base, pair_config, image_neighbors.vectors), base, pair_config)
    inputs = {"neighbors": image_neighbors.neighbors.order_key, "allowed": _mask_key(allowed)}
    sampler = CandidateSampler(selected, pair_config.sampling_temperature)
    return _Selection(sampler, inputs, np.zeros(len(allowed), bool), (image_neighbors.neighbors,))


def _select_by_both(candidates: CandidateSet, pair_config: PairConfig, allowed: np.ndarray) -> _Selection:
    """Fuse the neighbors by caption and by image; images without a caption use image neighbors only."""
    by_caption, by_image = _require(candidates.by_caption), _require(candidates.by_image)
    candidate_sets = _nearest(by_caption, pair_config, allowed), _nearest(by_image, pair_config, allowed)
    anchors = np.arange(len(allowed))
    is_uncaptioned = by_caption.vectors.captions_per_image == 0
    # If either image has no caption, only the image similarity counts.
    image_weight = np.where(is_uncaptioned[:, None], 1.0, pair_config.image_weight)
    if pair_config.fusion == "rrf":
        positions, _ = reciprocal_rank_fusion(*candidate_sets, image_weight, 2 * pair_config.num_candidates)
    else:
        positions = union(*(candidates.positions for candidates in candidate_sets))
    # With either fusion, thresholds and sampling use the weighted similarity.
    image_weight = np.where(np.append(is_uncaptioned, False)[positions], 1.0, image_weight)
    similarity = (1 - image_weight) * by_caption.vectors.similarity(
        anchors, positions
    ) + image_weight * by_image.vectors.similarity(anchors, positions)
    fused = Candidates(positions, np.where(positions < 0, -np.inf, similarity).astype(np.float32))
    base = fused if pair_config.fusion == "rrf" else fused.rerank(fused.similarity)
    selected = _select_topk(_filter_and_rerank(base, pair_config, by_caption.vectors), base, pair_config)
    inputs = {
        "caption_neighbors": by_caption.neighbors.order_key,
        "image_neighbors": by_image.neighbors.order_key,
        "allowed": _mask_key(allowed),
    }
    sampler = CandidateSampler(selected, pair_config.sampling_temperature)
    neighbors = (by_caption.neighbors, by_image.neighbors)
    return _Selection(sampler, inputs, np.zeros(len(allowed), bool), neighbors)


_SELECTORS: dict[str, Callable[[CandidateSet, PairConfig, np.ndarray], _Selection]] = {
    "self": _select_self,
    "language": _select_by_caption,
    "vision": _select_by_image,
    "hybrid": _select_by_both,
    "label": _select_by_label,
    "file": _select_from_file,
}


def _require(value: T | None) -> T:
    """Return a field that `find_candidates` sets for this source."""
    if value is None:
        raise TypeError("the candidates are those of another source of pairs")
    return value


def _nearest(table: NeighborTable, pair_config: PairConfig, allowed: np.ndarray) -> Candidates:
    """Return the nearest allowed neighbors, as many as the config considers."""
    return restrict_to(table.candidates, allowed).topk(pair_config.num_candidates)


def _mask_key(allowed: np.ndarray) -> str:
    """Return a hash of `allowed`, part of the key: a run does not resume with other partners."""
    return config_hash("images", {}, {"allowed": np.packbits(allowed).tobytes().hex()})


def _borrow_captions(
    base: Candidates, visual_candidates: Candidates, is_uncaptioned: np.ndarray
) -> Candidates:
    """Give each image without a caption the partners of its nearest image that has a caption.

    That image comes first, with a similarity of 1.
    """
    can_lend = np.append(~is_uncaptioned & base.mask.any(axis=1), False)
    lender_candidates = visual_candidates.filter(can_lend[visual_candidates.positions])
    rows = np.flatnonzero(is_uncaptioned & lender_candidates.mask[:, 0])
    lenders = lender_candidates.positions[rows, 0]
    positions = np.concatenate([base.positions, np.full((len(base.positions), 1), -1)], axis=1)
    similarity = np.pad(base.similarity, ((0, 0), (0, 1)), constant_values=-np.inf)
    positions[rows, 0], similarity[rows, 0] = lenders, 1
    positions[rows, 1:], similarity[rows, 1:] = base.positions[lenders], base.similarity[lenders]
    candidates = Candidates(positions, similarity)
    return candidates.filter(positions != np.arange(len(positions))[:, None]).topk(base.positions.shape[1])


def _fill_visual(
    candidates: Candidates, visual_candidates: Candidates, is_uncaptioned: np.ndarray
) -> Candidates:
    """Give images without a caption their visual neighbor, to which caption thresholds do not apply."""
    rows = is_uncaptioned & visual_candidates.mask[:, 0]
    positions, similarity = candidates.positions.copy(), candidates.similarity.copy()
    positions[rows, 0], similarity[rows, 0] = (
        visual_candidates.positions[rows, 0],
        visual_candidates.similarity[rows, 0],
    )
    return Candidates(positions, similarity)


def _apply_thresholds(base: Candidates, pair_config: PairConfig) -> Candidates:
    """Apply the similarity thresholds."""
    filtered = base if pair_config.ratio_threshold is None else ratio_test(base, pair_config.ratio_threshold)
    return (
        filtered
        if pair_config.min_similarity is None
        else filter_min_similarity(filtered, pair_config.min_similarity)
    )


def _filter_and_rerank(base: Candidates, pair_config: PairConfig, vectors: ImageVectors) -> Candidates:
    """Apply the similarity thresholds and rank the rest by the hubness correction."""
    filtered = _apply_thresholds(base, pair_config)
    if pair_config.hubness_correction == "csls":
        return filtered.rerank(csls_scores(filtered, base))
    if pair_config.hubness_correction == "mutual-proximity":
        return filtered.rerank(mutual_proximity_scores(filtered, *vectors.similarity_moments()))
    return filtered


def _select_topk(candidates: Candidates, base: Candidates, pair_config: PairConfig) -> Candidates:
    """Apply `mutual_k`, `k` and the fallback to the nearest."""
    limited = candidates if pair_config.mutual_k is None else filter_mutual(candidates, pair_config.mutual_k)
    k = pair_config.k
    if k is None:
        k = limited.positions.shape[1] if pair_config.source == "file" else 1
    limited = limited.topk(k)
    if pair_config.fallback != "nearest":
        return limited
    is_empty = ~limited.mask.any(axis=1)
    positions, similarity = limited.positions.copy(), limited.similarity.copy()
    positions[is_empty, 0], similarity[is_empty, 0] = (
        base.positions[is_empty, 0],
        base.similarity[is_empty, 0],
    )
    return Candidates(positions, similarity)
