"""The page of a diagnosis: every row, only text from captions, pictures, and what is missing told."""

import csv
import json
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.data.readers.base import ImportOptions
from likewise.embeddings.embed import embed
from likewise.pairs.analyze import PairAnalysis, analyze_pairs
from likewise.report.pairs_report import (
    ScatterPoint,
    format_analysis,
    group_by_encoder,
    marker_index,
    scatter_plot,
    table_columns,
    write_pairs_report,
)
from likewise.report.plots import NUM_STYLES
from support import MINILM

RULES = [
    "default",
    "k=3",
    "exclude-identical-captions,min-similarity=0.999",
    "mutual-k=1,min-similarity=0.9",
    "source=label",
]
EVIL = "<script>alert(1)</script> {{7*7}} <img src=x onerror=alert(2)>"
VOID = {"meta", "img"}
Made = tuple[PairAnalysis, CaptionDataset, Path]


@dataclass
class Page(HTMLParser):
    """Checks nesting and gathers tags, words and cells of tables."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]
        self.cells += [""] if tag == "td" else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += [] if self.open[-1:] == ["style"] else [data]
        if "td" in self.open:
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def _write_table(emoji: Path, folder: Path) -> Path:
    """Copy 48 emoji, the two houses' drawings of some concepts, hostile captions; a third without any."""
    (folder / "images").mkdir(parents=True)
    with emoji.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "train"][:48]
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", "caption", "label"))
        for i, row in enumerate(rows):
            source = emoji.parent / row["file"]
            shutil.copy(source, folder / "images" / f"{i}{source.suffix}")
            caption = "" if i % 3 == 2 else f"{row['caption']} {EVIL}"
            writer.writerow((f"images/{i}{source.suffix}", caption, row["label"]))
    return folder / "table.csv"


@pytest.fixture(scope="module")
def made(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.mktemp("pairs page")
    options = ImportOptions(caption_column=("caption",), label_column="label")
    table = _write_table(emoji, base / "set")
    collection = import_dataset(table, base / "a <b> collection", options)
    embed(collection, MINILM)
    found = analyze_pairs(collection, pair_configs=RULES)
    return found, collection, write_pairs_report(found, collection, base / "pages" / "pairs.html")


def test_every_row_stands_in_the_table(made: Made) -> None:
    found, _, out = made
    page = read(out)
    shown = table_columns(found)
    assert [column.header for column in shown][-1] == "precision %"
    for row in found.rows:
        assert row.pair_config in page.text
        if row.stats is None:
            assert row.error in page.cells
        else:
            cells = [column.format_cell(row.stats) for column in shown]
            starts = [i for i in range(len(page.cells)) if page.cells[i : i + len(cells)] == cells]
            assert starts
    assert sum(row.stats is None for row in found.rows) == 1
    for column in shown:
        assert column.description in page.text
    assert "two images at random" in page.text


def test_the_page_is_complete_in_itself(made: Made) -> None:
    _, _, out = made
    page = read(out)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "url(http" not in out.read_text(encoding="utf-8")
    assert out.stat().st_size < 1_500_000


def test_captions_are_shown_as_text(made: Made) -> None:
    _, _, out = made
    raw, page = out.read_text(encoding="utf-8"), read(out)
    assert "<script>alert(1)</script>" in page.text
    assert "{{7*7}}" in page.text
    assert "<script" not in raw
    assert "onerror=alert(2)>" not in raw
    assert "a <b> collection" in page.text
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_anchors_stand_with_each_partner_or_the_lack_of_one(made: Made) -> None:
    found, collection, out = made
    page = read(out)
    applied = [place for place, row in enumerate(found.rows) if row.stats is not None]
    lacking = sum(partner.position is None for anchor in found.anchors for partner in anchor.partners)
    assert lacking > 0
    assert page.text.count("no partner") == lacking
    partners = [p for anchor in found.anchors for p in anchor.partners if p.position is not None]
    assert len(partners) + lacking == 6 * len(applied)
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    for partner in partners:
        captions = collection[partner.position or 0].captions
        assert (captions[0] if captions else "an image without a caption")[:80] in " ".join(map(str, alts))


def test_hubs_are_shown_with_how_often_they_are_drawn(made: Made) -> None:
    found, _, out = made
    figures = found.rows[0].stats
    assert figures is not None
    assert figures.hubs
    text = read(out).text
    for hub in figures.hubs:
        assert f"{hub.expected_in_degree:.0f} times" in text


def test_data_lie_beside_the_page_and_bytes_repeat(made: Made, tmp_path: Path) -> None:
    found, collection, out = made
    told = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert told == json.loads(json.dumps(found.to_dict()))
    again = write_pairs_report(found, collection, tmp_path / "again.html")
    assert again.read_bytes() == out.read_bytes()


def test_lost_images_leave_their_reason(made: Made, tmp_path: Path) -> None:
    found, collection, _ = made
    images, away = collection.root / "images", tmp_path / "away"
    images.rename(away)
    try:
        page = read(write_pairs_report(found, collection, tmp_path / "lost.html"))
    finally:
        away.rename(images)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "file is missing" in page.text


def test_the_terminal_shows_the_same_figures_in_columns(made: Made) -> None:
    found, _, _ = made
    lines = format_analysis(found)
    for row in found.rows:
        (line,) = [each for each in lines if each.split()[:1] == [row.pair_config]]
        if row.stats is None:
            assert line.endswith(str(row.error))
        else:
            assert (
                line.split()[1:] == " ".join(c.format_cell(row.stats) for c in table_columns(found)).split()
            )
    ends = {len(line) for line in lines if line.startswith("  ") and line.split()[0] in ("default", "k=3")}
    assert len(ends) == 1
    assert [name for name, _ in group_by_encoder(found)] == [MINILM, ""]


def test_styles_of_many_encoders_differ() -> None:
    assert len({(style % NUM_STYLES, marker_index(style)) for style in range(36)}) == 36


def test_numbers_of_dots_on_one_spot_are_written_together() -> None:
    dots = [
        ScatterPoint(style=0, number=n, x=x, y=y)
        for n, x, y in ((1, 50.0, 9.0), (4, 50.01, 9.0), (2, 80.0, 3.0))
    ]
    drawn = scatter_plot("test", "across", "up", dots)
    assert ">1,4<" in drawn
    assert ">2<" in drawn


def test_nothing_to_draw_is_told(made: Made, tmp_path: Path) -> None:
    _, collection, _ = made
    found = analyze_pairs(collection, pair_configs=["exclude-identical-captions,min-similarity=0.999"])
    page: Page = read(write_pairs_report(found, collection, tmp_path / "none.html"))
    assert "No rule left pairs to draw" in page.text
    assert "1 rule leaves nobody with a partner" in page.text
    assert "No image is drawn more than once" in page.text
