"""Plots as inline SVG: they use the colors and the font of the page, and equal data give equal bytes.

Colors are drawn as placeholders and replaced by CSS variables, so that one plot serves the light and the dark
color scheme.
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
_OVERLAP_FRACTION = 0.05  # labels of points closer than this fraction of both axes would overlap
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
    """A value with its interval, in percent, in the style of one encoder."""

    style: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line through m points, x and y of shape (m,), in the style of one run."""

    style: int
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ScatterPoint:
    """One point, in the style of one encoder, with the number of its pair config."""

    style: int
    number: int
    x: float
    y: float


def series_color(style: int) -> str:
    """Return the placeholder of the color of a style."""
    return f"#0405{style % NUM_STYLES:02d}"


def marker_index(style: int) -> int:
    """Return the index of the marker of a style; the first 36 styles differ in color or marker."""
    return (style + style // NUM_STYLES) % NUM_STYLES


def interval_plot(name: str, rows: Sequence[tuple[str, Sequence[IntervalMark]]]) -> Markup:
    """Draw each metric as a block of values with intervals, one line per encoder."""
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
                marker = MARKERS[marker_index(interval.style)]
                axes.plot([interval.value], [y], marker=marker, color=color, markersize=5.5, linestyle="none")
            y += gap
        axes.set_ylim(y - gap + step, -step)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(visible=True, axis="x")
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
        axes.set_xlabel("percent, with 95 % confidence intervals")
        return _to_svg(figure, "Values with 95 % confidence intervals, as in the table")


def line_plot(name: str, title: str, curves: Sequence[Curve], *, log_scale: bool = False) -> Markup:
    """Draw a metric over the training steps, one line per run."""
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
        return _to_svg(figure, f"{title} over the training steps")


def histogram(name: str, values: Sequence[tuple[int, np.ndarray]]) -> Markup:
    """Draw histograms of similarities, one (n,) array per style."""
    low = min((float(similarity.min()) for _, similarity in values if len(similarity)), default=0.0)
    edges = np.linspace(min(0.0, np.floor(low * 10) / 10), 1.0, 41)
    with _plot_style(name):
        figure, axes = _make_figure(4.4, 2.4)
        for style, similarities in values:
            counts, _ = np.histogram(np.clip(similarities, edges[0], 1.0), edges)
            _draw_bins(axes, counts, edges, style)
        axes.set_xlabel("caption similarity to the nearest neighbor")
        return _to_svg(figure, "Histogram of the caption similarity of each image to its nearest neighbor")


def binned_histogram(name: str, counts: np.ndarray, edges: np.ndarray, style: int) -> Markup:
    """Draw a small histogram of similarities from counts (b,) and bin edges (b + 1,)."""
    with _plot_style(name):
        figure, axes = _make_figure(2.9, 1.6)
        _draw_bins(axes, counts, edges, style)
        axes.set_xlim(min(0.0, float(edges[0])), 1)
        axes.set_xlabel("similarity to the nearest neighbor")
        return _to_svg(figure, "Histogram of the similarity of each image to its nearest neighbor")


def _draw_bins(axes: Axes, counts: np.ndarray, edges: np.ndarray, style: int) -> None:
    percents = 100 * counts / max(1, int(counts.sum()))
    axes.stairs(percents, edges, fill=True, color=series_color(style), alpha=0.35)
    axes.stairs(percents, edges, color=series_color(style), linewidth=1.4)
    axes.set_ylabel("% of images")


def scatter_plot(name: str, xlabel: str, ylabel: str, points: Sequence[ScatterPoint]) -> Markup:
    """Draw numbered points, one per encoder and pair config."""
    with _plot_style(name):
        figure, axes = _make_figure(4.4, 3.2)
        for point in points:
            axes.plot(
                [point.x],
                [point.y],
                marker=MARKERS[marker_index(point.style)],
                color=series_color(point.style),
                markersize=6.5,
                alpha=0.85,
                linestyle="none",
            )
        for xy, label in _point_labels(points):
            axes.annotate(label, xy, (5, 2.5), textcoords="offset points", fontsize=7.5)
        axes.margins(0.1)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return _to_svg(figure, f"{ylabel} against {xlabel}, one numbered point per encoder and pair config")


def _point_labels(points: Sequence[ScatterPoint]) -> list[tuple[tuple[float, float], str]]:
    """Return positions and texts of labels; points whose labels would overlap share one."""
    x_range, y_range = (
        max(1e-9, float(np.ptp(values))) for values in ([p.x for p in points], [p.y for p in points])
    )
    groups: list[list[ScatterPoint]] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        overlapping = [
            group
            for group in groups
            if abs(point.x - group[0].x) < _OVERLAP_FRACTION * x_range
            and abs(point.y - group[0].y) < _OVERLAP_FRACTION * y_range
        ]
        if overlapping:
            overlapping[0].append(point)
        else:
            groups.append([point])
    return [
        ((group[-1].x, group[-1].y), ",".join(map(str, sorted({point.number for point in group}))))
        for group in groups
    ]


def downsample(x: np.ndarray, y: np.ndarray, max_points: int = _MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Average consecutive points, x and y of shape (m,), down to at most `max_points`."""
    if len(x) <= max_points:
        return x, y
    chunks = np.array_split(np.arange(len(x)), max_points)
    return np.array([x[chunk].mean() for chunk in chunks]), np.array([y[chunk].mean() for chunk in chunks])


def _plot_style(name: str) -> AbstractContextManager[None]:
    """Return the style context of a plot; its name salts the element ids, which are unique within a page."""
    return mpl.rc_context({**_RC_PARAMS, "svg.hashsalt": name})


def _make_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _to_svg(figure: Figure, description: str) -> Markup:
    """Return a figure as a bare `svg` element, without prolog, metadata, namespaces and global styles."""
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
    # All text of a plot is from this package or escaped by matplotlib.
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1))  # noqa: S704
