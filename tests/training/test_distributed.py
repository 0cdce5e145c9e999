"""Several processes do what one does: the same loss, the same gradients, the same weights."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ranks
from likewise.data.dataset import CaptionDataset
from likewise.distributed import DistributedContext
from likewise.errors import TrainingError
from likewise.models.checkpoints import load_tensors
from likewise.training import trainer as loop
from likewise.training.config import TrainConfig
from likewise.training.train import Run, train

FLAGS = (
    "--backbone resnet10t --size 32 --stem standard --batch-size 31 --steps 4 --rate 0.001 --method moco "
    "--queue 64 --head 32 16 --quiet --workers 1 --precision float32"
)
SAME = TrainConfig(
    backbone="resnet10t",
    image_size=32,
    stem="default",
    batch_size=31,
    max_steps=4,
    base_lr=0.001,
    method="moco",
    memory_bank_size=64,
    projector_dims=(32, 16),
    precision="fp32",
)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(*command: str, count: int = 2) -> list[str]:
    """Start `count` processes as torchrun does, wait for them, and return what they wrote to stderr."""
    port = free_port()
    started = []
    for rank in range(count):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        started.append(
            subprocess.Popen([sys.executable, *command], env=env, stderr=subprocess.PIPE, text=True)
        )
    told = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n".join(told)
    return told


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("ranks") / "two.safetensors"
    launch(str(Path(ranks.__file__)), str(out))
    return load_file(out)


@pytest.mark.parametrize("name", ranks.VARIANTS)
def test_two_processes_have_the_loss_and_gradients_of_one(
    name: str, together: dict[str, torch.Tensor]
) -> None:
    alone = ranks.one_step(name, 0, 1)
    mine = {key: value for key, value in together.items() if key.startswith(f"{name}/")}
    assert mine.keys() == alone.keys()
    assert any("gradient" in key for key in alone)
    scale = max(float(v.abs().max()) for k, v in alone.items() if "gradient" in k)
    for key, expected in alone.items():
        atol, rtol = (1e-4 * scale, 1e-3) if "gradient" in key else (1e-5, 1e-4)
        torch.testing.assert_close(mine[key], expected, atol=atol, rtol=rtol)


def test_parts_of_a_batch_are_all_of_it_once() -> None:
    for rows in (1, 7, 8, 31):
        parts = [DistributedContext(rank, 3).local_slice(rows) for rank in range(3)]
        assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
        assert DistributedContext(0, 3).shard_sizes(rows) == tuple(len(range(rows)[part]) for part in parts)


def test_a_run_of_one_process_goes_on_with_two(
    collection: CaptionDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(collection, tmp_path / "whole", SAME)
    original = loop.save_checkpoint

    def save_then_fail(trainer, scaler, step, sums) -> None:  # noqa: ANN001
        original(trainer, scaler, step, sums)
        if step == 2:
            raise TrainingError("stopped on purpose")

    monkeypatch.setattr(loop, "save_checkpoint", save_then_fail)
    with pytest.raises(TrainingError, match="on purpose"):
        train(collection, tmp_path / "run", SAME, checkpoint_minutes=0.0)
    monkeypatch.undo()
    command = ["-m", "likewise.cli", "train", str(collection.path), "--out", str(tmp_path / "run")]
    told = launch(*command, *FLAGS.split())
    assert "Traceback" not in "".join(told)
    assert "Warning" not in "".join(told)
    rows, expected = Run(tmp_path / "run").metrics(), whole.metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2, 3, 4]
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    mine, theirs = (load_tensors(run / "encoder.safetensors")[0] for run in (tmp_path / "run", whole.path))
    for name, tensor in theirs.items():
        if tensor.is_floating_point():
            # Adam makes steps of equal length of the smallest gradients, rounding included.
            assert (mine[name] - tensor).abs().mean() < 1e-3 * (1 + tensor.abs().mean()), name


def test_shared_batch_norm_keeps_the_names_of_weights() -> None:
    from likewise.distributed import convert_to_sync_batchnorm

    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4, affine=False))
    )
    names = list(model.state_dict())
    convert_to_sync_batchnorm(model, torch.device("cpu"))
    assert list(model.state_dict()) == names
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
