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
from likewise.data.audit.images import (
    NearDuplicates,
    image_finding,
    singleton_group_finding,
    summarize_groups,
)
from likewise.data.audit.scan import (
    CaptionScan,
    Finding,
    iter_rows,
    scan_dataset,
    top_phrases,
    uninformative_reason,
)
from likewise.data.config import AuditConfig
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import FilterRow, write_filter
from likewise.data.perceptual_hash import PerceptualHashes, compute_perceptual_hashes, validate_max_hamming
from likewise.errors import ArtifactError
from likewise.progress import NULL_PROGRESS, Progress

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
