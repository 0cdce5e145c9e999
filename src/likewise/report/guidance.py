"""Pairs as pictures: who is described like whom, and what the network was shown of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from likewise.collection.records import Collection
from likewise.errors import ArtifactError
from likewise.neighbors.neighbors import Neighbors
from likewise.report.pictures import Picture, caption_of, picture, picture_of
from likewise.report.sources import FAULTS, Entry, Preview, Trained

SHOWN_ANCHORS = 8
SHOWN_PARTNERS = 4
_MOST_VIEWS = 40  # keeps the page small with many runs


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image with its captions, and how alike its captions are to the anchor's."""

    picture: Picture
    caption: str
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of a pair, two or one, as one run's network was shown them."""

    run: str
    pictures: list[Picture]


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """An image with the images described most like it, and with what became of it in training."""

    image: Shown
    partners: list[Shown]
    views: list[Views]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Neighbors by language with the collection they are about.

    Attributes:
        style: The place of the run that used them.
        collection: The images.
        neighbors: The artifact.
        positions: (n, k) int64, -1 where there is none.
        similarity: (n, k) float32.
    """

    style: int
    collection: Collection
    neighbors: Neighbors
    positions: np.ndarray
    similarity: np.ndarray

    @property
    def nearest(self) -> np.ndarray:
        """The similarity of every image to the one described most like it, where there is one: (m,)."""
        first = self.similarity[:, 0]
        return first[np.isfinite(first)]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What could be read, and sentences about what could not.

    Attributes:
        collection: The images, or None.
        lead: The place of the run whose collection that is and whose first pairs are shown.
        guidance: Neighbors by language, each once; the first are of `collection`.
        notes: What is missing.
    """

    collection: Collection | None = None
    lead: int = 0
    guidance: list[Guidance] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look_up(entries: Sequence[Entry]) -> Found:
    """Open the collection and the neighbors that runs were trained with, each once."""
    notes: list[str] = []
    opened: dict[int, Collection] = {}
    guidance: dict[str, Guidance] = {}
    for place, entry in enumerate(entries):
        if entry.trained is None:
            continue
        try:
            opened[place] = open_collection(entry.trained)
            used = entry.trained.derived.get("neighbors")
            if used and used[0]["path"] not in guidance:
                guidance[used[0]["path"]] = _open_guidance(place, opened[place], used[0])
        except FAULTS as fault:
            notes.append(f"{entry.name}: {fault}.")
    if not guidance and not notes and opened:
        notes.append("No run used pairs by language, so there are no neighbors to show.")
    lead = next((each.style for each in guidance.values()), next(iter(opened), 0))
    return Found(collection=opened.get(lead), lead=lead, guidance=list(guidance.values()), notes=notes)


def open_collection(trained: Trained) -> Collection:
    """Open the collection of a run.

    Raises:
        ArtifactError: where it is gone, or another has taken its place.
    """
    place = trained.derived.get("collection")
    if place is None:
        raise ArtifactError("the run does not say which collection it was trained on")
    found = Collection(Path(place))
    if found.key != trained.manifest.inputs.get("collection") or len(found) == 0:
        raise ArtifactError(f"the collection at {place} is no longer the one that the run was trained on")
    return found


def _open_guidance(style: int, collection: Collection, told: dict[str, str]) -> Guidance:
    neighbors = Neighbors(Path(told["path"]))
    if neighbors.artifact.manifest.key != told["key"]:
        raise ArtifactError(
            f"the neighbors at {neighbors.path} are no longer those that the run was trained on"
        )
    if len(neighbors) != len(collection):
        raise ArtifactError(f"the neighbors at {neighbors.path} are those of captions, not of images")
    positions, similarity = neighbors.table(min(SHOWN_PARTNERS, neighbors.k))
    return Guidance(
        style=style,
        collection=collection,
        neighbors=neighbors,
        positions=positions,
        similarity=similarity,
    )


def anchors(entries: Sequence[Entry], found: Found) -> list[Anchor]:
    """Show the first images of training, preferring those that the first pairs of every run hold."""
    shown = [(e.name, e.trained.preview) for e in entries if e.trained and e.trained.preview]
    leader = entries[found.lead].trained
    if found.collection is None or leader is None or leader.preview is None:
        return []
    common = [{pair["anchor"] for pair in preview.pairs} for _, preview in shown]
    order = sorted(leader.preview.pairs, key=lambda pair: -sum(pair["anchor"] in ids for ids in common))
    count = max(2, min(SHOWN_ANCHORS, _MOST_VIEWS // len(shown)))
    guidance = found.guidance[0] if found.guidance else None
    return [_anchor(found.collection, guidance, pair["position"], shown) for pair in order[:count]]


def _anchor(
    collection: Collection, guidance: Guidance | None, position: int, shown: Sequence[tuple[str, Preview]]
) -> Anchor:
    record = collection[position]
    partners = []
    if guidance is not None:
        for at, similar in zip(guidance.positions[position], guidance.similarity[position], strict=True):
            if at >= 0:
                partners.append(_shown(guidance.collection, int(at), float(similar)))
    return Anchor(
        image=_shown(collection, position),
        partners=partners,
        views=[_views(run, pair) for run, preview in shown if (pair := preview.of(record.id)) is not None],
    )


def _shown(collection: Collection, position: int, similarity: float | None = None) -> Shown:
    record = collection[position]
    return Shown(picture=picture_of(collection, record), caption=caption_of(record), similarity=similarity)


def _views(run: str, pair: np.ndarray) -> Views:
    names = ("one", "the other") if len(pair) == 2 else ("the",)
    told = [
        picture(pixels, f"{which} view shown to {run}") for which, pixels in zip(names, pair, strict=True)
    ]
    return Views(run=run, pictures=told)
