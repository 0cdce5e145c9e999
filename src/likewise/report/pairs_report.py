"""Pair analysis as an HTML report, and as a table for a terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from likewise.artifacts import write_json
from likewise.data.dataset import CaptionDataset
from likewise.pairs.analyze import AnalysisRow, PairAnalysis
from likewise.pairs.stats import Estimate, PairStats, RandomBaseline
from likewise.report.page import (
    ABSENT,
    MINUS,
    Thumbnail,
    ThumbnailCache,
    format_captions,
    format_percent,
    render,
    write_page,
)
from likewise.report.plots import ScatterPoint, binned_histogram, scatter_plot
from likewise.strings import count_noun

_MAX_GRID_COLUMNS = 9  # a wider grid does not fit on the page
_THUMBNAIL_SIZE = 112
_MAX_CAPTION_LENGTH = 90


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table: one statistic of the pairs.

    Attributes:
        header: Name of the statistic.
        description: Definition of the statistic, and its unit.
        format_cell: Returns the text of a cell.
        format_baseline: Returns the text for random pairs; None if the statistic is not defined for them.
    """

    header: str
    description: str
    format_cell: Callable[[PairStats], str]
    format_baseline: Callable[[RandomBaseline], str | None] = lambda _: None


def table_columns(analysis: PairAnalysis) -> list[Column]:
    """Return the columns for which the dataset has data."""
    image_columns = (
        [] if analysis.image_encoder is None else [_image_similarity_column(analysis.image_encoder)]
    )
    return [*_COLUMNS, *image_columns, *(_LABEL_COLUMNS if analysis.num_labeled else ())]


def group_by_encoder(analysis: PairAnalysis) -> list[tuple[str, list[AnalysisRow]]]:
    """Return consecutive rows of the same encoder as one block each."""
    return [(name, list(rows)) for name, rows in groupby(analysis.rows, lambda row: row.encoder)]


def encoder_label(encoder: str) -> str:
    """Return the name of an encoder, or that a pair config uses none."""
    return encoder or "no encoder"


def format_analysis(analysis: PairAnalysis) -> list[str]:
    """Return the analysis as lines for a terminal, in aligned columns with one block per encoder."""
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
    lines += ["random pairs", _align_row("", baseline, width, widths)]
    return [*lines, *_agreement_lines(analysis)]


def _align_row(name: str, cells: list[str], width: int, widths: list[int]) -> str:
    text = "  ".join(f"{cell:>{cell_width}}" for cell, cell_width in zip(cells, widths, strict=True))
    return f"  {name:<{width}}{text}".rstrip()


def _split_header(header: str) -> tuple[str, str]:
    """Break a header into the two lines of least width."""
    tokens = header.split()
    splits = [(" ".join(tokens[:i]), " ".join(tokens[i:])) for i in range(len(tokens))]
    return min(splits, key=lambda split: max(map(len, split)))


def _agreement_lines(analysis: PairAnalysis) -> list[str]:
    if not analysis.agreements:
        return []
    names = [f"{agreement.encoder_a}, {agreement.encoder_b}" for agreement in analysis.agreements]
    width = max(len(name) for name in names)
    lines = ["agreement of encoders: overlap of the ten nearest neighbors, rank correlation"]
    for name, agreement in zip(names, analysis.agreements, strict=True):
        lines.append(
            f"  {name:<{width}}  {format_percent(agreement.overlap):>5} %  "
            f"{format_number(agreement.correlation)}"
        )
    return lines


def format_number(value: float | None, decimals: int = 2) -> str:
    """Return a number with the given number of decimals; None as a dash."""
    return ABSENT if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def _format_optional_percent(fraction: float | None) -> str:
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
        description="Images of the dataset that have a partner. The others are paired with themselves or "
        "excluded, depending on the pair config.",
        format_cell=lambda stats: format_percent(stats.paired_fraction),
    ),
    Column(
        header="similarity",
        description="Cosine similarity of the pairs in the search: 10th, 50th and 90th percentile. The scale "
        "depends on the encoder.",
        format_cell=_format_percentiles,
    ),
    Column(
        header="identical captions %",
        description="Pairs whose captions are equal except for case, spaces and punctuation.",
        format_cell=lambda stats: format_percent(stats.identical_caption_fraction),
        format_baseline=lambda baseline: format_percent(baseline.identical_caption_fraction),
    ),
    Column(
        header="hubness skew",
        description="Skewness of the number of times that an image is a partner. At or below 0, all images "
        "are partners about equally often; above 0, a few hubs are partners of many images (Radovanović et "
        "al. 2010).",
        format_cell=lambda stats: format_number(stats.hubness_skew),
    ),
    Column(
        header="largest hub",
        description="Expected number of images that are paired with the largest hub per epoch.",
        format_cell=lambda stats: format_number(stats.hubs[0].expected_in_degree, 1) if stats.hubs else "1.0",
    ),
    Column(
        header="reciprocity %",
        description="Pairs whose anchor is also a possible partner of its partner.",
        format_cell=lambda stats: format_percent(stats.reciprocity),
    ),
    Column(
        header="coverage %",
        description="Images of the dataset that are a possible partner. The others are anchors only.",
        format_cell=lambda stats: format_percent(stats.coverage),
    ),
    Column(
        header="hash distance",
        description="Mean number of bits (of 64) in which the difference hashes of a pair differ. Near the "
        "value of random pairs: visually diverse; near 0: the same picture.",
        format_cell=lambda stats: format_number(stats.hash_distance, 1),
        format_baseline=lambda baseline: format_number(baseline.hash_distance, 1),
    ),
    Column(
        header="near-duplicates %",
        description="Pairs of near-duplicate images, which exclude_near_duplicates would exclude.",
        format_cell=lambda stats: format_percent(stats.near_duplicate_fraction),
        format_baseline=lambda baseline: format_percent(baseline.near_duplicate_fraction),
    ),
)
_LABEL_COLUMNS = (
    Column(
        header="label precision@1 %",
        description="Pairs with the same label if only the best candidate is sampled, over images with a "
        "label and a labeled partner. ± is a 95 % confidence interval over images.",
        format_cell=lambda stats: _format_interval(stats.top1_precision),
        format_baseline=lambda baseline: _format_optional_percent(baseline.label_precision),
    ),
    Column(
        header="label precision %",
        description="The same over all possible partners, weighted by their probability.",
        format_cell=lambda stats: _format_interval(stats.label_precision),
        format_baseline=lambda baseline: _format_optional_percent(baseline.label_precision),
    ),
)


def _image_similarity_column(encoder: str) -> Column:
    return Column(
        header="image similarity",
        description=f"Mean cosine similarity of the image embeddings of a pair, by {encoder}. Good language "
        "pairs show the same kind of thing (above random pairs) without being the same picture.",
        format_cell=lambda stats: format_number(stats.image_similarity),
        format_baseline=lambda baseline: format_number(baseline.image_similarity),
    )


@dataclass(frozen=True, kw_only=True)
class ExampleCard:
    """An image with its caption and a note; only the note if an anchor has no partner."""

    note: str
    thumbnail: Thumbnail | None = None
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class PartnerGrid:
    """The partners of the anchors: one row per anchor, one column per pair config."""

    title: str
    headers: list[str]
    rows: list[tuple[ExampleCard, list[ExampleCard]]]


def write_pairs_report(analysis: PairAnalysis, dataset: CaptionDataset, out: Path | str) -> Path:
    """Write a pair analysis as a self-contained HTML page, and its data as JSON beside it.

    Args:
        analysis: The pair analysis.
        dataset: The dataset, for images and captions.
        out: The HTML file; the JSON file has the same name with the suffix `.json`.
    """
    path = Path(out)
    write_page(path, render("pairs.html", **_template_context(analysis, dataset)))
    write_json(path.with_suffix(".json"), analysis.to_dict())
    return path


class _CardFactory:
    """Makes cards of a dataset's images, each thumbnail once."""

    def __init__(self, dataset: CaptionDataset) -> None:
        self._dataset, self._thumbnails = dataset, ThumbnailCache(dataset, _THUMBNAIL_SIZE)

    def card(self, position: int, note: str) -> ExampleCard:
        """Return the card of the image at a position of the dataset."""
        caption = format_captions(self._dataset[position], _MAX_CAPTION_LENGTH)
        return ExampleCard(thumbnail=self._thumbnails(position), caption=caption, note=note)


def _template_context(analysis: PairAnalysis, dataset: CaptionDataset) -> dict[str, Any]:
    pair_configs = list(dict.fromkeys(row.pair_config for row in analysis.rows))
    blocks, columns, cards = group_by_encoder(analysis), table_columns(analysis), _CardFactory(dataset)
    styles = {name: index for index, (name, _) in enumerate(blocks)}
    has_labels = _has_label_precision(analysis)
    return {
        "title": f"Pairs of {Path(analysis.dataset).name}",
        "analysis": analysis,
        "columns": columns,
        "column_definitions": [(column.header, column.description) for column in columns],
        "config_definitions": [
            (
                f"{row.pair_config}, {row.encoder}" if row.encoder else row.pair_config,
                f"{row.summary}: {row.error}" if row.error else row.summary,
            )
            for row in analysis.rows
        ],
        "blocks": blocks,
        "numbers": {pair_config: index + 1 for index, pair_config in enumerate(pair_configs)},
        "styles": styles,
        "legend": [(styles[name], name) for name, _ in blocks if name],
        "sentences": _summary_sentences(analysis),
        "plot_heading": f"{'Label precision' if has_labels else 'Similarity'} against coverage and hubness",
        "plots": _scatter_plots(analysis, pair_configs, styles),
        "histograms": [
            (
                histogram.encoder,
                format_number(histogram.median),
                binned_histogram(
                    f"similarity {i}",
                    np.array(histogram.counts),
                    np.array(histogram.bin_edges),
                    styles.get(histogram.encoder, i),
                ),
            )
            for i, histogram in enumerate(analysis.similarity_histograms)
        ],
        "agreements": [
            (agreement, format_percent(agreement.overlap), format_number(agreement.correlation))
            for agreement in analysis.agreements
        ],
        "hubs": _hub_examples(analysis, cards),
        "grids": _partner_grids(analysis, cards),
    }


def _summary_sentences(analysis: PairAnalysis) -> list[str]:
    """Return the size of the comparison, the extremes of label precision, and the number of empty rows."""
    sentences = [
        f"{count_noun(len(analysis.rows), 'combination')} of encoder and pair config for "
        f"{count_noun(analysis.num_images, 'image')}, compared without training."
    ]
    scored = [
        (row.stats.label_precision.value, row)
        for row in analysis.rows
        if row.stats is not None and row.stats.label_precision is not None and row.encoder
    ]
    if scored:
        best, worst = max(scored, key=lambda item: item[0]), min(scored, key=lambda item: item[0])
        sentences.append(
            f"Label precision is highest for {_describe_row(*best)} and lowest for {_describe_row(*worst)}; "
            f"that of random pairs is {_format_optional_percent(analysis.random_baseline.label_precision)} %."
        )
    num_empty = sum(row.stats is None for row in analysis.rows)
    if num_empty:
        subject = count_noun(num_empty, "combination has", "combinations have")
        sentences.append(f"{subject} no pairs; the table has the reasons.")
    return sentences


def _describe_row(precision: float, row: AnalysisRow) -> str:
    return f"{row.pair_config} with {row.encoder} ({format_percent(precision)} %)"


def _has_label_precision(analysis: PairAnalysis) -> bool:
    return any(row.stats is not None and row.stats.label_precision is not None for row in analysis.rows)


def _scatter_plots(analysis: PairAnalysis, pair_configs: list[str], styles: dict[str, int]) -> list[Markup]:
    """Draw label precision, or similarity without labels, against coverage and against hubness."""
    has_labels = _has_label_precision(analysis)
    points = []
    for row in analysis.rows:
        # The label oracle is omitted: it would compress the scale of the other points.
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
    if not points:
        return []
    ylabel = "label precision, %" if has_labels else "median similarity"
    coverage_points = [
        ScatterPoint(style=style, number=number, x=100 * stats.coverage, y=y)
        for style, number, stats, y in points
    ]
    hubness_points = [
        ScatterPoint(style=style, number=number, x=stats.hubness_skew, y=y)
        for style, number, stats, y in points
    ]
    return [
        scatter_plot("scatter coverage", "coverage, %", ylabel, coverage_points),
        scatter_plot("scatter hubness", "hubness skew", ylabel, hubness_points),
    ]


def _hub_examples(analysis: PairAnalysis, cards: _CardFactory) -> list[tuple[AnalysisRow, list[ExampleCard]]]:
    """Return the largest hubs of the first row of each encoder that has hubs."""
    hubs = []
    for _, rows in group_by_encoder(analysis):
        row = next((row for row in rows if row.stats is not None and row.stats.hubs), None)
        if row is not None and row.stats is not None:
            examples = [
                cards.card(hub.position, f"{hub.expected_in_degree:.1f}".removesuffix(".0") + " times")
                for hub in row.stats.hubs
            ]
            hubs.append((row, examples))
    return hubs


def _partner_grids(analysis: PairAnalysis, cards: _CardFactory) -> list[PartnerGrid]:
    """Return one grid of partners per encoder; encoders with a single pair config share a grid."""
    blocks: list[tuple[str, list[int]]] = []
    single: list[int] = []
    offset = 0
    for encoder, rows in group_by_encoder(analysis):
        row_indices = [offset + i for i, row in enumerate(rows) if row.stats is not None]
        offset += len(rows)
        if len(row_indices) == 1:
            single += row_indices
        else:
            blocks += [(encoder_label(encoder), chunk) for chunk in _chunks(row_indices)]
    blocks += [("", chunk) for chunk in _chunks(single)]
    return [_build_grid(title, row_indices, analysis, cards) for title, row_indices in blocks]


def _chunks(row_indices: Sequence[int]) -> list[list[int]]:
    return [
        list(row_indices[i : i + _MAX_GRID_COLUMNS]) for i in range(0, len(row_indices), _MAX_GRID_COLUMNS)
    ]


def _build_grid(
    title: str, row_indices: list[int], analysis: PairAnalysis, cards: _CardFactory
) -> PartnerGrid:
    grid_rows = []
    for anchor in analysis.anchors:
        partners = {partner.row: partner for partner in anchor.partners}
        examples = []
        for row_index in row_indices:
            partner = partners[row_index]
            if partner.position is None:
                examples.append(ExampleCard(note="no partner"))
            else:
                note = "" if partner.similarity is None else format_number(partner.similarity)
                examples.append(cards.card(partner.position, note))
        grid_rows.append((cards.card(anchor.position, ""), examples))
    rows = [analysis.rows[row_index] for row_index in row_indices]
    headers = [
        row.pair_config if title else f"{encoder_label(row.encoder)}: {row.pair_config}" for row in rows
    ]
    return PartnerGrid(title=title or "encoders with one pair config", headers=headers, rows=grid_rows)
