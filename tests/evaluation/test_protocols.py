"""Protocols beyond the probe, each against scikit-learn, torchvision or its definition written out."""

import csv
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
from likewise.evaluation.protocols import ProtocolConfig
from likewise.evaluation.protocols.clustering import ClusteringConfig, evaluate_clustering
from likewise.evaluation.protocols.finetune import FineTuningConfig, fine_tune
from likewise.evaluation.protocols.knn import KNNConfig, KNNGridConfig, knn_predict, search_knn_grid
from likewise.evaluation.protocols.localization import box_iou, localize, normalize_boxes
from likewise.evaluation.protocols.zero_shot import ZeroShotConfig, match_captions, zero_shot_predict
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


def test_the_grid_scores_each_setting_as_knn_itself_does() -> None:
    labels = torch.arange(90) % 4
    x = rows(90, 6) + torch.nn.functional.one_hot(labels, 6)
    settings = KNNGridConfig(ks=(1, 7, 500), temperatures=(0.05, 1.0))
    found = search_knn_grid(settings, (x[:60], labels[:60]), (x[60:], labels[60:]), 4)
    assert set(found) == {KNNConfig(k=k, temperature=t) for k in (1, 7, 500) for t in (0.05, 1.0)}
    for each, accuracy in found.items():
        predicted = knn_predict(each, x[:60], labels[:60], x[60:], 4)
        assert accuracy == pytest.approx(float((predicted == labels[60:]).double().mean()))


def test_clusters_of_separate_groups_agree_with_labels_and_those_of_noise_do_not() -> None:
    labels = np.arange(120) % 3
    apart = np.eye(3)[labels] * 9 + RNG.standard_normal((120, 3)) * 0.05
    found = evaluate_clustering(ClusteringConfig(num_restarts=20), apart, labels)
    assert found.nmi_per_restart.max() == pytest.approx(1)
    assert found.ari.value <= 1
    noise = evaluate_clustering(
        ClusteringConfig(num_restarts=3), RNG.standard_normal((300, 8)), np.arange(300) % 3
    )
    assert abs(noise.ari.value) < 0.05
    with pytest.raises(ValueError, match="two starts"):
        evaluate_clustering(ClusteringConfig(num_restarts=1), apart, labels)


def test_zero_shot_is_the_nearest_mean_of_sentences() -> None:
    words = {
        name: rows(1, 5, seed)[0]
        for seed, name in enumerate(("an owl here", "the owl", "an ox here", "the ox"))
    }
    projection = rows(7, 5, 9)
    language = TextAlignment(
        encode_text=lambda c: torch.stack([words[each] for each in c]), project_image=lambda x: x @ projection
    )
    features = rows(50, 7, 3)
    got = zero_shot_predict(
        ZeroShotConfig(prompts=("an {} here", "the {}")), features, ("owl", "ox"), language
    )
    for image, answer in zip(features.double(), got.tolist(), strict=True):
        scores = []
        for name in ("owl", "ox"):
            sentences = [words[f"an {name} here"].double(), words[f"the {name}"].double()]
            mean = torch.stack([s / s.norm() for s in sentences]).mean(dim=0)
            scores.append(float(torch.cosine_similarity(image @ projection.double(), mean, dim=0)))
        assert answer == int(np.argmax(scores))
    with pytest.raises(ValueError, match="template"):
        zero_shot_predict(ZeroShotConfig(prompts=("a photo",)), features, ("owl", "ox"), language)


def test_captions_and_images_find_each_other_as_a_loop_finds_them() -> None:
    images, owners = rows(20, 6), torch.from_numpy(RNG.integers(0, 20, 47))
    texts = images[owners] + rows(47, 6, 5)
    by_image, by_text = match_captions(images, texts, owners, (1, 3))
    similar = torch.cosine_similarity(images[:, None].double(), texts[None].double(), dim=2).numpy()
    for column, k in enumerate((1, 3)):
        for i in range(20):
            assert by_image[i, column] == (owners.numpy()[np.argsort(-similar[i])[:k]] == i).any()
        for j in range(47):
            assert by_text[j, column] == (int(owners[j]) in np.argsort(-similar[:, j])[:k])


def test_boxes_are_predicted_as_ridge_regression_does() -> None:
    x = RNG.standard_normal((80, 5)) @ RNG.standard_normal((5, 5)) + 3
    low = RNG.uniform(0, 0.4, (80, 2))
    boxes = np.concatenate([low, low + 0.3], axis=1) + x[:, :1] * 0.01
    held = np.arange(0, 60, 5)
    found = localize(x[:60], boxes[:60], x[60:], boxes[60:], held)
    kept = np.setdiff1d(np.arange(60), held)
    for penalty, score in found.sweep.items():
        energy = x[kept].var(axis=0).sum() / 5
        peer = Ridge(alpha=penalty * len(kept) * energy).fit(x[kept], boxes[kept])
        assert score == pytest.approx(box_iou(peer.predict(x[held]), boxes[held]).mean(), abs=1e-9)
    peer = Ridge(alpha=found.penalty * 60 * x[:60].var(axis=0).sum() / 5).fit(x[:60], boxes[:60])
    np.testing.assert_allclose(found.iou, box_iou(peer.predict(x[60:]), boxes[60:]), atol=1e-9)


def test_overlap_is_torchvisions() -> None:
    corners = RNG.uniform(0, 1, (2, 200, 2, 2))
    a, b = (np.concatenate([c.min(axis=1), c.max(axis=1)], axis=1) for c in corners)
    expected = torchvision.ops.box_iou(torch.from_numpy(a), torch.from_numpy(b)).diagonal().numpy()
    np.testing.assert_allclose(box_iou(a, b), expected, atol=1e-12)
    assert box_iou(np.array([[0.5, 0.5, 0.2, 0.9]]), np.array([[0.0, 0.0, 1.0, 1.0]])) == 0


def squares(folder: Path, count: int = 48) -> Path:
    """Write a set of bright squares, left or right, with their boxes in pixels."""
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


def test_pixels_become_shares_and_are_cut_at_the_edge(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    got = normalize_boxes(np.array([[20.0, 10, 250, 50]]), ["a.png"], tmp_path)
    np.testing.assert_allclose(got, [[0.1, 0.1, 1.0, 0.5]])
    np.testing.assert_allclose(
        normalize_boxes(np.array([[0.1, 0.2, 1.2, 1.0]]), ["absent"], tmp_path), [[0.1, 0.2, 1, 1]]
    )


def test_fine_tuning_learns_repeats_and_leaves_the_encoder_alone(tmp_path: Path) -> None:
    # Nothing but the shape of the class: the flips of training would exchange left and right.
    folder = tmp_path / "kinds"
    for i in range(60):
        split, kind = ("train" if i < 40 else "test"), ("dark", "light")[i % 2]
        place = folder / split / kind / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(RNG.normal(100 + 60 * (i % 2), 40, (40, 52, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place)
    images, encoder = open_labeled(folder), load_encoder("random:resnet10t", image_size=32)
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    part = {name: np.flatnonzero(images.splits == name) for name in ("train", "test")}
    settings = FineTuningConfig(epochs=4, batch_size=13)

    def run(workers: int) -> Tensor:
        cpu = torch.device("cpu")
        return fine_tune(
            settings, encoder, images, part["train"], part["test"], device=cpu, num_workers=workers
        )

    first = run(0)
    assert float((first.numpy() == images.labels[part["test"]]).mean()) > 0.9
    assert torch.equal(first, run(2))
    after = encoder.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_all_protocols_of_a_labelled_set_run_and_compare(tmp_path: Path) -> None:
    folder = squares(tmp_path / "squares", 180)
    names = ("knn-grid", "clustering", "finetune", "localisation")
    settings = ProtocolConfig(
        finetune=FineTuningConfig(epochs=1), clustering=ClusteringConfig(num_restarts=3)
    )
    for encoder in ("resnet10t", "resnet18"):
        out = tmp_path / encoder
        loaded = load_encoder(f"random:{encoder}", image_size=48)
        (result,) = evaluate(loaded, folder, names, config=settings, out=out).raw
        assert set(result["protocols"]) == set(names)
    box = result["protocols"]["localisation"]["scores"][0]
    assert box["metric"] == "mean IoU of boxes"
    images = open_labeled(folder)
    assert images.boxes is not None
    test = images.boxes[images.splits == "test"]
    usual = np.broadcast_to(images.boxes[images.splits == "train"].mean(axis=0), test.shape)
    assert box["value"] > box_iou(usual, test).mean() + 0.1
    rows = compare_metrics([read_results(tmp_path / name) for name in ("resnet10t", "resnet18")])
    tested = {row.baseline.metric: row.differences[0] for row in rows}
    assert tested["NMI"] is None
    assert tested["mean IoU of boxes"] is not None


@pytest.fixture(scope="module")
def clip_run(collection: CaptionDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = TrainConfig(
        method=CLIPOptions(text_width=64, text_layers=1),
        backbone="resnet10t",
        image_size=32,
        batch_size=32,
        max_steps=3,
    )
    return train(collection, tmp_path_factory.mktemp("clip") / "run", settings).path


@pytest.fixture(scope="module")
def captions(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the test emoji with two captions each, and rows that say nothing."""
    target = tmp_path_factory.mktemp("captions") / "captions.csv"
    with emoji.open() as stream:
        found = [row for row in csv.DictReader(stream) if row["split"] == "test"][:40]
    lines = [
        f"{emoji.parent / r['file']},{text}" for r in found for text in (r["caption"], f"a {r['caption']}")
    ]
    target.write_text("file,caption\n" + "\n".join(lines) + "\nnone.png,\n")
    return target


def test_a_run_with_a_text_tower_is_judged_by_words(clip_run: Path, captions: Path, emoji: Path) -> None:
    encoder = load_encoder(str(clip_run))
    assert encoder.text_alignment is not None
    tensors = load_tensors(clip_run / "encoder.safetensors")[0]
    x = rows(3, encoder.feature_dim)
    torch.testing.assert_close(
        encoder.text_alignment.project_image(x), x @ tensors["image_projection.weight"].T
    )
    words = encoder.text_alignment.encode_text(["a cat", "a dog", "a cat"])
    torch.testing.assert_close(words[0], words[2])
    assert not torch.allclose(words[0], words[1])
    (found,) = evaluate(clip_run, captions, ("image-text",)).raw
    assert found["dataset"]["num_captions"] == 80
    assert found["dataset"]["skipped"] == {"without a file or a caption": 1}
    scores = {s["metric"]: s for s in found["protocols"]["image-text"]["scores"]}
    assert scores["image to text recall@10"]["n"] == 40
    assert scores["text to image recall@10"]["n"] == 80
    assert 0 < scores["text to image recall@10"]["value"] < 1
    assert scores["text to image recall@1"]["value"] <= scores["text to image recall@10"]["value"]
    (named,) = evaluate(clip_run, emoji, ("zeroshot",), columns=ColumnOptions(label="category")).raw
    features = np.load(
        next((clip_run / "evaluation/features").glob(f"{named['dataset']['name']}-*/features.npy"))
    )
    images = open_labeled(emoji, label_column="category")
    test = images.splits == "test"
    sentences = [f"a photo of a {name}." for name in images.classes]
    space = torch.from_numpy(features[test]) @ tensors["image_projection.weight"].T
    answers = torch.cosine_similarity(
        space[:, None], encoder.text_alignment.encode_text(sentences)[None], dim=2
    ).argmax(dim=1)
    score = named["protocols"]["zeroshot"]["scores"][0]
    assert score["value"] == pytest.approx((answers.numpy() == images.labels[test]).mean())


def test_what_has_no_words_is_refused(tmp_path: Path, captions: Path) -> None:
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
    with pytest.raises(InvalidInputError, match="row 2: x0, y0, x1, y1 must be four numbers"):
        open_labeled(folder)


def test_a_box_without_area_is_counted_and_its_image_is_kept(tmp_path: Path) -> None:
    folder = squares(tmp_path / "squares", 12)
    table = folder / "labels.csv"
    lines = table.read_text().splitlines()
    lines[3] = ",".join([*lines[3].split(",")[:3], "5", "5", "5", "9"])
    table.write_text("\n".join(lines) + "\n")
    images = open_labeled(folder)
    assert list(images.skipped.values()) == [1]
    assert "row 4" in next(iter(images.skipped))
    assert len(images) == 12
    assert images.boxes is not None
    assert np.isnan(images.boxes).any(axis=1).sum() == 1


def test_the_report_speaks_of_every_protocol(clip_run: Path, captions: Path, tmp_path: Path) -> None:
    from likewise.evaluation.protocols import PROTOCOLS
    from likewise.report.results import PROTOCOL_TEXTS as WORDS
    from likewise.report.run_report import write_report

    assert set(WORDS) == set(PROTOCOLS)
    settings = ProtocolConfig(
        finetune=FineTuningConfig(epochs=1), clustering=ClusteringConfig(num_restarts=3)
    )
    names = ("knn-grid", "clustering", "finetune", "localisation", "zeroshot")
    evaluate(clip_run, squares(tmp_path / "squares", 60), names, config=settings)
    evaluate(clip_run, captions, ("image-text",))
    page = write_report([clip_run], tmp_path / "report.html").read_text()
    for text in ("kNN, tuned", "Clustering", "Fine-tuned", "a photo of a {}.", "80 captions", "box around"):
        assert text in page


def test_the_documentation_and_the_help_name_every_protocol_and_set() -> None:
    from likewise.cli.evaluation import evaluate as verb
    from likewise.evaluation.datasets.registry import DATASETS
    from likewise.evaluation.protocols import PROTOCOLS

    page = (Path(__file__).parents[2] / "docs/guide/evaluation.md").read_text()
    for name in PROTOCOLS:
        assert f"| `{name}` |" in page
        assert name in str(verb.__doc__)
    for name in DATASETS:
        assert name in page.split("## Protocols")[0]
