"""What a run is made of, and how it is kept on disk."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from likewise.distributed import DistributedContext
from likewise.errors import TrainingError
from likewise.models.backbones import BackboneConfig
from likewise.models.checkpoints import load_state_dict_strict, load_tensors, save_encoder, save_tensors
from likewise.training.config import TrainSchedule
from likewise.training.loader import PairLoader
from likewise.training.methods.base import Method
from likewise.training.methods.image_text import text_state
from likewise.training.validation import PairRetrievalEvaluator

BEST_ENCODER_FILE = "encoder-best.safetensors"


def save_method_encoder(path: Path, method: Method, backbone_config: BackboneConfig) -> None:
    """Write what a method trains for: its backbone, and its text tower where it has one."""
    save_encoder(path, method.backbone, backbone_config, text_state(method))


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run is made of, once settings have been turned into things.

    Attributes:
        run_dir: Its folder.
        method: What is trained.
        backbone_config: What it takes to build its backbone again.
        ddp_method: The method, or what brings its gradients together over processes.
        optimizer: What moves the weights.
        loader: What is shown.
        schedule: Steps and rates.
        device: Where it is trained.
        dtype: What matrix products run in.
        seed: Decides what backbones draw.
        num_workers: Threads that make batches.
        checkpoint_minutes: How much work a kill may lose.
        dist: The processes of the run.
        evaluator: What scores the encoder on held-out pairs; None without them.
        early_stopping_patience: After how many scores without a better one to stop; None for never.
        image_id: What the image at a position is called.
    """

    run_dir: Path
    method: Method
    backbone_config: BackboneConfig
    ddp_method: nn.Module
    optimizer: Optimizer
    loader: PairLoader
    schedule: TrainSchedule
    device: torch.device
    dtype: torch.dtype
    seed: int
    num_workers: int
    checkpoint_minutes: float
    dist: DistributedContext
    evaluator: PairRetrievalEvaluator | None
    early_stopping_patience: int | None
    image_id: Callable[[int], str]


@dataclass(frozen=True)
class RunningTotals:
    """What has been added up on the device.

    Attributes:
        loss: Of the batches that taught something, since the last row of metrics.
        num_updates: How many those were.
        num_skipped: Batches that taught nothing, since the beginning of the run.
        first_nonfinite: The number, counted from 1, of the first step whose loss was no number; 0 while
            there was none.
    """

    loss: Tensor
    num_updates: Tensor
    num_skipped: Tensor
    first_nonfinite: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> "RunningTotals":
        """Return the sums of nothing."""
        return cls(*(torch.zeros((), device=device) for _ in range(4)))

    def add(self, loss: Tensor, skip_update: Tensor | None, step: int) -> "RunningTotals":
        """Add a step, counted from 1."""
        skipped = torch.zeros_like(self.num_skipped) if skip_update is None else skip_update
        is_first_nonfinite = (self.first_nonfinite == 0) & ~torch.isfinite(loss)
        return RunningTotals(
            self.loss + loss,
            self.num_updates + 1 - skipped,
            self.num_skipped + skipped,
            torch.where(
                is_first_nonfinite, torch.full_like(self.first_nonfinite, step), self.first_nonfinite
            ),
        )

    def reset_window(self) -> "RunningTotals":
        """Begin the sums of the next row of metrics."""
        return replace(self, loss=torch.zeros_like(self.loss), num_updates=torch.zeros_like(self.num_updates))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(run_dir.glob("checkpoint-*.safetensors"))


def save_checkpoint(
    train_state: TrainState, scaler: torch.amp.GradScaler, step: int, totals: RunningTotals
) -> None:
    """Write everything that going on needs, then drop the older checkpoint.

    Raises:
        TrainingError: where a weight is no number any more; the older checkpoint then stays.
    """
    param_sums = torch.stack([p.detach().sum() for p in train_state.method.parameters()])
    if not bool(torch.isfinite(param_sums).all()):
        raise TrainingError(
            f"weights are no longer numbers at step {step:,}; "
            f"{describe_last_checkpoint(train_state.run_dir)}. "
            "A lower --rate or --precision float32 often helps"
        )
    previous = list_checkpoints(train_state.run_dir)
    tensors = {f"model.{name}": value for name, value in train_state.method.state_dict().items()}
    for index, param_state in train_state.optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in param_state.items()
        }
    tensors |= {f"sums.{name}": value for name, value in vars(totals).items()}
    path = train_state.run_dir / f"checkpoint-{step:08d}.safetensors"
    save_tensors(path, tensors, {"kind": "checkpoint", "step": step, "scaler": scaler.state_dict()})
    for stale in previous:
        if stale != path:
            stale.unlink(missing_ok=True)


def describe_last_checkpoint(run_dir: Path) -> str:
    """Say which checkpoint there is to fall back on."""
    paths = list_checkpoints(run_dir)
    return f"the last good checkpoint is {paths[-1]}" if paths else "no checkpoint had been written yet"


def load_checkpoint(train_state: TrainState, scaler: torch.amp.GradScaler) -> tuple[int, RunningTotals]:
    """Take up the newest checkpoint of a run and return its step and sums; step 0 where there is none.

    Raises:
        ModelError: where its tensors do not fit the method.
    """
    paths = list_checkpoints(train_state.run_dir)
    if not paths:
        return 0, RunningTotals.zeros(train_state.device)
    tensors, metadata = load_tensors(paths[-1])
    load_state_dict_strict(train_state.method, _strip_prefix(tensors, "model."), str(paths[-1]))
    parameters = [p for group in train_state.optimizer.param_groups for p in group["params"]]
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _strip_prefix(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        optimizer_state.setdefault(int(index), {})[key] = _match_memory_format(parameters[int(index)], tensor)
    train_state.optimizer.load_state_dict(train_state.optimizer.state_dict() | {"state": optimizer_state})
    if metadata["scaler"]:
        scaler.load_state_dict(metadata["scaler"])
    totals = {name: value.to(train_state.device) for name, value in _strip_prefix(tensors, "sums.").items()}
    return int(metadata["step"]), RunningTotals(**totals)


def _strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _match_memory_format(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Give a moment the memory format of its parameter: the fused optimizer walks both by address."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
