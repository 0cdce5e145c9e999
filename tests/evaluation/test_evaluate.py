"""Evaluation end to end on real images: results are recomputed, stored on disk and compared."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import likewise
from likewise.errors import ArtifactError, InvalidInputError, LikewiseError
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.evaluation.evaluate import evaluate
from likewise.evaluation.protocols import ProtocolConfig
from likewise.evaluation.protocols.fewshot import FewShotConfig
from likewise.evaluation.results import compare_metrics, read_results
from likewise.models.encoders import ImageEncoder, load_encoder
from likewise.models.features import extract_features

CONFIG = ProtocolConfig(fewshot=FewShotConfig(ways=2, shots=2, episodes=50))


def test_results_are_indexed_printed_and_saved(folder: Path, tmp_path: Path) -> None:
    """Read this first: evaluate an encoder on a labeled folder and read its results."""
    encoder = likewise.load_encoder("random:resnet10t", image_size=32)
    results = likewise.evaluate(encoder, folder, ["knn", "clustering"], out=tmp_path / "out")
    accuracy = results["categories", "knn", "accuracy"]
    assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1
    assert [(row.protocol, row.metric) for row in results] == [
        ("clustering", "NMI"),
        ("clustering", "ARI"),
        ("knn", "accuracy"),
    ]
    header, *_, last_line = results.table().splitlines()
    assert header.split() == ["dataset", "protocol", "metric", "value", "95", "%", "interval", "n"]
    assert last_line.split()[:4] == ["categories", "knn", "accuracy", f"{100 * accuracy.value:.1f}"]
    assert last_line.index("knn") == header.index("protocol")
    frame = results.to_dataframe()
    assert frame.loc[frame.metric == "accuracy", "value"].item() == accuracy.value
    assert results.path == tmp_path / "out"
    assert likewise.read_results(tmp_path / "out").to_dataframe().equals(frame)
    with pytest.raises(KeyError, match="clustering"):
        results["categories", "linear", "accuracy"]


def small_encoder(name: str = "resnet10t", image_size: int = 48) -> ImageEncoder:
    return load_encoder(f"random:{name}", image_size=image_size)


def copy_categories(emoji: Path, root: Path, *, with_unreadable: bool = False) -> Path:
    """Copy some emoji to split/category/file, optionally with unreadable files."""
    with emoji.open() as stream:
        for row in csv.DictReader(stream):
            if row["category"] in ("objects", "animals-and-nature", "symbols"):
                path = root / row["split"] / row["category"] / f"{row['domain']}-{row['instance']}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(emoji.parent / row["file"], path)
    if with_unreadable:
        first = sorted((root / "test").rglob("*.png"))[0]
        (first.parent / "broken.png").write_bytes(first.read_bytes()[:200])
        (first.parent / "text.jpg").write_text("no image")
        Image.new("RGB", (900, 10)).save(first.parent / "wide.png")
    return root


@pytest.fixture(scope="module")
def folder(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets") / "categories"
    return copy_categories(emoji, root, with_unreadable=True)


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results")
    evaluate(small_encoder(), folder, ("linear", "fewshot", "knn", "retrieval"), config=CONFIG, out=path)
    return path


def read_json_results(out: Path) -> dict:
    (file,) = out.glob("categories-*/results.json")
    return json.loads(file.read_text())


def test_features_equal_the_model_on_resized_center_crops(folder: Path, tmp_path: Path) -> None:
    encoder = small_encoder()
    dataset = open_labeled(folder)
    features = extract_features(encoder, dataset, tmp_path, batch_size=7)
    assert features.skipped == {"truncated": 1, "not an image": 1, "aspect ratio above 20": 1}
    assert len(features.indices) == len(dataset) - 3
    index = int(features.indices[11])
    image = Image.open(folder / dataset.files[index]).convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    pixels = (
        torch.from_numpy(np.asarray(rgb.resize((48, 48), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
        / 255
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = encoder.model(((pixels - mean) / std)[None].to(encoder.device))[0].cpu()
    torch.testing.assert_close(torch.from_numpy(features.vectors[index]), expected, atol=1e-4, rtol=1e-3)


def test_linear_probe_matches_scikit_learn_at_the_selected_cost(folder: Path, out: Path) -> None:
    score = read_json_results(out)["protocols"]["linear"]["scores"][0]
    dataset = open_labeled(folder)
    features = extract_features(small_encoder(), dataset, out / "features")
    vectors, splits, labels = (
        array[features.indices] for array in (features.vectors, dataset.splits, dataset.labels)
    )
    reference = LogisticRegression(C=score["details"]["C"], max_iter=20_000, tol=1e-6)
    reference.fit(vectors[splits == "train"].astype(np.float64), labels[splits == "train"])
    accuracy = reference.score(vectors[splits == "test"].astype(np.float64), labels[splits == "test"])
    assert score["value"] == pytest.approx(accuracy, abs=0.02)
    assert score["low"] < score["value"] < score["high"]
    assert score["n"] == (splits == "test").sum()
    assert score["details"]["converged"]


def test_results_count_unreadable_images(out: Path) -> None:
    info = read_json_results(out)["dataset"]
    assert info["num_classes"] == 3
    assert info["skipped"] == {"truncated": 1, "not an image": 1, "aspect ratio above 20": 1}
    for protocol in ("linear", "fewshot", "knn", "retrieval"):
        for score in read_json_results(out)["protocols"][protocol]["scores"]:
            per_item = np.load(next(out.glob("categories-*")) / score["per_item"])
            assert per_item.mean() == pytest.approx(score["value"], abs=1e-6)


def test_second_call_reads_results_from_disk(folder: Path, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    results = evaluate(small_encoder(), folder, "linear", config=CONFIG, out=out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")} == before
    assert results.raw[0]["protocols"]["linear"] == read_json_results(out)["protocols"]["linear"]


def test_encoder_by_name_and_default_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = evaluate("random:test_resnet", open_labeled(folder), "knn")
    assert results.path == Path("evaluation-random-test_resnet")
    assert results[0].encoder == "random:test_resnet"
    assert results.raw[0]["requested"] == {
        "encoder": "random:test_resnet",
        "backbone": None,
        "weights_prefix": "",
        "weights_exclude": [],
        "image_size": None,
    }


def test_comparison_is_paired_by_item(folder: Path, out: Path, tmp_path: Path) -> None:
    evaluate(small_encoder("resnet14t"), folder, ("linear", "knn"), config=CONFIG, out=tmp_path)
    comparisons = compare_metrics([read_results(out), read_results(tmp_path)])
    assert {(c.baseline.protocol, c.baseline.metric) for c in comparisons} == {
        ("linear", "accuracy"),
        ("knn", "accuracy"),
    }
    for comparison in comparisons:
        (difference,) = comparison.differences
        assert difference is not None
        expected = comparison.estimates[1].value - comparison.estimates[0].value
        assert difference.value == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ArtifactError) as excinfo:
        read_results(tmp_path / "nothing")
    assert excinfo.value.path == tmp_path / "nothing"


def test_cross_domain_retrieval_searches_the_other_domain(emoji: Path, tmp_path: Path) -> None:
    results = evaluate(small_encoder(), emoji.parent, "retrieval", out=tmp_path)
    scores = {row.metric: row for row in results}
    assert scores["recall@1"].value <= scores["recall@5"].value
    assert scores["recall@1"].groups is not None
    dataset = open_labeled(emoji.parent)
    is_test = dataset.splits == "test"
    assert dataset.instances is not None
    assert dataset.domains is not None
    in_both = set(dataset.instances[is_test & (dataset.domains == "twemoji")]) & set(
        dataset.instances[is_test & (dataset.domains == "openmoji")]
    )
    assert scores["recall@1"].n == 2 * len(in_both)


def test_no_instance_is_in_both_splits(emoji: Path) -> None:
    dataset = open_labeled(emoji.parent)
    assert dataset.instances is not None
    train, test = (set(dataset.instances[dataset.splits == split]) for split in ("train", "test"))
    assert len(test) > 10
    assert not train & test


@pytest.mark.parametrize(
    ("table", "match", "field"),
    [
        ("name,split,label\n", "column of image files", None),
        ("file,split,kind\n", "no column 'label'.*file, split, kind", "label_column"),
        ("file,label\n", "no column 'split'", "split_column"),
        ("file,split,label\na.png,later,x\n", "split 'later' is not train.*line 2", None),
        ("file,split,label\na.png,train,x\n", "no test images", None),
        ("file,split,label\na.png,train,x\nb.png,test,x\n", "1 class; at least 2", None),
        ("file,split,label\na.png,train,x\nb.png,test,y\n", "no train image.*2 file is missing", None),
    ],
)
def test_invalid_tables_raise(table: str, match: str, field: str | None, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(table)
    with pytest.raises(InvalidInputError, match=match) as excinfo:
        evaluate(small_encoder(), tmp_path / "data.csv", out=tmp_path / "out")
    assert excinfo.value.field == field


def test_invalid_arguments_raise(folder: Path, tmp_path: Path) -> None:
    def error_of(
        dataset: Path, protocols: tuple[str, ...] = ("knn",), config: ProtocolConfig | None = None
    ) -> LikewiseError:
        with pytest.raises(InvalidInputError) as excinfo:
            evaluate(small_encoder(), dataset, protocols, config=config, out=tmp_path)
        return excinfo.value

    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty"):
        assert error_of(path).path == path
    assert "linear" in str(error_of(folder, ("lineer",)))
    assert error_of(folder, ()).field == "protocols"
    config = ProtocolConfig(fewshot=FewShotConfig(ways=9))
    assert "fewshot on categories" in str(error_of(folder, ("fewshot",), config))


def test_results_with_different_options_are_stored_separately(folder: Path, tmp_path: Path) -> None:
    for shots in (1, 2):
        config = ProtocolConfig(fewshot=FewShotConfig(ways=2, shots=shots, episodes=20))
        evaluate(small_encoder(), folder, "fewshot", config=config, out=tmp_path)
    results = read_results(tmp_path)
    assert sorted(row.config["shots"] for row in results) == [1, 2]
    assert len({row.key for row in results}) == 2
    with pytest.raises(KeyError, match="2 results"):
        results["categories", "fewshot", "accuracy"]


def test_results_of_several_encoders_in_one_folder_raise(folder: Path, tmp_path: Path) -> None:
    for image_size in (32, 48):
        evaluate(small_encoder(image_size=image_size), folder, "knn", out=tmp_path)
    with pytest.raises(ArtifactError) as excinfo:
        read_results(tmp_path)
    assert excinfo.value.field == "out"


def test_mean_per_class_accuracies_are_not_compared_by_item(folder: Path, tmp_path: Path) -> None:
    config = ProtocolConfig().with_mean_class_accuracy()
    for name in ("resnet10t", "resnet14t"):
        evaluate(small_encoder(name), folder, "knn", config=config, out=tmp_path / name)
    (row,) = compare_metrics([read_results(tmp_path / "resnet10t"), read_results(tmp_path / "resnet14t")])
    assert row.baseline.metric == "mean per-class accuracy"
    assert row.differences == [None]


def test_incomplete_retrieval_columns_and_unsupported_tables_raise(tmp_path: Path) -> None:
    rows = ["a.png,train,x,", "b.png,test,x,1", "c.png,test,y,"]
    (tmp_path / "data.csv").write_text("\n".join(["file,split,label,instance", *rows]) + "\n")
    with pytest.raises(InvalidInputError, match="'instance'"):
        open_labeled(tmp_path / "data.csv")
    (tmp_path / "data.csv").write_bytes(b"file,split,label\n\xff.png,train,x\n")
    with pytest.raises(InvalidInputError, match="UTF-8"):
        open_labeled(tmp_path / "data.csv")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidInputError, match="not a Parquet file"):
        open_labeled(tmp_path / "data.parquet")


def test_all_image_modes_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("stone", "wool"):
            class_dir = tmp_path / "modes" / split / label
            class_dir.mkdir(parents=True)
            gray = rng.integers(0, 256, (40, 44), np.uint8)
            Image.fromarray(gray).save(class_dir / "gray.png")
            Image.fromarray(gray.astype(np.uint16) * 257).save(class_dir / "gray16.png")
            Image.fromarray(np.stack([gray] * 4, axis=2), "RGBA").save(class_dir / "rgba.png")
            Image.fromarray(np.stack([gray] * 4, axis=2), "CMYK").save(class_dir / "cmyk.jpg")
    out = tmp_path / "out"
    (info,) = (raw["dataset"] for raw in evaluate(small_encoder(), tmp_path / "modes", "knn", out=out).raw)
    assert info["skipped"] == {}
    assert info["num_images"] == {"train": 8, "test": 8}
    features = np.load(next((out / "features").glob("*/features.npy")))
    assert np.isfinite(features).all()
    names = [Path(file).name for file in open_labeled(tmp_path / "modes").files]
    deep, gray = (
        features[[i for i, name in enumerate(names) if name == file]] for file in ("gray16.png", "gray.png")
    )
    np.testing.assert_allclose(deep, gray, rtol=0.02, atol=0.02)
    for file in ("rgba.png", "gray16.png", "cmyk.jpg"):
        for label in ("stone", "wool"):
            (tmp_path / "modes/train" / label / file).unlink()
    with pytest.raises(InvalidInputError, match="no class has two"):
        evaluate(small_encoder(), tmp_path / "modes", "linear", out=out)
    with pytest.raises(InvalidInputError, match="5-way 5-shot"):
        evaluate(small_encoder(), tmp_path / "modes", "fewshot", out=out)


def test_rows_without_a_label_are_counted(folder: Path, tmp_path: Path) -> None:
    dataset = open_labeled(folder)
    lines = [
        f"{folder / file},{split},{dataset.classes[label]}"
        for file, split, label in zip(dataset.files, dataset.splits, dataset.labels, strict=True)
    ]
    (tmp_path / "table.csv").write_text(
        "file,split,label\n" + "\n".join(lines) + f"\n{folder / 'x.png'},train,\n,test,a\n"
    )
    results = evaluate(small_encoder(), tmp_path / "table.csv", "knn", out=tmp_path / "out")
    assert results.raw[0]["dataset"]["skipped"]["without a file or a label"] == 2
