"""Pairs report: every row of the analysis, escaped captions, partner images, and reasons of missing parts."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from helpers.pages import EVIL_CAPTION, Page, check_escaped, check_self_contained
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.embeddings.embed import embed
from likewise.pairs.analyze import PairAnalysis, analyze_pairs
from likewise.report.pairs_report import (
    format_analysis,
    group_by_encoder,
    table_columns,
    write_pairs_report,
)
from likewise.report.plots import NUM_STYLES, ScatterPoint, marker_index, scatter_plot
from support import MINILM

PAIR_CONFIGS = [
    "default",
    "k=3",
    "exclude-identical-captions,min-similarity=0.999",
    "mutual-k=1,min-similarity=0.9",
    "source=label",
]
Report = tuple[PairAnalysis, CaptionDataset, Path]


def _write_table(emoji: Path, folder: Path) -> Path:
    """Write 48 emoji of both vendors with hostile captions; a third have no caption."""
    (folder / "images").mkdir(parents=True)
    with emoji.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "train"][:48]
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", "caption", "label"))
        for i, row in enumerate(rows):
            source = emoji.parent / row["file"]
            shutil.copy(source, folder / "images" / f"{i}{source.suffix}")
            caption = "" if i % 3 == 2 else f"{row['caption']} {EVIL_CAPTION}"
            writer.writerow((f"images/{i}{source.suffix}", caption, row["label"]))
    return folder / "table.csv"


@pytest.fixture(scope="module")
def report(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The analysis, its dataset, and the path of the page."""
    base = tmp_path_factory.mktemp("pairs page")
    options = ImportOptions(caption_column=("caption",), label_column="label")
    table = _write_table(emoji, base / "images")
    dataset = import_dataset(table, base / "a <b> dataset", options)
    embed(dataset, MINILM)
    analysis = analyze_pairs(dataset, pair_configs=PAIR_CONFIGS)
    return analysis, dataset, write_pairs_report(analysis, dataset, base / "pages" / "pairs.html")


def test_table_has_every_row_and_column(report: Report) -> None:
    analysis, _, path = report
    page = Page(path)
    columns = table_columns(analysis)
    assert columns[-1].header == "label precision %"
    for row in analysis.rows:
        assert row.pair_config in page.text
        if row.stats is None:
            assert row.error in page.cells
        else:
            cells = [column.format_cell(row.stats) for column in columns]
            assert [i for i in range(len(page.cells)) if page.cells[i : i + len(cells)] == cells]
    assert sum(row.stats is None for row in analysis.rows) == 1
    for column in columns:
        assert column.header in page.text
        assert column.description in page.text
    baseline = [column.format_baseline(analysis.random_baseline) or "" for column in columns]
    assert [i for i in range(len(page.cells)) if page.cells[i : i + len(baseline)] == baseline]


def test_page_is_self_contained_and_escaped(report: Report) -> None:
    _, _, path = report
    page = check_self_contained(path)
    check_escaped(path)
    assert "a <b> dataset" in page.text
    assert path.stat().st_size < 1_500_000


def test_anchors_have_a_partner_or_a_note_per_pair_config(report: Report) -> None:
    analysis, dataset, path = report
    page = Page(path)
    num_configs = sum(row.stats is not None for row in analysis.rows)
    partners = [partner for anchor in analysis.anchors for partner in anchor.partners]
    assert len(partners) == 6 * num_configs
    num_without_partner = sum(partner.position is None for partner in partners)
    assert num_without_partner > 0
    assert page.text.count("no partner") == num_without_partner
    alts = " ".join(str(attributes["alt"]) for attributes in page.attributes("img"))
    for partner in partners:
        if partner.position is not None:
            captions = dataset[partner.position].captions
            assert (captions[0] if captions else "image without a caption")[:80] in alts


def test_hubs_have_their_number_of_anchors(report: Report) -> None:
    analysis, _, path = report
    stats = analysis.rows[0].stats
    assert stats is not None
    assert stats.hubs
    text = Page(path).text
    for hub in stats.hubs:
        assert f"{hub.expected_in_degree:.0f} times" in text


def test_json_has_the_analysis_and_bytes_repeat(report: Report, tmp_path: Path) -> None:
    analysis, dataset, path = report
    data = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert data == json.loads(json.dumps(analysis.to_dict()))
    repeated = write_pairs_report(analysis, dataset, tmp_path / "repeated.html")
    assert repeated.read_bytes() == path.read_bytes()


def test_missing_images_have_a_placeholder_with_the_reason(report: Report, tmp_path: Path) -> None:
    analysis, dataset, _ = report
    images, moved = dataset.root / "images", tmp_path / "moved"
    images.rename(moved)
    try:
        page = Page(write_pairs_report(analysis, dataset, tmp_path / "page.html"))
    finally:
        moved.rename(images)
    assert not page.attributes("img")
    assert "file is missing" in page.text


def test_terminal_table_has_the_same_values_in_aligned_columns(report: Report) -> None:
    analysis, _, _ = report
    lines = format_analysis(analysis)
    columns = table_columns(analysis)
    for row in analysis.rows:
        (line,) = [line for line in lines if line.split()[:1] == [row.pair_config]]
        if row.stats is None:
            assert line.endswith(str(row.error))
        else:
            assert line.split()[1:] == " ".join(column.format_cell(row.stats) for column in columns).split()
    lengths = {len(line) for line in lines if line.startswith("  ") and line.split()[0] in ("default", "k=3")}
    assert len(lengths) == 1
    assert [name for name, _ in group_by_encoder(analysis)] == [MINILM, ""]


def test_36_styles_differ_in_color_or_marker() -> None:
    assert len({(style % NUM_STYLES, marker_index(style)) for style in range(36)}) == 36


def test_overlapping_points_share_a_label() -> None:
    points = [
        ScatterPoint(style=0, number=n, x=x, y=y)
        for n, x, y in ((1, 50.0, 9.0), (4, 50.01, 9.0), (2, 80.0, 3.0))
    ]
    svg = scatter_plot("test", "x", "y", points)
    assert ">1,4<" in svg
    assert ">2<" in svg


def test_page_of_an_analysis_without_pairs(report: Report, tmp_path: Path) -> None:
    _, dataset, _ = report
    analysis = analyze_pairs(dataset, pair_configs=["exclude-identical-captions,min-similarity=0.999"])
    page = Page(write_pairs_report(analysis, dataset, tmp_path / "empty.html"))
    assert "No pair config has pairs to plot" in page.text
    assert "1 combination has no pairs" in page.text
    assert "No image is expected to be a partner more than once" in page.text
