"""Audit of a dataset: a report of findings, and a filter of uninformative captions and redundant images."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import Artifact, read_json, write_json
from likewise.data.audit.captions import (
    MIN_TEMPLATE_IMAGES,
    detect_languages,
    find_caption_issues,
    find_templates,
    repeated_captions,
    summarize_lengths,
)
from likewise.data.audit.scan import (
    MAX_EXAMPLES,
    CaptionScan,
    Finding,
    iter_rows,
    make_example,
    scan_dataset,
    top_phrases,
    uninformative_reason,
)
from likewise.data.config import AuditConfig
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import FilterRow, write_filter
from likewise.data.perceptual_hash import (
    PerceptualHashes,
    compute_perceptual_hashes,
    find_near_duplicate_clusters,
    validate_max_hamming,
)
from likewise.errors import ArtifactError
from likewise.progress import NULL_PROGRESS, Progress

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


logger = logging.getLogger(__name__)

ARTIFACT_KIND = "audit"
BOILERPLATE = "boilerplate"
NEAR_DUPLICATE = "near-duplicate with the same captions"
_MIN_PHRASE_FRACTION = 0.01
_NUM_PHRASES = 12
_NUM_TEMPLATES = 12
_DEFAULT_CONFIG = AuditConfig()


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """A complete audit."""

    path: Path
    """Folder with `report.json` and `filter.csv`."""
    report: dict[str, Any]
    """Content of `report.json`."""

    @property
    def filter_path(self) -> Path:
        """Path of the filter, which users may edit."""
        return self.path / "filter.csv"

    def summary(self) -> dict[str, Any]:
        """Return the report without examples."""
        finding_fields = ("count", "total", "unit", "fraction", "filtered")
        findings = {
            finding["name"]: {name: finding[name] for name in finding_fields}
            for finding in self.report["findings"]
        }
        report_fields = ("images", "captions", "lengths", "languages", "groups", "labels")
        counts = {"findings": findings, "excluded": self.report["filter"]}
        return {"audit": str(self.path), **{name: self.report[name] for name in report_fields}, **counts}


def audit_dataset(
    dataset: CaptionDataset | str | Path,
    config: AuditConfig = _DEFAULT_CONFIG,
    *,
    num_workers: int | None = None,
    progress: Progress = NULL_PROGRESS,
) -> AuditReport:
    """Audit the captions and images of a dataset in `DATASET/audit/`; nothing is deleted.

    The filter excludes uninformative captions (no letters, only a URL or file name, filler words,
    boilerplate) and, of near-duplicate images with the same captions, all but the first. A complete audit is
    read again; its filter is not overwritten, because users may have edited it.

    Args:
        dataset: The dataset or its path.
        config: Thresholds.
        num_workers: Threads that decode images; defaults to the number of CPU cores.
        progress: Receives the progress.

    Raises:
        InvalidInputError: if a threshold is out of range.
        ArtifactError: if the images are missing, or the dataset has an audit with other thresholds.
        DependencyError: if py3langid is not installed.
    """
    config.validate()
    validate_max_hamming(config.max_hamming)
    dataset = CaptionDataset.open(dataset)
    path, inputs = dataset.path / "audit", {"dataset": dataset.key}
    report_path = path / "report.json"
    with Artifact.exclusive(path, ARTIFACT_KIND, asdict(config), inputs) as artifact:
        if artifact.is_complete:
            _require_file(report_path)
            logger.info(f"{dataset.path} already has an audit; delete {path} to repeat it")
        else:
            report = _build_report(dataset, config, path / "filter.csv", num_workers, progress)
            write_json(report_path, report)
            artifact.finish({"images": report["images"], "captions": report["captions"]})
    return AuditReport(path=path, report=read_json(report_path))


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; delete {path.parent} to audit again", path=path)


def _build_report(
    dataset: CaptionDataset,
    config: AuditConfig,
    filter_path: Path,
    num_workers: int | None,
    progress: Progress,
) -> dict[str, Any]:
    hashes = compute_perceptual_hashes(dataset, num_workers, progress)
    scan = scan_dataset(dataset, config, progress)
    near_duplicates = NearDuplicates(hashes, scan, config.max_hamming)
    templates = find_templates(dataset, scan, hashes)
    boilerplate_hashes = {template.template_hash for template in templates if template.is_boilerplate}
    reason_counts = write_filter(
        filter_path, _iter_filter_rows(dataset, scan, near_duplicates, boilerplate_hashes)
    )
    num_captions = len(scan.caption_hashes)
    findings = [
        *find_caption_issues(dataset, scan, templates),
        *_image_findings(dataset, scan, hashes, near_duplicates, config),
    ]
    return {
        "images": len(dataset),
        "captions": num_captions,
        "empty_captions": dataset.artifact.manifest.counts.get("empty_captions", 0),
        "settings": asdict(config),
        "findings": [finding.to_dict() for finding in findings],
        "filter": reason_counts,
        "lengths": summarize_lengths(scan.length_counts),
        "languages": detect_languages(dataset, num_captions, progress),
        "repeated": repeated_captions(dataset, scan),
        "templates": [template.to_dict(dataset) for template in templates[:_NUM_TEMPLATES]],
        "frequent_phrases": _frequent_phrases(scan),
        "clusters": near_duplicates.largest_clusters(dataset),
        "groups": summarize_groups(dataset, scan),
        "labels": {
            "images": int((scan.label_hashes != 0).sum()),
            "labels": len(np.unique(scan.label_hashes[scan.label_hashes != 0])),
        },
    }


def _image_findings(
    dataset: CaptionDataset,
    scan: CaptionScan,
    hashes: PerceptualHashes,
    near_duplicates: NearDuplicates,
    config: AuditConfig,
) -> list[Finding]:
    num_images, counter = len(dataset), scan.counter
    findings = [
        near_duplicates.to_finding(dataset),
        image_finding(
            dataset, np.flatnonzero(hashes.uniform), name="uniform", title="images of a single color"
        ),
        image_finding(
            dataset, np.flatnonzero(~hashes.readable), name="unreadable", title="images no longer readable"
        ),
        counter.to_finding("tiny", f"images with a side below {config.min_side} px", num_images, "images"),
        counter.to_finding(
            "stretched", f"images with an aspect ratio above {config.max_aspect:g}", num_images, "images"
        ),
    ]
    return [*findings, singleton_group_finding(dataset, scan)] if scan.group_hashes.any() else findings


def _frequent_phrases(scan: CaptionScan) -> list[dict[str, Any]]:
    min_count = max(MIN_TEMPLATE_IMAGES, int(np.ceil(_MIN_PHRASE_FRACTION * len(scan.caption_hashes))))
    phrases = top_phrases(scan.frequent_phrases.counts, min_count)[:_NUM_PHRASES]
    return [
        {"position": phrase.position, "text": phrase.text, "captions": count} for phrase, count in phrases
    ]


def _iter_filter_rows(
    dataset: CaptionDataset, scan: CaptionScan, near_duplicates: NearDuplicates, boilerplate_hashes: set[int]
) -> Iterator[FilterRow]:
    """Yield the exclusions in the order of the samples, with distinct captions per sample."""
    caption_index = 0
    for shard in range(len(dataset.shard_paths)):
        for index, sample in iter_rows(dataset, shard, ["id", "captions"]):
            if near_duplicates.redundant[index]:
                yield FilterRow(id=sample["id"], caption="", reason=NEAR_DUPLICATE)
            seen = set()
            for caption in sample["captions"]:
                reason = (
                    BOILERPLATE
                    if int(scan.template_hashes[caption_index]) in boilerplate_hashes
                    else uninformative_reason(caption)
                )
                caption_index += 1
                if reason is not None and caption not in seen and not near_duplicates.redundant[index]:
                    seen.add(caption)
                    yield FilterRow(id=sample["id"], caption=caption, reason=reason)
