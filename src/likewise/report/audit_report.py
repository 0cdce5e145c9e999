"""Audit of a dataset as an HTML report, and as lines for a terminal."""

from pathlib import Path
from typing import Any

from likewise.data.audit.audit import AuditReport
from likewise.data.dataset import CaptionDataset
from likewise.report.page import ABSENT, ThumbnailCache, format_fraction, render, write_page
from likewise.strings import count_noun

_UNBOUNDED = 10**9
_LENGTH_BINS = ((0, 2), (3, 5), (6, 10), (11, 15), (16, 20), (21, 30), (31, 55), (56, _UNBOUNDED))
_LANGUAGE_NAMES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
}
_MAX_LANGUAGES = 8


def write_audit_report(dataset: CaptionDataset, audit: AuditReport) -> Path:
    """Write `audit.html` into the folder of the audit, unless it exists, and return its path."""
    path = audit.path / "audit.html"
    if not path.is_file():
        write_page(path, render("audit.html", **_template_context(dataset, audit)))
    return path


def _template_context(dataset: CaptionDataset, audit: AuditReport) -> dict[str, Any]:
    report, thumbnails = audit.report, ThumbnailCache(dataset)
    present, absent = _split_findings(report)
    return {
        "title": f"Audit of {dataset.path.name}",
        "report": report,
        "sentences": summary_sentences(report),
        "facts": _key_facts(report),
        "present": present,
        "absent": absent,
        "bins": _bin_lengths(report["lengths"]),
        "languages": [(fraction, name) for name, fraction in _top_languages(report["languages"])],
        "repeated": [(f"{item['images']:,}", item["caption"]) for item in report["repeated"]],
        "phrases": [
            (
                f"{item['captions']:,}",
                f"{item['text']} …" if item["position"] == "first" else f"… {item['text']}",
            )
            for item in report["frequent_phrases"]
        ],
        "thumbnail": lambda example: thumbnails(example["index"]),
        "filter": audit.filter_path.name,
    }


def _split_findings(report: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the findings with a count above zero, and the titles of the others."""
    present = [finding for finding in report["findings"] if finding["count"]]
    return present, [finding["title"] for finding in report["findings"] if not finding["count"]]


def _key_facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("images", f"{report['images']:,}"), ("captions", f"{report['captions']:,}")]
    if report["lengths"]:
        facts.append(("median words per caption", str(report["lengths"]["median"])))
    if report["groups"]:
        facts.append(("groups", f"{report['groups']['groups']:,}"))
    if report["labels"]["images"]:
        facts.append(("images with a label", format_fraction(report["labels"]["images"], report["images"])))
    return facts


def summary_sentences(report: dict[str, Any]) -> list[str]:
    """Return the main findings: uninformative captions, near-duplicates, and images without a caption."""
    findings = {finding["name"]: finding for finding in report["findings"]}
    num_uninformative = sum(f["filtered"] for f in findings.values() if f["unit"] == "captions")
    near_duplicates, num_images = findings["near_duplicates"], report["images"]
    num_captions = report["captions"]
    if num_uninformative:
        sentences = [
            f"{num_uninformative:,} of {count_noun(num_captions, 'caption')} "
            f"({format_fraction(num_uninformative, num_captions)}) "
            f"{'is' if num_uninformative == 1 else 'are'} uninformative."
        ]
    elif num_captions:
        sentences = [f"No uninformative caption was found among {count_noun(num_captions, 'caption')}."]
    else:
        sentences = ["No image has a caption: only self pairs are possible."]
    if near_duplicates["count"]:
        sentences.append(
            f"{near_duplicates['count']:,} of {num_images:,} images "
            f"({format_fraction(near_duplicates['count'], num_images)}) are near-duplicates; "
            f"{near_duplicates['filtered']:,} of them are redundant (same captions as another one)."
        )
    num_without_caption = findings["without_caption"]["count"]
    if num_without_caption and num_captions:
        sentences.append(
            f"{count_noun(num_without_caption, 'image has', 'images have')} no caption "
            f"({format_fraction(num_without_caption, num_images)})."
        )
    return sentences


def _bin_lengths(lengths: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the histogram of caption lengths: name, count and width of the bar in percent per bin."""
    if lengths is None:
        return []
    counts = [
        sum(count for length, count in lengths["counts"] if low <= length <= high)
        for low, high in _LENGTH_BINS
    ]
    names = [f"{low}–{high}" if high < _UNBOUNDED else f"{low} and more" for low, high in _LENGTH_BINS]
    return [
        {"name": name, "count": count, "width": f"{100 * count / max(counts):.1f}"}
        for name, count in zip(names, counts, strict=True)
    ]


def _top_languages(languages: dict[str, Any]) -> list[tuple[str, str]]:
    top = languages["counts"][:_MAX_LANGUAGES]
    return [
        (_LANGUAGE_NAMES.get(code, code), format_fraction(count, languages["captions"]))
        for code, count in top
    ]


def format_audit(report: dict[str, Any]) -> list[str]:
    """Return an audit as lines for a terminal: the findings as a table, statistics, and exclusions."""
    present, absent = _split_findings(report)
    lines = [
        f"{count_noun(report['images'], 'image')}, {count_noun(report['captions'], 'caption')}",
        "",
        f"{'finding':<36}{'count':>9}{'fraction':>10}  {'of':<9}{'excluded':>9}",
    ]
    for finding in present:
        excluded = f"{finding['filtered']:,}" if finding["filtered"] else ABSENT
        fraction = format_fraction(finding["count"], finding["total"])
        lines.append(
            f"{finding['title']:<36}{finding['count']:>9,}{fraction:>10}  "
            f"{finding['unit']:<9}{excluded:>9}  {finding['note']}".rstrip()
        )
    return [*lines, "", *_audit_notes(report, absent)]


def _audit_notes(report: dict[str, Any], absent: list[str]) -> list[str]:
    lines = [f"checked and not found: {'; '.join(absent)}"] if absent else []
    if report["lengths"]:
        lengths, languages = report["lengths"], report["languages"]
        lines.append(
            f"words: {lengths['min']} to {lengths['max']}, median {lengths['median']}, "
            f"95 % at most {lengths['p95']}"
        )
        language_fractions = ", ".join(f"{name} {fraction}" for name, fraction in _top_languages(languages))
        lines.append(f"languages of {count_noun(languages['captions'], 'caption')}: {language_fractions}")
    lines += [
        f"boilerplate: `{template['text'][:72]}` ({count_noun(template['images'], 'image')})"
        for template in report["templates"]
        if template["is_boilerplate"]
    ]
    if report["groups"]:
        groups = report["groups"]
        lines.append(
            f"groups: {groups['groups']:,} of {groups['smallest']:,} to {groups['largest']:,} images, "
            f"median {groups['median']:g}"
        )
    labeled_fraction = format_fraction(report["labels"]["images"], report["images"])
    lines.append(
        "labels: none" if labeled_fraction == ABSENT else f"labels: {labeled_fraction} of the images have one"
    )
    exclusions = ", ".join(f"{count:,} {reason}" for reason, count in report["filter"].items())
    return [*lines, f"excluded by the filter: {exclusions or 'nothing'}"]
