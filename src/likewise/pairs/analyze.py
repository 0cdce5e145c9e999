"""Judge pairs without training: encoders and rules side by side, by figures and by pictures."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import MANIFEST
from likewise.data.dataset import Collection
from likewise.data.filters import read_filter
from likewise.data.perceptual_hash import image_hashes, near_duplicate_clusters
from likewise.embeddings.store import Embeddings, look_up_embeddings
from likewise.errors import ArtifactError, InputError
from likewise.neighbors.config import SearchRule
from likewise.neighbors.index import obtain_neighbors
from likewise.neighbors.vectors import RecordVectors, caption_codes, column_codes, kept_captions
from likewise.pairs.build import make_pairs
from likewise.pairs.config import RANKED, PairRule, parse_rule
from likewise.pairs.sampling import Pairs
from likewise.pairs.stats import (
    Agreement,
    Chance,
    Draws,
    Evidence,
    Figures,
    Nearest,
    Spread,
    agreement,
    chance_of,
    draws_of,
    figures_of,
    nearest_of,
)
from likewise.progress import SILENT, Progress
from likewise.rng import permutation


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rule with one encoder.

    Attributes:
        encoder: Whose embeddings; two names for a hybrid, none for labels and files.
        rule: The rule as it is typed.
        summary: The rule in words, with how many images have a partner.
        fault: Why there are no pairs, where there are none.
        figures: What its pairs are worth, where there are some.
    """

    encoder: str
    rule: str
    summary: str
    fault: str | None = None
    figures: Figures | None = None


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Whom a rule shows an image with in the first epoch of seed 0.

    Attributes:
        row: The place of the rule among the rows.
        position: The partner, or None where there is none.
        similarity: As the rule sees it, if it does.
    """

    row: int
    position: int | None = None
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """An image picked by seed alone, with its partner under each rule that left pairs."""

    position: int
    partners: tuple[Shown, ...]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Encoders and rules of pairing side by side.

    Attributes:
        collection: The path of the collection.
        images: How many images it has.
        labelled: How many of them have a label.
        looks: The image encoder that tells how alike pairs look, if there is one.
        rows: One an encoder and rule.
        chance: The same for two images picked blindly.
        spreads: How alike the nearest are, one an encoder.
        agreements: How far each two encoders agree.
        anchors: A few images with their partners.
    """

    collection: str
    images: int
    labelled: int
    looks: str | None
    rows: tuple[Row, ...]
    chance: Chance
    spreads: tuple[Spread, ...]
    agreements: tuple[Agreement, ...]
    anchors: tuple[Anchor, ...]

    def told(self) -> dict[str, Any]:
        """Return everything as plain dictionaries, lists and numbers."""
        return asdict(self)


LANGUAGE_RULES = (
    "paper",
    "k=5",
    "distinct-captions",
    "mutual=10",
    "hubs=csls",
    "hubs=mutual-proximity",
    "min-similarity=0.7",
)
SHOWN_ANCHORS = 6
_SEED = 0
_IMAGES = "images"


@dataclass(frozen=True)
class _Encoders:
    """Names of finished embeddings, of captions and of images."""

    words: tuple[str, ...]
    looks: tuple[str, ...]


def diagnose(
    collection: Collection | str | Path,
    encoders: Sequence[str] | None = None,
    rules: Sequence[str | PairRule] | None = None,
    *,
    progress: Progress = SILENT,
) -> Diagnosis:
    """Apply rules to a collection by several encoders and measure the pairs that they leave.

    Neighbors that are missing are searched for and kept. A rule that leaves nobody with a partner, or asks
    for what the collection does not have (groups, labels), is a row with the reason.

    Args:
        collection: A collection or its path.
        encoders: Whose embeddings to compare; names that begin with `image:` are those of images. All
            finished ones where not given.
        rules: Rules as `parse_rule` reads them, or as they are; a rule that names no encoder is applied with
            each. Where not given, the usual ones, with labels as the oracle where there are any.
        progress: Where to report.

    Raises:
        ArtifactError: where embeddings are missing.
        InputError: for a rule that cannot be read.
    """
    source = Collection.open(collection)
    asked = None if rules is None else [parse_rule(r) if isinstance(r, str) else r for r in rules]
    there = _encoders(source, None)
    chosen = there if encoders is None else _encoders(source, encoders)
    labels = column_codes(source, "label")
    if asked is None:
        asked = [parse_rule(text) for text in _usual(chosen, labelled=bool((labels >= 0).any()))]
    if not asked:
        raise ArtifactError(
            f"{source.path} has neither finished embeddings nor labels; run: likewise embed {source.path}"
        )
    cases = list(dict.fromkeys(case for rule in asked for case in _cases(rule, chosen)))
    cases.sort(key=lambda case: _order(case, chosen))
    _search(source, cases, progress)
    looks = next(iter(chosen.looks or there.looks), None)
    evidence = _evidence(source, labels, looks, progress)
    anchors = permutation(len(source), seed=_SEED, epoch=0)[:SHOWN_ANCHORS]
    rows, shown = _measure(source, cases, evidence, anchors, progress)
    nearest = _nearest(source, chosen, progress)
    return Diagnosis(
        collection=str(source.path),
        images=len(source),
        labelled=int((labels >= 0).sum()),
        looks=looks,
        rows=tuple(rows),
        chance=chance_of(evidence),
        spreads=tuple(each.spread for each in nearest),
        agreements=tuple(told for pair in combinations(nearest, 2) if (told := agreement(*pair)) is not None),
        anchors=tuple(
            Anchor(position=int(at), partners=tuple(partners))
            for at, partners in zip(anchors, shown, strict=True)
        ),
    )


def rule_text(rule: PairRule) -> str:
    """Return a rule as it is typed, without its encoders; `paper` where nothing differs from it."""
    told = [
        field.name.replace("_", "-") + ("" if value is True else f"={value}")
        for field in fields(rule)
        if (value := getattr(rule, field.name)) != field.default
        and field.name not in ("encoder", "image_encoder")
    ]
    return ",".join(told) or "paper"


def encoder_text(rule: PairRule) -> str:
    """Return whose embeddings a rule goes by, or nothing where it needs none."""
    words, looks = rule.encoder or "", rule.image_encoder or ""
    return {"language": words, "vision": looks, "hybrid": f"{words} + {looks}"}.get(rule.pairs, "")


def _encoders(collection: Collection, asked: Sequence[str] | None) -> _Encoders:
    """Return the names of embeddings that are asked for, or of all that are finished."""
    if asked is None:
        found = _finished(collection)
    else:
        found = [
            look_up_embeddings(
                collection, name, modality=_IMAGES if name.startswith("image:") else "captions"
            )
            for name in asked
        ]
    # Two of one name, of other weights, go by the names of their folders.
    shared = Counter(name for name, _ in {(each.encoder, each.path) for each in found})
    names = {each.path.name if shared[each.encoder] > 1 else each.encoder: each.modality for each in found}
    return _Encoders(
        tuple(name for name, modality in names.items() if modality != _IMAGES),
        tuple(name for name, modality in names.items() if modality == _IMAGES),
    )


def _finished(collection: Collection) -> list[Embeddings]:
    found = []
    for path in sorted((collection.path / "embeddings").glob(f"*/{MANIFEST}")):
        try:
            found.append(Embeddings(path.parent))
        except ArtifactError:
            continue
    return found


def _usual(encoders: _Encoders, *, labelled: bool) -> list[str]:
    return [
        *(LANGUAGE_RULES if encoders.words else ()),
        *(["pairs=vision"] if encoders.looks else []),
        *(["pairs=hybrid"] if encoders.words and encoders.looks else []),
        *(["pairs=label"] if labelled else []),
    ]


def _cases(rule: PairRule, encoders: _Encoders) -> list[PairRule]:
    """Return a rule once for each encoder that it may go by and does not name."""
    words: Sequence[str | None] = (rule.encoder,) if rule.encoder else encoders.words or (None,)
    looks: Sequence[str | None] = (rule.image_encoder,) if rule.image_encoder else encoders.looks or (None,)
    if rule.pairs == "language":
        # Looks stand in for missing captions only.
        return [replace(rule, encoder=word, image_encoder=looks[0]) for word in words]
    if rule.pairs == "vision":
        return [replace(rule, image_encoder=look) for look in looks]
    if rule.pairs == "hybrid":
        return [replace(rule, encoder=w, image_encoder=i) for w, i in product(words, looks)]
    return [rule]


def _order(case: PairRule, encoders: _Encoders) -> tuple[int, int, int]:
    """Sort rows by what they go by, encoder by encoder; within one they stay as they were asked for."""
    known = {name: place for place, name in enumerate((*encoders.words, *encoders.looks))}
    kind = RANKED.index(case.pairs) if case.pairs in RANKED else len(RANKED)
    words, looks = known.get(case.encoder or "", len(known)), known.get(case.image_encoder or "", len(known))
    return (kind, looks, words) if case.pairs in ("vision", "hybrid") else (kind, words, 0)


def _search(collection: Collection, cases: Sequence[PairRule], progress: Progress) -> None:
    """Search once for all rules that look for the same, as deep as the deepest of them needs."""
    depths: dict[tuple[str | None, bool, SearchRule], int] = {}
    for case in cases:
        by_looks = case.pairs in ("vision", "hybrid") or case.uncaptioned in ("vision", "borrow")
        wanted = [(case.encoder, False)] if case.pairs in ("language", "hybrid") else []
        wanted += [(case.image_encoder, True)] if by_looks and case.pairs in RANKED else []
        for encoder, images in wanted:
            key = (encoder, images, case.search)
            depths[key] = max(depths.get(key, 0), case.depth)
    for (encoder, images, rule), depth in depths.items():
        try:
            obtain_neighbors(collection, encoder, rule, depth, images=images, progress=progress)
        except InputError:
            continue  # the row says why


def _evidence(collection: Collection, labels: np.ndarray, looks: str | None, progress: Progress) -> Evidence:
    hashes = image_hashes(collection, progress=progress)
    seen = None
    if looks is not None:
        seen = RecordVectors(look_up_embeddings(collection, looks, modality="images"), len(collection))
    return Evidence(
        captions=caption_codes(collection, each=False),
        hashes=hashes.bits,
        readable=hashes.readable,
        copies=near_duplicate_clusters(hashes),
        labels=labels if (labels >= 0).any() else None,
        looks=seen,
    )


def _measure(
    collection: Collection,
    cases: Sequence[PairRule],
    evidence: Evidence,
    anchors: np.ndarray,
    progress: Progress,
) -> tuple[list[Row], list[list[Shown]]]:
    """Return a row a case, and for each anchor its partner under each case that leaves pairs."""
    rows: list[Row] = []
    shown: list[list[Shown]] = [[] for _ in anchors]
    with progress.task("diagnosing", len(cases), "rules") as task:
        for place, case in enumerate(cases):
            named = {"encoder": encoder_text(case), "rule": rule_text(case)}
            try:
                pairs = make_pairs(collection, case)
                if not pairs.with_partner.any():
                    raise InputError("no image has a partner other than itself")
            except InputError as fault:
                rows.append(Row(**named, summary=case.summary(), fault=str(fault)))
            else:
                draws = draws_of(pairs, _owner(collection, case))
                figures = figures_of(draws, evidence, collection)
                rows.append(Row(**named, summary=pairs.summary(), figures=figures))
                for told, partner in zip(shown, _partners(pairs, draws, anchors, place), strict=True):
                    told.append(partner)
            task.advance(note=f"{named['encoder']} {named['rule']}".strip())
    return rows, shown


def _owner(collection: Collection, rule: PairRule) -> np.ndarray:
    """Return the image of each row of a rule's candidates: itself, or its captions' where these are drawn."""
    n = len(collection)
    if rule.pairs != "language" or rule.captions != "draw":
        return np.arange(n)
    left_out = None if rule.filter is None else read_filter(rule.filter, collection)
    embeddings = look_up_embeddings(collection, rule.encoder, modality="captions")
    return RecordVectors(embeddings, n, kept_captions(collection, left_out)).ids


def _partners(pairs: Pairs, draws: Draws, anchors: np.ndarray, row: int) -> list[Shown]:
    drawn = pairs.partners(anchors, seed=_SEED, epoch=0)
    found = []
    for anchor, partner in zip(anchors, drawn, strict=True):
        first, last = np.searchsorted(draws.anchor, [anchor, anchor + 1])
        at = first + np.flatnonzero(draws.partner[first:last] == partner)
        value = None if draws.similarity is None or not len(at) else float(draws.similarity[at[0]])
        found.append(Shown(row=row, position=None if partner == anchor else int(partner), similarity=value))
    return found


def _nearest(collection: Collection, encoders: _Encoders, progress: Progress) -> list[Nearest]:
    """Return the plain neighbors by each encoder that has any to compare."""
    found = []
    for images, names in ((False, encoders.words), (True, encoders.looks)):
        for name in names:
            try:
                found.append(nearest_of(collection, name, images=images, progress=progress))
            except InputError:
                continue  # fewer than two images; each row says so
    return found
