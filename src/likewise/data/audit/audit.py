"""The audit of a collection: one report, and one filter that leaves out what says nothing."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import begin, read_json, write_json
from likewise.data.audit.captions import (
    IMAGES,
    caption_findings,
    find_templates,
    language_mix,
    lengths_told,
    repeated_texts,
)
from likewise.data.audit.config import AuditSettings
from likewise.data.audit.images import Copies, finding_of, group_sizes, single_members
from likewise.data.audit.scan import Finding, Survey, emptiness_of, rows_of, survey, telling
from likewise.data.dataset import Collection
from likewise.data.filters import FilterRow, write_filter
from likewise.data.perceptual_hash import ImageHashes, check_distance, image_hashes
from likewise.errors import ArtifactError
from likewise.progress import SILENT, Progress

KIND = "audit"
BOILERPLATE = "boilerplate"
COPY = "copy of an image with the same captions"
_OPENINGS_SHARE = 0.01
_SHOWN_OPENINGS = 12
_SHOWN_TEMPLATES = 12
_USUAL = AuditSettings()


@dataclass(frozen=True, kw_only=True)
class Audit:
    """A finished audit: its folder, with `report.json` and `filter.csv`, and the report as JSON values."""

    path: Path
    report: dict[str, Any]

    @property
    def filter(self) -> Path:
        """The filter that it wrote; people may edit it."""
        return self.path / "filter.csv"

    def summary(self) -> dict[str, Any]:
        """Return the counts of the report without examples."""
        shown = ("count", "total", "unit", "share", "filtered")
        findings = {f["name"]: {name: f[name] for name in shown} for f in self.report["findings"]}
        kept = ("images", "captions", "lengths", "languages", "groups", "labels")
        rows = {"findings": findings, "left_out": self.report["filter"]}
        return {"audit": str(self.path), **{name: self.report[name] for name in kept}, **rows}


def audit(
    collection: Collection | str | Path,
    settings: AuditSettings = _USUAL,
    *,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Audit:
    """Look for what is wrong with captions and images, into `COLLECTION/audit/`; nothing is deleted.

    The filter leaves out captions that say nothing (no letters, a web address or file name, filler words,
    boilerplate) and, of near-duplicate images with the same captions, all but the first. Run again, a
    finished audit is read, and its filter is left as it may have been edited.

    Raises:
        InputError: where a setting makes no sense.
        ArtifactError: where the images are gone, or another audit was made with other settings.
        DependencyError: where py3langid is missing.
    """
    settings.check()
    check_distance(settings.distance)
    source = Collection.open(collection)
    artifact = begin(source.path / "audit", KIND, asdict(settings), {"collection": source.key})
    told = artifact.path / "report.json"
    if artifact.complete:
        _require(told)
        progress.say(f"{source.path} was audited before; delete {artifact.path} to do it anew")
        return Audit(path=artifact.path, report=read_json(told))
    report = _audit(source, settings, artifact.path / "filter.csv", workers, progress)
    write_json(told, report)
    artifact.finish({"images": report["images"], "captions": report["captions"]})
    return Audit(path=artifact.path, report=read_json(told))


def _require(path: Path) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; delete {path.parent} to audit anew")


def _audit(
    source: Collection, settings: AuditSettings, target: Path, workers: int | None, progress: Progress
) -> dict[str, Any]:
    hashes = image_hashes(source, workers, progress)
    found = survey(source, settings, progress)
    copies = Copies(hashes, found, settings.distance)
    templates = find_templates(source, found, hashes)
    empty = {template.code for template in templates if template.boilerplate}
    rows = write_filter(target, _filter_rows(source, found, copies, empty))
    captions = len(found.texts)
    findings = [
        *caption_findings(source, found, templates),
        *_image_findings(source, found, hashes, copies, settings),
    ]
    return {
        "images": len(source),
        "captions": captions,
        "empty_captions": source.artifact.manifest.counts.get("empty_captions", 0),
        "settings": asdict(settings),
        "findings": [finding.told() for finding in findings],
        "filter": rows,
        "lengths": lengths_told(found.lengths),
        "languages": language_mix(source, captions, progress),
        "repeated": repeated_texts(source, found),
        "templates": [template.told(source) for template in templates[:_SHOWN_TEMPLATES]],
        "openings": _openings(found),
        "clusters": copies.shown(source),
        "groups": group_sizes(source, found),
        "labels": {
            "images": int((found.labels != 0).sum()),
            "labels": len(np.unique(found.labels[found.labels != 0])),
        },
    }


def _image_findings(
    source: Collection, found: Survey, hashes: ImageHashes, copies: Copies, settings: AuditSettings
) -> list[Finding]:
    images, tally = len(source), found.tally
    findings = [
        copies.finding(source),
        finding_of(source, np.flatnonzero(hashes.flat), name="flat", title="images of one colour"),
        finding_of(
            source, np.flatnonzero(~hashes.readable), name="unreadable", title="images no longer readable"
        ),
        tally.finding("tiny", f"images with a side under {settings.min_side} px", images, "images"),
        tally.finding("stretched", f"images with sides over {settings.max_aspect:g} to 1", images, "images"),
    ]
    return [*findings, single_members(source, found)] if found.groups.any() else findings


def _openings(found: Survey) -> list[dict[str, Any]]:
    least = max(IMAGES, int(np.ceil(_OPENINGS_SHARE * len(found.texts))))
    told = telling(found.openings.counts, least)[:_SHOWN_OPENINGS]
    return [{"end": phrase.end, "words": phrase.words, "captions": count} for phrase, count in told]


def _filter_rows(
    source: Collection, found: Survey, copies: Copies, boilerplate: set[int]
) -> Iterator[FilterRow]:
    """Yield what is left out, in the order of records; each text of a record once."""
    row = 0
    for shard in range(len(source.shards)):
        for position, record in rows_of(source, shard, ["id", "captions"]):
            if copies.surplus[position]:
                yield FilterRow(id=record["id"], caption="", reason=COPY)
            told = set()
            for caption in record["captions"]:
                reason = BOILERPLATE if int(found.templates[row]) in boilerplate else emptiness_of(caption)
                row += 1
                if reason is not None and caption not in told and not copies.surplus[position]:
                    told.add(caption)
                    yield FilterRow(id=record["id"], caption=caption, reason=reason)
