"""The training loop: one for all methods and all sources of pairs."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.optim import Optimizer

from likewise.errors import InterruptedRunError, TrainingError
from likewise.models.checkpoints import load_strictly, load_tensors, save_tensors
from likewise.pretraining.batches import Batch, PairBatches
from likewise.pretraining.methods.base import Method, Step
from likewise.pretraining.monitor import MetricsLog, effective_rank, has_collapsed, spread
from likewise.pretraining.optim import scheduled_rate
from likewise.pretraining.settings import Plan
from likewise.progress import Progress, Task


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """What a run is made of, once settings have been turned into things."""

    run: Path
    method: Method
    optimizer: Optimizer
    batches: PairBatches
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    seed: int
    workers: int
    checkpoint_minutes: float


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(run.glob("checkpoint-*.safetensors"))


@dataclass
class Sums:
    """What has been added up since the last row of metrics."""

    loss: Tensor
    steps: int = 0


def save_checkpoint(trainer: Trainer, scaler: torch.amp.GradScaler, step: int, sums: Sums) -> None:
    """Write everything that going on needs, then drop the older checkpoint."""
    older = checkpoints(trainer.run)
    tensors = {f"model.{name}": value for name, value in trainer.method.state_dict().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    path = trainer.run / f"checkpoint-{step:08d}.safetensors"
    tensors["sums.loss"] = sums.loss
    meta = {"kind": "checkpoint", "step": step, "summed": sums.steps, "scaler": scaler.state_dict()}
    save_tensors(path, tensors, meta)
    for stale in older:
        if stale != path:
            stale.unlink(missing_ok=True)


def load_checkpoint(trainer: Trainer, scaler: torch.amp.GradScaler) -> tuple[int, Sums]:
    """Take up the newest checkpoint of a run and return its step and sums; step 0 where there is none.

    Raises:
        ModelError: where its tensors do not fit the method.
    """
    found = checkpoints(trainer.run)
    if not found:
        return 0, Sums(torch.zeros((), device=trainer.device))
    tensors, meta = load_tensors(found[-1])
    model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    load_strictly(trainer.method, model, str(found[-1]))
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, part = name.split(".", 2)
            state.setdefault(int(index), {})[part] = _laid_out_like(parameters[int(index)], tensor)
    trainer.optimizer.load_state_dict(trainer.optimizer.state_dict() | {"state": state})
    if meta["scaler"]:
        scaler.load_state_dict(meta["scaler"])
    return int(meta["step"]), Sums(tensors["sums.loss"].to(trainer.device), int(meta["summed"]))


def _laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Give a moment the memory format of its parameter: the fused optimizer walks both by address."""
    return torch.empty_like(parameter).copy_(tensor) if tensor.shape == parameter.shape else tensor


def run_training(trainer: Trainer, progress: Progress) -> None:
    """Train from the newest checkpoint, or the start, to the last step of the plan.

    Raises:
        InterruptedRunError: after SIGINT or SIGTERM, with a checkpoint written.
        TrainingError: where the loss stops being a number; the last good checkpoint is kept.
    """
    scaler = torch.amp.GradScaler(trainer.device.type, enabled=trainer.dtype == torch.float16)
    start, sums = load_checkpoint(trainer, scaler)
    if start:
        progress.say(f"going on from step {start:,} of {trainer.plan.steps:,}")
    log = MetricsLog(trainer.run, start)
    try:
        with _stop_signals() as stop, progress.task("training", trainer.plan.steps, "steps", start) as task:
            _Loop(trainer, scaler, log, task, progress, sums).run(start, stop)
    finally:
        log.close()


class _Loop:
    """One pass from a step to the end, with what is logged now and then."""

    def __init__(
        self,
        trainer: Trainer,
        scaler: torch.amp.GradScaler,
        log: MetricsLog,
        task: Task,
        progress: Progress,
        sums: Sums,
    ) -> None:
        self.trainer, self.scaler, self.log = trainer, scaler, log
        self.task, self.progress, self.sums = task, progress, sums
        self.warned = False
        self._restart_clock()

    def run(self, start: int, stop: threading.Event) -> None:
        trainer, saved_at = self.trainer, time.monotonic()
        trainer.method.train()
        batches = trainer.batches.stream(start, trainer.plan.steps, trainer.workers)
        for number in range(start, trainer.plan.steps):
            asked = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - asked
            self._note(number, self._step(number, batch), batch)
            last = number + 1 == trainer.plan.steps
            due = time.monotonic() - saved_at >= 60 * trainer.checkpoint_minutes
            if last or due or stop.is_set():
                self._require_finite(number, batch)
                save_checkpoint(trainer, self.scaler, number + 1, self.sums)
                saved_at = time.monotonic()
            if stop.is_set() and not last:
                raise InterruptedRunError(
                    f"stopped after step {number + 1:,} of {trainer.plan.steps:,}; "
                    f"run the same command again to go on from there ({trainer.run})"
                )

    def _step(self, number: int, batch: Batch) -> Step:
        """Take one optimizer step; the generator is set by the step, for backbones that drop paths."""
        trainer = self.trainer
        torch.manual_seed(trainer.seed * 1_000_003 + number)
        rate = scheduled_rate(
            number, steps=trainer.plan.steps, warmup=trainer.plan.warmup, peak=trainer.plan.peak_rate
        )
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate
        self.rate = rate
        views = batch.views(trainer.batches.recipe, trainer.device)
        captions = None if batch.captions is None else batch.captions.to(trainer.device, non_blocking=True)
        mixed = trainer.dtype != torch.float32
        with torch.autocast(trainer.device.type, trainer.dtype, enabled=mixed):
            step = trainer.method.step(views, captions)
        trainer.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(step.loss).backward()
        self.scaler.step(trainer.optimizer)
        self.scaler.update()
        return step

    def _note(self, number: int, step: Step, batch: Batch) -> None:
        self.sums = Sums(self.sums.loss + step.loss.detach(), self.sums.steps + 1)
        self.here += 1
        done, every = number + 1, self.trainer.plan.log_every
        if done % every and done != self.trainer.plan.steps:
            self.task.advance()
            return
        self._require_finite(number, batch)
        row = self._row(done, step)
        self.log.write(row)
        self._warn_of_collapse(row)
        self.task.advance(
            note=f"loss {row['loss']:.3f} · rank {row['effective_rank']:.0f} · "
            f"{row['images_per_second']:,.0f} images/s"
        )
        self.sums = Sums(torch.zeros_like(self.sums.loss))
        self._restart_clock()

    def _row(self, done: int, step: Step) -> dict[str, int | float]:
        elapsed = time.monotonic() - self.since
        return {
            "step": done,
            "epoch": done / self.trainer.plan.steps_per_epoch,
            "loss": float(self.sums.loss) / self.sums.steps,
            "rate": self.rate,
            "effective_rank": float(effective_rank(step.features)),
            "spread": float(spread(step.features)),
            **{name: float(value) for name, value in step.logs.items()},
            "images_per_second": 2 * self.trainer.batches.batch_size * self.here / elapsed,
            "data_wait": self.waited / elapsed,
        }

    def _require_finite(self, number: int, batch: Batch) -> None:
        if not math.isfinite(float(self.sums.loss)):
            ids = ", ".join(str(i) for i in batch.anchors[:5])
            kept = checkpoints(self.trainer.run)
            told = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"
            raise TrainingError(
                f"the loss is no longer a number, at step {number + 1:,} at the latest "
                f"(images {ids}, …); {told}. "
                "A lower --rate or --precision float32 often helps"
            )

    def _warn_of_collapse(self, row: dict[str, int | float]) -> None:
        if not self.warned and has_collapsed(rank=row["effective_rank"], spread=row["spread"]):
            self.warned = True
            self.progress.say(
                f"warning: the features have collapsed at step {row['step']:,} (effective rank "
                f"{row['effective_rank']:.1f}, spread {row['spread']:.3f}): images are hardly told apart"
            )

    def _restart_clock(self) -> None:
        self.here, self.waited, self.since = 0, 0.0, time.monotonic()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one has its usual effect."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, usual[signal.Signals(number)])

    for number in usual:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
