"""The report: one page, one file, made from what runs and evaluations left on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from likewise.artifacts import write_text
from likewise.report import about, figures
from likewise.report.commands import Commands
from likewise.report.findings import caveats, sentences
from likewise.report.guidance import Found, anchors, look_up
from likewise.report.plots import Curve, Interval, curves, dots, histogram
from likewise.report.results import Results, SetTable, tabulate
from likewise.report.sources import Entry, read_entries

_HERE = Path(__file__).parent
_CURVES = (
    ("loss", "Loss"),
    ("effective_rank", "Effective rank of the features"),
    ("spread", "Spread of the features"),
    ("rate", "Learning rate"),
)


def write_report(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    title: str | None = None,
    credits: Sequence[str] = (),  # noqa: A002  # nobody misses the interpreter's own
) -> Path:
    """Write a page on one or several runs; the same files give the same bytes.

    Args:
        runs: Finished runs, and folders of evaluations that are no runs (an untrained encoder). Runs are
            compared with the first that has `self` pairs, or else with the first.
        out: The HTML file.
        title: What stands at the top.
        credits: Whom the images are owed to, and their licences.

    Raises:
        ArtifactError: where a folder is neither a finished run nor holds results.
        InputError: where no run is given.
    """
    entries = read_entries(runs)
    page, target = _render(entries, title or _title(entries), credits), Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Names of files may hold bytes that are no text.
    write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


def _title(entries: Sequence[Entry]) -> str:
    return f"likewise: {figures.listed([entry.path.name for entry in entries])}"


def _render(entries: Sequence[Entry], title: str, credits: Sequence[str]) -> str:  # noqa: A002  # as in write_report
    found, results = look_up(entries), tabulate(entries)
    # Captions are anybody's text: everything is escaped but what this package drew itself.
    pages = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"plain": figures.plain, "counted": figures.counted}
    styles = {entry.path: place for place, entry in enumerate(entries)}
    return pages.get_template("page.html").render(
        title=title,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704  # the package's own file
        entries=entries,
        runs=[entry for entry in entries if entry.trained],
        styles=styles,
        results=results,
        sentences=[] if results is None else sentences(results),
        caveats=[] if results is None else caveats(results),
        dots=[] if results is None else [_dots(table, results, styles) for table in results.tables],
        unmeasured=[e.fault or f"{e.name} has not been evaluated" for e in entries if not e.rows],
        facts=about.facts(entries, found),
        found=found,
        anchors=anchors(entries, found),
        alike=_alike(found),
        curves=_curves(entries),
        pace=[about.pace(entry) for entry in entries if entry.trained],
        settings=about.settings(entries),
        skipped=about.skipped(entries, found),
        versions=about.versions(entries),
        commands=Commands(entries, found).lines(),
        credits=credits,
    )


def _dots(table: SetTable, results: Results, styles: dict[Path, int]) -> Markup:
    rows = []
    for line in table.lines:
        told = [
            (c.estimate, styles[e.path])
            for c, e in zip(line.cells, results.columns, strict=True)
            if c.estimate
        ]
        marks = [
            Interval(style=style, value=100 * e.value, low=100 * e.low, high=100 * e.high)
            for e, style in told
        ]
        rows.append((line.name, marks))
    return dots(f"results {table.lines[0].row.set_key}", rows)


def _alike(found: Found) -> dict[str, Any] | None:
    """Return the histogram of similarities, with shares in words."""
    told = [(guidance, guidance.nearest) for guidance in found.guidance if len(guidance.nearest)]
    if not told:
        return None
    images = len(told[0][0].collection)
    return {
        "plot": histogram("similarity", [(guidance.style, values) for guidance, values in told]),
        "sources": [
            {
                "style": guidance.style,
                "encoder": guidance.neighbors.encoder,
                "median": f"{np.median(values):.2f}",
                "near": figures.percent(float((values >= 0.8).mean())),
                "same": figures.percent(float((values >= 0.9995).mean())),
            }
            for guidance, values in told
        ],
        "images": images,
        "without": images - len(told[0][1]),
        "share": figures.percent((images - len(told[0][1])) / images),
    }


def _curves(entries: Sequence[Entry]) -> list[Markup]:
    """Draw what was logged, one small plot a figure."""
    drawn = []
    for name, title in _CURVES:
        told = [(i, entry.trained.column(name)) for i, entry in enumerate(entries) if entry.trained]
        lines = [Curve(style=i, x=x, y=y) for i, (x, y) in told if len(x)]
        if lines:
            drawn.append(curves(f"curve {name}", title, lines))
    return drawn
