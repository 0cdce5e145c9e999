"""Protocols against scikit-learn, torchvision or a direct implementation of their definition."""

import csv
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.linear_model import Ridge
from torch import Tensor

from likewise.data.dataset import CaptionDataset
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.captioned import open_captioned
from likewise.evaluation.datasets.labeled import open_labeled
from likewise.evaluation.evaluate import ColumnOptions, evaluate
from likewise.evaluation.protocols import PROTOCOLS, ProtocolConfig, build_protocol
from likewise.evaluation.protocols.base import Split
from likewise.evaluation.protocols.clustering import ClusteringConfig, evaluate_clustering
from likewise.evaluation.protocols.finetune import FineTuningConfig, fine_tune
from likewise.evaluation.protocols.image_text import image_text_hits
from likewise.evaluation.protocols.knn import KNNConfig, KNNGridConfig, knn_predict, search_knn_grid
from likewise.evaluation.protocols.localization import box_iou, localize
from likewise.evaluation.protocols.zero_shot import ZeroShotConfig, zero_shot_predict
from likewise.evaluation.results import compare_metrics, read_results
from likewise.models.checkpoints import load_tensors
from likewise.models.encoders import load_encoder
from likewise.models.text_tower import TextAlignment
from likewise.training.config import TrainConfig
from likewise.training.methods.options import CLIPOptions
from likewise.training.train import train

RNG = np.random.default_rng(0)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_one_protocol_is_evaluated_and_explained(tmp_path: Path) -> None:
    """Evaluate an encoder with one protocol, and explain the score."""
    config = ProtocolConfig(knn=KNNConfig(k=5))
    dataset = open_labeled(squares(tmp_path / "squares"))
    results = evaluate("random:test_resnet", dataset, "knn", config=config, out=tmp_path / "out")
    row = results["squares", "knn", "accuracy"]
    assert row.n == 16
    assert row.low <= row.value <= row.high
    protocol = build_protocol("knn", config)
    assert protocol.requires == "labels"
    assert protocol.explain(row).startswith("The 5 most similar training images vote")


def test_every_protocol_is_registered_with_its_config() -> None:
    config = ProtocolConfig()
    assert len(PROTOCOLS) == len(fields(config)) == 12
    for name in PROTOCOLS:
        protocol = build_protocol(name, config)
        assert protocol.name == name
        assert protocol.title and protocol.summary
        assert protocol.config_dict() == asdict(protocol.config)
    with pytest.raises(InvalidInputError, match="localization") as excinfo:
        build_protocol("localisation", config)
    assert excinfo.value.field == "protocols"
    classifiers = [f.name for f in fields(config) if hasattr(getattr(config, f.name), "mean_class_accuracy")]
    assert classifiers == ["linear", "knn", "knn_grid", "finetune", "zeroshot"]
    changed = config.with_mean_class_accuracy()
    assert all(getattr(changed, name).mean_class_accuracy for name in classifiers)


def test_grid_search_scores_each_config_as_knn_does() -> None:
    labels = torch.arange(90) % 4
    x = rows(90, 6) + torch.nn.functional.one_hot(labels, 6)
    train, val = Split(x[:60], labels[:60]), Split(x[60:], labels[60:])
    accuracies = search_knn_grid(KNNGridConfig(ks=(1, 7, 500), temperatures=(0.05, 1.0)), train, val, 4)
    assert set(accuracies) == {KNNConfig(k=k, temperature=t) for k in (1, 7, 500) for t in (0.05, 1.0)}
    for config, accuracy in accuracies.items():
        predictions = knn_predict(config, train, val.x, 4)
        assert accuracy == pytest.approx(float((predictions == val.y).double().mean()))


def test_separate_clusters_have_nmi_1_and_noise_has_ari_0() -> None:
    labels = np.arange(120) % 3
    separate = np.eye(3)[labels] * 9 + RNG.standard_normal((120, 3)) * 0.05
    result = evaluate_clustering(ClusteringConfig(num_restarts=20), separate, labels)
    assert result.nmi_per_restart.max() == pytest.approx(1)
    assert result.ari.value <= 1
    noise = evaluate_clustering(
        ClusteringConfig(num_restarts=3), RNG.standard_normal((300, 8)), np.arange(300) % 3
    )
    assert abs(noise.ari.value) < 0.05
    with pytest.raises(InvalidInputError) as excinfo:
        ClusteringConfig(num_restarts=1)
    assert excinfo.value.field == "num_restarts"


def test_zero_shot_predicts_the_nearest_mean_of_prompt_embeddings() -> None:
    embeddings = {
        name: rows(1, 5, seed)[0]
        for seed, name in enumerate(("an owl here", "the owl", "an ox here", "the ox"))
    }
    projection = rows(7, 5, 9)
    text_alignment = TextAlignment(
        encode_text=lambda c: torch.stack([embeddings[caption] for caption in c]),
        project_image=lambda x: x @ projection,
    )
    features = rows(50, 7, 3)
    predictions = zero_shot_predict(
        ZeroShotConfig(prompts=("an {} here", "the {}")), features, ("owl", "ox"), text_alignment
    )
    for image, prediction in zip(features.double(), predictions.tolist(), strict=True):
        scores = []
        for name in ("owl", "ox"):
            sentences = [embeddings[f"an {name} here"].double(), embeddings[f"the {name}"].double()]
            mean = torch.stack([s / s.norm() for s in sentences]).mean(dim=0)
            scores.append(float(torch.cosine_similarity(image @ projection.double(), mean, dim=0)))
        assert prediction == int(np.argmax(scores))
    with pytest.raises(InvalidInputError) as excinfo:
        ZeroShotConfig(prompts=("a photo",))
    assert excinfo.value.field == "prompts"


def test_image_text_hits_match_a_loop() -> None:
    images, image_ids = rows(20, 6), torch.from_numpy(RNG.integers(0, 20, 47))
    texts = images[image_ids] + rows(47, 6, 5)
    image_to_text, text_to_image = image_text_hits(images, texts, image_ids, (1, 3))
    similarity = torch.cosine_similarity(images[:, None].double(), texts[None].double(), dim=2).numpy()
    for column, k in enumerate((1, 3)):
        for i in range(20):
            assert image_to_text[i, column] == (image_ids.numpy()[np.argsort(-similarity[i])[:k]] == i).any()
        for j in range(47):
            assert text_to_image[j, column] == (int(image_ids[j]) in np.argsort(-similarity[:, j])[:k])


def test_localization_matches_ridge_regression() -> None:
    x = RNG.standard_normal((80, 5)) @ RNG.standard_normal((5, 5)) + 3
    low = RNG.uniform(0, 0.4, (80, 2))
    boxes = np.concatenate([low, low + 0.3], axis=1) + x[:, :1] * 0.01
    val = np.arange(0, 60, 5)
    result = localize(x[:60], boxes[:60], x[60:], boxes[60:], val)
    train = np.setdiff1d(np.arange(60), val)
    for penalty, score in result.sweep.items():
        variance = x[train].var(axis=0).sum() / 5
        ridge = Ridge(alpha=penalty * len(train) * variance).fit(x[train], boxes[train])
        assert score == pytest.approx(box_iou(ridge.predict(x[val]), boxes[val]).mean(), abs=1e-9)
    ridge = Ridge(alpha=result.penalty * 60 * x[:60].var(axis=0).sum() / 5).fit(x[:60], boxes[:60])
    np.testing.assert_allclose(result.iou, box_iou(ridge.predict(x[60:]), boxes[60:]), atol=1e-9)


def test_box_iou_matches_torchvision() -> None:
    corners = RNG.uniform(0, 1, (2, 200, 2, 2))
    a, b = (np.concatenate([c.min(axis=1), c.max(axis=1)], axis=1) for c in corners)
    expected = torchvision.ops.box_iou(torch.from_numpy(a), torch.from_numpy(b)).diagonal().numpy()
    np.testing.assert_allclose(box_iou(a, b), expected, atol=1e-12)
    assert box_iou(np.array([[0.5, 0.5, 0.2, 0.9]]), np.array([[0.0, 0.0, 1.0, 1.0]])) == 0


def squares(folder: Path, count: int = 48) -> Path:
    """Write a dataset of bright squares, left or right, with their boxes in pixels."""
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        side = ("left", "right")[i % 2]
        x, y = int(RNG.integers(0, 8)) + 24 * (i % 2), int(RNG.integers(0, 30))
        pixels = RNG.integers(0, 60, (48, 48, 3), np.uint8)
        pixels[y : y + 16, x : x + 16] = 220
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{'train' if i < count * 2 // 3 else 'test'},{side},{x},{y},{x + 16},{y + 16}")
    (folder / "labels.csv").write_text("file,split,label,x0,y0,x1,y1\n" + "\n".join(lines) + "\n")
    return folder


def test_fine_tuning_learns_is_reproducible_and_does_not_modify_the_encoder(tmp_path: Path) -> None:
    # Classes differ in brightness only: horizontal flips would exchange left and right.
    folder = tmp_path / "brightness"
    for i in range(60):
        split, label = ("train" if i < 40 else "test"), ("dark", "light")[i % 2]
        path = folder / split / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(RNG.normal(100 + 60 * (i % 2), 40, (40, 52, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    dataset, encoder = open_labeled(folder), load_encoder("random:resnet10t", image_size=32)
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    indices = {name: np.flatnonzero(dataset.splits == name) for name in ("train", "test")}
    config = FineTuningConfig(epochs=4, batch_size=13)

    def run(num_workers: int) -> Tensor:
        cpu = torch.device("cpu")
        return fine_tune(
            config, encoder, dataset, indices["train"], indices["test"], device=cpu, num_workers=num_workers
        )

    rng_state = torch.get_rng_state()
    predictions = run(0)
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert float((predictions.numpy() == dataset.labels[indices["test"]]).mean()) > 0.9
    assert torch.equal(predictions, run(2))
    after = encoder.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_protocols_of_a_labeled_dataset_run_and_compare(tmp_path: Path) -> None:
    folder = squares(tmp_path / "squares", 180)
    names = ("knn-grid", "clustering", "finetune", "localization")
    config = ProtocolConfig(finetune=FineTuningConfig(epochs=1), clustering=ClusteringConfig(num_restarts=3))
    for encoder in ("resnet10t", "resnet18"):
        out = tmp_path / encoder
        loaded = load_encoder(f"random:{encoder}", image_size=48)
        (result,) = evaluate(loaded, folder, names, config=config, out=out).raw
        assert set(result["protocols"]) == set(names)
    box = result["protocols"]["localization"]["scores"][0]
    assert box["metric"] == "mean IoU of boxes"
    images = open_labeled(folder)
    assert images.boxes is not None
    test = images.boxes[images.splits == "test"]
    mean_box = np.broadcast_to(images.boxes[images.splits == "train"].mean(axis=0), test.shape)
    assert box["value"] > box_iou(mean_box, test).mean() + 0.1
    rows = compare_metrics([read_results(tmp_path / name) for name in ("resnet10t", "resnet18")])
    tested = {row.baseline.metric: row.differences[0] for row in rows}
    assert tested["NMI"] is None
    assert tested["mean IoU of boxes"] is not None


@pytest.fixture(scope="module")
def clip_run(dataset: CaptionDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = TrainConfig(
        method=CLIPOptions(text_width=64, text_layers=1),
        backbone="resnet10t",
        image_size=32,
        batch_size=32,
        max_steps=3,
    )
    return train(dataset, tmp_path_factory.mktemp("clip") / "run", settings).path


@pytest.fixture(scope="module")
def captions(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the test emoji with two captions each, and a row without a caption."""
    target = tmp_path_factory.mktemp("captions") / "captions.csv"
    with emoji.open() as stream:
        test_rows = [row for row in csv.DictReader(stream) if row["split"] == "test"][:40]
    lines = [
        f"{emoji.parent / r['file']},{text}"
        for r in test_rows
        for text in (r["caption"], f"a {r['caption']}")
    ]
    target.write_text("file,caption\n" + "\n".join(lines) + "\nnone.png,\n")
    return target


def test_run_with_a_text_tower_is_evaluated_on_captions(clip_run: Path, captions: Path, emoji: Path) -> None:
    encoder = load_encoder(str(clip_run))
    assert encoder.text_alignment is not None
    tensors = load_tensors(clip_run / "encoder.safetensors")[0]
    x = rows(3, encoder.feature_dim)
    torch.testing.assert_close(
        encoder.text_alignment.project_image(x), x @ tensors["image_projection.weight"].T
    )
    text_embeddings = encoder.text_alignment.encode_text(["a cat", "a dog", "a cat"])
    torch.testing.assert_close(text_embeddings[0], text_embeddings[2])
    assert not torch.allclose(text_embeddings[0], text_embeddings[1])
    (result,) = evaluate(clip_run, captions, ("image-text",)).raw
    assert result["dataset"]["num_captions"] == 80
    assert result["dataset"]["skipped"] == {"without a file or a caption": 1}
    scores = {s["metric"]: s for s in result["protocols"]["image-text"]["scores"]}
    assert scores["image to text recall@10"]["n"] == 40
    assert scores["text to image recall@10"]["n"] == 80
    assert 0 < scores["text to image recall@10"]["value"] < 1
    assert scores["text to image recall@1"]["value"] <= scores["text to image recall@10"]["value"]
    (zeroshot,) = evaluate(clip_run, emoji, ("zeroshot",), columns=ColumnOptions(label="category")).raw
    features = np.load(
        next((clip_run / "evaluation/features").glob(f"{zeroshot['dataset']['name']}-*/features.npy"))
    )
    images = open_labeled(emoji, label_column="category")
    test = images.splits == "test"
    sentences = [f"a photo of a {name}." for name in images.classes]
    image_embeddings = torch.from_numpy(features[test]) @ tensors["image_projection.weight"].T
    predictions = torch.cosine_similarity(
        image_embeddings[:, None], encoder.text_alignment.encode_text(sentences)[None], dim=2
    ).argmax(dim=1)
    score = zeroshot["protocols"]["zeroshot"]["scores"][0]
    assert score["value"] == pytest.approx((predictions.numpy() == images.labels[test]).mean())


def test_missing_text_tower_or_captions_raise(tmp_path: Path, captions: Path) -> None:
    folder = squares(tmp_path / "squares", 12)
    with pytest.raises(InvalidInputError, match="no text tower"):
        evaluate("random:test_resnet", folder, ("zeroshot",), out=tmp_path / "out")
    (tmp_path / "plain.csv").write_text("file,split,label\na.png,train,x\n")
    with pytest.raises(InvalidInputError, match="no column of captions"):
        open_captioned(tmp_path / "plain.csv")
    with pytest.raises(InvalidInputError, match=r"captions\.csv does not exist"):
        open_captioned(folder)
    with pytest.raises(InvalidInputError, match="captoin"):
        open_captioned(captions, caption_column="captoin")
    bad = folder / "labels.csv"
    bad.write_text(bad.read_text().replace(",left,", ",left,x", 1))
    assert open_labeled(folder).skipped == {
        "boxes that are not four numbers, excluded (first: labels.csv line 2)": 1
    }


def test_empty_box_is_counted_and_its_image_used(tmp_path: Path) -> None:
    folder = squares(tmp_path / "squares", 12)
    table = folder / "labels.csv"
    lines = table.read_text().splitlines()
    lines[3] = ",".join([*lines[3].split(",")[:3], "5", "5", "5", "9"])
    table.write_text("\n".join(lines) + "\n")
    images = open_labeled(folder)
    assert list(images.skipped.values()) == [1]
    assert "line 4" in next(iter(images.skipped))
    assert len(images) == 12
    assert images.boxes is not None
    assert np.isnan(images.boxes).any(axis=1).sum() == 1


def test_report_explains_the_protocols(clip_run: Path, captions: Path, tmp_path: Path) -> None:
    from likewise.report.run_report import write_report

    config = ProtocolConfig(finetune=FineTuningConfig(epochs=1), clustering=ClusteringConfig(num_restarts=3))
    names = ("knn-grid", "clustering", "finetune", "localization", "zeroshot")
    evaluate(clip_run, squares(tmp_path / "squares", 60), names, config=config)
    evaluate(clip_run, captions, ("image-text",))
    page = write_report([clip_run], tmp_path / "report.html").read_text()
    for text in ("kNN, tuned", "Clustering", "Fine-tuned", "a photo of a {}.", "80 captions", "bounding box"):
        assert text in page


def test_documentation_and_help_name_every_protocol_and_dataset() -> None:
    from likewise.cli.evaluation import evaluate as command
    from likewise.evaluation.datasets.registry import DATASETS

    page = (Path(__file__).parents[2] / "docs/guide/evaluation.md").read_text()
    for name in PROTOCOLS:
        assert f"| `{name}` |" in page
        assert name in str(command.__doc__)
    for name in DATASETS:
        assert name in page.split("## Protocols")[0]
