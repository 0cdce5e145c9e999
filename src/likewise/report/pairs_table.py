"""The columns of a diagnosis: what each is called, what it means, and what stands in its cells."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from likewise.neighbors.diagnosis import Diagnosis, Row
from likewise.neighbors.quality import Chance, Figures, Share
from likewise.report.figures import ABSENT, MINUS, percent


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
