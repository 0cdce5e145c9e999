"""Distributed training: several processes compute the loss, gradients and weights of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers import distributed_worker
from helpers.methods import VARIANTS, InterruptAfter, InterruptedTrainingError, train_step
from likewise.data.dataset import CaptionDataset
from likewise.distributed import DistributedContext, convert_to_sync_batchnorm
from likewise.models.checkpoints import load_tensors
from likewise.training.config import TrainConfig
from likewise.training.methods.options import MoCoOptions
from likewise.training.train import Run, train

FLAGS = (
    "--backbone resnet10t --image-size 32 --stem default --batch-size 31 --max-steps 4 --base-lr 0.001 "
    "--method moco --memory-bank-size 64 --projector-dims 32 16 --quiet --num-workers 1 --precision fp32"
)
CONFIG = TrainConfig(
    backbone="resnet10t",
    image_size=32,
    stem="default",
    batch_size=31,
    max_steps=4,
    base_lr=0.001,
    method=MoCoOptions(memory_bank_size=64, projector_dims=(32, 16)),
    precision="fp32",
)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def torchrun(*command: str, world_size: int = 2) -> list[str]:
    """Run a command in `world_size` processes, as torchrun does, and return their standard errors."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen([sys.executable, *command], env=env, stderr=subprocess.PIPE, text=True)
        )
    stderrs = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(stderrs)
    return stderrs


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return loss, gradients and buffers of every method after one step in two processes."""
    out = tmp_path_factory.mktemp("distributed") / "two.safetensors"
    torchrun(str(Path(distributed_worker.__file__)), str(out))
    return load_file(out)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_compute_the_loss_and_gradients_of_one(
    name: str, two_processes: dict[str, torch.Tensor]
) -> None:
    expected = train_step(name, DistributedContext())
    results = {key: value for key, value in two_processes.items() if key.startswith(f"{name}/")}
    assert results.keys() == expected.keys()
    assert any("gradient" in key for key in expected)
    scale = max(float(v.abs().max()) for k, v in expected.items() if "gradient" in k)
    for key, value in expected.items():
        atol, rtol = (1e-4 * scale, 1e-3) if "gradient" in key else (1e-5, 1e-4)
        torch.testing.assert_close(results[key], value, atol=atol, rtol=rtol)


def test_local_slices_partition_the_batch() -> None:
    for n in (1, 7, 8, 31):
        slices = [DistributedContext(rank, 3).local_slice(n) for rank in range(3)]
        assert [row for part in slices for row in range(n)[part]] == list(range(n))
        assert DistributedContext(0, 3).shard_sizes(n) == tuple(len(range(n)[part]) for part in slices)


def test_a_run_of_one_process_resumes_with_two(dataset: CaptionDataset, tmp_path: Path) -> None:
    expected_run = train(dataset, tmp_path / "expected", CONFIG)
    with pytest.raises(InterruptedTrainingError):
        train(dataset, tmp_path / "run", CONFIG, checkpoint_minutes=0.0, progress=InterruptAfter(2))
    command = ["-m", "likewise.cli", "train", str(dataset.path), "--out", str(tmp_path / "run")]
    stderrs = torchrun(*command, *FLAGS.split())
    assert "Traceback" not in "".join(stderrs)
    assert "Warning" not in "".join(stderrs)
    rows, expected_rows = Run(tmp_path / "run").metrics(), expected_run.metrics()
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows] == [1, 2, 3, 4]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-3)
    weights, expected = (
        load_tensors(run / "encoder.safetensors")[0] for run in (tmp_path / "run", expected_run.path)
    )
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            # Adam's steps have the same length for the smallest gradients, rounding errors included.
            assert (weights[name] - tensor).abs().mean() < 1e-3 * (1 + tensor.abs().mean()), name


def test_sync_batch_norm_does_not_rename_weights() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4, affine=False))
    )
    names = list(model.state_dict())
    convert_to_sync_batchnorm(model, torch.device("cpu"))
    assert list(model.state_dict()) == names
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def test_two_processes_adapt_an_encoder_as_one(dataset: CaptionDataset, tmp_path: Path) -> None:
    flags = (
        "--encoder random:resnet10t --image-size 32 --level full --precision fp32 --batch-size 15 "
        "--max-steps 3 --projector-dims 32 16 --num-val-pairs 20 --frozen-fraction 0 --quiet"
    )
    command = ["-m", "likewise.cli", "adapt", str(dataset.path), *flags.split(), "--out"]
    torchrun(*command, str(tmp_path / "two"))
    torchrun(*command, str(tmp_path / "one"), world_size=1)
    one, two = (Run(tmp_path / name) for name in ("one", "two"))
    for row, other in zip(one.metrics(), two.metrics(), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert other["anchor_distance"] == pytest.approx(row["anchor_distance"], rel=0.05, abs=1e-6)
    assert two.encoder_path.is_file()
