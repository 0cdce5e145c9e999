"""Sources of pairs: a rule and a collection in, partners to draw from out."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from likewise.artifacts import fingerprint, key_of
from likewise.data.dataset import Collection
from likewise.data.filters import Filter, read_filter
from likewise.embeddings.store import look_up_embeddings
from likewise.errors import InputError
from likewise.neighbors.index import Neighbors, obtain_neighbors
from likewise.neighbors.vectors import RecordVectors, column_codes, kept_captions
from likewise.pairs.candidates import (
    Candidates,
    among,
    at_least,
    clearly_nearest,
    csls_scores,
    mutual,
    mutual_proximity_scores,
    read_pairs,
    reciprocal_ranks,
    union,
)
from likewise.pairs.config import PairRule
from likewise.pairs.sampling import Choice, FromGroups, FromTable, Nobody, Pairs
from likewise.progress import SILENT, Progress


@dataclass(frozen=True)
class _Place:
    """Where a rule is applied: the collection, who takes part, and where to report."""

    collection: Collection
    allowed: np.ndarray
    left_out: Filter | None
    device: str
    progress: Progress


@dataclass(frozen=True)
class _Found:
    """What a source gives.

    Attributes:
        choice: The partners.
        inputs: Fingerprints of what they were made from.
        uncaptioned: Images that the source cannot compare, (n,) bool.
        neighbors: The folders of neighbors behind it.
        notes: What to say of it beside the counts of partners.
    """

    choice: Choice
    inputs: dict[str, str]
    uncaptioned: np.ndarray
    neighbors: tuple[Neighbors, ...] = ()
    notes: tuple[str, ...] = ()


def make_pairs(
    collection: Collection,
    rule: PairRule,
    usable: np.ndarray | None = None,
    *,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Pairs:
    """Apply a rule to a collection; neighbors that it needs and that are missing are searched for.

    Args:
        collection: The images.
        rule: Who may be paired with whom.
        usable: Positions of the images whose pixels can be read, (m,) int64; no other becomes a partner.
            All of them where not given.
        device: Where neighbors are searched for.
        progress: Where to report.

    Raises:
        ArtifactError: where the embeddings are missing.
        InputError: where the rule leaves nobody with a partner, or its files do not fit the collection.
    """
    n = len(collection)
    allowed = np.zeros(n, bool)
    allowed[np.arange(n) if usable is None else usable] = True
    left_out = None if rule.filter is None else read_filter(rule.filter, collection)
    if left_out is not None:
        allowed &= ~left_out.images
    found = _SOURCES[rule.pairs](_Place(collection, allowed, left_out, device, progress), rule)
    with_partner = found.choice.with_partner & allowed
    if rule.pairs != "self" and not with_partner.any():
        raise InputError(f"no image of {collection.path} has a partner ({rule.summary()}); loosen the rule")
    alone = allowed & ~with_partner & (rule.pairs != "self")
    dropped = ~allowed
    dropped |= alone & np.where(found.uncaptioned, rule.uncaptioned == "drop", rule.fallback == "drop")
    return Pairs(
        rule,
        found.choice,
        _key(rule, found, left_out),
        dropped=dropped,
        neighbors=tuple(each.artifact for each in found.neighbors),
        notes=_notes(rule, found, alone, dropped & allowed, left_out),
    )


def _key(rule: PairRule, found: _Found, left_out: Filter | None) -> str:
    settings = {
        k: v for k, v in asdict(rule).items() if k not in ("filter", "pairs_file", "encoder", "image_encoder")
    }
    inputs = found.inputs if left_out is None else found.inputs | {"filter": left_out.key}
    return key_of("pairs", settings, inputs)


def _notes(
    rule: PairRule, found: _Found, alone: np.ndarray, dropped: np.ndarray, left_out: Filter | None
) -> tuple[str, ...]:
    """Count in words who has no partner and why, and what else was asked for and is not there."""
    told = list(found.notes)
    if rule.k is not None and isinstance(found.choice, FromTable):
        most = int(found.choice.candidates.found.sum(axis=1).max())
        if most < rule.k:
            told.append(f"none has more than {most:,} partners")
    without = int((alone & found.uncaptioned).sum())
    if without:
        told.append(f"{without:,} of those without are not captioned")
    if dropped.any():
        told.append(f"{int(dropped.sum()):,} without a partner are no anchors")
    if left_out is not None and left_out.images.any():
        told.append(f"{int(left_out.images.sum()):,} left out by the filter")
    return tuple(told)


def _itself(place: _Place, _: PairRule) -> _Found:
    n = len(place.collection)
    return _Found(Nobody(n), {}, np.zeros(n, bool))


def _labelled(place: _Place, _: PairRule) -> _Found:
    labels = column_codes(place.collection, "label")
    if (labels < 0).all():
        raise InputError(f"no image of {place.collection.path} has a label; import with --label-column")
    codes = np.where(place.allowed, labels, -1)
    inputs = {"labels": place.collection.key, "allowed": _mask_key(place.allowed)}
    holes = int((labels < 0).sum())
    notes = (f"{holes:,} have no label",) if holes else ()
    return _Found(FromGroups(codes), inputs, np.zeros(len(labels), bool), notes=notes)


def _given(place: _Place, rule: PairRule) -> _Found:
    if rule.pairs_file is None:
        raise InputError("--pairs file needs --pairs-file FILE")
    candidates = read_pairs(rule.pairs_file, place.collection)
    inputs = {"pairs": fingerprint(rule.pairs_file), "allowed": _mask_key(place.allowed)}
    base = among(candidates, place.allowed)
    chosen = _limited(_near(base, rule), base, rule)
    return _Found(FromTable(chosen, rule.draw_temperature), inputs, np.zeros(len(place.collection), bool))


def _described(place: _Place, rule: PairRule) -> _Found:
    words = _neighbors(place, rule, images=False)
    stored = _vectors(place, rule, images=False)
    starts = np.concatenate([[0], np.cumsum(stored.count)]) if rule.captions == "draw" else None
    uncaptioned = stored.count == 0
    base = _table(place, rule, words)
    inputs = {"neighbors": words.identity, "allowed": _mask_key(place.allowed)}
    behind = [words]
    looks = None
    if rule.uncaptioned in ("vision", "borrow") and uncaptioned.any():
        behind.append(_neighbors(place, rule, images=True))
        inputs["looks"] = behind[1].identity
        looks = among(Candidates(*behind[1].table()), place.allowed)
        if rule.captions == "draw":
            raise InputError(
                "--captions draw has no row for images without caption: let them be self or drop"
            )
    if looks is not None and rule.uncaptioned == "borrow":
        base = _borrowed(base, looks, uncaptioned)
    chosen = _limited(_corrected(base, rule, stored), base, rule)
    if looks is not None and rule.uncaptioned == "vision":
        chosen = _by_looks(chosen, looks, uncaptioned)
    uncaptioned = uncaptioned if starts is not None else uncaptioned & ~chosen.found.any(axis=1)
    return _Found(FromTable(chosen, rule.draw_temperature, starts), inputs, uncaptioned, tuple(behind))


def _alike(place: _Place, rule: PairRule) -> _Found:
    looks = _neighbors(place, rule, images=True)
    base = _table(place, rule, looks)
    chosen = _limited(_corrected(base, rule, _vectors(place, rule, images=True)), base, rule)
    inputs = {"neighbors": looks.identity, "allowed": _mask_key(place.allowed)}
    return _Found(
        FromTable(chosen, rule.draw_temperature), inputs, np.zeros(len(place.collection), bool), (looks,)
    )


def _both(place: _Place, rule: PairRule) -> _Found:
    """Fuse the neighbors of words and of looks; an image without caption has those of its looks alone."""
    words, looks = (_neighbors(place, rule, images=images) for images in (False, True))
    tables = (_table(place, rule, words), _table(place, rule, looks))
    by_words, by_looks = (_vectors(place, rule, images=images) for images in (False, True))
    n = np.arange(len(place.collection))
    # Where one of two images has no caption, looks alone tell how alike they are.
    w = np.where(by_words.count[:, None] > 0, rule.image_weight, 1.0)
    if rule.fusion == "rank":
        positions, _ = reciprocal_ranks(*tables, w, 2 * rule.depth)
    else:
        positions = union(*(table.positions for table in tables))
    # Whichever order is asked for, the similarity that limits and draws go by is the weighted one.
    silent = np.append(by_words.count == 0, False)[positions]
    w = np.where(silent, 1.0, w)
    value = (1 - w) * by_words.similarity(n, positions) + w * by_looks.similarity(n, positions)
    fused = Candidates(positions, np.where(positions < 0, -np.inf, value).astype(np.float32))
    base = fused if rule.fusion == "rank" else fused.by(fused.similarity)
    inputs = {
        "words": words.identity,
        "looks": looks.identity,
        "allowed": _mask_key(place.allowed),
    }
    chosen = _limited(_corrected(base, rule, by_words), base, rule)
    return _Found(FromTable(chosen, rule.draw_temperature), inputs, by_words.count == 0, (words, looks))


_SOURCES: dict[str, Callable[[_Place, PairRule], _Found]] = {
    "self": _itself,
    "language": _described,
    "vision": _alike,
    "hybrid": _both,
    "label": _labelled,
    "file": _given,
}


def _neighbors(place: _Place, rule: PairRule, *, images: bool) -> Neighbors:
    encoder = rule.image_encoder if images else rule.encoder
    return obtain_neighbors(
        place.collection,
        encoder,
        rule.search,
        rule.depth,
        images=images,
        device=place.device,
        progress=place.progress,
    )


def _table(place: _Place, rule: PairRule, neighbors: Neighbors) -> Candidates:
    """Return as many of the nearest as the rule looks at, those that take no part left out."""
    return among(Candidates(*neighbors.table()), place.allowed).first(rule.depth)


def _vectors(place: _Place, rule: PairRule, *, images: bool) -> RecordVectors:
    encoder, modality = (rule.image_encoder, "images") if images else (rule.encoder, "captions")
    embeddings = look_up_embeddings(place.collection, encoder, modality=modality)
    kept = None if images else kept_captions(place.collection, place.left_out)
    return RecordVectors(embeddings, len(place.collection), kept)


def _mask_key(allowed: np.ndarray) -> str:
    """Return a fingerprint of who takes part: a run must not go on with other partners."""
    return key_of("images", {}, {"allowed": np.packbits(allowed).tobytes().hex()})


def _borrowed(base: Candidates, looks: Candidates, uncaptioned: np.ndarray) -> Candidates:
    """Treat images without caption as if they had that of their nearest captioned image by looks.

    That image is then their nearest, with a similarity of 1, and its partners follow.
    """
    captioned = np.append(~uncaptioned & base.found.any(axis=1), False)
    near = looks.keep(captioned[looks.positions])
    rows = np.flatnonzero(uncaptioned & near.found[:, 0])
    lender = near.positions[rows, 0]
    positions = np.concatenate([base.positions, np.full((len(base.positions), 1), -1)], axis=1)
    similarity = np.pad(base.similarity, ((0, 0), (0, 1)), constant_values=-np.inf)
    positions[rows, 0], similarity[rows, 0] = lender, 1
    positions[rows, 1:], similarity[rows, 1:] = base.positions[lender], base.similarity[lender]
    table = Candidates(positions, similarity)
    return table.keep(positions != np.arange(len(positions))[:, None]).first(base.positions.shape[1])


def _by_looks(chosen: Candidates, looks: Candidates, uncaptioned: np.ndarray) -> Candidates:
    """Give images without caption their visual neighbor; limits on captions do not concern it."""
    rows = uncaptioned & looks.found[:, 0]
    positions, similarity = chosen.positions.copy(), chosen.similarity.copy()
    positions[rows, 0], similarity[rows, 0] = looks.positions[rows, 0], looks.similarity[rows, 0]
    return Candidates(positions, similarity)


def _near(base: Candidates, rule: PairRule) -> Candidates:
    """Apply the limits on similarity."""
    near = base if rule.ratio is None else clearly_nearest(base, rule.ratio)
    return near if rule.min_similarity is None else at_least(near, rule.min_similarity)


def _corrected(base: Candidates, rule: PairRule, stored: RecordVectors) -> Candidates:
    """Apply the limits on similarity and bring the rest into the order that the correction of hubs gives."""
    near = _near(base, rule)
    if rule.hubs == "csls":
        return near.by(csls_scores(near, base))
    if rule.hubs == "mutual-proximity":
        return near.by(mutual_proximity_scores(near, *stored.moments()))
    return near


def _limited(near: Candidates, base: Candidates, rule: PairRule) -> Candidates:
    """Apply mutual, k and the fallback to the nearest."""
    kept = near if rule.mutual is None else mutual(near, rule.mutual)
    kept = kept.first(1 if rule.k is None and rule.pairs != "file" else rule.k or kept.positions.shape[1])
    if rule.fallback != "nearest":
        return kept
    empty = ~kept.found.any(axis=1)
    positions, similarity = kept.positions.copy(), kept.similarity.copy()
    positions[empty, 0], similarity[empty, 0] = base.positions[empty, 0], base.similarity[empty, 0]
    return Candidates(positions, similarity)
