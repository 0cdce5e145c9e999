"""Segmentation: metrics against scikit-learn, validation of masks, training of the head."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import jaccard_score

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.segmentation import open_segmentation
from likewise.evaluation.evaluate import ColumnOptions, evaluate
from likewise.evaluation.protocols import ProtocolConfig
from likewise.evaluation.protocols.segmentation import (
    SegmentationConfig,
    bootstrap_metrics,
    confusion_matrix,
    per_class_iou,
    run_segmentation,
    segmentation_metrics,
)
from likewise.models.encoders import load_encoder

RNG = np.random.default_rng(0)
CPU = torch.device("cpu")


def test_metrics_match_scikit_learn() -> None:
    for _ in range(20):
        target, pred = RNG.integers(-1, 4, (9, 13)), RNG.integers(0, 4, (9, 13))
        counts = confusion_matrix(target, pred, 6)
        mask = target >= 0
        expected = sklearn_confusion_matrix(target[mask], pred[mask], labels=range(6))
        np.testing.assert_array_equal(counts, expected)
        present = np.union1d(target[mask], pred[mask])
        scores = jaccard_score(target[mask], pred[mask], labels=present, average=None)
        np.testing.assert_allclose(per_class_iou(counts.astype(float))[present], scores)
        metrics = segmentation_metrics(counts.astype(float))
        assert float(metrics["mean IoU"]) == pytest.approx(scores.mean())
        assert float(metrics["pixel accuracy"]) == pytest.approx((target[mask] == pred[mask]).mean())


def test_bootstrap_resamples_sum_the_confusion_matrices_of_their_images() -> None:
    counts = RNG.integers(0, 50, (7, 3, 3))
    resampled = bootstrap_metrics(counts, 5, seed=3)
    rows = np.random.default_rng(3).multinomial(7, np.full(7, 1 / 7), size=5)
    for i, image_counts in enumerate(rows):
        total = np.stack([counts[j] * image_counts[j] for j in range(7)]).sum(axis=0).astype(float)
        assert resampled["mean IoU"][i] == pytest.approx(float(segmentation_metrics(total)["mean IoU"]))


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images of two classes, dark and light, with an unlabeled border."""
    root = tmp_path_factory.mktemp("segment") / "halves"
    for i in range(30):
        folder = root / ("train" if i < 22 else "val")
        for subfolder in ("images", "masks"):
            (folder / subfolder).mkdir(parents=True, exist_ok=True)
        mask = np.zeros((48, 72), np.uint8)
        x, y = RNG.integers(0, 40), RNG.integers(0, 20)
        mask[y : y + 28, x : x + 32] = 1
        pixels = np.clip(RNG.normal(60 + 120 * mask[..., None], 20, (48, 72, 3)), 0, 255).astype(np.uint8)
        mask[:2] = 9
        Image.fromarray(pixels).save(folder / f"images/{i:02d}.png")
        Image.fromarray(mask).save(folder / f"masks/{i:02d}.png")
    return root


@pytest.mark.parametrize("finetune_backbone", [False, True])
def test_head_learns_and_does_not_modify_the_encoder(halves: Path, finetune_backbone: bool) -> None:
    encoder, images = load_encoder("random:resnet10t", image_size=64), open_segmentation(halves, (9,))
    assert images.classes == ("0", "1")
    assert (images.splits == "test").sum() == 8
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    config = (
        SegmentationConfig(finetune_backbone=True, image_size=96, epochs=12, backbone_lr=1e-3)
        if finetune_backbone
        else SegmentationConfig(image_size=128, epochs=30, lr=0.01)
    )
    result = run_segmentation(config, encoder, images, device=CPU, num_workers=0)
    confusion = result.confusion.sum(axis=0).astype(float)
    # Predicting the larger class everywhere would give 0.37 or less.
    assert float(segmentation_metrics(confusion)["mean IoU"]) > 0.6
    assert confusion.sum() == 8 * 46 * 72
    if not finetune_backbone:
        repeated = run_segmentation(config, encoder, images, device=CPU, num_workers=2)
        np.testing.assert_array_equal(result.confusion, repeated.confusion)
    after = encoder.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_segmentation_from_a_table_counts_skipped_masks(halves: Path, tmp_path: Path) -> None:
    lines = ["file,mask,split"]
    for split in ("train", "val"):
        images = sorted((halves / split / "images").iterdir())
        lines += [f"{image},{halves / split / 'masks' / image.name},{split}" for image in images]
    Image.new("L", (10, 10)).save(tmp_path / "small.png")
    first = lines[1].split(",")[0]
    lines += [f"{first},{tmp_path / 'small.png'},train", f"{first},{tmp_path / 'none.png'},train"]
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "classes.txt").write_text("0 dark\n1 light\n")
    config = ProtocolConfig(segmentation=SegmentationConfig(image_size=64, epochs=1))
    (result,) = evaluate(
        load_encoder("random:resnet10t", image_size=64),
        tmp_path,
        ("segmentation",),
        config=config,
        columns=ColumnOptions(ignore_index=(9,)),
        out=tmp_path / "out",
    ).raw
    skipped = result["dataset"]["skipped"]
    assert list(skipped.values()) == [1, 1]
    assert any(reason.startswith("masks whose size differs") for reason in skipped)
    scores = result["protocols"]["segmentation"]["scores"]
    assert [score["metric"] for score in scores] == ["mean IoU", "pixel accuracy"]
    assert set(scores[0]["details"]["per_class"]) == {"dark", "light"}
    assert scores[0]["low"] <= scores[0]["value"] <= scores[0]["high"]


def test_invalid_masks_raise(halves: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist"):
        open_segmentation(tmp_path / "absent")
    with pytest.raises(InvalidInputError, match="holds neither"):
        open_segmentation(tmp_path)
    (tmp_path / "index.csv").write_text("file,split\na.png,train\n")
    with pytest.raises(InvalidInputError, match="no column 'mask'"):
        open_segmentation(tmp_path)
    Image.new("RGB", (72, 48)).save(tmp_path / "color.png")
    image = halves / "train/images/00.png"
    (tmp_path / "index.csv").write_text(f"file,mask,split\n{image},color.png,train\n")
    with pytest.raises(InvalidInputError, match="no train images.*mode RGB"):
        open_segmentation(tmp_path)
    mask, other = halves / "train/masks/00.png", halves / "train/images/01.png"
    (tmp_path / "index.csv").write_text(f"file,mask,split\n{image},{mask},train\n{other},{mask},test\n")
    (tmp_path / "classes.txt").write_text("dark\nlight\n")
    with pytest.raises(InvalidInputError, match="class 9;.*`ignore_index`"):
        open_segmentation(tmp_path)
    assert open_segmentation(tmp_path, (9,)).classes == ("dark", "light")
