"""`Trainer`: the training loop of all methods, all sources of pairs and any number of processes."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from likewise.artifacts import Artifact
from likewise.data.dataset import CaptionDataset
from likewise.distributed import DistributedContext, convert_to_sync_batchnorm, wrap_ddp
from likewise.errors import InterruptedRunError, TrainingError
from likewise.models.backbones import check_input_size
from likewise.models.checkpoints import save_encoder
from likewise.pairs.config import PairConfig
from likewise.progress import NULL_PROGRESS, Progress, ProgressBar
from likewise.rng import Stream, derive_seed
from likewise.run_directory import RunDirectory
from likewise.training.checkpoint import (
    RunningTotals,
    describe_last_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from likewise.training.config import (
    TrainConfig,
    TrainSchedule,
    build_schedule,
    build_view_specs,
    resolve_augmentation,
    validate_combination,
)
from likewise.training.data import build_loader, input_keys
from likewise.training.initial import Start, load_start
from likewise.training.loader import HostBatch, PairLoader
from likewise.training.methods.base import Method, StepOutput
from likewise.training.methods.build import build_method
from likewise.training.methods.image_text import text_state
from likewise.training.methods.options import MemoryBankOptions
from likewise.training.optim import (
    build_optimizer,
    discard_frozen_gradients,
    lr_factor,
    skip_update_where,
    warmup_cosine_lr,
)
from likewise.training.run_files import (
    DTYPES,
    MetricsLogger,
    non_default_settings,
    precision_name,
    run_settings,
    warn_precision_change,
    write_config,
    write_preview,
)
from likewise.training.validation import (
    PRIMARY_METRIC,
    PairRetrievalEvaluator,
    best_step,
    effective_rank,
    feature_std,
    has_collapsed,
    should_stop,
)

logger = logging.getLogger(__name__)

ARTIFACT_KIND = "run"
# Paths and names; what they refer to is hashed with the inputs.
_NON_HASHED = ("caption_encoder", "image_encoder", "filter", "pairs_file", "index")


@dataclass(kw_only=True, eq=False)
class Trainer:
    """A training run: `setup` builds it, `fit` trains from the last checkpoint, `finalize` closes it.

    Attributes:
        artifact: The manifest of the run.
        dataset: The images.
        config: The training config.
        loader: The loader of training pairs.
        evaluator: The evaluator of validation pairs; None without them.
        schedule: Steps, learning rate and intervals.
        method: The method that is trained.
        ddp_method: The method in `DistributedDataParallel`; the method itself in a single process.
        start: The initial weights, preprocessing and structure of the backbone.
        optimizer: The optimizer.
        device: The device.
        dtype: The dtype of autocast; float32 disables it.
        dist_context: Rank and number of the processes.
        progress: Progress bars.
    """

    artifact: Artifact
    dataset: CaptionDataset
    config: TrainConfig
    loader: PairLoader
    evaluator: PairRetrievalEvaluator | None
    schedule: TrainSchedule
    method: Method
    ddp_method: nn.Module
    start: Start
    optimizer: Optimizer
    device: torch.device
    dtype: torch.dtype
    dist_context: DistributedContext
    progress: Progress

    def __post_init__(self) -> None:
        """Initialize the state of the loop."""
        self.run_dir = RunDirectory(self.artifact.path)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.totals = 0, RunningTotals.zeros(self.device)
        self.window = _LogWindow()
        self.has_warned_of_collapse = False
        self.metrics_logger: MetricsLogger | None = None
        self.validation_logger: MetricsLogger | None = None

    @classmethod
    def setup(
        cls,
        dataset: CaptionDataset | str | Path,
        out: str | Path,
        config: TrainConfig,
        pair_config: PairConfig,
        *,
        dist_context: DistributedContext,
        device: torch.device,
        num_workers: int | None = None,
        progress: Progress = NULL_PROGRESS,
    ) -> "Trainer":
        """Build or open everything that training needs; cheap checks come before expensive steps.

        Rank 0 builds caches, neighbors and the run directory; the other ranks wait, then read them.

        Args:
            dataset: The dataset or its path.
            out: The directory of the run.
            config: The training config.
            pair_config: The pair config.
            dist_context: The process.
            device: The device.
            num_workers: Threads; defaults to half of the cores.
            progress: Progress bars.
        """
        validate_combination(config, pair_config)
        dataset = CaptionDataset.open(dataset)
        start, config = load_start(config)
        for image_size in {spec.image_size for spec in build_view_specs(config, pair_config)}:
            if image_size != config.image_size:
                check_input_size(start.backbone, str(config.backbone), image_size)
        build_schedule(config, len(dataset), dataset.path)
        if not dist_context.is_main_process:
            dist_context.barrier()
        loader, evaluator = build_loader(
            dataset,
            config,
            pair_config,
            dist_context=dist_context,
            device=device,
            num_workers=num_workers,
            progress=progress,
            preprocessing=start.preprocessing,
        )
        schedule = build_schedule(config, len(loader.dataset), dataset.path)
        artifact = Artifact.create_or_resume(
            Path(out),
            ARTIFACT_KIND,
            run_settings(config, pair_config),
            input_keys(dataset, loader.dataset, start.fingerprint),
            non_hashed=_NON_HASHED,
        )
        if dist_context.is_main_process:
            if not artifact.is_complete and not RunDirectory(artifact.path).config_path.is_file():
                write_preview(RunDirectory(artifact.path), dataset, loader)
            dist_context.barrier()
        method = _build_method(config, schedule, loader, start.backbone, start.feature_dim)
        if dist_context.world_size > 1:
            convert_to_sync_batchnorm(method, device)
        method.to(device).to(memory_format=torch.channels_last)
        return cls(
            artifact=artifact,
            dataset=dataset,
            config=config,
            loader=loader,
            evaluator=evaluator,
            schedule=schedule,
            method=method,
            ddp_method=wrap_ddp(method) if dist_context.world_size > 1 else method,
            start=start,
            optimizer=build_optimizer(
                config.optimizer, method, lr=schedule.peak_lr, weight_decay=config.weight_decay
            ),
            device=device,
            dtype=choose_dtype(config.precision, device),
            dist_context=dist_context,
            progress=progress,
        )

    @property
    def is_finished(self) -> bool:
        """Whether the run was finished before."""
        return self.artifact.is_complete

    def fit(self, checkpoint_minutes: float | None = 2.0) -> None:
        """Train from the last checkpoint, or from the start, to the last step.

        Args:
            checkpoint_minutes: Minutes between checkpoints; 0 writes one after every step, None only one
                after a signal.

        Raises:
            InterruptedRunError: after SIGINT or SIGTERM, with a checkpoint written.
            TrainingError: if the loss is not finite; the last good checkpoint is kept.
        """
        if self.run_dir.config_path.is_file():
            warn_precision_change(self.run_dir, self.dtype)
        elif self.dist_context.is_main_process:
            self._write_config()
        self.step, self.totals = load_checkpoint(
            self.run_dir, self.method, self.optimizer, self.scaler, self.device
        )
        if self.step:
            logger.info("resuming from step %s of %s", f"{self.step:,}", f"{self.schedule.steps:,}")
        with ExitStack() as stack:
            stop_event = stack.enter_context(_catch_stop_signals())
            stack.enter_context(_preserve_rng_state(self.device))
            stack.enter_context(self._open_loggers())
            progress_bar = stack.enter_context(
                self.progress.task("training", self.schedule.steps, "steps", self.step)
            )
            batches = stack.enter_context(closing(self.loader.iterate(self.step, self.schedule.steps)))
            self._train(batches, stop_event, progress_bar, checkpoint_minutes)

    def _train(
        self,
        batches: Iterator[HostBatch],
        stop_event: threading.Event,
        progress_bar: ProgressBar,
        checkpoint_minutes: float | None,
    ) -> None:
        self.method.train()
        self.window, last_checkpoint_time = _LogWindow(), time.monotonic()
        (early_stop,) = self.dist_context.any_rank(self._should_stop_early())
        while self.step < self.schedule.steps and not early_stop:
            wait_started = time.monotonic()
            batch = next(batches)
            self.window.data_wait += time.monotonic() - wait_started
            output = self._train_step(batch)
            self.step += 1
            self._log(output, progress_bar)
            self._validate(progress_bar)
            checkpoint_due = (
                checkpoint_minutes is not None
                and time.monotonic() - last_checkpoint_time >= 60 * checkpoint_minutes
            )
            interrupted, checkpoint_due, early_stop = self.dist_context.any_rank(
                stop_event.is_set(), checkpoint_due, self._should_stop_early()
            )
            is_last = early_stop or self.step == self.schedule.steps
            if is_last or checkpoint_due or interrupted:
                self._check_finite()
                if self.dist_context.is_main_process and (checkpoint_minutes is not None or interrupted):
                    self._save_checkpoint()
                last_checkpoint_time = time.monotonic()
            if interrupted and not is_last:
                raise InterruptedRunError(
                    f"stopped after step {self.step:,} of {self.schedule.steps:,}; the same call resumes "
                    f"{self.run_dir.path}",
                    path=self.run_dir.path,
                )

    def _save_checkpoint(self) -> None:
        for metrics_logger in (self.metrics_logger, self.validation_logger):
            if metrics_logger is not None:
                metrics_logger.flush()
        save_checkpoint(self.run_dir, self.method, self.optimizer, self.scaler, self.totals, self.step)

    def _train_step(self, host_batch: HostBatch) -> StepOutput:
        """Take one optimizer step; the random numbers within it are a function of seed and step."""
        _seed_rng(derive_seed(self.config.seed, Stream.TRAIN_STEP, self.step), self.device)
        lr = self._lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * lr_factor(group, self.step)
        batch = host_batch.to_device(
            self.loader.dataset.augmentations, self.device, self.step / self.schedule.steps
        )
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output: StepOutput = self.ddp_method(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(output.loss).backward()
        discard_frozen_gradients(self.optimizer, self.step)
        if not self.scaler.is_enabled():
            skip_update = (~torch.isfinite(output.loss.detach())).float()
            if output.skip_update is not None:
                skip_update = torch.maximum(skip_update, output.skip_update)
            skip_update_where(self.optimizer, skip_update)
        # Without a GradScaler the update is skipped on the device; with one the host must know.
        is_skipped = self.scaler.is_enabled() and output.skip_update is not None and bool(output.skip_update)
        if not is_skipped:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.totals = self.totals.add(output.loss.detach(), output.skip_update, self.step + 1)
        return output

    def _lr(self, step: int) -> float:
        return warmup_cosine_lr(
            step,
            total_steps=self.schedule.steps,
            warmup_steps=self.schedule.warmup_steps,
            peak_lr=self.schedule.peak_lr,
        )

    def _log(self, output: StepOutput, progress_bar: ProgressBar) -> None:
        """Write a row of metrics if it is due."""
        self.window.steps += 1
        if self.step % self.schedule.log_every and self.step != self.schedule.steps:
            progress_bar.update()
            return
        self._check_finite()
        row = self._metrics_row(output)
        if self.metrics_logger is not None:
            self.metrics_logger.write(row)
            self._warn_if_collapsed(row)
        progress_bar.update(
            postfix=f"loss {row['loss']:.3f} · rank {row['effective_rank']:.0f} · "
            f"{row['images_per_second']:,.0f} images/s"
        )
        self.totals, self.window = self.totals.reset_window(), _LogWindow()

    def _metrics_row(self, output: StepOutput) -> dict[str, int | float]:
        elapsed = time.monotonic() - self.window.started
        features = cast("Tensor", output.features)
        row: dict[str, int | float] = {
            "step": self.step,
            "epoch": self.step / self.schedule.steps_per_epoch,
            "loss": float(self.totals.loss) / max(1.0, float(self.totals.num_updates)),
            "lr": self._lr(self.step - 1),
            "effective_rank": float(effective_rank(features)),
            "feature_std": float(feature_std(features)),
            **{name: float(value) for name, value in output.logs.items()},
            "images_per_second": self._images_per_step() * self.window.steps / elapsed,
            "data_time_fraction": self.window.data_wait / elapsed,
        }
        return (
            row if output.skip_update is None else row | {"skipped_updates": float(self.totals.num_skipped)}
        )

    def _images_per_step(self) -> int:
        return len(self.loader.dataset.view_specs) * self.loader.batch_size

    def _validate(self, progress_bar: ProgressBar) -> None:
        """Evaluate the encoder on the validation pairs if it is due, and save it if it is the best so far."""
        if self.validation_logger is None or self.evaluator is None:
            return
        if self.step % self.schedule.val_every and self.step != self.schedule.steps:
            return
        metrics = self.evaluator.evaluate(self.method.backbone, self.device, self.dtype)
        self.validation_logger.write({"step": self.step, **metrics})
        if best_step(self.validation_logger.rows) == self.step:
            self._save_encoder(self.run_dir.best_encoder_path)
        progress_bar.update(0, postfix=f"validation {PRIMARY_METRIC} {metrics[PRIMARY_METRIC]:.3f}")

    def _should_stop_early(self) -> bool:
        return self.validation_logger is not None and should_stop(
            self.validation_logger.rows, self.config.early_stopping_patience
        )

    def _check_finite(self) -> None:
        """Raise TrainingError if the loss of a step was not finite."""
        step = int(self.totals.first_nonfinite_step)
        if not step:
            return
        anchors = self.loader.batch_at(step - 1).anchors
        ids = ", ".join(self.dataset[position].id for position in anchors[:5].tolist())
        others = f" and {len(anchors) - 5:,} more" if len(anchors) > 5 else ""
        raise TrainingError(
            f"non-finite loss at step {step:,} (images {ids}{others}). "
            f"{describe_last_checkpoint(self.run_dir)} Try a lower learning rate or precision 'fp32'.",
            path=self.run_dir.path,
        )

    def _warn_if_collapsed(self, row: dict[str, int | float]) -> None:
        if self.has_warned_of_collapse:
            return
        if has_collapsed(rank=row["effective_rank"], std=row["feature_std"]):
            self.has_warned_of_collapse = True
            logger.warning(
                "the features have collapsed at step %s (effective rank %.1f, standard deviation %.3f): they "
                "are nearly the same for all images",
                f"{row['step']:,}",
                row["effective_rank"],
                row["feature_std"],
            )

    def _write_config(self) -> None:
        pairs = self.loader.dataset.pairs
        derived = asdict(self.schedule) | {
            "augmentation": resolve_augmentation(self.config, pairs.pair_config),
            "stem": self.start.stem,
            "device": str(self.device),
            "precision": precision_name(self.dtype),
            "world_size": self.dist_context.world_size,
        }
        settings = run_settings(self.config, pairs.pair_config)
        non_default = non_default_settings(self.config, pairs.pair_config)
        write_config(self.run_dir, settings, pairs, self.dataset, derived | {"non_default": non_default})

    @contextmanager
    def _open_loggers(self) -> Iterator[None]:
        """Open the metrics and, with validation pairs, the validation metrics, on rank 0."""
        if self.dist_context.is_main_process:
            tensorboard = self.run_dir.tensorboard_dir
            self.metrics_logger = MetricsLogger(self.run_dir.metrics_path, tensorboard, self.step)
            if self.evaluator is not None:
                self.validation_logger = MetricsLogger(self.run_dir.validation_path, tensorboard, self.step)
        try:
            yield
        finally:
            for metrics_logger in (self.metrics_logger, self.validation_logger):
                if metrics_logger is not None:
                    metrics_logger.close()

    def _save_encoder(self, path: Path) -> None:
        """Write the backbone and, if the method trains one, its text tower."""
        save_encoder(
            path,
            self.method.backbone,
            self.start.structure,
            text_state(self.method),
            self.loader.dataset.image_cache.bands,
            self.start.transform,
        )

    def finalize(self) -> None:
        """Write the encoder, the last or the best one, and mark the run as finished."""
        if self.dist_context.is_main_process:
            if self.evaluator is None:
                self._save_encoder(self.run_dir.encoder_path)
            else:
                self._save_encoder(self.run_dir.last_encoder_path)
                if self.run_dir.best_encoder_path.is_file():
                    self.run_dir.best_encoder_path.replace(self.run_dir.encoder_path)
            image_cache = self.loader.dataset.image_cache
            skipped = {
                "unreadable images": len(image_cache) - len(image_cache.readable),
                "batches without a positive or a negative": int(self.totals.num_skipped),
            }
            self.artifact = self.artifact.finish(
                {"steps": self.step, "images": len(image_cache.readable)},
                {reason: count for reason, count in skipped.items() if count},
            )
        self.dist_context.barrier()


@dataclass
class _LogWindow:
    """Time and steps since the last row of metrics."""

    steps: int = 0
    data_wait: float = 0.0
    started: float = field(default_factory=time.monotonic)


def _build_method(
    config: TrainConfig, schedule: TrainSchedule, loader: PairLoader, backbone: nn.Module, feature_dim: int
) -> Method:
    """Build the method; the initial weights of its heads are a function of the seed."""
    options, vectors = config.method_options, loader.dataset.caption_inputs.vectors
    if isinstance(options, MemoryBankOptions):
        options = replace(options, memory_bank_size=schedule.memory_bank_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(config.seed, Stream.HEADS))
        method = build_method(
            options, backbone, feature_dim, caption_embedding_dim=0 if vectors is None else vectors.dim
        )
    method.grad_cache_chunk_size = config.grad_cache_chunk_size
    return method


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for a `TrainConfig.precision` and a device."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
        return torch.bfloat16 if has_bf16 else torch.float32
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _seed_rng(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of a device, and of no other device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def _preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Restore the generators of the CPU and of a device afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _catch_stop_signals() -> Iterator[threading.Event]:
    """Set an event on the first SIGINT or SIGTERM; the previous handler then applies again."""
    stop_event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_event
        return
    previous_handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def request_stop(signum: int, _: FrameType | None) -> None:
        stop_event.set()
        signal.signal(signum, previous_handlers[signal.Signals(signum)])

    for signum in previous_handlers:
        signal.signal(signum, request_stop)
    try:
        yield stop_event
    finally:
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)
