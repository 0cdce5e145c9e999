"""What is wrong with the images themselves: copies, blanks, and how they fall into groups and labels."""

from typing import Any

import numpy as np

from likewise.data.audit.scan import EXAMPLES, Finding, Survey, example
from likewise.data.dataset import Collection
from likewise.data.perceptual_hash import ImageHashes, near_duplicate_clusters

_SHOWN_CLUSTERS = 12


class Copies:
    """The near-duplicate images of a collection."""

    def __init__(self, hashes: ImageHashes, found: Survey, distance: int) -> None:
        """Find them."""
        self.clusters = near_duplicate_clusters(hashes, distance)
        members = np.flatnonzero(self.clusters >= 0)
        pairs = np.stack([self.clusters[members].astype(np.uint64), found.told[members]])
        _, firsts = np.unique(pairs, axis=1, return_index=True)
        self.surplus = self.clusters >= 0
        self.surplus[members[firsts]] = False

    def finding(self, collection: Collection) -> Finding:
        """Return how many images have copies."""
        groups = int(self.clusters.max(initial=-1)) + 1
        return finding_of(
            collection,
            np.flatnonzero(self.clusters >= 0),
            name="near_duplicates",
            title="near-duplicate images",
            filtered=int(self.surplus.sum()),
            note=f"{groups:,} groups; copies with the same captions are left out" if groups else "",
        )

    def shown(self, collection: Collection) -> list[dict[str, Any]]:
        """Return the largest groups, with some of their images."""
        sizes = np.bincount(self.clusters[self.clusters >= 0])
        told = []
        for code in np.argsort(-sizes, kind="stable")[:_SHOWN_CLUSTERS]:
            members = np.flatnonzero(self.clusters == code)
            told.append({"images": len(members), "examples": examples_at(collection, members)})
        return told


def examples_at(collection: Collection, positions: np.ndarray) -> list[dict[str, Any]]:
    """Return the first few of some records as examples."""
    records = [(int(position), collection[int(position)]) for position in positions[:EXAMPLES]]
    return [example(at, record.id, record.captions[0] if record.captions else None) for at, record in records]


def finding_of(
    collection: Collection, positions: np.ndarray, *, name: str, title: str, filtered: int = 0, note: str = ""
) -> Finding:
    """Return a finding on images at some positions."""
    return Finding(
        name=name,
        title=title,
        count=len(positions),
        total=len(collection),
        unit="images",
        filtered=filtered,
        note=note,
        examples=tuple(examples_at(collection, positions)),
    )


def group_sizes(collection: Collection, found: Survey) -> dict[str, Any] | None:
    """Return how many groups there are and their sizes, None where no image has a group."""
    given = found.groups[found.groups != 0]
    if not len(given):
        return None
    codes, counts = np.unique(given, return_counts=True)
    largest = codes[np.argsort(-counts, kind="stable")[:EXAMPLES]]
    names = _names(collection, "group", found.groups, largest)
    return {
        "groups": len(codes),
        "images": len(given),
        "smallest": int(counts.min()),
        "median": float(np.median(counts)),
        "largest": int(counts.max()),
        "single": int((counts == 1).sum()),
        "examples": [
            {"name": name, "images": int((given == code).sum())}
            for name, code in zip(names, largest, strict=True)
        ],
    }


def _names(collection: Collection, column: str, codes: np.ndarray, wanted: np.ndarray) -> list[str]:
    """Return the names behind some codes, each from the first record that has it."""
    return [str(getattr(collection[int(np.argmax(codes == code))], column)) for code in wanted]


def single_members(collection: Collection, found: Survey) -> Finding:
    """Return the groups with one image, which finds no partner of its own group."""
    codes, firsts, counts = np.unique(found.groups, return_index=True, return_counts=True)
    given = codes != 0
    lonely = np.sort(firsts[given & (counts == 1)])
    return Finding(
        name="single_groups",
        title="groups with a single image",
        count=len(lonely),
        total=int(given.sum()),
        unit="groups",
        examples=tuple(examples_at(collection, lonely)),
    )
