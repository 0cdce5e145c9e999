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

NUM_STYLES = 6
MARKERS = ("o", "s", "D", "^", "v", "P")
LINESTYLES = (
    "solid",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_CSS_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--line"}
_CSS_VARIABLES |= {f"#0405{i:02d}": f"--series-{i}" for i in range(NUM_STYLES)}
_MAX_POINTS = 240  # more are indistinguishable on a page
_RC_PARAMS = {
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
class IntervalMark:
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


def series_color(style: int) -> str:
    """Return the mark that stands for a series' colour until the page gives it one."""
    return f"#0405{style % NUM_STYLES:02d}"


def interval_plot(name: str, rows: Sequence[tuple[str, Sequence[IntervalMark]]]) -> Markup:
    """Draw every figure of every encoder as a dot on its interval, one block a figure."""
    step, gap = 1.0, 2.1
    height = sum(step * len(intervals) + gap for _, intervals in rows)
    with _plot_style(name):
        figure, axes = _make_figure(4.4, 0.34 + 0.17 * height)
        y = 0.0
        for title, intervals in rows:
            axes.text(0, y, title, transform=axes.get_yaxis_transform(), va="center", parse_math=False)
            for interval in intervals:
                y += step
                color = series_color(interval.style)
                axes.plot(
                    [interval.low, interval.high], [y, y], color=color, linewidth=2, solid_capstyle="round"
                )
                marker = MARKERS[interval.style % NUM_STYLES]
                axes.plot([interval.value], [y], marker=marker, color=color, markersize=5.5, linestyle="none")
            y += gap
        axes.set_ylim(y - gap + step, -step)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=True, axis="x")
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
        axes.set_xlabel("percent, with 95 % intervals")
        return _to_svg(figure, "Dots with 95 % intervals; the table holds the same figures")


def line_plot(name: str, title: str, curves: Sequence[Curve], *, log_scale: bool = False) -> Markup:
    """Draw a figure over the steps of training, one line a run."""
    with _plot_style(name):
        figure, axes = _make_figure(4.4, 2.3)
        for curve in curves:
            x, y = downsample(curve.x, curve.y)
            color, linestyle = series_color(curve.style), LINESTYLES[curve.style % NUM_STYLES]
            axes.plot(x, y, color=color, linestyle=linestyle, linewidth=1.6)
            if len(x) == 1:
                axes.plot(x, y, color=color, marker="o", markersize=4)
        if log_scale:
            axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _to_svg(figure, f"{title} over the steps of training")


def histogram(name: str, values: Sequence[tuple[int, np.ndarray]]) -> Markup:
    """Draw how similarities (n,) spread, one outline a source of neighbors."""
    low = min((float(similarity.min()) for _, similarity in values if len(similarity)), default=0.0)
    edges = np.linspace(min(0.0, np.floor(low * 10) / 10), 1.0, 41)
    with _plot_style(name):
        figure, axes = _make_figure(4.4, 2.4)
        for style, similarities in values:
            counts, _ = np.histogram(np.clip(similarities, edges[0], 1.0), edges)
            axes.stairs(
                100 * counts / max(1, len(similarities)),
                edges,
                fill=True,
                color=series_color(style),
                alpha=0.35,
            )
            axes.stairs(
                100 * counts / max(1, len(similarities)), edges, color=series_color(style), linewidth=1.4
            )
        axes.set_xlabel("similarity of the caption to the nearest other caption")
        axes.set_ylabel("% of images")
        return _to_svg(
            figure, "Histogram of the similarity between each image's caption and the nearest other one"
        )


def downsample(x: np.ndarray, y: np.ndarray, max_points: int = _MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Average runs of neighboring points (m,) down to at most `max_points`."""
    if len(x) <= max_points:
        return x, y
    chunks = np.array_split(np.arange(len(x)), max_points)
    return np.array([x[chunk].mean() for chunk in chunks]), np.array([y[chunk].mean() for chunk in chunks])


def _plot_style(name: str) -> AbstractContextManager[None]:
    """Return the look of all plots; the salt is the plot's own, so that no two share names within a page."""
    return mpl.rc_context({**_RC_PARAMS, "svg.hashsalt": name})


def _make_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _to_svg(figure: Figure, description: str) -> Markup:
    """Return the bare element: no prolog, no metadata, no namespaces, no style for the whole page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style[^>]*>.*?</style>\s*", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head)
    text = re.sub(r"font-family: [^;\"]*;?", "", f"{head}>{rest}").replace("xlink:href=", "href=")
    used_ids = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in used_ids else "", text)
    for placeholder, variable in _CSS_VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    text = re.sub(r"\s*\n\s*", " ", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    # The only text in a plot is this module's own and names that matplotlib has escaped.
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1))  # noqa: S704
