"""The page of an audit: what was found, with pictures, made from its report and the collection alone."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from likewise.artifacts import write_text
from likewise.data.audit.audit import AuditReport
from likewise.data.dataset import CaptionDataset
from likewise.report import format as figures
from likewise.report.format import Thumbnail, sample_thumbnail

_TEMPLATE_DIR = Path(__file__).parent
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
    """Write `audit.html` beside an audit's report, unless it is there; return where it is.

    The page is one file without scripts; captions and names are escaped.
    """
    path = audit.path / "audit.html"
    if not path.is_file():
        page = _render(dataset, audit)
        # Names of files may hold bytes that are no text.
        write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def _render(dataset: CaptionDataset, audit: AuditReport) -> str:
    env = Environment(
        loader=FileSystemLoader(_TEMPLATE_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"counted": figures.count_noun, "share": format_fraction}
    style = "".join((_TEMPLATE_DIR / name).read_text(encoding="utf-8") for name in ("page.css", "audit.css"))
    report = audit.report
    return env.get_template("audit.html").render(
        title=f"{dataset.path.name}: what is wrong with it",
        style=Markup(style),  # noqa: S704  # the package's own files
        report=report,
        present=[finding for finding in report["findings"] if finding["count"]],
        absent=[finding["title"] for finding in report["findings"] if not finding["count"]],
        sentences=summary_sentences(report),
        bins=_bin_lengths(report["lengths"]),
        languages=_top_languages(report["languages"]),
        picture=_ThumbnailCache(dataset),
        filter=audit.filter_path.name,
    )


def format_fraction(count: int, total: int) -> str:
    """Return a share in percent, such as `6.7 %`, and what is less than a tenth of one as such."""
    if not count or not total:
        return figures.ABSENT
    return f"{100 * count / total:.1f} %" if count >= 0.0005 * total else "< 0.1 %"


class _ThumbnailCache:
    """The picture of an example, read once; an example tells where its record stands."""

    def __init__(self, dataset: CaptionDataset) -> None:
        self.dataset = dataset
        self.thumbnails: dict[int, Thumbnail] = {}

    def __call__(self, example: dict[str, Any]) -> Thumbnail:
        position = example["index"]
        if position not in self.thumbnails:
            self.thumbnails[position] = sample_thumbnail(self.dataset, self.dataset[position])
        return self.thumbnails[position]


def summary_sentences(report: dict[str, Any]) -> list[str]:
    """Return in words what matters most: captions that say nothing, copies, images without a caption."""
    findings = {finding["name"]: finding for finding in report["findings"]}
    num_uninformative = sum(f["filtered"] for f in findings.values() if f["unit"] == "captions")
    near_duplicates, num_images = findings["near_duplicates"], report["images"]
    sentences = []
    if num_uninformative:
        sentences.append(
            f"{figures.count_noun(num_uninformative, 'caption')} of {report['captions']:,} "
            f"({format_fraction(num_uninformative, report['captions'])}) "
            f"say{'s' if num_uninformative == 1 else ''} nothing of the image."
        )
    elif report["captions"]:
        sentences.append(
            f"None of the {figures.count_noun(report['captions'], 'caption')} was found to be empty words."
        )
    else:
        sentences.append("No image has a caption: only pairs of an image with itself can be made.")
    if near_duplicates["count"]:
        sentences.append(
            f"{near_duplicates['count']:,} of {num_images:,} images "
            f"({format_fraction(near_duplicates['count'], num_images)}) look nearly like "
            f"another; {near_duplicates['filtered']:,} of them are surplus copies with the same captions."
        )
    num_without_caption = findings["without_caption"]["count"]
    if num_without_caption and report["captions"]:
        sentences.append(
            f"{figures.count_noun(num_without_caption, 'image')} "
            f"({format_fraction(num_without_caption, num_images)}) "
            f"ha{'s' if num_without_caption == 1 else 've'} no caption."
        )
    return sentences


def _bin_lengths(lengths: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the lengths of captions in a few bins, with the width of each bar in percent."""
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
    """Lay out an audit for a terminal: a table of what was found, then figures and what the filter holds."""
    lines = [
        f"{figures.count_noun(report['images'], 'image')}, "
        f"{figures.count_noun(report['captions'], 'caption')}",
        "",
    ]
    lines.append(f"{'found':<36}{'count':>9}{'share':>9}  {'of':<9}{'left out':>9}")
    for finding in report["findings"]:
        if finding["count"]:
            excluded = f"{finding['filtered']:,}" if finding["filtered"] else figures.ABSENT
            fraction = format_fraction(finding["count"], finding["total"])
            lines.append(
                f"{finding['title']:<36}{finding['count']:>9,}{fraction:>9}  "
                f"{finding['unit']:<9}{excluded:>9}"
                f"  {finding['note']}".rstrip()
            )
    absent = [finding["title"] for finding in report["findings"] if not finding["count"]]
    return [*lines, "", *_audit_notes(report, absent)]


def _audit_notes(report: dict[str, Any], absent: list[str]) -> list[str]:
    lines = [f"not found: {'; '.join(absent)}"] if absent else []
    if report["lengths"]:
        lengths, languages = report["lengths"], report["languages"]
        lines.append(
            f"words: {lengths['min']} to {lengths['max']}, median {lengths['median']}, "
            f"95 % at most {lengths['p95']}"
        )
        language_shares = ", ".join(f"{name} {fraction}" for name, fraction in _top_languages(languages))
        lines.append(
            f"languages, of {figures.count_noun(languages['captions'], 'caption')}: {language_shares}"
        )
    lines += [
        f"boilerplate: `{template['text'][:72]}` ({figures.count_noun(template['images'], 'image')})"
        for template in report["templates"]
        if template["is_boilerplate"]
    ]
    if report["groups"]:
        groups = report["groups"]
        lines.append(
            f"groups: {groups['groups']:,} of {groups['smallest']:,} to {groups['largest']:,} images, "
            f"median {groups['median']:g}"
        )
    labeled_share = format_fraction(report["labels"]["images"], report["images"])
    lines.append(
        "labels: none"
        if labeled_share == figures.ABSENT
        else f"labels: {labeled_share} of the images have one"
    )
    exclusions = ", ".join(f"{count:,} {reason}" for reason, count in report["filter"].items())
    return [*lines, f"left out by the filter: {exclusions or 'nothing'}"]
