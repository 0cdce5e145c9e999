"""What a run is made of, and how it is kept on disk."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from likewise.distributed import Processes
from likewise.errors import TrainingError
from likewise.models.backbones import BackboneSpec
from likewise.models.checkpoints import load_strictly, load_tensors, save_encoder, save_tensors
from likewise.training.config import Plan
from likewise.training.loader import PairBatches
from likewise.training.methods.base import Method
from likewise.training.methods.image_text import language_of
from likewise.training.validation import PairScorer

BEST = "encoder-best.safetensors"


def keep_encoder(path: Path, method: Method, spec: BackboneSpec) -> None:
    """Write what a method trains for: its backbone, and its text tower where it has one."""
    save_encoder(path, method.backbone, spec, language_of(method))


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What a run is made of, once settings have been turned into things.

    Attributes:
        run: Its folder.
        method: What is trained.
        spec: What it takes to build its backbone again.
        stepper: The method, or what brings its gradients together over processes.
        optimizer: What moves the weights.
        batches: What is shown.
        plan: Steps and rates.
        device: Where it is trained.
        dtype: What matrix products run in.
        seed: Decides what backbones draw.
        workers: Threads that make batches.
        checkpoint_minutes: How much work a kill may lose.
        among: The processes of the run.
        scorer: What scores the encoder on held-out pairs; None without them.
        patience: After how many scores without a better one to stop; None for never.
        name: What the image at a position is called.
    """

    run: Path
    method: Method
    spec: BackboneSpec
    stepper: nn.Module
    optimizer: Optimizer
    batches: PairBatches
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    seed: int
    workers: int
    checkpoint_minutes: float
    among: Processes
    scorer: PairScorer | None
    patience: int | None
    name: Callable[[int], str]


@dataclass(frozen=True)
class Sums:
    """What has been added up on the device.

    Attributes:
        loss: Of the batches that taught something, since the last row of metrics.
        taught: How many those were.
        skipped: Batches that taught nothing, since the beginning of the run.
        bad: The number, counted from 1, of the first step whose loss was no number; 0 while there was none.
    """

    loss: Tensor
    taught: Tensor
    skipped: Tensor
    bad: Tensor

    @classmethod
    def zero(cls, device: torch.device) -> "Sums":
        """Return the sums of nothing."""
        return cls(*(torch.zeros((), device=device) for _ in range(4)))

    def add(self, loss: Tensor, skip: Tensor | None, number: int) -> "Sums":
        """Add a step, counted from 1."""
        missed = torch.zeros_like(self.skipped) if skip is None else skip
        fault = (self.bad == 0) & ~torch.isfinite(loss)
        return Sums(
            self.loss + loss,
            self.taught + 1 - missed,
            self.skipped + missed,
            torch.where(fault, torch.full_like(self.bad, number), self.bad),
        )

    def next_row(self) -> "Sums":
        """Begin the sums of the next row of metrics."""
        return replace(self, loss=torch.zeros_like(self.loss), taught=torch.zeros_like(self.taught))


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(run.glob("checkpoint-*.safetensors"))


def save_checkpoint(trainer: Trainer, scaler: torch.amp.GradScaler, step: int, sums: Sums) -> None:
    """Write everything that going on needs, then drop the older checkpoint.

    Raises:
        TrainingError: where a weight is no number any more; the older checkpoint then stays.
    """
    parameters = torch.stack([p.detach().sum() for p in trainer.method.parameters()])
    if not bool(torch.isfinite(parameters).all()):
        raise TrainingError(
            f"weights are no longer numbers at step {step:,}; {last_good(trainer.run)}. "
            "A lower --rate or --precision float32 often helps"
        )
    older = checkpoints(trainer.run)
    tensors = {f"model.{name}": value for name, value in trainer.method.state_dict().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors |= {f"sums.{name}": value for name, value in vars(sums).items()}
    path = trainer.run / f"checkpoint-{step:08d}.safetensors"
    save_tensors(path, tensors, {"kind": "checkpoint", "step": step, "scaler": scaler.state_dict()})
    for stale in older:
        if stale != path:
            stale.unlink(missing_ok=True)


def last_good(run: Path) -> str:
    """Say which checkpoint there is to fall back on."""
    kept = checkpoints(run)
    return f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"


def load_checkpoint(trainer: Trainer, scaler: torch.amp.GradScaler) -> tuple[int, Sums]:
    """Take up the newest checkpoint of a run and return its step and sums; step 0 where there is none.

    Raises:
        ModelError: where its tensors do not fit the method.
    """
    found = checkpoints(trainer.run)
    if not found:
        return 0, Sums.zero(trainer.device)
    tensors, meta = load_tensors(found[-1])
    load_strictly(trainer.method, _below(tensors, "model."), str(found[-1]))
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below(tensors, "optimizer.").items():
        index, part = name.split(".", 1)
        state.setdefault(int(index), {})[part] = _laid_out_like(parameters[int(index)], tensor)
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict() | {"state": state})
    if meta["scaler"]:
        scaler.load_state_dict(meta["scaler"])
    sums = {name: value.to(trainer.device) for name, value in _below(tensors, "sums.").items()}
    return int(meta["step"]), Sums(**sums)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Give a moment the memory format of its parameter: the fused optimizer walks both by address."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
