"""The page of a diagnosis: encoders and rules in a table, as dots and as pictures, in one file."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from likewise.artifacts import write_json, write_text
from likewise.collection.records import Collection
from likewise.neighbors.diagnosis import Diagnosis, Row
from likewise.report import figures
from likewise.report.pairs_plots import Dot, scatter, shape, similarities
from likewise.report.pairs_table import by_encoder, columns, named, number, share
from likewise.report.pictures import Picture, caption_of, picture_of
from likewise.report.plots import STYLES

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
