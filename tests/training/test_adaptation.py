"""Adaptation of a pretrained encoder: adapter, loss, choice of the blend, and the encoder file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import likewise
from likewise.data.dataset import CaptionDataset
from likewise.errors import InvalidInputError, ModelError, TrainingError
from likewise.models.adapter import FeatureAdapter
from likewise.models.encoders import load_encoder
from likewise.training import adaptation
from likewise.training.adapt_config import AdaptConfig, AdapterOptions, parse_adapt_config
from likewise.training.adaptation import adapt
from likewise.training.feature_adapter import feature_moments
from likewise.training.losses import soft_target_loss
from support import save_png

START = "random:resnet10t"
SMALL = AdaptConfig(
    level=AdapterOptions(hidden_dim=16),
    batch_size=32,
    max_steps=6,
    projector_dims=(32, 16),
    num_val_pairs=20,
)


@pytest.fixture(scope="module")
def start() -> likewise.ImageEncoder:
    return load_encoder(START, image_size=32)


@pytest.fixture(scope="module")
def run(
    dataset: CaptionDataset, start: likewise.ImageEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return adapt(dataset, start, tmp_path_factory.mktemp("adapt") / "run", SMALL).path


def test_adapt_an_encoder(dataset: CaptionDataset, start: likewise.ImageEncoder, run: Path) -> None:
    """Read this first: adapt an encoder, and use the result like any other encoder."""
    outcome = json.loads((run / "adaptation.json").read_text())
    encoder = likewise.load_encoder(run)
    features, start_features = (
        e.encode([dataset.root / str(dataset[0].image.path)]) for e in (encoder, start)
    )
    assert features.shape == start_features.shape == (1, 512)
    assert encoder.transform == start.transform
    is_start = torch.allclose(features, start_features, atol=1e-5)
    assert is_start == (outcome["blend"] == 0)
    assert [score["blend"] for score in outcome["scores"]] == [0, 0.25, 0.5, 0.75, 1]
    assert [row["step"] for row in likewise.Run(run).metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_second_call_changes_nothing(
    dataset: CaptionDataset, start: likewise.ImageEncoder, run: Path
) -> None:
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    adapt(dataset, start, run, SMALL)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == files


def test_an_interrupted_run_ends_with_the_same_bytes(
    dataset: CaptionDataset,
    start: likewise.ImageEncoder,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(adaptation, "choose_blend", interrupt)
        adapt(dataset, start, tmp_path / "run", SMALL)
    adapt(dataset, start, tmp_path / "run", SMALL)
    for name in ("encoder.safetensors", "adaptation.json", "metrics.jsonl", "artifact.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes(), name


def test_a_useless_adapter_is_rejected(
    dataset: CaptionDataset, start: likewise.ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that maps all images to one point must not replace the start."""

    def train_collapsed(*_: object) -> FeatureAdapter:
        adapter = FeatureAdapter(start.feature_dim, 8)
        torch.nn.init.constant_(adapter.up.bias, 1e9)
        return adapter.eval().requires_grad_(False)

    monkeypatch.setattr(adaptation, "train_adapter", train_collapsed)
    run = adapt(dataset, start, tmp_path / "run", SMALL)
    outcome = json.loads((run.path / "adaptation.json").read_text())
    assert outcome["blend"] == 0
    image = dataset.root / str(dataset[0].image.path)
    torch.testing.assert_close(load_encoder(run).encode([image]), start.encode([image]))


def test_retention_bounds_the_blend(
    dataset: CaptionDataset, start: likewise.ImageEncoder, tmp_path: Path
) -> None:
    """No blend may lose more than allowed; with an impossible bound the start is kept."""
    run = adapt(dataset, start, tmp_path / "run", replace(SMALL, max_retention_loss=0.0), retain=dataset)
    outcome = json.loads((run.path / "adaptation.json").read_text())
    retention = {score["blend"]: score["retention"] for score in outcome["scores"]}
    assert retention[outcome["blend"]] >= retention[0]


def test_self_pairs_need_no_captions(
    dataset: CaptionDataset, start: likewise.ImageEncoder, tmp_path: Path
) -> None:
    run = adapt(dataset, start, tmp_path / "run", SMALL, likewise.PairConfig(source="self"))
    assert likewise.Run(run.path).metrics()[-1]["step"] == SMALL.max_steps


@pytest.mark.parametrize(
    ("overrides", "field"),
    [({"batch_size": 1000}, "batch_size"), ({"num_val_pairs": 5000}, "num_val_pairs")],
)
def test_too_few_images(
    overrides: dict[str, Any],
    field: str,
    dataset: CaptionDataset,
    start: likewise.ImageEncoder,
    tmp_path: Path,
) -> None:
    with pytest.raises(TrainingError) as error:
        adapt(dataset, start, tmp_path / "run", replace(SMALL, **overrides))
    assert error.value.field == field
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("input_dropout", 1.0), ("lr", 0.0), ("batch_size", 1), ("caption_weight", -1.0)]
)
def test_config_ranges(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        parse_adapt_config({field: value})
    assert error.value.field == field


def test_retention_needs_labels(
    start: likewise.ImageEncoder, dataset: CaptionDataset, tmp_path: Path
) -> None:
    for i in range(3):
        save_png(tmp_path / "photos" / f"{i}.png")
    unlabeled = likewise.import_dataset(tmp_path / "photos", tmp_path / "unlabeled")
    with pytest.raises(InvalidInputError) as error:
        adapt(dataset, start, tmp_path / "run", SMALL, retain=unlabeled)
    assert error.value.field == "retain"


def test_a_start_that_changed_is_refused(
    dataset: CaptionDataset, start: likewise.ImageEncoder, tmp_path: Path
) -> None:
    """The file of an adapter whose start timm does not build refers to the start by its fingerprint."""
    referenced = replace(start, backbone_config=None, fingerprint="0" * 16)
    run = adapt(dataset, referenced, tmp_path / "run", SMALL)
    with pytest.raises(ModelError, match="changed"):
        load_encoder(run)


def test_adapter_starts_as_the_identity_and_blends_linearly() -> None:
    torch.manual_seed(0)
    adapter, features = FeatureAdapter(12, 5), torch.randn(7, 12)
    assert torch.equal(adapter(features), features)
    torch.nn.init.normal_(adapter.up.weight)
    torch.nn.init.normal_(adapter.up.bias)
    adapted = adapter(features)
    torch.testing.assert_close(adapter.scale_residual_(0.3)(features), 0.7 * features + 0.3 * adapted)


def test_feature_moments_equal_numpy() -> None:
    vectors = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    indices = np.arange(5, 45)
    mean, std = feature_moments(vectors, indices, block_size=7)
    np.testing.assert_allclose(mean, vectors[indices].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, vectors[indices].std(axis=0), rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_soft_target_loss_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, keys = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    tensor = torch.from_numpy(queries).requires_grad_()
    loss = soft_target_loss(tensor, torch.from_numpy(keys), 0.2, 0.5)
    loss.backward()

    def reference(values: np.ndarray) -> float:
        q = values / np.linalg.norm(values, axis=1, keepdims=True)
        k = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        total = 0.0
        for i in range(6):
            target = np.exp([k[i] @ k[j] / 0.5 for j in range(6)])
            logits = np.array([q[i] @ k[j] / 0.2 for j in range(6)])
            log_probs = logits - np.log(np.exp(logits).sum())
            total -= (target / target.sum()) @ log_probs
        return total / 6

    assert float(loss.detach()) == pytest.approx(reference(queries), rel=1e-9)
    step = 1e-6 * rng.normal(size=queries.shape)
    numeric = (reference(queries + step) - reference(queries - step)) / 2
    assert tensor.grad is not None
    assert float((tensor.grad * torch.from_numpy(step)).sum()) == pytest.approx(numeric, rel=1e-4)
