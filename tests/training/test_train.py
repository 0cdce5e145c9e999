"""Training end to end on real pictures: what it learns, and that stopping anywhere changes nothing."""

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

from likewise.data.dataset import CaptionDataset
from likewise.data.importing import import_dataset
from likewise.data.readers.base import ImportOptions
from likewise.errors import ArtifactError, InvalidInputError, ModelError, TrainingError
from likewise.models.checkpoints import load_tensors
from likewise.pairs.config import PairConfig
from likewise.training import trainer as loop
from likewise.training.config import TrainConfig
from likewise.training.train import Run, train
from support import save_png

# 207 images and a batch of 32 make 6 steps an epoch: 8 steps end in the middle of the second.
TINY = TrainConfig(
    backbone="resnet10t", image_size=32, stem="default", batch_size=32, max_steps=8, base_lr=0.01
)


class StopAfterError(Exception):
    """Stands for a fault in the middle of training."""


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run / "encoder.safetensors")[0]


def assert_equal_runs(one: Path, two: Path) -> None:
    mine, other = weights(one), weights(two)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name
    timed = {"images_per_second", "data_wait"}
    for row, expected in zip(Run(one).metrics(), Run(two).metrics(), strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in expected.items() if k not in timed
        }


@pytest.fixture(scope="module")
def whole(collection: CaptionDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(collection, tmp_path_factory.mktemp("runs") / "whole", TINY).path


def test_loss_falls_and_everything_is_recorded(collection: CaptionDataset, whole: Path) -> None:
    rows = Run(whole).metrics()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert np.mean([r["loss"] for r in rows[-3:]]) < np.mean([r["loss"] for r in rows[:3]]) - 0.3
    # At random, one of 63 others is the partner.
    assert rows[0]["loss"] == pytest.approx(np.log(63), abs=1.5)
    for name in ("effective_rank", "spread", "images_per_second", "data_wait", "rate"):
        assert name in rows[0]
    assert list((whole / "tensorboard").iterdir())
    views = np.load(whole / "preview.npy")
    told = json.loads((whole / "preview.json").read_text())
    assert views.shape == (12, 2, 32, 32, 3)
    assert len(told) == 12
    assert all(pair["anchor"] != pair["partner"] for pair in told)
    assert all(collection[pair["position"]].id == pair["anchor"] for pair in told)


def test_resumed_in_mid_epoch_equals_uninterrupted(
    collection: CaptionDataset, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.save_checkpoint

    def save_then_fail(trainer, scaler, step, sums) -> None:  # noqa: ANN001
        original(trainer, scaler, step, sums)
        if step == 3:
            raise StopAfterError

    monkeypatch.setattr(loop, "save_checkpoint", save_then_fail)
    with pytest.raises(StopAfterError):
        train(collection, tmp_path / "run", TINY, checkpoint_minutes=0.0, num_workers=2)
    assert [p.name for p in loop.list_checkpoints(tmp_path / "run")] == ["checkpoint-00000003.safetensors"]
    with pytest.raises(ArtifactError, match="incomplete"):
        Run(tmp_path / "run")
    monkeypatch.undo()
    # Another number of threads, and checkpoints at other steps.
    train(collection, tmp_path / "run", TINY, num_workers=0)
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again_equals_uninterrupted(
    collection: CaptionDataset, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    flags = "--backbone resnet10t --size 32 --stem standard --batch-size 32 --steps 8 --rate 0.01 --quiet"
    command = [
        sys.executable,
        "-m",
        "likewise.cli",
        "train",
        str(collection.path),
        "--out",
        str(run),
        *flags.split(),
    ]
    process = subprocess.Popen([*command, "--checkpoint-minutes", "0"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not loop.list_checkpoints(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "run the same command again" in told
        assert "Traceback" not in told
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert str(run) in again.stdout
    assert_equal_runs(run, whole)


def test_a_finished_run_is_left_alone(collection: CaptionDataset, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    train(collection, whole, TINY)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_other_settings_or_seed_never_mix(collection: CaptionDataset, whole: Path) -> None:
    with pytest.raises(ArtifactError, match="backbone was resnet10t, is resnet14t"):
        train(collection, whole, replace(TINY, backbone="resnet14t"))
    with pytest.raises(ArtifactError, match="seed was 0, is 1"):
        train(collection, whole, replace(TINY, seed=1))


def test_both_arms_start_alike_and_seeds_differ(collection: CaptionDataset, tmp_path: Path) -> None:
    one_step = replace(TINY, max_steps=1, base_lr=1e-30)
    start = {
        name: weights(train(collection, tmp_path / name, settings, PairConfig(source=pairs)).path)[
            "conv1.0.weight"
        ]
        for name, settings, pairs in (
            ("language", one_step, "language"),
            ("self", one_step, "self"),
            ("seed", replace(one_step, seed=1), "language"),
        )
    }
    torch.testing.assert_close(start["self"], start["language"])
    assert not torch.allclose(start["seed"], start["language"])


def test_training_goes_on_from_a_run_and_refuses_another_backbone(
    collection: CaptionDataset, whole: Path, tmp_path: Path
) -> None:
    still = replace(TINY, max_steps=1, base_lr=1e-30, init=str(whole))
    moved = weights(train(collection, tmp_path / "more", still).path)
    torch.testing.assert_close(moved["conv1.0.weight"], weights(whole)["conv1.0.weight"])
    with pytest.raises(ModelError, match="do not fit this model.*missing"):
        train(collection, tmp_path / "other", replace(still, backbone="resnet14t"))
    with pytest.raises(ModelError, match="no such weights"):
        train(collection, tmp_path / "other", replace(still, init="nowhere"))
    assert not (tmp_path / "other").exists()


def test_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    collection: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from likewise.training.methods import contrastive

    original, calls = contrastive.nt_xent_loss, []

    def breaks(*arguments):  # noqa: ANN002, ANN202
        calls.append(1)
        loss = original(*arguments)
        return loss * float("nan") if len(calls) == 4 else loss

    monkeypatch.setattr(contrastive, "nt_xent", breaks)
    with pytest.raises(
        TrainingError, match=r"no longer a number, at step 4 \(images .*27 more\).*checkpoint-00000003"
    ):
        train(collection, tmp_path / "run", TINY, checkpoint_minutes=0.0)
    kept = load_tensors(loop.list_checkpoints(tmp_path / "run")[-1])[0]
    assert all(torch.isfinite(t).all() for t in kept.values() if t.is_floating_point())


def test_bad_settings_are_refused_before_anything_is_made(collection: CaptionDataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(
        TrainingError, match="207 usable images, fewer than a batch of 512; use --batch-size 207"
    ):
        train(collection, run, replace(TINY, batch_size=512))
    with pytest.raises(ModelError, match="unknown backbone 'resnet10'.*Did you mean.*resnet10t"):
        train(collection, run, replace(TINY, backbone="resnet10"))
    with pytest.raises(InvalidInputError, match="unknown method 'simcrl'.*Did you mean simclr"):
        train(collection, run, replace(TINY, method="simcrl"))
    with pytest.raises(InvalidInputError, match="--epochs or --steps, not both"):
        replace(TINY, epochs=2)
    with pytest.raises(InvalidInputError, match="no image .* has a partner .*loosen the rule"):
        train(collection, run, TINY, PairConfig(min_similarity=1.0, exclude_identical_captions=True))
    assert not run.exists()


def test_one_image_is_too_few(tmp_path: Path) -> None:
    save_png(tmp_path / "images" / "one.png")
    one = import_dataset(tmp_path / "images", tmp_path / "c", ImportOptions())
    with pytest.raises(TrainingError, match="1 usable images.*at least 2"):
        train(one, tmp_path / "run", TINY, PairConfig(source="self"))


def test_images_lost_since_import_are_left_out_and_counted(emoji: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(emoji.parent, tmp_path / "pictures")
    made = import_dataset(
        tmp_path / "pictures" / "labels.csv", tmp_path / "c", ImportOptions(where=("split=train",))
    )
    for position in (0, 7):
        (made.root / str(made[position].image.path)).unlink()
    run = train(made, tmp_path / "run", replace(TINY, max_steps=2), PairConfig(source="self"))
    assert run.artifact.manifest.skipped == {"no longer readable": 2}
    assert run.artifact.manifest.counts["images"] == len(made) - 2
