"""Plots as SVG that is part of the page: it takes the page's colours and font, and has no date.

Colours are drawn as marks of their own and replaced by the page's variables, so that one plot serves light
and dark. Equal data give equal bytes.
"""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLES = 6
MARKERS = ("o", "s", "D", "^", "v", "P")
DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line"}
_VARIABLES |= {f"#0405{i:02d}": f"--series-{i}" for i in range(STYLES)}
_POINTS = 240  # more cannot be told apart on a page
_LOOK = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.color": _GRID,
    "ytick.labelcolor": _MUTED,
}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A dot with its interval, in percent, drawn in the style of one encoder."""

    style: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line (m,) over (m,), drawn in the style of one run."""

    style: int
    x: np.ndarray
    y: np.ndarray


def colour(style: int) -> str:
    """Return the mark that stands for a series' colour until the page gives it one."""
    return f"#0405{style % STYLES:02d}"


def dots(name: str, rows: Sequence[tuple[str, Sequence[Interval]]]) -> Markup:
    """Draw every figure of every encoder as a dot on its interval, one block a figure."""
    step, gap = 1.0, 2.1
    height = sum(step * len(marks) + gap for _, marks in rows)
    with _styled(name):
        figure, axes = _figure(4.4, 0.34 + 0.17 * height)
        y = 0.0
        for title, marks in rows:
            axes.text(0, y, title, transform=axes.get_yaxis_transform(), va="center", parse_math=False)
            for mark in marks:
                y += step
                paint = colour(mark.style)
                axes.plot([mark.low, mark.high], [y, y], color=paint, linewidth=2, solid_capstyle="round")
                shape = MARKERS[mark.style % STYLES]
                axes.plot([mark.value], [y], marker=shape, color=paint, markersize=5.5, linestyle="none")
            y += gap
        axes.set_ylim(y - gap + step, -step)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=True, axis="x")
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
        axes.set_xlabel("percent, with 95 % intervals")
        return _svg(figure, "Dots with 95 % intervals; the table holds the same figures")


def curves(name: str, title: str, lines: Sequence[Curve], *, logarithmic: bool = False) -> Markup:
    """Draw a figure over the steps of training, one line a run."""
    with _styled(name):
        figure, axes = _figure(4.4, 2.3)
        for line in lines:
            x, y = thinned(line.x, line.y)
            paint, dash = colour(line.style), DASHES[line.style % STYLES]
            axes.plot(x, y, color=paint, linestyle=dash, linewidth=1.6)
            if len(x) == 1:
                axes.plot(x, y, color=paint, marker="o", markersize=4)
        if logarithmic:
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, f"{title} over the steps of training")


def histogram(name: str, values: Sequence[tuple[int, np.ndarray]]) -> Markup:
    """Draw how similarities (n,) spread, one outline a source of neighbors."""
    low = min((float(v.min()) for _, v in values if len(v)), default=0.0)
    edges = np.linspace(min(0.0, np.floor(low * 10) / 10), 1.0, 41)
    with _styled(name):
        figure, axes = _figure(4.4, 2.4)
        for style, each in values:
            counts, _ = np.histogram(np.clip(each, edges[0], 1.0), edges)
            axes.stairs(100 * counts / max(1, len(each)), edges, fill=True, color=colour(style), alpha=0.35)
            axes.stairs(100 * counts / max(1, len(each)), edges, color=colour(style), linewidth=1.4)
        axes.set_xlabel("similarity of the caption to the nearest other caption")
        axes.set_ylabel("% of images")
        return _svg(
            figure, "Histogram of the similarity between each image's caption and the nearest other one"
        )


def thinned(x: np.ndarray, y: np.ndarray, most: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Average runs of neighboring points (m,) down to at most `most`."""
    if len(x) <= most:
        return x, y
    parts = np.array_split(np.arange(len(x)), most)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _styled(name: str) -> AbstractContextManager[None]:
    """Return the look of all plots; the salt is the plot's own, so that no two share names within a page."""
    return mpl.rc_context({**_LOOK, "svg.hashsalt": name})


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure, told: str) -> Markup:
    """Return the bare element: no prolog, no metadata, no namespaces, no style for the whole page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head)
    text = re.sub(r"font-family: [^;\"]*;?", "", f"{head}>{rest}").replace("xlink:href=", "href=")
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    for mark, variable in _VARIABLES.items():
        text = text.replace(mark, f"var({variable})")
    text = re.sub(r"\s*\n\s*", " ", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    # The only text in a plot is this module's own and names that matplotlib has escaped.
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{told}"', 1))  # noqa: S704
