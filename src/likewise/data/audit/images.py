"""Findings on images: near-duplicates and groups."""

from typing import Any

import numpy as np

from likewise.data.audit.scan import MAX_EXAMPLES, CaptionScan, Finding, make_example
from likewise.data.dataset import CaptionDataset
from likewise.data.perceptual_hash import PerceptualHashes, find_near_duplicate_clusters

_NUM_CLUSTERS = 12


class NearDuplicates:
    """Near-duplicate images of a dataset.

    Attributes:
        cluster_ids: Cluster of each image, (n,) int64; −1 for an image without near-duplicates.
        redundant: Mask of the images whose cluster has an earlier image with the same captions, (n,) bool.
    """

    def __init__(self, hashes: PerceptualHashes, scan: CaptionScan, max_hamming: int) -> None:
        """Find the clusters."""
        self.cluster_ids = find_near_duplicate_clusters(hashes, max_hamming)
        duplicates = np.flatnonzero(self.cluster_ids >= 0)
        cluster_caption_keys = np.stack(
            [self.cluster_ids[duplicates].astype(np.uint64), scan.caption_set_hashes[duplicates]]
        )
        _, first_indices = np.unique(cluster_caption_keys, axis=1, return_index=True)
        self.redundant = self.cluster_ids >= 0
        self.redundant[duplicates[first_indices]] = False

    def to_finding(self, dataset: CaptionDataset) -> Finding:
        """Return the finding on images with near-duplicates."""
        num_clusters = int(self.cluster_ids.max(initial=-1)) + 1
        return image_finding(
            dataset,
            np.flatnonzero(self.cluster_ids >= 0),
            name="near_duplicates",
            title="near-duplicate images",
            filtered=int(self.redundant.sum()),
            note=f"{num_clusters:,} clusters; excluded if the captions are the same" if num_clusters else "",
        )

    def largest_clusters(self, dataset: CaptionDataset) -> list[dict[str, Any]]:
        """Return the largest clusters with examples."""
        sizes = np.bincount(self.cluster_ids[self.cluster_ids >= 0])
        clusters = []
        for cluster_id in np.argsort(-sizes, kind="stable")[:_NUM_CLUSTERS]:
            members = np.flatnonzero(self.cluster_ids == cluster_id)
            clusters.append({"images": len(members), "examples": make_examples(dataset, members)})
        return clusters


def make_examples(dataset: CaptionDataset, indices: np.ndarray) -> list[dict[str, Any]]:
    """Return the first samples as examples."""
    samples = [(int(index), dataset[int(index)]) for index in indices[:MAX_EXAMPLES]]
    return [
        make_example(index, sample.id, sample.captions[0] if sample.captions else None)
        for index, sample in samples
    ]


def image_finding(
    dataset: CaptionDataset,
    indices: np.ndarray,
    *,
    name: str,
    title: str,
    filtered: int = 0,
    note: str = "",
) -> Finding:
    """Return a finding on images by their indices."""
    return Finding(
        name=name,
        title=title,
        count=len(indices),
        total=len(dataset),
        unit="images",
        filtered=filtered,
        note=note,
        examples=tuple(make_examples(dataset, indices)),
    )


def summarize_groups(dataset: CaptionDataset, scan: CaptionScan) -> dict[str, Any] | None:
    """Return the number and sizes of the groups, or None if no image has a group."""
    known = scan.group_hashes[scan.group_hashes != 0]
    if not len(known):
        return None
    unique_hashes, counts = np.unique(known, return_counts=True)
    largest_hashes = unique_hashes[np.argsort(-counts, kind="stable")[:MAX_EXAMPLES]]
    names = _column_values(dataset, "group", scan.group_hashes, largest_hashes)
    return {
        "groups": len(unique_hashes),
        "images": len(known),
        "smallest": int(counts.min()),
        "median": float(np.median(counts)),
        "largest": int(counts.max()),
        "singletons": int((counts == 1).sum()),
        "examples": [
            {"name": name, "images": int((known == group_hash).sum())}
            for name, group_hash in zip(names, largest_hashes, strict=True)
        ],
    }


def _column_values(
    dataset: CaptionDataset, column: str, hashes: np.ndarray, targets: np.ndarray
) -> list[str]:
    """Return the values of a column by their hashes."""
    return [str(getattr(dataset[int(np.argmax(hashes == target))], column)) for target in targets]


def singleton_group_finding(dataset: CaptionDataset, scan: CaptionScan) -> Finding:
    """Return the finding on groups of one image, which has no partner in its group."""
    group_hashes, first_indices, counts = np.unique(scan.group_hashes, return_index=True, return_counts=True)
    has_group = group_hashes != 0
    singletons = np.sort(first_indices[has_group & (counts == 1)])
    return Finding(
        name="singleton_groups",
        title="groups with a single image",
        count=len(singletons),
        total=int(has_group.sum()),
        unit="groups",
        examples=tuple(make_examples(dataset, singletons)),
    )
