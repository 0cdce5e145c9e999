"""Plots of a diagnosis: rules as dots, and how alike the nearest are by each encoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from likewise.neighbors.agreement import Spread
from likewise.report.plots import MARKERS, STYLES, _figure, _styled, _svg, colour

_NEAR = 0.05  # of an axis, within which numbers would cover each other


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One rule with one encoder: where it stands, in the style of its encoder, with the rule's number."""

    style: int
    number: int
    x: float
    y: float


def shape(style: int) -> int:
    """Return the place of a style's shape: all of 36 combinations with colours differ."""
    return (style + style // STYLES) % STYLES


def scatter(name: str, across: str, up: str, dots: Sequence[Dot]) -> Markup:
    """Draw rules as numbered dots."""
    with _styled(name):
        figure, axes = _figure(4.4, 3.2)
        for dot in dots:
            axes.plot(
                [dot.x],
                [dot.y],
                marker=MARKERS[shape(dot.style)],
                color=colour(dot.style),
                markersize=6.5,
                alpha=0.85,
                linestyle="none",
            )
        for at, numbers in _labels(dots):
            axes.annotate(numbers, at, (5, 2.5), textcoords="offset points", fontsize=7.5)
        axes.margins(0.1)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        return _svg(figure, f"{up} against {across}; one dot a rule and encoder, numbered as listed")


def _labels(dots: Sequence[Dot]) -> list[tuple[tuple[float, float], str]]:
    """Return the numbers of dots, together where they would cover each other, and where to write them."""
    wide, high = (max(1e-9, float(np.ptp(values))) for values in ([d.x for d in dots], [d.y for d in dots]))
    together: list[list[Dot]] = []
    for dot in sorted(dots, key=lambda each: (each.x, each.y)):
        near = [
            each
            for each in together
            if abs(dot.x - each[0].x) < _NEAR * wide and abs(dot.y - each[0].y) < _NEAR * high
        ]
        if near:
            near[0].append(dot)
        else:
            together.append([dot])
    return [
        ((each[-1].x, each[-1].y), ",".join(map(str, sorted({dot.number for dot in each}))))
        for each in together
    ]


def similarities(name: str, spread: Spread, style: int) -> Markup:
    """Draw how alike images are to their nearest, by one encoder."""
    counts, edges = np.array(spread.images, np.float64), np.array(spread.edges)
    with _styled(name):
        figure, axes = _figure(2.9, 1.6)
        percents = 100 * counts / max(1.0, float(counts.sum()))
        axes.stairs(percents, edges, fill=True, color=colour(style), alpha=0.35)
        axes.stairs(percents, edges, color=colour(style), linewidth=1.2)
        axes.set_xlim(min(0.0, float(edges[0])), 1)
        axes.set_xlabel("similarity to the nearest")
        axes.set_ylabel("% of images")
        return _svg(figure, "Histogram of the similarity of each image to the one nearest to it")
