"""Checkpoints of a run: everything that resuming needs, in one safetensors file.

Safetensors instead of `torch.save`: loading a checkpoint from another machine must not execute code.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from likewise.errors import TrainingError
from likewise.models.checkpoints import load_state_dict_strict, load_tensors, save_tensors
from likewise.run_directory import RunDirectory
from likewise.training.methods.base import Method


@dataclass(frozen=True)
class RunningTotals:
    """Sums of the training loop, on the device.

    Attributes:
        loss: Sum of the losses since the last row of metrics.
        num_updates: Optimizer updates since the last row of metrics.
        num_skipped: Skipped updates since the start of the run.
        first_nonfinite_step: The first step, counted from 1, with a non-finite loss; 0 if there is none.
    """

    loss: Tensor
    num_updates: Tensor
    num_skipped: Tensor
    first_nonfinite_step: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> "RunningTotals":
        """Return the totals before the first step."""
        return cls(*(torch.zeros((), device=device) for _ in range(4)))

    def add(self, loss: Tensor, skip_update: Tensor | None, step: int) -> "RunningTotals":
        """Add a step, counted from 1."""
        skipped = torch.zeros_like(self.num_skipped) if skip_update is None else skip_update
        is_first_nonfinite_step = (self.first_nonfinite_step == 0) & ~torch.isfinite(loss)
        return RunningTotals(
            self.loss + loss,
            self.num_updates + 1 - skipped,
            self.num_skipped + skipped,
            torch.where(
                is_first_nonfinite_step,
                torch.full_like(self.first_nonfinite_step, step),
                self.first_nonfinite_step,
            ),
        )

    def reset_window(self) -> "RunningTotals":
        """Reset the sums since the last row of metrics."""
        return replace(self, loss=torch.zeros_like(self.loss), num_updates=torch.zeros_like(self.num_updates))


def save_checkpoint(
    run_dir: RunDirectory,
    method: Method,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    totals: RunningTotals,
    step: int,
) -> None:
    """Write the checkpoint after a number of steps, then delete the older ones.

    Raises:
        TrainingError: if a weight is not finite; the older checkpoint then stays.
    """
    param_sums = torch.stack([p.detach().sum() for p in method.parameters()])
    if not bool(torch.isfinite(param_sums).all()):
        raise TrainingError(
            f"non-finite weights at step {step:,}. {describe_last_checkpoint(run_dir)} "
            "Try a lower learning rate or precision 'fp32'.",
            path=run_dir.path,
        )
    previous = run_dir.list_checkpoints()
    tensors = {f"model.{name}": value for name, value in method.state_dict().items()}
    for index, param_state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in param_state.items()
        }
    tensors |= {f"totals.{name}": value for name, value in vars(totals).items()}
    path = run_dir.checkpoint_path(step)
    save_tensors(path, tensors, {"kind": "checkpoint", "step": step, "scaler": scaler.state_dict()})
    for stale in previous:
        if stale != path:
            stale.unlink(missing_ok=True)


def describe_last_checkpoint(run_dir: RunDirectory) -> str:
    """Return a sentence on the last checkpoint, for error messages."""
    paths = run_dir.list_checkpoints()
    return f"Last good checkpoint: {paths[-1]}." if paths else "No checkpoint has been written yet."


def load_checkpoint(
    run_dir: RunDirectory,
    method: Method,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> tuple[int, RunningTotals]:
    """Restore the last checkpoint of a run.

    Returns:
        The number of steps taken and the totals; 0 and zeros without a checkpoint.

    Raises:
        ModelError: if its tensors do not fit the method.
    """
    paths = run_dir.list_checkpoints()
    if not paths:
        return 0, RunningTotals.zeros(device)
    tensors, metadata = load_tensors(paths[-1])
    load_state_dict_strict(method, _strip_prefix(tensors, "model."), str(paths[-1]))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _strip_prefix(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        optimizer_state.setdefault(int(index), {})[key] = _match_memory_format(parameters[int(index)], tensor)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": optimizer_state})
    if metadata["scaler"]:
        scaler.load_state_dict(metadata["scaler"])
    totals = {name: value.to(device) for name, value in _strip_prefix(tensors, "totals.").items()}
    return int(metadata["step"]), RunningTotals(**totals)


def _strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _match_memory_format(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return an optimizer moment in the memory format of its parameter, as fused optimizers require."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor
