"""Sources of pairs: a rule and a collection in, partners to draw from out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from likewise.artifacts import config_hash, fingerprint
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import DatasetFilter, read_filter
from likewise.embeddings.store import find_embeddings
from likewise.errors import InvalidInputError
from likewise.neighbors.index import Neighbors, find_or_compute_neighbors
from likewise.neighbors.vectors import ImageVectors, encode_column, filtered_caption_mask
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


@dataclass(frozen=True)
class BuildContext:
    """Where a rule is applied: the collection, who takes part, and where to report."""

    dataset: CaptionDataset
    allowed: np.ndarray
    dataset_filter: DatasetFilter | None
    device: str
    progress: Progress


@dataclass(frozen=True)
class CandidateSet:
    """What a source gives.

    Attributes:
        sampler: The partners.
        inputs: Fingerprints of what they were made from.
        is_uncaptioned: Images that the source cannot compare, (n,) bool.
        neighbors: The folders of neighbors behind it.
        messages: What to say of it beside the counts of partners.
    """

    sampler: PartnerSampler
    inputs: dict[str, str]
    is_uncaptioned: np.ndarray
    neighbors: tuple[Neighbors, ...] = ()
    messages: tuple[str, ...] = ()


def build_pairs(
    dataset: CaptionDataset,
    pair_config: PairConfig,
    readable_positions: np.ndarray | None = None,
    *,
    device: str = "cpu",
    progress: Progress = NULL_PROGRESS,
) -> Pairs:
    """Apply a rule to a collection; neighbors that it needs and that are missing are searched for.

    Args:
        dataset: The images.
        pair_config: Who may be paired with whom.
        readable_positions: Positions of the images whose pixels can be read, (m,) int64; no other becomes a
            partner.
            All of them where not given.
        device: Where neighbors are searched for.
        progress: Where to report.

    Raises:
        ArtifactError: where the embeddings are missing.
        InputError: where the rule leaves nobody with a partner, or its files do not fit the collection.
    """
    num_images = len(dataset)
    allowed = np.zeros(num_images, bool)
    allowed[np.arange(num_images) if readable_positions is None else readable_positions] = True
    dataset_filter = None if pair_config.filter is None else read_filter(pair_config.filter, dataset)
    if dataset_filter is not None:
        allowed &= ~dataset_filter.excluded_images
    candidate_set = _PAIR_SOURCES[pair_config.source](
        BuildContext(dataset, allowed, dataset_filter, device, progress), pair_config
    )
    has_partner = candidate_set.sampler.has_partner & allowed
    if pair_config.source != "self" and not has_partner.any():
        raise InvalidInputError(
            f"no image of {dataset.path} has a partner ({pair_config.summary()}); loosen the rule"
        )
    is_unpaired = allowed & ~has_partner & (pair_config.source != "self")
    excluded = ~allowed
    excluded |= is_unpaired & np.where(
        candidate_set.is_uncaptioned, pair_config.missing_caption == "drop", pair_config.fallback == "drop"
    )
    return Pairs(
        pair_config,
        candidate_set.sampler,
        _pairs_key(pair_config, candidate_set, dataset_filter),
        excluded=excluded,
        neighbors=tuple(neighbors.artifact for neighbors in candidate_set.neighbors),
        messages=_collect_messages(
            pair_config, candidate_set, is_unpaired, excluded & allowed, dataset_filter
        ),
    )


def _pairs_key(
    pair_config: PairConfig, candidate_set: CandidateSet, dataset_filter: DatasetFilter | None
) -> str:
    settings = {
        name: value
        for name, value in asdict(pair_config).items()
        if name not in ("filter", "pairs_file", "caption_encoder", "image_encoder")
    }
    inputs = (
        candidate_set.inputs
        if dataset_filter is None
        else candidate_set.inputs | {"filter": dataset_filter.key}
    )
    return config_hash("pairs", settings, inputs)


def _collect_messages(
    pair_config: PairConfig,
    candidate_set: CandidateSet,
    is_unpaired: np.ndarray,
    excluded: np.ndarray,
    dataset_filter: DatasetFilter | None,
) -> tuple[str, ...]:
    """Count in words who has no partner and why, and what else was asked for and is not there."""
    messages = list(candidate_set.messages)
    if pair_config.k is not None and isinstance(candidate_set.sampler, CandidateSampler):
        max_partners = int(candidate_set.sampler.candidates.mask.sum(axis=1).max())
        if max_partners < pair_config.k:
            messages.append(f"none has more than {max_partners:,} partners")
    num_uncaptioned = int((is_unpaired & candidate_set.is_uncaptioned).sum())
    if num_uncaptioned:
        messages.append(f"{num_uncaptioned:,} of those without are not captioned")
    if excluded.any():
        messages.append(f"{int(excluded.sum()):,} without a partner are no anchors")
    if dataset_filter is not None and dataset_filter.excluded_images.any():
        messages.append(f"{int(dataset_filter.excluded_images.sum()):,} left out by the filter")
    return tuple(messages)


def _self_pairs(context: BuildContext, _: PairConfig) -> CandidateSet:
    num_images = len(context.dataset)
    return CandidateSet(NullSampler(num_images), {}, np.zeros(num_images, bool))


def _label_pairs(context: BuildContext, _: PairConfig) -> CandidateSet:
    labels = encode_column(context.dataset, "label")
    if (labels < 0).all():
        raise InvalidInputError(f"no image of {context.dataset.path} has a label; import with --label-column")
    allowed_labels = np.where(context.allowed, labels, -1)
    inputs = {"labels": context.dataset.key, "allowed": _mask_key(context.allowed)}
    num_unlabeled = int((labels < 0).sum())
    messages = (f"{num_unlabeled:,} have no label",) if num_unlabeled else ()
    return CandidateSet(LabelSampler(allowed_labels), inputs, np.zeros(len(labels), bool), messages=messages)


def _file_pairs(context: BuildContext, pair_config: PairConfig) -> CandidateSet:
    if pair_config.pairs_file is None:
        raise InvalidInputError("--pairs file needs --pairs-file FILE")
    candidates = read_pairs_file(pair_config.pairs_file, context.dataset)
    inputs = {"pairs": fingerprint(pair_config.pairs_file), "allowed": _mask_key(context.allowed)}
    base = restrict_to(candidates, context.allowed)
    selected = _apply_limits(_apply_thresholds(base, pair_config), base, pair_config)
    return CandidateSet(
        CandidateSampler(selected, pair_config.sampling_temperature),
        inputs,
        np.zeros(len(context.dataset), bool),
    )


def _language_pairs(context: BuildContext, pair_config: PairConfig) -> CandidateSet:
    caption_neighbors = _find_neighbors(context, pair_config, use_image_embeddings=False)
    vectors = _open_vectors(context, pair_config, use_image_embeddings=False)
    row_starts = (
        np.concatenate([[0], np.cumsum(vectors.captions_per_image)])
        if pair_config.caption_pooling == "sample"
        else None
    )
    is_uncaptioned = vectors.captions_per_image == 0
    base = _nearest_candidates(context, pair_config, caption_neighbors)
    inputs = {"neighbors": caption_neighbors.order_key, "allowed": _mask_key(context.allowed)}
    used_neighbors = [caption_neighbors]
    visual_candidates = None
    if pair_config.missing_caption in ("visual", "borrow") and is_uncaptioned.any():
        used_neighbors.append(_find_neighbors(context, pair_config, use_image_embeddings=True))
        inputs["looks"] = used_neighbors[1].order_key
        visual_candidates = restrict_to(Candidates(*used_neighbors[1].topk()), context.allowed)
        if pair_config.caption_pooling == "sample":
            raise InvalidInputError(
                "--captions draw has no row for images without caption: let them be self or drop"
            )
    if visual_candidates is not None and pair_config.missing_caption == "borrow":
        base = _borrow_captions(base, visual_candidates, is_uncaptioned)
    selected = _apply_limits(_correct_hubness(base, pair_config, vectors), base, pair_config)
    if visual_candidates is not None and pair_config.missing_caption == "visual":
        selected = _fill_visual(selected, visual_candidates, is_uncaptioned)
    is_uncaptioned = is_uncaptioned if row_starts is not None else is_uncaptioned & ~selected.mask.any(axis=1)
    return CandidateSet(
        CandidateSampler(selected, pair_config.sampling_temperature, row_starts),
        inputs,
        is_uncaptioned,
        tuple(used_neighbors),
    )


def _vision_pairs(context: BuildContext, pair_config: PairConfig) -> CandidateSet:
    image_neighbors = _find_neighbors(context, pair_config, use_image_embeddings=True)
    base = _nearest_candidates(context, pair_config, image_neighbors)
    selected = _apply_limits(
        _correct_hubness(base, pair_config, _open_vectors(context, pair_config, use_image_embeddings=True)),
        base,
        pair_config,
    )
    inputs = {"neighbors": image_neighbors.order_key, "allowed": _mask_key(context.allowed)}
    return CandidateSet(
        CandidateSampler(selected, pair_config.sampling_temperature),
        inputs,
        np.zeros(len(context.dataset), bool),
        (image_neighbors,),
    )


def _hybrid_pairs(context: BuildContext, pair_config: PairConfig) -> CandidateSet:
    """Fuse the neighbors of words and of looks; an image without caption has those of its looks alone."""
    caption_neighbors, image_neighbors = (
        _find_neighbors(context, pair_config, use_image_embeddings=use_image_embeddings)
        for use_image_embeddings in (False, True)
    )
    tables = (
        _nearest_candidates(context, pair_config, caption_neighbors),
        _nearest_candidates(context, pair_config, image_neighbors),
    )
    caption_vectors, image_vectors = (
        _open_vectors(context, pair_config, use_image_embeddings=use_image_embeddings)
        for use_image_embeddings in (False, True)
    )
    anchors = np.arange(len(context.dataset))
    # Where one of two images has no caption, looks alone tell how alike they are.
    image_weight = np.where(caption_vectors.captions_per_image[:, None] > 0, pair_config.image_weight, 1.0)
    if pair_config.fusion == "rrf":
        positions, _ = reciprocal_rank_fusion(*tables, image_weight, 2 * pair_config.num_candidates)
    else:
        positions = union(*(candidates.positions for candidates in tables))
    # Whichever order is asked for, the similarity that limits and draws go by is the weighted one.
    is_uncaptioned = np.append(caption_vectors.captions_per_image == 0, False)[positions]
    image_weight = np.where(is_uncaptioned, 1.0, image_weight)
    similarity = (1 - image_weight) * caption_vectors.similarity(
        anchors, positions
    ) + image_weight * image_vectors.similarity(anchors, positions)
    fused = Candidates(positions, np.where(positions < 0, -np.inf, similarity).astype(np.float32))
    base = fused if pair_config.fusion == "rrf" else fused.rerank(fused.similarity)
    inputs = {
        "words": caption_neighbors.order_key,
        "looks": image_neighbors.order_key,
        "allowed": _mask_key(context.allowed),
    }
    selected = _apply_limits(_correct_hubness(base, pair_config, caption_vectors), base, pair_config)
    return CandidateSet(
        CandidateSampler(selected, pair_config.sampling_temperature),
        inputs,
        caption_vectors.captions_per_image == 0,
        (caption_neighbors, image_neighbors),
    )


_PAIR_SOURCES: dict[str, Callable[[BuildContext, PairConfig], CandidateSet]] = {
    "self": _self_pairs,
    "language": _language_pairs,
    "vision": _vision_pairs,
    "hybrid": _hybrid_pairs,
    "label": _label_pairs,
    "file": _file_pairs,
}


def _find_neighbors(
    context: BuildContext, pair_config: PairConfig, *, use_image_embeddings: bool
) -> Neighbors:
    encoder = pair_config.image_encoder if use_image_embeddings else pair_config.caption_encoder
    return find_or_compute_neighbors(
        context.dataset,
        encoder,
        pair_config.search_config,
        pair_config.num_candidates,
        use_image_embeddings=use_image_embeddings,
        device=context.device,
        progress=context.progress,
    )


def _nearest_candidates(context: BuildContext, pair_config: PairConfig, neighbors: Neighbors) -> Candidates:
    """Return as many of the nearest as the rule looks at, those that take no part left out."""
    return restrict_to(Candidates(*neighbors.topk()), context.allowed).topk(pair_config.num_candidates)


def _open_vectors(
    context: BuildContext, pair_config: PairConfig, *, use_image_embeddings: bool
) -> ImageVectors:
    encoder, modality = (
        (pair_config.image_encoder, "images")
        if use_image_embeddings
        else (pair_config.caption_encoder, "captions")
    )
    embeddings = find_embeddings(context.dataset, encoder, modality=modality)
    caption_mask = (
        None if use_image_embeddings else filtered_caption_mask(context.dataset, context.dataset_filter)
    )
    return ImageVectors(embeddings, len(context.dataset), caption_mask)


def _mask_key(allowed: np.ndarray) -> str:
    """Return a fingerprint of who takes part: a run must not go on with other partners."""
    return config_hash("images", {}, {"allowed": np.packbits(allowed).tobytes().hex()})


def _borrow_captions(
    base: Candidates, visual_candidates: Candidates, is_uncaptioned: np.ndarray
) -> Candidates:
    """Treat images without caption as if they had that of their nearest captioned image by looks.

    That image is then their nearest, with a similarity of 1, and its partners follow.
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
    """Give images without caption their visual neighbor; limits on captions do not concern it."""
    rows = is_uncaptioned & visual_candidates.mask[:, 0]
    positions, similarity = candidates.positions.copy(), candidates.similarity.copy()
    positions[rows, 0], similarity[rows, 0] = (
        visual_candidates.positions[rows, 0],
        visual_candidates.similarity[rows, 0],
    )
    return Candidates(positions, similarity)


def _apply_thresholds(base: Candidates, pair_config: PairConfig) -> Candidates:
    """Apply the limits on similarity."""
    filtered = base if pair_config.ratio_threshold is None else ratio_test(base, pair_config.ratio_threshold)
    return (
        filtered
        if pair_config.min_similarity is None
        else filter_min_similarity(filtered, pair_config.min_similarity)
    )


def _correct_hubness(base: Candidates, pair_config: PairConfig, vectors: ImageVectors) -> Candidates:
    """Apply the limits on similarity and bring the rest into the order that the correction of hubs gives."""
    filtered = _apply_thresholds(base, pair_config)
    if pair_config.hubness_correction == "csls":
        return filtered.rerank(csls_scores(filtered, base))
    if pair_config.hubness_correction == "mutual-proximity":
        return filtered.rerank(mutual_proximity_scores(filtered, *vectors.similarity_moments()))
    return filtered


def _apply_limits(candidates: Candidates, base: Candidates, pair_config: PairConfig) -> Candidates:
    """Apply mutual, k and the fallback to the nearest."""
    limited = candidates if pair_config.mutual_k is None else filter_mutual(candidates, pair_config.mutual_k)
    limited = limited.topk(
        1
        if pair_config.k is None and pair_config.source != "file"
        else pair_config.k or limited.positions.shape[1]
    )
    if pair_config.fallback != "nearest":
        return limited
    is_empty = ~limited.mask.any(axis=1)
    positions, similarity = limited.positions.copy(), limited.similarity.copy()
    positions[is_empty, 0], similarity[is_empty, 0] = (
        base.positions[is_empty, 0],
        base.similarity[is_empty, 0],
    )
    return Candidates(positions, similarity)
