"""Training end to end on real images: the loss decreases, and resuming at any step changes nothing."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import likewise
from helpers.methods import InterruptAfter, InterruptedTrainingError
from likewise.data.config import ImportOptions
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import FilterRow, write_filter
from likewise.data.importing import import_dataset
from likewise.errors import ArtifactError, InvalidInputError, ModelError, TrainingError
from likewise.models.checkpoints import load_tensors
from likewise.pairs.config import PairConfig
from likewise.run_directory import RunDirectory
from likewise.training.config import TrainConfig
from likewise.training.train import Run, train
from support import save_png

# 207 images and a batch size of 32 give 6 steps per epoch: 8 steps end in the middle of the second.
TINY = TrainConfig(
    backbone="resnet10t", image_size=32, stem="default", batch_size=32, max_steps=8, base_lr=0.01
)


def test_trained_encoder_loads_and_returns_features(dataset: CaptionDataset, tmp_path: Path) -> None:
    """Read this first: train an encoder on language pairs and compute features with it."""
    config = likewise.TrainConfig(
        method="simclr", backbone="resnet10t", image_size=32, stem="default", batch_size=32, max_steps=2
    )
    run = likewise.train(dataset, tmp_path / "run", config, likewise.PairConfig(source="language", k=3))
    assert [row["step"] for row in run.metrics()] == [1, 2]
    encoder = likewise.load_encoder(run.path)
    image = dataset.root / str(dataset[0].image.path)
    assert encoder.encode([image]).shape == (1, 512)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run / "encoder.safetensors")[0]


def assert_equal_runs(run: Path, expected_run: Path) -> None:
    result, expected = weights(run), weights(expected_run)
    assert result.keys() == expected.keys()
    for name, tensor in result.items():
        assert torch.equal(tensor, expected[name]), name
    timed = {"images_per_second", "data_time_fraction"}
    for row, expected_row in zip(Run(run).metrics(), Run(expected_run).metrics(), strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in expected_row.items() if k not in timed
        }


@pytest.fixture(scope="module")
def finished_run(dataset: CaptionDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(dataset, tmp_path_factory.mktemp("runs") / "run", TINY).path


def test_loss_decreases_and_metrics_are_logged(dataset: CaptionDataset, finished_run: Path) -> None:
    rows = Run(finished_run).metrics()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert np.mean([r["loss"] for r in rows[-3:]]) < np.mean([r["loss"] for r in rows[:3]]) - 0.3
    # A random encoder gives the 63 other views nearly equal probabilities.
    assert rows[0]["loss"] == pytest.approx(np.log(63), abs=1.5)
    for name in ("effective_rank", "feature_std", "images_per_second", "data_time_fraction", "lr"):
        assert name in rows[0]
    assert list((finished_run / "tensorboard").iterdir())
    views = np.load(finished_run / "preview.npy")
    pairs = json.loads((finished_run / "preview.json").read_text())
    assert views.shape == (12, 2, 32, 32, 3)
    assert len(pairs) == 12
    assert all(pair["anchor"] != pair["partner"] for pair in pairs)
    assert all(dataset[pair["position"]].id == pair["anchor"] for pair in pairs)


def test_run_interrupted_within_an_epoch_resumes_to_the_same_weights(
    dataset: CaptionDataset, finished_run: Path, tmp_path: Path
) -> None:
    progress = InterruptAfter(3)
    with pytest.raises(InterruptedTrainingError):
        train(dataset, tmp_path / "run", TINY, checkpoint_minutes=0.0, num_workers=2, progress=progress)
    checkpoints = RunDirectory(tmp_path / "run").list_checkpoints()
    assert [path.name for path in checkpoints] == ["checkpoint-00000003.safetensors"]
    with pytest.raises(ArtifactError, match="unfinished|incomplete"):
        Run(tmp_path / "run")
    # With another number of threads, and checkpoints at other steps.
    train(dataset, tmp_path / "run", TINY, num_workers=0)
    assert_equal_runs(tmp_path / "run", finished_run)


def test_training_restores_the_global_rng_and_checkpoints_are_optional(
    dataset: CaptionDataset, finished_run: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    generator_state = torch.get_rng_state()
    train(dataset, tmp_path / "run", TINY, checkpoint_minutes=None)
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert RunDirectory(tmp_path / "run").list_checkpoints() == []
    assert_equal_runs(tmp_path / "run", finished_run)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_resumes_to_the_same_weights(
    dataset: CaptionDataset, finished_run: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    run = tmp_path / "run"
    flags = (
        "--backbone resnet10t --image-size 32 --stem default --batch-size 32 --max-steps 8 --base-lr 0.01 "
        "--quiet"
    )
    command = [
        sys.executable,
        "-m",
        "likewise.cli",
        "train",
        str(dataset.path),
        "--out",
        str(run),
        *flags.split(),
    ]
    process = subprocess.Popen([*command, "--checkpoint-minutes", "0"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not RunDirectory(run).list_checkpoints() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    if signum == signal.SIGINT:
        assert process.returncode == 130
        assert "stopped after step" in stderr
        assert "Traceback" not in stderr
    resumed = subprocess.run(command, check=True, capture_output=True, text=True)
    assert str(run) in resumed.stdout
    assert_equal_runs(run, finished_run)


def test_a_finished_run_is_a_no_op(dataset: CaptionDataset, finished_run: Path) -> None:
    mtimes = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    train(dataset, finished_run, TINY)
    assert {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")} == mtimes


def test_a_run_with_other_settings_raises(dataset: CaptionDataset, finished_run: Path) -> None:
    with pytest.raises(ArtifactError, match="backbone was resnet10t, is resnet14t"):
        train(dataset, finished_run, replace(TINY, backbone="resnet14t"))
    with pytest.raises(ArtifactError, match="seed was 0, is 1"):
        train(dataset, finished_run, replace(TINY, seed=1))


def test_initial_weights_depend_on_the_seed_but_not_on_the_pairs(
    dataset: CaptionDataset, tmp_path: Path
) -> None:
    one_step = replace(TINY, max_steps=1, base_lr=1e-30)
    initial = {
        name: weights(train(dataset, tmp_path / name, config, PairConfig(source=source)).path)[
            "conv1.0.weight"
        ]
        for name, config, source in (
            ("language", one_step, "language"),
            ("self", one_step, "self"),
            ("seed", replace(one_step, seed=1), "language"),
        )
    }
    torch.testing.assert_close(initial["self"], initial["language"])
    assert not torch.allclose(initial["seed"], initial["language"])


def test_training_starts_from_a_run_of_the_same_backbone(
    dataset: CaptionDataset, finished_run: Path, tmp_path: Path
) -> None:
    frozen = replace(TINY, max_steps=1, base_lr=1e-30, init=str(finished_run))
    result = weights(train(dataset, tmp_path / "more", frozen).path)
    torch.testing.assert_close(result["conv1.0.weight"], weights(finished_run)["conv1.0.weight"])
    with pytest.raises(ModelError, match="`backbone` is 'resnet14t'"):
        train(dataset, tmp_path / "other", replace(frozen, backbone="resnet14t"))
    with pytest.raises(ModelError, match="`init`"):
        train(dataset, tmp_path / "other", replace(frozen, init="nowhere"))
    assert not (tmp_path / "other").exists()


def test_non_finite_loss_raises_and_does_not_overwrite_the_last_checkpoint(
    dataset: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from likewise.training.methods import contrastive

    original, calls = contrastive.nt_xent_loss, []

    def break_fourth_step(*arguments):  # noqa: ANN002, ANN202
        calls.append(1)
        loss = original(*arguments)
        return loss * float("nan") if len(calls) == 4 else loss

    monkeypatch.setattr(contrastive, "nt_xent_loss", break_fourth_step)
    with pytest.raises(TrainingError, match=r"step 4 \(images .*27 more\).*checkpoint-00000003"):
        train(dataset, tmp_path / "run", TINY, checkpoint_minutes=0.0)
    tensors = load_tensors(RunDirectory(tmp_path / "run").list_checkpoints()[-1])[0]
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_invalid_settings_raise_before_the_run_directory_exists(
    dataset: CaptionDataset, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match="512.*at most 207") as excinfo:
        train(dataset, run, replace(TINY, batch_size=512))
    assert excinfo.value.field == "batch_size"
    with pytest.raises(ModelError, match="'resnet10'.*resnet10t"):
        train(dataset, run, replace(TINY, backbone="resnet10"))
    with pytest.raises(InvalidInputError, match="'simcrl'.*Did you mean simclr"):
        train(dataset, run, replace(TINY, method="simcrl"))
    with pytest.raises(InvalidInputError, match="`epochs` or `max_steps`"):
        replace(TINY, epochs=2)
    with pytest.raises(InvalidInputError, match="has a partner"):
        train(dataset, run, TINY, PairConfig(min_similarity=1.0, exclude_identical_captions=True))
    assert not run.exists()


def test_one_image_raises(tmp_path: Path) -> None:
    save_png(tmp_path / "images" / "one.png")
    dataset = import_dataset(tmp_path / "images", tmp_path / "c", ImportOptions())
    with pytest.raises(TrainingError, match="at least 2"):
        train(dataset, tmp_path / "run", TINY, PairConfig(source="self"))


def test_images_deleted_after_import_are_excluded_and_counted(emoji: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(emoji.parent, tmp_path / "pictures")
    dataset = import_dataset(
        tmp_path / "pictures" / "labels.csv", tmp_path / "c", ImportOptions(where=("split=train",))
    )
    for position in (0, 7):
        (dataset.root / str(dataset[position].image.path)).unlink()
    run = train(dataset, tmp_path / "run", replace(TINY, max_steps=2), PairConfig(source="self"))
    assert run.artifact.manifest.skipped == {"unreadable images": 2}
    assert run.artifact.manifest.counts["images"] == len(dataset) - 2


def test_filter_file_is_read_once_per_run(
    dataset: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from likewise.data import filters

    write_filter(tmp_path / "f.csv", [FilterRow(id=dataset[0].id, caption="", reason="test")])
    calls, read = [], filters.read_filter
    monkeypatch.setattr(filters, "read_filter", lambda *arguments: calls.append(1) or read(*arguments))
    config = TrainConfig(backbone="resnet10t", image_size=32, batch_size=32, max_steps=1)
    train(dataset, tmp_path / "run", config, PairConfig(filter=tmp_path / "f.csv"))
    assert len(calls) == 1
