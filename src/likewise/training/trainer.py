"""The training loop: one for all methods, all sources of pairs and any number of processes."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import nn

from likewise.artifacts import Artifact, fingerprint
from likewise.data.dataset import CaptionDataset
from likewise.data.filters import read_filter
from likewise.data.image_cache import ImageCache, build_image_cache, cache_resolution
from likewise.distributed import DistributedContext
from likewise.embeddings.store import find_embeddings
from likewise.errors import InterruptedRunError, InvalidInputError, ModelError, TrainingError
from likewise.models.backbones import BackboneConfig, build_backbone, check_input_size, default_stem
from likewise.models.checkpoints import load_state_dict, load_state_dict_strict
from likewise.models.encoders import ENCODER_FILE
from likewise.neighbors.vectors import ImageVectors, filtered_caption_mask
from likewise.pairs.build import build_pairs
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import Pairs
from likewise.progress import Progress, ProgressBar
from likewise.training.checkpoint import (
    BEST_ENCODER_FILE,
    RunningTotals,
    TrainState,
    describe_last_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_method_encoder,
)
from likewise.training.config import TrainConfig, TrainSchedule, build_schedule, build_view_specs
from likewise.training.loader import CaptionInputs, HostBatch, PairLoader, tokenize_captions
from likewise.training.methods.base import StepOutput
from likewise.training.optim import warmup_cosine_lr
from likewise.training.run_dir import (
    VALIDATION_FILE,
    MetricsLogger,
    effective_rank,
    feature_std,
    has_collapsed,
    pair_config_to_dict,
)
from likewise.training.validation import (
    PRIMARY_METRIC,
    PairRetrievalEvaluator,
    best_step,
    should_stop,
    split_validation,
)

logger = logging.getLogger(__name__)

ARTIFACT_KIND = "run"
_NON_HASHED = ("caption_encoder", "image_encoder", "filter", "pairs_file", "index")


@dataclass(frozen=True)
class TrainSetup:
    """What is ready before the first step."""

    artifact: Artifact
    backbone: nn.Module
    feature_dim: int
    backbone_config: BackboneConfig
    rng_state: torch.Tensor
    image_cache: ImageCache
    pairs: Pairs
    loader: PairLoader
    caption_inputs: CaptionInputs
    evaluator: PairRetrievalEvaluator | None
    schedule: TrainSchedule


def setup_training(
    dataset: CaptionDataset,
    run_dir: Path,
    config: TrainConfig,
    pair_config: PairConfig,
    dist: DistributedContext,
    num_workers: int | None,
    device: torch.device,
    progress: Progress,
) -> TrainSetup:
    """Make or find everything that training needs; what can fail fails before what takes long."""
    backbone_config = get_backbone_config(config)
    backbone, feature_dim, rng_state = init_backbone(config, backbone_config)
    view_specs = build_view_specs(config, pair_config)
    for image_size in {view.image_size for view in view_specs} - {config.image_size}:
        check_input_size(backbone, backbone_config.name, image_size)
    build_schedule(config, len(dataset), dataset.path)
    caption_inputs = _open_caption_inputs(dataset, config, pair_config, progress)
    pairs = build_pairs(dataset, pair_config, device=device.type, progress=progress)
    image_cache = build_image_cache(
        dataset, cache_resolution(config.image_size, len(dataset)), num_workers=num_workers, progress=progress
    )
    if len(image_cache.readable) < len(dataset):
        pairs = build_pairs(dataset, pair_config, image_cache.readable, device=device.type, progress=progress)
    evaluator = None
    if config.num_val_pairs:
        split, all_pairs = split_validation(pairs, config.num_val_pairs, seed=config.seed), pairs
        pairs = build_pairs(
            dataset,
            pair_config,
            split.training_positions(image_cache.readable),
            device=device.type,
            progress=progress,
        )
        labels = _label_ids(dataset, split.anchors)
        evaluator = PairRetrievalEvaluator(
            image_cache, all_pairs, split, view_specs[0], labels, seed=config.seed
        )
    loader = PairLoader(
        image_cache,
        pairs,
        view_specs,
        batch_size=config.batch_size,
        seed=config.seed,
        caption_inputs=caption_inputs,
        dist=dist,
    )
    schedule = build_schedule(config, len(loader.anchors), dataset.path)
    inputs = _input_keys(dataset, image_cache, pairs, caption_inputs, config)
    # Where partners come from is told by the inputs, however it was named.
    artifact = Artifact.create_or_resume(
        run_dir,
        ARTIFACT_KIND,
        pair_config_to_dict(pair_config) | asdict(config),
        inputs,
        non_hashed=_NON_HASHED,
    )
    return TrainSetup(
        artifact,
        backbone,
        feature_dim,
        backbone_config,
        rng_state,
        image_cache,
        pairs,
        loader,
        caption_inputs,
        evaluator,
        schedule,
    )


def get_backbone_config(config: TrainConfig) -> BackboneConfig:
    """Return what it takes to build the settings' backbone."""
    stem = config.stem or default_stem(config.image_size)
    return BackboneConfig(name=config.backbone, image_size=config.image_size, stem=stem)


def init_backbone(
    config: TrainConfig, backbone_config: BackboneConfig
) -> tuple[nn.Module, int, torch.Tensor]:
    """Return the backbone with its initial weights, its width, and the generator's state for the heads."""
    torch.manual_seed(config.seed)
    backbone, feature_dim = build_backbone(backbone_config, pretrained=config.init == "pretrained")
    rng_state = torch.get_rng_state()
    if config.init not in ("scratch", "pretrained"):
        weights_path = resolve_init_weights(config.init)
        load_state_dict_strict(backbone, load_state_dict(weights_path), str(weights_path))
    return backbone, feature_dim, rng_state


def resolve_init_weights(init: str) -> Path:
    """Return the file that `--init` names: a file, or the encoder of a run.

    Raises:
        ModelError: where there is neither.
    """
    path = Path(init)
    weights_path = path / ENCODER_FILE if path.is_dir() else path
    if not weights_path.is_file():
        raise ModelError(
            f"--init {init}: no such weights; give scratch, pretrained, a file, or a finished run"
        )
    return weights_path


def _input_keys(
    dataset: CaptionDataset,
    image_cache: ImageCache,
    pairs: Pairs,
    caption_inputs: CaptionInputs,
    config: TrainConfig,
) -> dict[str, str]:
    keys = {"collection": dataset.key, "images": image_cache.key, "pairs": pairs.key}
    if caption_inputs.vectors is not None:
        keys["captions"] = caption_inputs.vectors.key
    if caption_inputs.tokens is not None:
        keys["tokens"] = caption_inputs.tokens.key
    if config.init not in ("scratch", "pretrained"):
        keys["init"] = fingerprint(resolve_init_weights(config.init))
    return keys


def _open_caption_inputs(
    dataset: CaptionDataset, config: TrainConfig, pair_config: PairConfig, progress: Progress
) -> CaptionInputs:
    """Open what the method wants to know of captions.

    Raises:
        InputError: where an image is to be compared with its caption and no image has one.
    """
    if not (config.uses_caption_embeddings or config.uses_tokens):
        return CaptionInputs()
    excluded = None if pair_config.filter is None else read_filter(pair_config.filter, dataset)
    caption_mask = filtered_caption_mask(dataset, excluded)
    vectors = tokens = has_caption = None
    if config.uses_caption_embeddings:
        vectors = ImageVectors(
            find_embeddings(dataset, pair_config.caption_encoder), len(dataset), caption_mask
        )
        has_caption = vectors.captions_per_image > 0
    if config.uses_tokens:
        tokens = tokenize_captions(dataset, caption_mask, progress=progress)
        has_caption = tokens.has_caption
    if not config.method_options.needs_text:
        return CaptionInputs(vectors=vectors)
    if has_caption is None or not has_caption.any():
        raise InvalidInputError(
            f"--method {config.method} compares images with captions, and {dataset.path} has none; import "
            "it with --caption-column, or use a method without text"
        )
    num_missing = int((~has_caption).sum())
    if num_missing:
        logger.info(f"{num_missing:,} of {len(dataset):,} images have no caption and take no part")
    return CaptionInputs(
        vectors=vectors,
        tokens=tokens,
        use_partner_caption=config.method_options.inputs == "anchor",
        has_caption=has_caption,
    )


def _label_ids(dataset: CaptionDataset, positions: np.ndarray) -> np.ndarray | None:
    """Return the labels of some images by number, -1 without one; None where there are not two."""
    names = [dataset[int(position)].label for position in positions]
    label_ids = {name: i for i, name in enumerate(sorted({n for n in names if n is not None}))}
    if len(label_ids) < 2:
        return None
    return np.array([-1 if name is None else label_ids[name] for name in names], np.int64)


__all__ = ["fit", "list_checkpoints", "save_checkpoint"]


def fit(train_state: TrainState, progress: Progress) -> tuple[int, int]:
    """Train from the newest checkpoint, or the start, to the last step of the plan or of patience.

    Returns:
        How many steps the run has taken in all, and how many of its batches taught nothing.

    Raises:
        InterruptedRunError: after SIGINT or SIGTERM, with a checkpoint written.
        TrainingError: where the loss stops being a number; the last good checkpoint is kept.
    """
    scaler = torch.amp.GradScaler(train_state.device.type, enabled=train_state.dtype == torch.float16)
    start, totals = load_checkpoint(train_state, scaler)
    if start:
        logger.info(f"going on from step {start:,} of {train_state.schedule.steps:,}")
    with (
        _catch_stop_signals() as stop_event,
        _open_loggers(train_state, start) as (metrics_logger, validation_logger),
        progress.task("training", train_state.schedule.steps, "steps", start) as progress_bar,
    ):
        trainer = Trainer(
            train_state, scaler, metrics_logger, validation_logger, progress_bar, progress, totals
        )
        return trainer.fit(start, stop_event), int(trainer.totals.num_skipped)


@contextmanager
def _open_loggers(
    train_state: TrainState, start: int
) -> Iterator[tuple[MetricsLogger | None, MetricsLogger | None]]:
    """Open the metrics and, with held-out pairs, the scores, in the process that leads."""
    if not train_state.dist.is_main_process:
        yield None, None
        return
    metrics_logger = MetricsLogger(train_state.run_dir, start)
    validation_logger = (
        None if train_state.evaluator is None else MetricsLogger(train_state.run_dir, start, VALIDATION_FILE)
    )
    try:
        yield metrics_logger, validation_logger
    finally:
        metrics_logger.close()
        if validation_logger is not None:
            validation_logger.close()


class Trainer:
    """One pass from a step to the end, with what is logged now and then."""

    def __init__(
        self,
        train_state: TrainState,
        scaler: torch.amp.GradScaler,
        metrics_logger: MetricsLogger | None,
        validation_logger: MetricsLogger | None,
        progress_bar: ProgressBar,
        progress: Progress,
        totals: RunningTotals,
    ) -> None:
        self.train_state, self.scaler, self.metrics_logger, self.validation_logger = (
            train_state,
            scaler,
            metrics_logger,
            validation_logger,
        )
        self.progress_bar, self.progress, self.totals = progress_bar, progress, totals
        self.warned_of_collapse = False
        self._reset_timers()

    def fit(self, start: int, stop_event: threading.Event) -> int:
        """Go on until a step is the last one, and return how many have been taken."""
        train_state, saved_at = self.train_state, time.monotonic()
        train_state.method.train()
        step, (early_stop,) = start, train_state.dist.any_rank(self._early_stop())
        batches = train_state.loader.iterate(start, train_state.schedule.steps, train_state.num_workers)
        while step < train_state.schedule.steps and not early_stop:
            wait_started = time.monotonic()
            batch = next(batches)
            self.data_wait += time.monotonic() - wait_started
            output = self._train_step(step, batch)
            step += 1
            self._log(step, output)
            self._validate(step)
            checkpoint_due = time.monotonic() - saved_at >= 60 * train_state.checkpoint_minutes
            interrupted, checkpoint_due, early_stop = train_state.dist.any_rank(
                stop_event.is_set(), checkpoint_due, self._early_stop()
            )
            is_last = early_stop or step == train_state.schedule.steps
            if is_last or checkpoint_due or interrupted:
                self._check_finite()
                if train_state.dist.is_main_process:
                    save_checkpoint(train_state, self.scaler, step, self.totals)
                saved_at = time.monotonic()
            if interrupted and not is_last:
                raise InterruptedRunError(
                    f"stopped after step {step:,} of {train_state.schedule.steps:,}; "
                    f"run the same command again to go on from there ({train_state.run_dir})"
                )
        return step

    def _train_step(self, step: int, host_batch: HostBatch) -> StepOutput:
        """Take one optimizer step; the generator is set by the step, for whatever draws in it."""
        train_state = self.train_state
        torch.manual_seed(train_state.seed * 1_000_003 + step)
        self.lr = warmup_cosine_lr(
            step,
            total_steps=train_state.schedule.steps,
            warmup_steps=train_state.schedule.warmup_steps,
            peak_lr=train_state.schedule.peak_lr,
        )
        for group in train_state.optimizer.param_groups:
            group["lr"] = self.lr
        batch = host_batch.to_device(
            train_state.loader.augmentations, train_state.device, step / train_state.schedule.steps
        )
        use_amp = train_state.dtype != torch.float32
        with torch.autocast(train_state.device.type, train_state.dtype, enabled=use_amp):
            output = train_state.ddp_method(batch)
        train_state.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(output.loss).backward()
        if not self.scaler.is_enabled():
            skip_update_where(train_state.optimizer, output)
        self.scaler.step(train_state.optimizer)
        self.scaler.update()
        self.totals = self.totals.add(output.loss.detach(), output.skip_update, step + 1)
        return output

    def _log(self, step: int, output: StepOutput) -> None:
        self.steps_since_log += 1
        log_every = self.train_state.schedule.log_every
        if step % log_every and step != self.train_state.schedule.steps:
            self.progress_bar.update()
            return
        self._check_finite()
        row = self._metrics_row(step, output)
        if self.metrics_logger is not None:
            self.metrics_logger.write(row)
        self._warn_if_collapsed(row)
        self.progress_bar.update(
            postfix=f"loss {row['loss']:.3f} · rank {row['effective_rank']:.0f} · "
            f"{row['images_per_second']:,.0f} images/s"
        )
        self.totals = self.totals.reset_window()
        self._reset_timers()

    def _metrics_row(self, step: int, output: StepOutput) -> dict[str, int | float]:
        elapsed = time.monotonic() - self.log_started
        num_images = (
            len(self.train_state.loader.view_specs)
            * self.train_state.loader.batch_size
            * self.steps_since_log
        )
        row: dict[str, int | float] = {
            "step": step,
            "epoch": step / self.train_state.schedule.steps_per_epoch,
            "loss": float(self.totals.loss) / max(1.0, float(self.totals.num_updates)),
            "lr": self.lr,
            "effective_rank": float(effective_rank(output.features)),
            "feature_std": float(feature_std(output.features)),
            **{name: float(value) for name, value in output.logs.items()},
            "images_per_second": num_images / elapsed,
            "data_time_fraction": self.data_wait / elapsed,
        }
        return row if output.skip_update is None else row | {"skipped": float(self.totals.num_skipped)}

    def _validate(self, step: int) -> None:
        """Score the encoder on held-out pairs when it is time, and keep it if it is the best so far."""
        train_state = self.train_state
        val_every, total_steps = train_state.schedule.val_every, train_state.schedule.steps
        if (
            self.validation_logger is None
            or train_state.evaluator is None
            or (step % val_every and step != total_steps)
        ):
            return
        metrics = train_state.evaluator.evaluate(
            train_state.method.backbone, train_state.device, train_state.dtype
        )
        self.validation_logger.write({"step": step, **metrics})
        if best_step(self.validation_logger.rows) == step:
            save_method_encoder(
                train_state.run_dir / BEST_ENCODER_FILE, train_state.method, train_state.backbone_config
            )
        self.progress_bar.update(0, postfix=f"held-out pairs: {PRIMARY_METRIC} {metrics[PRIMARY_METRIC]:.3f}")

    def _early_stop(self) -> bool:
        return self.validation_logger is not None and should_stop(
            self.validation_logger.rows, self.train_state.early_stopping_patience
        )

    def _check_finite(self) -> None:
        step = int(self.totals.first_nonfinite)
        if not step:
            return
        train_state = self.train_state
        anchors = train_state.loader.batch_at(step - 1).anchors
        ids = ", ".join(train_state.image_id(position) for position in anchors[:5].tolist())
        raise TrainingError(
            f"the loss is no longer a number, at step {step:,} (images {ids} and {len(anchors) - 5:,} "
            f"more); {describe_last_checkpoint(train_state.run_dir)}. A lower --rate or --precision "
            f"float32 often helps"
        )

    def _warn_if_collapsed(self, row: dict[str, int | float]) -> None:
        if not self.warned_of_collapse and has_collapsed(rank=row["effective_rank"], std=row["feature_std"]):
            self.warned_of_collapse = True
            logger.info(
                f"warning: the features have collapsed at step {row['step']:,} (effective rank "
                f"{row['effective_rank']:.1f}, spread {row['feature_std']:.3f}): images are hardly told apart"
            )

    def _reset_timers(self) -> None:
        self.steps_since_log, self.data_wait, self.log_started = 0, 0.0, time.monotonic()


def skip_update_where(optimizer: torch.optim.Optimizer, output: StepOutput) -> None:
    """Let no weight move for a batch that teaches nothing or whose loss is no number.

    Fused optimizers look for this attribute, by which GradScaler tells them the same, and skip the step on
    the device: no step waits to be told.
    """
    nonfinite = (~torch.isfinite(output.loss.detach())).float()
    skip_update = nonfinite if output.skip_update is None else torch.maximum(nonfinite, output.skip_update)
    optimizer.__dict__["found_inf"] = skip_update


@contextmanager
def _catch_stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one has its usual effect."""
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
