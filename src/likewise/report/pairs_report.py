"""The page of a diagnosis: encoders and rules in a table, as dots and as pictures, in one file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from likewise.artifacts import write_json, write_text
from likewise.data.dataset import Collection
from likewise.pairs.analyze import Diagnosis, Row
from likewise.pairs.stats import Chance, Figures, Share, Spread
from likewise.report import format as figures
from likewise.report.format import ABSENT, MINUS, Picture, caption_of, percent, picture_of
from likewise.report.plots import MARKERS, STYLES, _figure, _styled, _svg, colour


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of every row.

    Attributes:
        head: What stands above it.
        explained: One sentence on what it means.
        cell: What stands in it.
        chance: What stands in it for two images picked blindly.
    """

    head: str
    explained: str
    cell: Callable[[Figures], str]
    chance: Callable[[Chance], str | None] = lambda _: None


def columns(diagnosis: Diagnosis) -> list[Column]:
    """Return the columns that a collection has figures for."""
    seen = [] if diagnosis.looks is None else [_looks(diagnosis.looks)]
    return [*_ALWAYS, *seen, *(_LABELLED if diagnosis.labelled else ())]


def by_encoder(diagnosis: Diagnosis) -> list[tuple[str, list[Row]]]:
    """Return the rows in blocks of one encoder each, as they stand."""
    return [(name, list(rows)) for name, rows in groupby(diagnosis.rows, lambda row: row.encoder)]


def named(encoder: str) -> str:
    """Return what a block of rows is called: its encoder, or that it needs none."""
    return encoder or "no encoder"


def text_lines(diagnosis: Diagnosis) -> list[str]:
    """Lay a diagnosis out in aligned columns for a terminal, a block an encoder."""
    shown = columns(diagnosis)
    cells = {
        id(row): [column.cell(row.figures) for column in shown]
        for row in diagnosis.rows
        if row.figures is not None
    }
    chance = [column.chance(diagnosis.chance) or "" for column in shown]
    heads = [list(each) for each in zip(*(_halves(column.head) for column in shown), strict=True)]
    width = max(18, *(len(row.rule) for row in diagnosis.rows)) + 2
    widths = [max(len(text) for text in each) for each in zip(*heads, chance, *cells.values(), strict=True)]
    lines = [f"{diagnosis.images:,} images, {diagnosis.labelled:,} with a label: {diagnosis.collection}"]
    lines += [_aligned("", head, width, widths) for head in heads]
    for encoder, rows in by_encoder(diagnosis):
        lines.append(named(encoder))
        for row in rows:
            told = cells.get(id(row))
            lines.append(
                f"  {row.rule:<{width}}{row.fault}"
                if told is None
                else _aligned(row.rule, told, width, widths)
            )
    lines += ["two images at random", _aligned("", chance, width, widths)]
    return [*lines, *_agreement_lines(diagnosis)]


def _aligned(name: str, cells: list[str], width: int, widths: list[int]) -> str:
    told = "  ".join(f"{cell:>{wide}}" for cell, wide in zip(cells, widths, strict=True))
    return f"  {name:<{width}}{told}".rstrip()


def _halves(head: str) -> tuple[str, str]:
    """Break a heading into two lines where they come out narrowest."""
    words = head.split()
    ways = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(len(words))]
    return min(ways, key=lambda way: max(map(len, way)))


def _agreement_lines(diagnosis: Diagnosis) -> list[str]:
    if not diagnosis.agreements:
        return []
    names = [f"{each.first}, {each.second}" for each in diagnosis.agreements]
    width = max(len(name) for name in names)
    lines = ["agreement of encoders: of the ten nearest the same, rank correlation"]
    for name, each in zip(names, diagnosis.agreements, strict=True):
        lines.append(f"  {name:<{width}}  {percent(each.overlap):>5} %  {number(each.correlation)}")
    return lines


def number(value: float | None, places: int = 2) -> str:
    """Return a number with few places, or a dash."""
    return ABSENT if value is None else f"{value:.{places}f}".replace("-", MINUS)


def share(value: float | None) -> str:
    """Return a share of one in percent, or a dash."""
    return ABSENT if value is None else percent(value)


def _interval(value: Share | None) -> str:
    if value is None:
        return ABSENT
    return f"{percent(value.value)} ±{percent((value.high - value.low) / 2)}"


def _percentiles(figures: Figures) -> str:
    return ABSENT if figures.similarity is None else " ".join(map(number, figures.similarity))


_ALWAYS = (
    Column(
        head="paired %",
        explained="Share of the collection's images that have a partner; the others are paired with "
        "themselves or left out, as the rule says.",
        cell=lambda f: share(f.with_partner),
    ),
    Column(
        head="similarity",
        explained="Of the pairs, as the rule sees it (cosine): 10th, 50th and 90th percentile. "
        "Different encoders have different scales.",
        cell=_percentiles,
    ),
    Column(
        head="same text %",
        explained="Pairs whose captions read the same but for case, spaces and punctuation.",
        cell=lambda f: share(f.identical_captions),
        chance=lambda c: share(c.identical_captions),
    ),
    Column(
        head="hub skew",
        explained="Skewness of how often images are drawn as a partner: at or below 0, all alike; above, "
        "a few images are shown with everybody (Radovanović et al. 2010).",
        cell=lambda f: number(f.hub_skew),
    ),
    Column(
        head="most drawn",
        explained="How many images are paired with the worst hub in an epoch, on average.",
        cell=lambda f: number(f.hubs[0].chosen, 1) if f.hubs else "1.0",
    ),
    Column(
        head="reciprocal %",
        explained="Pairs whose partner may draw the anchor as well.",
        cell=lambda f: share(f.reciprocal),
    ),
    Column(
        head="reach %",
        explained="Share of the collection's images that are ever a partner; the others are seen by "
        "themselves only.",
        cell=lambda f: share(f.reach),
    ),
    Column(
        head="hash bits",
        explained="How far apart pairs look: bits of 64 in which their difference hashes differ. Near what "
        "two random images have: visually diverse; near 0: the same picture.",
        cell=lambda f: number(f.hash_distance, 1),
        chance=lambda c: number(c.hash_distance, 1),
    ),
    Column(
        head="copies %",
        explained="Pairs of near-duplicate images, as the rule distinct-images takes them.",
        cell=lambda f: share(f.near_duplicates),
        chance=lambda c: share(c.near_duplicates),
    ),
)
_LABELLED = (
    Column(
        head="precision @1 %",
        explained="Pairs of one label if only the best partner is drawn, over images that have a label and a "
        "partner with one; ± is a 95 % interval over images.",
        cell=lambda f: _interval(f.precision_first),
        chance=lambda c: share(c.precision),
    ),
    Column(
        head="precision %",
        explained="The same over all partners of the rule, as often as each is drawn.",
        cell=lambda f: _interval(f.precision),
        chance=lambda c: share(c.precision),
    ),
)


def _looks(encoder: str) -> Column:
    return Column(
        head="looks",
        explained=f"How alike pairs look to {encoder}: mean cosine of its embeddings of the two images. "
        "Good language pairs show the same kind of thing (above random) without being the same picture.",
        cell=lambda f: number(f.looks),
        chance=lambda c: number(c.looks),
    )


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


_HERE = Path(__file__).parent
_ACROSS = 9  # pictures beside an anchor that a page has room for
_SIDE = 112
_CAPTION = 90


@dataclass(frozen=True, kw_only=True)
class Card:
    """A picture with its caption and a few words, or words alone where there is no partner."""

    words: str
    picture: Picture | None = None
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Anchors down, rules across: the partner of each anchor under each rule."""

    title: str
    heads: list[str]
    lines: list[tuple[Card, list[Card]]]


def write_pairs_page(diagnosis: Diagnosis, collection: Collection, out: Path | str) -> Path:
    """Write a diagnosis as an HTML page that needs nothing else, and its data as JSON beside it.

    Args:
        diagnosis: What was found.
        collection: The images, for pictures and captions.
        out: The HTML file; the data go into the same name with `.json`.
    """
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Captions are anybody's text: everything is escaped but what this package drew itself.
    pages = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"counted": figures.counted}
    page = pages.get_template("pairs_page.html").render(_told(diagnosis, _Album(collection)))
    # Captions may hold code points that are no text.
    write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    write_json(target.with_suffix(".json"), diagnosis.told())
    return target


class _Album:
    """Pictures of a collection's images, each made once."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._look = lru_cache(maxsize=None)(self._make)

    def card(self, position: int, words: str) -> Card:
        """Return an image with its captions and some words."""
        picture, caption = self._look(position)
        return Card(picture=picture, caption=caption, words=words)

    def _make(self, position: int) -> tuple[Picture, str]:
        record = self._collection[position]
        caption = caption_of(record, _CAPTION) or "(no caption)"
        return picture_of(self._collection, record, _SIDE), caption


def _told(diagnosis: Diagnosis, album: _Album) -> dict[str, Any]:
    rules = list(dict.fromkeys(row.rule for row in diagnosis.rows))
    styles = {name: place for place, (name, _) in enumerate(by_encoder(diagnosis))}
    return {
        "name": Path(diagnosis.collection).name,
        "style": Markup("".join((_HERE / f).read_text("utf-8") for f in ("page.css", "pairs_page.css"))),  # noqa: S704  # the package's own files
        "diagnosis": diagnosis,
        "columns": columns(diagnosis),
        "blocks": by_encoder(diagnosis),
        "named": named,
        "numbers": {rule: place + 1 for place, rule in enumerate(rules)},
        "styles": styles,
        "shapes": {name: (style % STYLES, shape(style)) for name, style in styles.items()},
        "sentences": _sentences(diagnosis),
        "plots": _plots(diagnosis, rules, styles),
        "spreads": [
            (each, number(each.median), similarities(f"spread {i}", each, styles.get(each.encoder, i)))
            for i, each in enumerate(diagnosis.spreads)
        ],
        "agreements": [(a, share(a.overlap), number(a.correlation)) for a in diagnosis.agreements],
        "hubs": _hubs(diagnosis, album),
        "grids": _grids(diagnosis, album),
    }


def _sentences(diagnosis: Diagnosis) -> list[str]:
    """Say what stands out in the table, without judging it."""
    judged = [
        (row.figures.precision.value, row)
        for row in diagnosis.rows
        if row.figures is not None and row.figures.precision is not None and row.encoder
    ]
    told = []
    if judged:
        best, least = max(judged, key=lambda each: each[0]), min(judged, key=lambda each: each[0])
        told.append(
            f"Partners have the same label most often under {_called(*best)}, and least often under "
            f"{_called(*least)}; two images at random have it in {share(diagnosis.chance.precision)} %."
        )
    empty = sum(row.figures is None for row in diagnosis.rows)
    if empty:
        rules = figures.counted(empty, "rule leaves", "rules leave")
        told.append(f"{rules} nobody with a partner; the table says why.")
    return told


def _called(value: float, row: Row) -> str:
    return f"{row.rule} by {row.encoder} ({share(value)} %)"


def _plots(diagnosis: Diagnosis, rules: list[str], styles: dict[str, int]) -> list[Markup]:
    """Draw label precision, or similarity where there are no labels, against reach and against hubs."""
    labelled = any(row.figures is not None and row.figures.precision is not None for row in diagnosis.rows)
    told = []
    for row in diagnosis.rows:
        # An oracle of labels would only press the others together.
        if row.figures is None or not row.encoder:
            continue
        each = row.figures
        height = None
        if labelled:
            height = None if each.precision is None else 100 * each.precision.value
        elif each.similarity is not None:
            height = each.similarity[1]
        if height is not None:
            told.append((styles[row.encoder], rules.index(row.rule) + 1, each, height))
    up = "pairs of one label, %" if labelled else "median similarity"
    reach = [Dot(style=s, number=n, x=100 * f.reach, y=y) for s, n, f, y in told]
    skew = [Dot(style=s, number=n, x=f.hub_skew, y=y) for s, n, f, y in told]
    if not told:
        return []
    return [
        scatter("dots reach", "images that are ever a partner, %", up, reach),
        scatter("dots skew", "skew of hubs", up, skew),
    ]


def _hubs(diagnosis: Diagnosis, album: _Album) -> list[tuple[Row, list[Card]]]:
    """Show the worst hubs of each encoder under the first of its rules that has any."""
    found = []
    for _, rows in by_encoder(diagnosis):
        for row in rows:
            if row.figures is not None and row.figures.hubs:
                cards = [
                    album.card(hub.position, f"{hub.chosen:.1f}".removesuffix(".0") + " times")
                    for hub in row.figures.hubs
                ]
                found.append((row, cards))
                break
    return found


def _grids(diagnosis: Diagnosis, album: _Album) -> list[Grid]:
    """Lay the partners of the anchors out, a grid an encoder; those with a single rule come together."""
    blocks: list[tuple[str, list[int]]] = []
    single: list[int] = []
    place = 0
    for encoder, rows in by_encoder(diagnosis):
        places = [place + i for i, row in enumerate(rows) if row.figures is not None]
        place += len(rows)
        if len(places) == 1:
            single += places
        else:
            blocks += [(named(encoder), places[i : i + _ACROSS]) for i in range(0, len(places), _ACROSS)]
    blocks += [("", single[i : i + _ACROSS]) for i in range(0, len(single), _ACROSS)]
    return [_grid(title, places, diagnosis, album) for title, places in blocks]


def _grid(title: str, places: list[int], diagnosis: Diagnosis, album: _Album) -> Grid:
    lines = []
    for anchor in diagnosis.anchors:
        shown = {partner.row: partner for partner in anchor.partners}
        cards = []
        for place in places:
            partner = shown[place]
            if partner.position is None:
                cards.append(Card(words="no partner"))
            else:
                words = "" if partner.similarity is None else number(partner.similarity)
                cards.append(album.card(partner.position, words))
        lines.append((album.card(anchor.position, ""), cards))
    rows = [diagnosis.rows[place] for place in places]
    heads = [row.rule if title else f"{named(row.encoder)}: {row.rule}" for row in rows]
    return Grid(title=title or "one rule each", heads=heads, lines=lines)
