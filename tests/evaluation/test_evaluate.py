"""Evaluation end to end on real pictures: figures that can be recomputed, kept on disk, and compared."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from likewise.errors import ArtifactError, InvalidInputError
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.evaluation.evaluate import evaluate
from likewise.evaluation.features import extract_features
from likewise.evaluation.protocols import ProtocolConfig
from likewise.evaluation.protocols.fewshot import FewShotConfig
from likewise.evaluation.protocols.linear import LinearProbeConfig
from likewise.evaluation.results import compare, read_results
from likewise.models.encoders import load_encoder

SETTINGS = ProtocolConfig(fewshot=FewShotConfig(ways=2, shots=2, episodes=50))


def by_category(emoji: Path, target: Path, *, bad: bool = False) -> Path:
    """Lay some emoji out as split/class/file, by their category, with unreadable files on demand."""
    import csv

    with emoji.open() as stream:
        for row in csv.DictReader(stream):
            if row["category"] in ("objects", "animals-and-nature", "symbols"):
                place = target / row["split"] / row["category"] / f"{row['house']}-{row['instance']}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(emoji.parent / row["file"], place)
    if bad:
        first = sorted((target / "test").rglob("*.png"))[0]
        (first.parent / "broken.png").write_bytes(first.read_bytes()[:200])
        (first.parent / "text.jpg").write_text("no image")
        (first.parent / "wide.png").parent.mkdir(exist_ok=True)
        Image.new("RGB", (900, 10)).save(first.parent / "wide.png")
    return target


@pytest.fixture(scope="module")
def folder(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_category(emoji, tmp_path_factory.mktemp("sets") / "kinds", bad=True)


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("results")
    evaluate(
        "random:resnet10t",
        folder,
        ("linear", "fewshot", "knn", "retrieval"),
        config=SETTINGS,
        image_size=48,
        out=target,
    )
    return target


def results(out: Path) -> dict:
    (file,) = out.glob("kinds-*/results.json")
    return json.loads(file.read_text())


def test_features_are_the_models_on_resized_centres(folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder("random:resnet10t", image_size=48)
    images = open_labeled(folder)
    features = extract_features(encoder, images, tmp_path, batch_size=7)
    assert features.skipped == {"damaged": 1, "not an image": 1, "sides differ more than 20 to 1": 1}
    assert len(features.indices) == len(images) - 3
    row = int(features.indices[11])
    picture = Image.open(folder / images.files[row]).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    pixels = (
        torch.from_numpy(np.asarray(flat.resize((48, 48), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
        / 255
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = encoder.model(((pixels - mean) / std)[None])[0]
    torch.testing.assert_close(torch.from_numpy(features.vectors[row]), expected, atol=1e-4, rtol=1e-3)


def test_linear_probe_is_scikit_learns_at_the_chosen_cost(folder: Path, out: Path) -> None:
    told = results(out)["protocols"]["linear"]["scores"][0]
    images = open_labeled(folder)
    features = extract_features(load_encoder("random:resnet10t", image_size=48), images, out / "features")
    vectors, splits, labels = (a[features.indices] for a in (features.vectors, images.splits, images.labels))
    peer = LogisticRegression(C=told["details"]["cost"], max_iter=20_000, tol=1e-6)
    peer.fit(vectors[splits == "train"].astype(np.float64), labels[splits == "train"])
    score = peer.score(vectors[splits == "test"].astype(np.float64), labels[splits == "test"])
    assert told["value"] == pytest.approx(score, abs=0.02)
    assert told["low"] < told["value"] < told["high"]
    assert told["n"] == (splits == "test").sum()
    assert told["details"]["converged"]


def test_results_say_what_was_left_out(out: Path) -> None:
    about = results(out)["dataset"]
    assert about["num_classes"] == 3
    assert about["skipped"] == {"damaged": 1, "not an image": 1, "sides differ more than 20 to 1": 1}
    for protocol in ("linear", "fewshot", "knn", "retrieval"):
        for score in results(out)["protocols"][protocol]["scores"]:
            items = np.load(next(out.glob("kinds-*")) / score["per_item"])
            assert items.mean() == pytest.approx(score["value"], abs=1e-6)


def test_a_second_call_measures_nothing_anew(folder: Path, out: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.npy")}
    again = evaluate("random:resnet10t", folder, ("linear",), config=SETTINGS, image_size=48, out=out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.npy")} == before
    assert again[0]["protocols"]["linear"] == results(out)["protocols"]["linear"]


def test_comparison_is_paired_and_by_name(folder: Path, out: Path, tmp_path: Path) -> None:
    evaluate("random:resnet14t", folder, ("linear", "knn"), config=SETTINGS, image_size=48, out=tmp_path)
    rows = compare([read_results(out), read_results(tmp_path)])
    assert {(r.baseline.protocol, r.baseline.metric) for r in rows} == {
        ("linear", "accuracy"),
        ("knn", "accuracy"),
    }
    for row in rows:
        (difference,) = row.differences
        assert difference is not None
        assert difference.value == pytest.approx(row.estimates[1].value - row.estimates[0].value, abs=1e-6)
    with pytest.raises(ArtifactError, match="holds no evaluation"):
        read_results(tmp_path / "nothing")


def test_cross_house_retrieval_looks_in_the_other_house(emoji: Path, tmp_path: Path) -> None:
    (result,) = evaluate("random:resnet10t", emoji.parent, ("retrieval",), image_size=48, out=tmp_path)
    scores = {s["metric"]: s for s in result["protocols"]["retrieval"]["scores"]}
    assert scores["recall@1"]["value"] <= scores["recall@5"]["value"]
    assert scores["recall@1"]["groups"] is not None
    images = open_labeled(emoji.parent)
    test = images.splits == "test"
    assert images.instances is not None
    assert images.domains is not None
    both = set(images.instances[test & (images.domains == "twemoji")]) & set(
        images.instances[test & (images.domains == "openmoji")]
    )
    assert scores["recall@1"]["n"] == 2 * len(both)


def test_no_concept_is_in_both_splits(emoji: Path) -> None:
    images = open_labeled(emoji.parent)
    assert images.instances is not None
    train, test = (set(images.instances[images.splits == split]) for split in ("train", "test"))
    assert len(test) > 10
    assert not train & test


@pytest.mark.parametrize(
    ("table", "match"),
    [
        ("name,split,label\n", "no column of image files"),
        ("file,split,kind\n", "no column 'label'; it has file, split, kind; use --label-column"),
        ("file,label\n", "no column 'split'.*--split-column"),
        ("file,split,label\na.png,later,x\n", "row 2: 'later' is no split"),
        ("file,split,label\na.png,train,x\n", "has no test images"),
        ("file,split,label\na.png,train,x\nb.png,test,x\n", "1 class; at least 2"),
        ("file,split,label\na.png,train,x\nb.png,test,y\n", "no train image.*can be read: 2 file is missing"),
    ],
)
def test_tables_that_are_no_sets_are_refused(table: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text(table)
    with pytest.raises(InvalidInputError, match=match):
        evaluate("random:resnet10t", tmp_path / "set.csv", image_size=48, out=tmp_path / "out")


def test_other_bad_input_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        evaluate("random:resnet10t", tmp_path / "no", image_size=48, out=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="neither a labels.csv nor images"):
        evaluate("random:resnet10t", tmp_path / "empty", image_size=48, out=tmp_path)
    with pytest.raises(InvalidInputError, match="unknown protocol 'lineer'.*linear"):
        evaluate("random:resnet10t", folder, ("lineer",), image_size=48, out=tmp_path)
    with pytest.raises(InvalidInputError, match="fewshot on kinds: "):
        evaluate(
            "random:resnet10t",
            folder,
            ("fewshot",),
            config=ProtocolConfig(fewshot=FewShotConfig(ways=9)),
            image_size=48,
            out=tmp_path,
        )


def test_other_settings_never_overwrite_what_was_measured(folder: Path, tmp_path: Path) -> None:
    for shots in (1, 2):
        chosen = ProtocolConfig(fewshot=FewShotConfig(ways=2, shots=shots, episodes=20))
        evaluate("random:resnet10t", folder, ("fewshot",), config=chosen, image_size=48, out=tmp_path)
    rows = read_results(tmp_path)
    assert sorted(row.config["shots"] for row in rows) == [1, 2]
    assert len({row.key for row in rows}) == 2


def test_results_of_several_encoders_in_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    for size in (32, 48):
        evaluate("random:resnet10t", folder, ("knn",), image_size=size, out=tmp_path)
    with pytest.raises(ArtifactError, match="several weights or input sizes"):
        read_results(tmp_path)


def test_means_over_classes_are_not_compared_item_by_item(folder: Path, tmp_path: Path) -> None:
    chosen = ProtocolConfig(linear=LinearProbeConfig(mean_class_accuracy=True))
    for name in ("resnet10t", "resnet14t"):
        evaluate(f"random:{name}", folder, ("knn",), config=chosen, image_size=48, out=tmp_path / name)
    (row,) = compare([read_results(tmp_path / "resnet10t"), read_results(tmp_path / "resnet14t")])
    assert row.baseline.metric == "mean per-class accuracy"
    assert row.differences == [None]


def test_half_filled_columns_for_retrieval_are_refused(tmp_path: Path) -> None:
    rows = ["a.png,train,x,", "b.png,test,x,1", "c.png,test,y,"]
    (tmp_path / "set.csv").write_text("\n".join(["file,split,label,instance", *rows]) + "\n")
    with pytest.raises(InvalidInputError, match="column 'instance' is empty for 1 test images"):
        open_labeled(tmp_path / "set.csv")
    (tmp_path / "set.csv").write_bytes(b"file,split,label\n\xff.png,train,x\n")
    with pytest.raises(InvalidInputError, match="no UTF-8 table"):
        open_labeled(tmp_path / "set.csv")
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidInputError, match="give a folder, or a .csv or .tsv file"):
        open_labeled(tmp_path / "set.parquet")


def test_grey_transparent_16_bit_and_cmyk_images_are_read_and_one_image_a_class_is_refused(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("stone", "wool"):
            folder = tmp_path / "modes" / split / kind
            folder.mkdir(parents=True)
            grey = rng.integers(0, 256, (40, 44), np.uint8)
            Image.fromarray(grey).save(folder / "grey.png")
            Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
            Image.fromarray(np.stack([grey] * 4, axis=2), "RGBA").save(folder / "clear.png")
            Image.fromarray(np.stack([grey] * 4, axis=2), "CMYK").save(folder / "ink.jpg")
    (result,) = evaluate(
        "random:resnet10t", tmp_path / "modes", ("knn",), image_size=32, out=tmp_path / "out"
    )
    assert result["dataset"]["skipped"] == {}
    assert result["dataset"]["num_images"] == {"train": 8, "test": 8}
    features = np.load(next((tmp_path / "out/features").glob("*/features.npy")))
    assert np.isfinite(features).all()
    names = [Path(file).name for file in open_labeled(tmp_path / "modes").files]
    deep, plain = (features[[i for i, n in enumerate(names) if n == f"{k}.png"]] for k in ("deep", "grey"))
    np.testing.assert_allclose(deep, plain, rtol=0.02, atol=0.02)
    for extra in ("clear.png", "deep.png", "ink.jpg"):
        for kind in ("stone", "wool"):
            (tmp_path / "modes/train" / kind / extra).unlink()
    with pytest.raises(InvalidInputError, match="no class has two images"):
        evaluate("random:resnet10t", tmp_path / "modes", ("linear",), image_size=32, out=tmp_path / "out")
    with pytest.raises(InvalidInputError, match="5-way 5-shot"):
        evaluate("random:resnet10t", tmp_path / "modes", ("fewshot",), image_size=32, out=tmp_path / "out")


def test_rows_without_a_label_are_counted(folder: Path, tmp_path: Path) -> None:
    images = open_labeled(folder)
    lines = [
        f"{folder / file},{split},{images.classes[label]}"
        for file, split, label in zip(images.files, images.splits, images.labels, strict=True)
    ]
    (tmp_path / "t.csv").write_text(
        "file,split,label\n" + "\n".join(lines) + f"\n{folder / 'x.png'},train,\n,test,a\n"
    )
    (result,) = evaluate(
        "random:resnet10t", tmp_path / "t.csv", ("knn",), image_size=32, out=tmp_path / "out"
    )
    assert result["dataset"]["skipped"]["without a file or a label"] == 2
