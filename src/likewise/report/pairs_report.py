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
from likewise.data.dataset import CaptionDataset
from likewise.pairs.analyze import AnalysisRow, PairAnalysis
from likewise.pairs.stats import Estimate, PairStats, RandomBaseline, SimilarityHistogram
from likewise.report import format as figures
from likewise.report.format import ABSENT, MINUS, Thumbnail, format_captions, format_percent, sample_thumbnail
from likewise.report.plots import MARKERS, NUM_STYLES, _make_figure, _plot_style, _to_svg, series_color


@dataclass(frozen=True, kw_only=True)
class Column:
    """One figure of every row.

    Attributes:
        header: What stands above it.
        description: One sentence on what it means.
        format_cell: What stands in it.
        format_baseline: What stands in it for two images picked blindly.
    """

    header: str
    description: str
    format_cell: Callable[[PairStats], str]
    format_baseline: Callable[[RandomBaseline], str | None] = lambda _: None


def table_columns(analysis: PairAnalysis) -> list[Column]:
    """Return the columns that a collection has figures for."""
    image_columns = (
        [] if analysis.image_encoder is None else [_image_similarity_column(analysis.image_encoder)]
    )
    return [*_COLUMNS, *image_columns, *(_LABEL_COLUMNS if analysis.num_labeled else ())]


def group_by_encoder(analysis: PairAnalysis) -> list[tuple[str, list[AnalysisRow]]]:
    """Return the rows in blocks of one encoder each, as they stand."""
    return [(name, list(rows)) for name, rows in groupby(analysis.rows, lambda row: row.encoder)]


def encoder_label(encoder: str) -> str:
    """Return what a block of rows is called: its encoder, or that it needs none."""
    return encoder or "no encoder"


def format_analysis(analysis: PairAnalysis) -> list[str]:
    """Lay a diagnosis out in aligned columns for a terminal, a block an encoder."""
    columns = table_columns(analysis)
    cells = {
        id(row): [column.format_cell(row.stats) for column in columns]
        for row in analysis.rows
        if row.stats is not None
    }
    baseline = [column.format_baseline(analysis.random_baseline) or "" for column in columns]
    headers = [
        list(texts) for texts in zip(*(_split_header(column.header) for column in columns), strict=True)
    ]
    width = max(18, *(len(row.pair_config) for row in analysis.rows)) + 2
    widths = [
        max(len(text) for text in texts) for texts in zip(*headers, baseline, *cells.values(), strict=True)
    ]
    lines = [f"{analysis.num_images:,} images, {analysis.num_labeled:,} with a label: {analysis.dataset}"]
    lines += [_align_row("", header, width, widths) for header in headers]
    for encoder, rows in group_by_encoder(analysis):
        lines.append(encoder_label(encoder))
        for row in rows:
            row_cells = cells.get(id(row))
            lines.append(
                f"  {row.pair_config:<{width}}{row.error}"
                if row_cells is None
                else _align_row(row.pair_config, row_cells, width, widths)
            )
    lines += ["two images at random", _align_row("", baseline, width, widths)]
    return [*lines, *_agreement_lines(analysis)]


def _align_row(name: str, cells: list[str], width: int, widths: list[int]) -> str:
    text = "  ".join(f"{cell:>{cell_width}}" for cell, cell_width in zip(cells, widths, strict=True))
    return f"  {name:<{width}}{text}".rstrip()


def _split_header(header: str) -> tuple[str, str]:
    """Break a heading into two lines where they come out narrowest."""
    tokens = header.split()
    splits = [(" ".join(tokens[:i]), " ".join(tokens[i:])) for i in range(len(tokens))]
    return min(splits, key=lambda split: max(map(len, split)))


def _agreement_lines(analysis: PairAnalysis) -> list[str]:
    if not analysis.agreements:
        return []
    names = [f"{agreement.encoder_a}, {agreement.encoder_b}" for agreement in analysis.agreements]
    width = max(len(name) for name in names)
    lines = ["agreement of encoders: of the ten nearest the same, rank correlation"]
    for name, agreement in zip(names, analysis.agreements, strict=True):
        lines.append(
            f"  {name:<{width}}  {format_percent(agreement.overlap):>5} %  "
            f"{format_number(agreement.correlation)}"
        )
    return lines


def format_number(value: float | None, decimals: int = 2) -> str:
    """Return a number with few places, or a dash."""
    return ABSENT if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def format_share(fraction: float | None) -> str:
    """Return a share of one in percent, or a dash."""
    return ABSENT if fraction is None else format_percent(fraction)


def _format_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ABSENT
    return f"{format_percent(estimate.value)} ±{format_percent((estimate.high - estimate.low) / 2)}"


def _format_percentiles(stats: PairStats) -> str:
    return ABSENT if stats.similarity is None else " ".join(map(format_number, stats.similarity))


_COLUMNS = (
    Column(
        header="paired %",
        description="Share of the collection's images that have a partner; the others are paired with "
        "themselves or left out, as the rule says.",
        format_cell=lambda f: format_share(f.paired_fraction),
    ),
    Column(
        header="similarity",
        description="Of the pairs, as the rule sees it (cosine): 10th, 50th and 90th percentile. "
        "Different encoders have different scales.",
        format_cell=_format_percentiles,
    ),
    Column(
        header="same text %",
        description="Pairs whose captions read the same but for case, spaces and punctuation.",
        format_cell=lambda f: format_share(f.identical_caption_fraction),
        format_baseline=lambda c: format_share(c.identical_caption_fraction),
    ),
    Column(
        header="hub skew",
        description="Skewness of how often images are drawn as a partner: at or below 0, all alike; above, "
        "a few images are shown with everybody (Radovanović et al. 2010).",
        format_cell=lambda f: format_number(f.hubness_skew),
    ),
    Column(
        header="most drawn",
        description="How many images are paired with the worst hub in an epoch, on average.",
        format_cell=lambda f: format_number(f.hubs[0].expected_in_degree, 1) if f.hubs else "1.0",
    ),
    Column(
        header="reciprocal %",
        description="Pairs whose partner may draw the anchor as well.",
        format_cell=lambda f: format_share(f.reciprocity),
    ),
    Column(
        header="reach %",
        description="Share of the collection's images that are ever a partner; the others are seen by "
        "themselves only.",
        format_cell=lambda f: format_share(f.coverage),
    ),
    Column(
        header="hash bits",
        description="How far apart pairs look: bits of 64 in which their difference hashes differ. Near what "
        "two random images have: visually diverse; near 0: the same picture.",
        format_cell=lambda f: format_number(f.hash_distance, 1),
        format_baseline=lambda c: format_number(c.hash_distance, 1),
    ),
    Column(
        header="copies %",
        description="Pairs of near-duplicate images, as the rule distinct-images takes them.",
        format_cell=lambda f: format_share(f.near_duplicate_fraction),
        format_baseline=lambda c: format_share(c.near_duplicate_fraction),
    ),
)
_LABEL_COLUMNS = (
    Column(
        header="precision @1 %",
        description="Pairs of one label if only the best partner is drawn, of images that have a label and a "
        "partner with one; ± is a 95 % interval over images.",
        format_cell=lambda f: _format_interval(f.top1_precision),
        format_baseline=lambda c: format_share(c.label_precision),
    ),
    Column(
        header="precision %",
        description="The same over all partners of the rule, as often as each is drawn.",
        format_cell=lambda f: _format_interval(f.label_precision),
        format_baseline=lambda c: format_share(c.label_precision),
    ),
)


def _image_similarity_column(encoder: str) -> Column:
    return Column(
        header="looks",
        description=f"How alike pairs look to {encoder}: mean cosine of its embeddings of the two images. "
        "Good language pairs show the same kind of thing (above random) without being the same picture.",
        format_cell=lambda f: format_number(f.image_similarity),
        format_baseline=lambda c: format_number(c.image_similarity),
    )


_OVERLAP_FRACTION = 0.05  # of an axis, within which numbers would cover each other


@dataclass(frozen=True, kw_only=True)
class ScatterPoint:
    """One rule with one encoder: where it stands, in the style of its encoder, with the rule's number."""

    style: int
    number: int
    x: float
    y: float


def marker_index(style: int) -> int:
    """Return the place of a style's shape: all of 36 combinations with colours differ."""
    return (style + style // NUM_STYLES) % NUM_STYLES


def scatter_plot(name: str, xlabel: str, ylabel: str, points: Sequence[ScatterPoint]) -> Markup:
    """Draw rules as numbered dots."""
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
        return _to_svg(figure, f"{ylabel} against {xlabel}; one dot a rule and encoder, numbered as listed")


def _point_labels(points: Sequence[ScatterPoint]) -> list[tuple[tuple[float, float], str]]:
    """Return the numbers of dots, together where they would cover each other, and where to write them."""
    x_range, y_range = (
        max(1e-9, float(np.ptp(values))) for values in ([p.x for p in points], [p.y for p in points])
    )
    groups: list[list[ScatterPoint]] = []
    for point in sorted(points, key=lambda group: (group.x, group.y)):
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


def similarity_plot(name: str, histogram: SimilarityHistogram, style: int) -> Markup:
    """Draw how alike images are to their nearest, by one encoder."""
    counts, edges = np.array(histogram.counts, np.float64), np.array(histogram.bin_edges)
    with _plot_style(name):
        figure, axes = _make_figure(2.9, 1.6)
        percents = 100 * counts / max(1.0, float(counts.sum()))
        axes.stairs(percents, edges, fill=True, color=series_color(style), alpha=0.35)
        axes.stairs(percents, edges, color=series_color(style), linewidth=1.2)
        axes.set_xlim(min(0.0, float(edges[0])), 1)
        axes.set_xlabel("similarity to the nearest")
        axes.set_ylabel("% of images")
        return _to_svg(figure, "Histogram of the similarity of each image to the one nearest to it")


_TEMPLATE_DIR = Path(__file__).parent
_MAX_GRID_COLUMNS = 9  # pictures beside an anchor that a page has room for
_THUMBNAIL_SIZE = 112
_MAX_CAPTION_LENGTH = 90


@dataclass(frozen=True, kw_only=True)
class ExampleCard:
    """A picture with its caption and a few words, or words alone where there is no partner."""

    note: str
    thumbnail: Thumbnail | None = None
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class PartnerGrid:
    """Anchors down, rules across: the partner of each anchor under each rule."""

    title: str
    headers: list[str]
    rows: list[tuple[ExampleCard, list[ExampleCard]]]


def write_pairs_report(analysis: PairAnalysis, dataset: CaptionDataset, out: Path | str) -> Path:
    """Write a diagnosis as an HTML page that needs nothing else, and its data as JSON beside it.

    Args:
        analysis: What was found.
        dataset: The images, for pictures and captions.
        out: The HTML file; the data go into the same name with `.json`.
    """
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Captions are anybody's text: everything is escaped but what this package drew itself.
    env = Environment(
        loader=FileSystemLoader(_TEMPLATE_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"counted": figures.count_noun}
    page = env.get_template("pairs_page.html").render(_template_context(analysis, _ThumbnailCache(dataset)))
    # Captions may hold code points that are no text.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    write_json(path.with_suffix(".json"), analysis.to_dict())
    return path


class _ThumbnailCache:
    """Pictures of a collection's images, each made once."""

    def __init__(self, dataset: CaptionDataset) -> None:
        self._dataset = dataset
        self._cached_load = lru_cache(maxsize=None)(self._load)

    def make_card(self, position: int, note: str) -> ExampleCard:
        """Return an image with its captions and some words."""
        thumbnail, caption = self._cached_load(position)
        return ExampleCard(thumbnail=thumbnail, caption=caption, note=note)

    def _load(self, position: int) -> tuple[Thumbnail, str]:
        sample = self._dataset[position]
        caption = format_captions(sample, _MAX_CAPTION_LENGTH) or "(no caption)"
        return sample_thumbnail(self._dataset, sample, _THUMBNAIL_SIZE), caption


def _template_context(analysis: PairAnalysis, thumbnails: _ThumbnailCache) -> dict[str, Any]:
    pair_configs = list(dict.fromkeys(row.pair_config for row in analysis.rows))
    styles = {name: index for index, (name, _) in enumerate(group_by_encoder(analysis))}
    return {
        "name": Path(analysis.dataset).name,
        "style": Markup(  # noqa: S704
            "".join(
                (_TEMPLATE_DIR / filename).read_text("utf-8") for filename in ("page.css", "pairs_page.css")
            )
        ),  # the package's own files
        "diagnosis": analysis,
        "columns": table_columns(analysis),
        "blocks": group_by_encoder(analysis),
        "named": encoder_label,
        "numbers": {pair_config: index + 1 for index, pair_config in enumerate(pair_configs)},
        "styles": styles,
        "shapes": {name: (style % NUM_STYLES, marker_index(style)) for name, style in styles.items()},
        "sentences": _summary_sentences(analysis),
        "plots": _scatter_plots(analysis, pair_configs, styles),
        "spreads": [
            (
                histogram,
                format_number(histogram.median),
                similarity_plot(f"spread {i}", histogram, styles.get(histogram.encoder, i)),
            )
            for i, histogram in enumerate(analysis.similarity_histograms)
        ],
        "agreements": [
            (agreement, format_share(agreement.overlap), format_number(agreement.correlation))
            for agreement in analysis.agreements
        ],
        "hubs": _hub_examples(analysis, thumbnails),
        "grids": _partner_grids(analysis, thumbnails),
    }


def _summary_sentences(analysis: PairAnalysis) -> list[str]:
    """Say what stands out in the table, without judging it."""
    scored = [
        (row.stats.label_precision.value, row)
        for row in analysis.rows
        if row.stats is not None and row.stats.label_precision is not None and row.encoder
    ]
    sentences = []
    if scored:
        best, worst = max(scored, key=lambda item: item[0]), min(scored, key=lambda each: each[0])
        sentences.append(
            f"Partners have the same label most often under {_describe_row(*best)}, and least often under "
            f"{_describe_row(*worst)}; two images at random have it in "
            f"{format_share(analysis.random_baseline.label_precision)} %."
        )
    num_empty = sum(row.stats is None for row in analysis.rows)
    if num_empty:
        subject = figures.count_noun(num_empty, "rule leaves", "rules leave")
        sentences.append(f"{subject} nobody with a partner; the table says why.")
    return sentences


def _describe_row(precision: float, row: AnalysisRow) -> str:
    return f"{row.pair_config} by {row.encoder} ({format_share(precision)} %)"


def _scatter_plots(analysis: PairAnalysis, pair_configs: list[str], styles: dict[str, int]) -> list[Markup]:
    """Draw label precision, or similarity where there are no labels, against reach and against hubs."""
    has_labels = any(row.stats is not None and row.stats.label_precision is not None for row in analysis.rows)
    points = []
    for row in analysis.rows:
        # An oracle of labels would only press the others together.
        if row.stats is None or not row.encoder:
            continue
        stats = row.stats
        y_value = None
        if has_labels:
            y_value = None if stats.label_precision is None else 100 * stats.label_precision.value
        elif stats.similarity is not None:
            y_value = stats.similarity[1]
        if y_value is not None:
            points.append((styles[row.encoder], pair_configs.index(row.pair_config) + 1, stats, y_value))
    ylabel = "pairs of one label, %" if has_labels else "median similarity"
    coverage_points = [
        ScatterPoint(style=style, number=number, x=100 * f.coverage, y=y) for style, number, f, y in points
    ]
    hubness_points = [
        ScatterPoint(style=style, number=number, x=f.hubness_skew, y=y) for style, number, f, y in points
    ]
    if not points:
        return []
    return [
        scatter_plot("dots reach", "images that are ever a partner, %", ylabel, coverage_points),
        scatter_plot("dots skew", "skew of hubs", ylabel, hubness_points),
    ]


def _hub_examples(
    analysis: PairAnalysis, thumbnails: _ThumbnailCache
) -> list[tuple[AnalysisRow, list[ExampleCard]]]:
    """Show the worst hubs of each encoder under the first of its rules that has any."""
    hubs = []
    for _, rows in group_by_encoder(analysis):
        for row in rows:
            if row.stats is not None and row.stats.hubs:
                cards = [
                    thumbnails.make_card(
                        hub.position, f"{hub.expected_in_degree:.1f}".removesuffix(".0") + " times"
                    )
                    for hub in row.stats.hubs
                ]
                hubs.append((row, cards))
                break
    return hubs


def _partner_grids(analysis: PairAnalysis, thumbnails: _ThumbnailCache) -> list[PartnerGrid]:
    """Lay the partners of the anchors out, a grid an encoder; those with a single rule come together."""
    blocks: list[tuple[str, list[int]]] = []
    single: list[int] = []
    offset = 0
    for encoder, rows in group_by_encoder(analysis):
        row_indices = [offset + i for i, row in enumerate(rows) if row.stats is not None]
        offset += len(rows)
        if len(row_indices) == 1:
            single += row_indices
        else:
            blocks += [
                (encoder_label(encoder), row_indices[i : i + _MAX_GRID_COLUMNS])
                for i in range(0, len(row_indices), _MAX_GRID_COLUMNS)
            ]
    blocks += [("", single[i : i + _MAX_GRID_COLUMNS]) for i in range(0, len(single), _MAX_GRID_COLUMNS)]
    return [_build_grid(title, row_indices, analysis, thumbnails) for title, row_indices in blocks]


def _build_grid(
    title: str, row_indices: list[int], analysis: PairAnalysis, thumbnails: _ThumbnailCache
) -> PartnerGrid:
    grid_rows = []
    for anchor in analysis.anchors:
        partners = {partner.row: partner for partner in anchor.partners}
        cards = []
        for row_index in row_indices:
            partner = partners[row_index]
            if partner.position is None:
                cards.append(ExampleCard(note="no partner"))
            else:
                note = "" if partner.similarity is None else format_number(partner.similarity)
                cards.append(thumbnails.make_card(partner.position, note))
        grid_rows.append((thumbnails.make_card(anchor.position, ""), cards))
    rows = [analysis.rows[row_index] for row_index in row_indices]
    headers = [
        row.pair_config if title else f"{encoder_label(row.encoder)}: {row.pair_config}" for row in rows
    ]
    return PartnerGrid(title=title or "one rule each", headers=headers, rows=grid_rows)
