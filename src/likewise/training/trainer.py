"""The training loop: one for all methods, all sources of pairs and any number of processes."""

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

from likewise.artifacts import Artifact, begin, fingerprint
from likewise.data.dataset import Collection
from likewise.data.filters import read_filter
from likewise.data.image_cache import PackedImages, pack_images, side_to_pack
from likewise.distributed import Processes
from likewise.embeddings.store import look_up_embeddings
from likewise.errors import InputError, InterruptedRunError, ModelError, TrainingError
from likewise.models.backbones import BackboneSpec, build_backbone, check_side, default_stem
from likewise.models.checkpoints import load_state_dict, load_strictly
from likewise.models.encoders import RUN_ENCODER
from likewise.neighbors.vectors import RecordVectors, kept_captions
from likewise.pairs.build import make_pairs
from likewise.pairs.config import PairRule
from likewise.pairs.sampling import Pairs
from likewise.progress import Progress, Task
from likewise.training.checkpoint import (
    BEST,
    Sums,
    Trainer,
    checkpoints,
    keep_encoder,
    last_good,
    load_checkpoint,
    save_checkpoint,
)
from likewise.training.config import Plan, TrainSettings, plan, showings
from likewise.training.loader import Batch, PairBatches, Words, make_tokens
from likewise.training.methods.base import Step
from likewise.training.optim import scheduled_rate
from likewise.training.run_dir import SCORES, MetricsLog, effective_rank, has_collapsed, spread, told
from likewise.training.validation import SCORE, PairScorer, best_step, hold_out, is_exhausted

KIND = "run"
_NAMES = ("encoder", "image_encoder", "filter", "pairs_file", "index")


@dataclass(frozen=True)
class Work:
    """What is ready before the first step."""

    artifact: Artifact
    backbone: nn.Module
    width: int
    spec: BackboneSpec
    state: torch.Tensor
    images: PackedImages
    pairs: Pairs
    batches: PairBatches
    words: Words
    scorer: PairScorer | None
    plan: Plan


def prepare(
    source: Collection,
    run: Path,
    chosen: TrainSettings,
    shown: PairRule,
    among: Processes,
    workers: int | None,
    on: torch.device,
    progress: Progress,
) -> Work:
    """Make or find everything that training needs; what can fail fails before what takes long."""
    spec = spec_of(chosen)
    backbone, width, state = initial_backbone(chosen, spec)
    views = showings(chosen, shown)
    for side in {each.size for each in views} - {chosen.size}:
        check_side(backbone, spec.name, side)
    plan(chosen, len(source), source.path)
    words = _words(source, chosen, shown, progress)
    pairs = make_pairs(source, shown, device=on.type, progress=progress)
    images = pack_images(source, side_to_pack(chosen.size, len(source)), workers=workers, progress=progress)
    if len(images.usable) < len(source):
        pairs = make_pairs(source, shown, images.usable, device=on.type, progress=progress)
    scorer = None
    if chosen.held_out:
        held, whole = hold_out(pairs, chosen.held_out, seed=chosen.seed), pairs
        pairs = make_pairs(source, shown, held.rest(images.usable), device=on.type, progress=progress)
        labels = _labels(source, held.anchors)
        scorer = PairScorer(images, whole, held, views[0], labels, seed=chosen.seed)
    batches = PairBatches(
        images, pairs, views, batch_size=chosen.batch_size, seed=chosen.seed, words=words, among=among
    )
    steps = plan(chosen, len(batches.anchors), source.path)
    inputs = _inputs(source, images, pairs, words, chosen)
    # Where partners come from is told by the inputs, however it was named.
    artifact = begin(run, KIND, told(shown) | asdict(chosen), inputs, volatile=_NAMES)
    return Work(artifact, backbone, width, spec, state, images, pairs, batches, words, scorer, steps)


def spec_of(settings: TrainSettings) -> BackboneSpec:
    """Return what it takes to build the settings' backbone."""
    stem = settings.stem or default_stem(settings.size)
    return BackboneSpec(name=settings.backbone, size=settings.size, stem=stem)


def initial_backbone(settings: TrainSettings, spec: BackboneSpec) -> tuple[nn.Module, int, torch.Tensor]:
    """Return the backbone with its initial weights, its width, and the generator's state for the heads."""
    torch.manual_seed(settings.seed)
    backbone, width = build_backbone(spec, pretrained=settings.init == "pretrained")
    state = torch.get_rng_state()
    if settings.init not in ("scratch", "pretrained"):
        weights = initial_weights(settings.init)
        load_strictly(backbone, load_state_dict(weights), str(weights))
    return backbone, width, state


def initial_weights(init: str) -> Path:
    """Return the file that `--init` names: a file, or the encoder of a run.

    Raises:
        ModelError: where there is neither.
    """
    path = Path(init)
    found = path / RUN_ENCODER if path.is_dir() else path
    if not found.is_file():
        raise ModelError(
            f"--init {init}: no such weights; give scratch, pretrained, a file, or a finished run"
        )
    return found


def _inputs(
    source: Collection,
    images: PackedImages,
    pairs: Pairs,
    words: Words,
    settings: TrainSettings,
) -> dict[str, str]:
    inputs = {"collection": source.key, "images": images.key, "pairs": pairs.key}
    if words.vectors is not None:
        inputs["captions"] = words.vectors.key
    if words.tokens is not None:
        inputs["tokens"] = words.tokens.key
    if settings.init not in ("scratch", "pretrained"):
        inputs["init"] = fingerprint(initial_weights(settings.init))
    return inputs


def _words(source: Collection, settings: TrainSettings, rule: PairRule, progress: Progress) -> Words:
    """Open what the method wants to know of captions.

    Raises:
        InputError: where an image is to be compared with its caption and no image has one.
    """
    if not (settings.uses_caption_vectors or settings.uses_tokens):
        return Words()
    left_out = None if rule.filter is None else read_filter(rule.filter, source)
    kept = kept_captions(source, left_out)
    vectors = tokens = captioned = None
    if settings.uses_caption_vectors:
        vectors = RecordVectors(look_up_embeddings(source, rule.encoder), len(source), kept)
        captioned = vectors.count > 0
    if settings.uses_tokens:
        tokens = make_tokens(source, kept, progress=progress)
        captioned = tokens.captioned
    if not settings.needs.text:
        return Words(vectors=vectors)
    if captioned is None or not captioned.any():
        raise InputError(
            f"--method {settings.method} compares images with captions, and {source.path} has none; import "
            "it with --caption-column, or use a method without text"
        )
    lost = int((~captioned).sum())
    if lost:
        progress.say(f"{lost:,} of {len(source):,} images have no caption and take no part")
    return Words(
        vectors=vectors,
        tokens=tokens,
        of_partners=settings.needs.shown == "anchor",
        captioned=captioned,
    )


def _labels(source: Collection, positions: np.ndarray) -> np.ndarray | None:
    """Return the labels of some images by number, -1 without one; None where there are not two."""
    names = [source[int(position)].label for position in positions]
    known = {name: number for number, name in enumerate(sorted({n for n in names if n is not None}))}
    if len(known) < 2:
        return None
    return np.array([-1 if name is None else known[name] for name in names], np.int64)


__all__ = ["checkpoints", "run_training", "save_checkpoint"]


def run_training(trainer: Trainer, progress: Progress) -> tuple[int, int]:
    """Train from the newest checkpoint, or the start, to the last step of the plan or of patience.

    Returns:
        How many steps the run has taken in all, and how many of its batches taught nothing.

    Raises:
        InterruptedRunError: after SIGINT or SIGTERM, with a checkpoint written.
        TrainingError: where the loss stops being a number; the last good checkpoint is kept.
    """
    scaler = torch.amp.GradScaler(trainer.device.type, enabled=trainer.dtype == torch.float16)
    start, sums = load_checkpoint(trainer, scaler)
    if start:
        progress.say(f"going on from step {start:,} of {trainer.plan.steps:,}")
    with (
        _stop_signals() as stop,
        _logs(trainer, start) as (log, scores),
        progress.task("training", trainer.plan.steps, "steps", start) as task,
    ):
        loop = _Loop(trainer, scaler, log, scores, task, progress, sums)
        return loop.run(start, stop), int(loop.sums.skipped)


@contextmanager
def _logs(trainer: Trainer, start: int) -> Iterator[tuple[MetricsLog | None, MetricsLog | None]]:
    """Open the metrics and, with held-out pairs, the scores, in the process that leads."""
    if not trainer.among.leads:
        yield None, None
        return
    log = MetricsLog(trainer.run, start)
    scores = None if trainer.scorer is None else MetricsLog(trainer.run, start, SCORES)
    try:
        yield log, scores
    finally:
        log.close()
        if scores is not None:
            scores.close()


class _Loop:
    """One pass from a step to the end, with what is logged now and then."""

    def __init__(
        self,
        trainer: Trainer,
        scaler: torch.amp.GradScaler,
        log: MetricsLog | None,
        scores: MetricsLog | None,
        task: Task,
        progress: Progress,
        sums: Sums,
    ) -> None:
        self.trainer, self.scaler, self.log, self.scores = trainer, scaler, log, scores
        self.task, self.progress, self.sums = task, progress, sums
        self.warned = False
        self._restart_clock()

    def run(self, start: int, stop: threading.Event) -> int:
        """Go on until a step is the last one, and return how many have been taken."""
        trainer, saved_at = self.trainer, time.monotonic()
        trainer.method.train()
        done, (enough,) = start, trainer.among.agree(self._has_enough())
        batches = trainer.batches.stream(start, trainer.plan.steps, trainer.workers)
        while done < trainer.plan.steps and not enough:
            asked = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - asked
            step = self._step(done, batch)
            done += 1
            self._note(done, step)
            self._score(done)
            due = time.monotonic() - saved_at >= 60 * trainer.checkpoint_minutes
            stopped, due, enough = trainer.among.agree(stop.is_set(), due, self._has_enough())
            last = enough or done == trainer.plan.steps
            if last or due or stopped:
                self._require_finite()
                if trainer.among.leads:
                    save_checkpoint(trainer, self.scaler, done, self.sums)
                saved_at = time.monotonic()
            if stopped and not last:
                raise InterruptedRunError(
                    f"stopped after step {done:,} of {trainer.plan.steps:,}; "
                    f"run the same command again to go on from there ({trainer.run})"
                )
        return done

    def _step(self, number: int, batch: Batch) -> Step:
        """Take one optimizer step; the generator is set by the step, for whatever draws in it."""
        trainer = self.trainer
        torch.manual_seed(trainer.seed * 1_000_003 + number)
        self.rate = scheduled_rate(
            number, steps=trainer.plan.steps, warmup=trainer.plan.warmup, peak=trainer.plan.peak_rate
        )
        for group in trainer.optimizer.param_groups:
            group["lr"] = self.rate
        shown = batch.shown(trainer.batches.recipes, trainer.device, number / trainer.plan.steps)
        mixed = trainer.dtype != torch.float32
        with torch.autocast(trainer.device.type, trainer.dtype, enabled=mixed):
            step = trainer.stepper(shown)
        trainer.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(step.loss).backward()
        if not self.scaler.is_enabled():
            _hold_still(trainer.optimizer, step)
        self.scaler.step(trainer.optimizer)
        self.scaler.update()
        self.sums = self.sums.add(step.loss.detach(), step.skip, number + 1)
        return step

    def _note(self, done: int, step: Step) -> None:
        self.here += 1
        every = self.trainer.plan.log_every
        if done % every and done != self.trainer.plan.steps:
            self.task.advance()
            return
        self._require_finite()
        row = self._row(done, step)
        if self.log is not None:
            self.log.write(row)
        self._warn_of_collapse(row)
        self.task.advance(
            note=f"loss {row['loss']:.3f} · rank {row['effective_rank']:.0f} · "
            f"{row['images_per_second']:,.0f} images/s"
        )
        self.sums = self.sums.next_row()
        self._restart_clock()

    def _row(self, done: int, step: Step) -> dict[str, int | float]:
        elapsed = time.monotonic() - self.since
        images = len(self.trainer.batches.showings) * self.trainer.batches.batch_size * self.here
        row: dict[str, int | float] = {
            "step": done,
            "epoch": done / self.trainer.plan.steps_per_epoch,
            "loss": float(self.sums.loss) / max(1.0, float(self.sums.taught)),
            "rate": self.rate,
            "effective_rank": float(effective_rank(step.features)),
            "spread": float(spread(step.features)),
            **{name: float(value) for name, value in step.logs.items()},
            "images_per_second": images / elapsed,
            "data_wait": self.waited / elapsed,
        }
        return row if step.skip is None else row | {"skipped": float(self.sums.skipped)}

    def _score(self, done: int) -> None:
        """Score the encoder on held-out pairs when it is time, and keep it if it is the best so far."""
        trainer = self.trainer
        every, last = trainer.plan.score_every, trainer.plan.steps
        if self.scores is None or trainer.scorer is None or (done % every and done != last):
            return
        row = trainer.scorer.score(trainer.method.backbone, trainer.device, trainer.dtype)
        self.scores.write({"step": done, **row})
        if best_step(self.scores.rows) == done:
            keep_encoder(trainer.run / BEST, trainer.method, trainer.spec)
        self.task.advance(0, note=f"held-out pairs: {SCORE} {row[SCORE]:.3f}")

    def _has_enough(self) -> bool:
        return self.scores is not None and is_exhausted(self.scores.rows, self.trainer.patience)

    def _require_finite(self) -> None:
        number = int(self.sums.bad)
        if not number:
            return
        trainer = self.trainer
        anchors = trainer.batches.batch(number - 1).anchors
        ids = ", ".join(trainer.name(position) for position in anchors[:5].tolist())
        raise TrainingError(
            f"the loss is no longer a number, at step {number:,} (images {ids} and {len(anchors) - 5:,} "
            f"more); {last_good(trainer.run)}. A lower --rate or --precision float32 often helps"
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


def _hold_still(optimizer: torch.optim.Optimizer, step: Step) -> None:
    """Let no weight move for a batch that teaches nothing or whose loss is no number.

    Fused optimizers look for this attribute, by which GradScaler tells them the same, and skip the step on
    the device: no step waits to be told.
    """
    fault = (~torch.isfinite(step.loss.detach())).float()
    held = fault if step.skip is None else torch.maximum(fault, step.skip)
    optimizer.__dict__["found_inf"] = held


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
