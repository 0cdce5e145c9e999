"""The page of an audit: what was found, with pictures, made from its report and the collection alone."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from likewise.artifacts import write_text
from likewise.data.audit.audit import Audit
from likewise.data.dataset import Collection
from likewise.report import format as figures
from likewise.report.format import Picture, picture_of

_HERE = Path(__file__).parent
_ENDLESS = 10**9
_BINS = ((0, 2), (3, 5), (6, 10), (11, 15), (16, 20), (21, 30), (31, 55), (56, _ENDLESS))
_NAMED = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
}
_SHOWN_LANGUAGES = 8


def write_audit_page(collection: Collection, audit: Audit) -> Path:
    """Write `audit.html` beside an audit's report, unless it is there; return where it is.

    The page is one file without scripts; captions and names are escaped.
    """
    target = audit.path / "audit.html"
    if not target.is_file():
        page = _render(collection, audit)
        # Names of files may hold bytes that are no text.
        write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


def _render(collection: Collection, audit: Audit) -> str:
    pages = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"counted": figures.counted, "share": share}
    style = "".join((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "audit.css"))
    report = audit.report
    return pages.get_template("audit.html").render(
        title=f"{collection.path.name}: what is wrong with it",
        style=Markup(style),  # noqa: S704  # the package's own files
        report=report,
        present=[finding for finding in report["findings"] if finding["count"]],
        absent=[finding["title"] for finding in report["findings"] if not finding["count"]],
        sentences=sentences(report),
        bins=_binned(report["lengths"]),
        languages=_languages(report["languages"]),
        picture=_Pictures(collection),
        filter=audit.filter.name,
    )


def share(part: int, total: int) -> str:
    """Return a share in percent, such as `6.7 %`, and what is less than a tenth of one as such."""
    if not part or not total:
        return figures.ABSENT
    return f"{100 * part / total:.1f} %" if part >= 0.0005 * total else "< 0.1 %"


class _Pictures:
    """The picture of an example, read once; an example tells where its record stands."""

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.known: dict[int, Picture] = {}

    def __call__(self, example: dict[str, Any]) -> Picture:
        position = example["position"]
        if position not in self.known:
            self.known[position] = picture_of(self.collection, self.collection[position])
        return self.known[position]


def sentences(report: dict[str, Any]) -> list[str]:
    """Return in words what matters most: captions that say nothing, copies, images without a caption."""
    findings = {finding["name"]: finding for finding in report["findings"]}
    captions = sum(f["filtered"] for f in findings.values() if f["unit"] == "captions")
    copies, images = findings["near_duplicates"], report["images"]
    told = []
    if captions:
        told.append(
            f"{figures.counted(captions, 'caption')} of {report['captions']:,} "
            f"({share(captions, report['captions'])}) say{'s' if captions == 1 else ''} nothing of the image."
        )
    elif report["captions"]:
        told.append(
            f"None of the {figures.counted(report['captions'], 'caption')} was found to be empty words."
        )
    else:
        told.append("No image has a caption: only pairs of an image with itself can be made.")
    if copies["count"]:
        told.append(
            f"{copies['count']:,} of {images:,} images ({share(copies['count'], images)}) look nearly like "
            f"another; {copies['filtered']:,} of them are surplus copies with the same captions."
        )
    without = findings["without_caption"]["count"]
    if without and report["captions"]:
        told.append(
            f"{figures.counted(without, 'image')} ({share(without, images)}) "
            f"ha{'s' if without == 1 else 've'} no caption."
        )
    return told


def _binned(lengths: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the lengths of captions in a few bins, with the width of each bar in percent."""
    if lengths is None:
        return []
    counts = [
        sum(count for length, count in lengths["counts"] if low <= length <= high) for low, high in _BINS
    ]
    names = [f"{low}–{high}" if high < _ENDLESS else f"{low} and more" for low, high in _BINS]
    return [
        {"name": name, "count": count, "width": f"{100 * count / max(counts):.1f}"}
        for name, count in zip(names, counts, strict=True)
    ]


def _languages(mix: dict[str, Any]) -> list[tuple[str, str]]:
    shown = mix["counts"][:_SHOWN_LANGUAGES]
    return [(_NAMED.get(code, code), share(count, mix["captions"])) for code, count in shown]


def audit_lines(report: dict[str, Any]) -> list[str]:
    """Lay out an audit for a terminal: a table of what was found, then figures and what the filter holds."""
    told = [
        f"{figures.counted(report['images'], 'image')}, {figures.counted(report['captions'], 'caption')}",
        "",
    ]
    told.append(f"{'found':<36}{'count':>9}{'share':>9}  {'of':<9}{'left out':>9}")
    for finding in report["findings"]:
        if finding["count"]:
            left = f"{finding['filtered']:,}" if finding["filtered"] else figures.ABSENT
            part = share(finding["count"], finding["total"])
            told.append(
                f"{finding['title']:<36}{finding['count']:>9,}{part:>9}  {finding['unit']:<9}{left:>9}"
                f"  {finding['note']}".rstrip()
            )
    absent = [finding["title"] for finding in report["findings"] if not finding["count"]]
    return [*told, "", *_notes(report, absent)]


def _notes(report: dict[str, Any], absent: list[str]) -> list[str]:
    told = [f"not found: {'; '.join(absent)}"] if absent else []
    if report["lengths"]:
        lengths, mix = report["lengths"], report["languages"]
        told.append(
            f"words: {lengths['min']} to {lengths['max']}, median {lengths['median']}, "
            f"95 % at most {lengths['p95']}"
        )
        parts = ", ".join(f"{name} {part}" for name, part in _languages(mix))
        told.append(f"languages, of {figures.counted(mix['captions'], 'caption')}: {parts}")
    told += [
        f"boilerplate: `{template['text'][:72]}` ({figures.counted(template['images'], 'image')})"
        for template in report["templates"]
        if template["boilerplate"]
    ]
    if report["groups"]:
        groups = report["groups"]
        told.append(
            f"groups: {groups['groups']:,} of {groups['smallest']:,} to {groups['largest']:,} images, "
            f"median {groups['median']:g}"
        )
    labelled = share(report["labels"]["images"], report["images"])
    told.append(
        "labels: none" if labelled == figures.ABSENT else f"labels: {labelled} of the images have one"
    )
    rows = ", ".join(f"{count:,} {reason}" for reason, count in report["filter"].items())
    return [*told, f"left out by the filter: {rows or 'nothing'}"]
