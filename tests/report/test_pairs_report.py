"""The page of a diagnosis: every row, only text from captions, pictures, and what is missing told."""

import csv
import json
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from likewise.data.dataset import Collection
from likewise.data.importing import import_collection
from likewise.data.readers.base import ImportOptions
from likewise.embeddings.embed import embed
from likewise.pairs.analyze import Diagnosis, diagnose
from likewise.report.pairs_report import (
    Dot,
    by_encoder,
    columns,
    scatter,
    shape,
    text_lines,
    write_pairs_page,
)
from likewise.report.plots import STYLES
from support import MINILM

RULES = [
    "paper",
    "k=3",
    "distinct-captions,min-similarity=0.999",
    "mutual=1,min-similarity=0.9",
    "pairs=label",
]
EVIL = "<script>alert(1)</script> {{7*7}} <img src=x onerror=alert(2)>"
VOID = {"meta", "img"}
Made = tuple[Diagnosis, Collection, Path]


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
    collection = import_collection(table, base / "a <b> collection", options)
    embed(collection, MINILM)
    found = diagnose(collection, rules=RULES)
    return found, collection, write_pairs_page(found, collection, base / "pages" / "pairs.html")


def test_every_row_stands_in_the_table(made: Made) -> None:
    found, _, out = made
    page = read(out)
    shown = columns(found)
    assert [column.head for column in shown][-1] == "precision %"
    for row in found.rows:
        assert row.rule in page.text
        if row.figures is None:
            assert row.fault in page.cells
        else:
            cells = [column.cell(row.figures) for column in shown]
            starts = [i for i in range(len(page.cells)) if page.cells[i : i + len(cells)] == cells]
            assert starts
    assert sum(row.figures is None for row in found.rows) == 1
    for column in shown:
        assert column.explained in page.text
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
    applied = [place for place, row in enumerate(found.rows) if row.figures is not None]
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
    figures = found.rows[0].figures
    assert figures is not None
    assert figures.hubs
    text = read(out).text
    for hub in figures.hubs:
        assert f"{hub.chosen:.0f} times" in text


def test_data_lie_beside_the_page_and_bytes_repeat(made: Made, tmp_path: Path) -> None:
    found, collection, out = made
    told = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert told == json.loads(json.dumps(found.told()))
    again = write_pairs_page(found, collection, tmp_path / "again.html")
    assert again.read_bytes() == out.read_bytes()


def test_lost_images_leave_their_reason(made: Made, tmp_path: Path) -> None:
    found, collection, _ = made
    images, away = collection.root / "images", tmp_path / "away"
    images.rename(away)
    try:
        page = read(write_pairs_page(found, collection, tmp_path / "lost.html"))
    finally:
        away.rename(images)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "file is missing" in page.text


def test_the_terminal_shows_the_same_figures_in_columns(made: Made) -> None:
    found, _, _ = made
    lines = text_lines(found)
    for row in found.rows:
        (line,) = [each for each in lines if each.split()[:1] == [row.rule]]
        if row.figures is None:
            assert line.endswith(str(row.fault))
        else:
            assert line.split()[1:] == " ".join(c.cell(row.figures) for c in columns(found)).split()
    ends = {len(line) for line in lines if line.startswith("  ") and line.split()[0] in ("paper", "k=3")}
    assert len(ends) == 1
    assert [name for name, _ in by_encoder(found)] == [MINILM, ""]


def test_styles_of_many_encoders_differ() -> None:
    assert len({(style % STYLES, shape(style)) for style in range(36)}) == 36


def test_numbers_of_dots_on_one_spot_are_written_together() -> None:
    dots = [Dot(style=0, number=n, x=x, y=y) for n, x, y in ((1, 50.0, 9.0), (4, 50.01, 9.0), (2, 80.0, 3.0))]
    drawn = scatter("test", "across", "up", dots)
    assert ">1,4<" in drawn
    assert ">2<" in drawn


def test_nothing_to_draw_is_told(made: Made, tmp_path: Path) -> None:
    _, collection, _ = made
    found = diagnose(collection, rules=["distinct-captions,min-similarity=0.999"])
    page: Page = read(write_pairs_page(found, collection, tmp_path / "none.html"))
    assert "No rule left pairs to draw" in page.text
    assert "1 rule leaves nobody with a partner" in page.text
    assert "No image is drawn more than once" in page.text
