"""From a collection and settings to a trained encoder: `likewise train`."""

from pathlib import Path

import torch

from likewise.artifacts import open_artifact, read_lines
from likewise.data.dataset import Collection
from likewise.distributed import Processes, distributed, local_device, processes, share_batch_norms
from likewise.models.checkpoints import save_encoder
from likewise.models.encoders import RUN_ENCODER
from likewise.pairs.config import PairRule
from likewise.pairs.sampling import Pairs
from likewise.parallel import default_workers, resolve_device
from likewise.progress import SILENT, Progress
from likewise.training.checkpoint import BEST, Trainer, keep_encoder
from likewise.training.config import TrainSettings, check_together
from likewise.training.methods.base import Method
from likewise.training.methods.registry import build_method
from likewise.training.optim import build_optimizer
from likewise.training.run_dir import (
    CONFIG,
    METRICS,
    PRECISIONS,
    SCORES,
    describe,
    say_if_precision_changed,
    write_preview,
)
from likewise.training.trainer import KIND, Work, initial_backbone, prepare, run_training, spec_of
from likewise.training.validation import best_step

LAST = "encoder-last.safetensors"


class Run:
    """A finished training run."""

    def __init__(self, path: str | Path) -> None:
        """Open a run; raises ArtifactError where there is none or it is unfinished."""
        self.artifact = open_artifact(Path(path), KIND)
        self.path = self.artifact.path

    @property
    def encoder(self) -> Path:
        """The file with the trained backbone."""
        return self.path / RUN_ENCODER

    def metrics(self) -> list[dict[str, int | float]]:
        """Return what was logged, in the order of steps."""
        return read_lines(self.path / METRICS)

    def scores(self) -> list[dict[str, int | float]]:
        """Return the scores on held-out pairs, in the order of steps; none where nothing was held out."""
        return read_lines(self.path / SCORES)

    @property
    def kept_step(self) -> int:
        """The step whose encoder was kept: that of the best score, or the last one."""
        return best_step(self.scores()) or self.artifact.manifest.counts["steps"]


def train(
    collection: Collection | str | Path,
    out: str | Path,
    settings: TrainSettings | None = None,
    rule: PairRule | None = None,
    *,
    workers: int | None = None,
    device: str | None = None,
    checkpoint_minutes: float = 2.0,
    progress: Progress = SILENT,
) -> Run:
    """Train an image encoder on a collection; an interrupted run goes on where its checkpoint stands.

    Under torchrun, each process takes a part of every batch; `batch_size` is that of all together, and the
    result is that of one process but for rounding. A run may go on with another number of processes.

    Args:
        collection: A collection or its path.
        out: The run's folder.
        settings: What is trained and how; the paper's recipe where not given.
        rule: Who is shown with whom; `PairRule()` where not given. Missing neighbors are searched for.
        workers: Threads that make batches; half the processors by default. Does not change the result.
        device: `cpu`, `cuda`, …; chosen by itself where not given.
        checkpoint_minutes: A kill loses at most this much work; 0 writes a checkpoint every step.
        progress: Where to report.

    Raises:
        ArtifactError: where embeddings are missing or `out` holds something else.
        InputError: where the rule leaves nobody with a partner.
        ModelError: where the backbone or initial weights do not fit.
        DependencyError: where a text tower is wanted and open_clip is not installed.
        TrainingError: where there are too few images or the loss stops being a number.
        InterruptedRunError: after Ctrl-C, with a checkpoint written.
    """
    chosen, shown = settings or TrainSettings(), rule or PairRule()
    check_together(chosen, shown)
    on = local_device(torch.device(resolve_device(device)))
    with processes(on) as among:
        aloud = progress if among.leads else SILENT
        source = Collection.open(collection)
        if not among.leads:
            # The one that leads has packed, searched and begun the run: everything is found there.
            among.wait()
        work = prepare(source, Path(out), chosen, shown, among, workers, on, aloud)
        if among.leads:
            if not work.artifact.complete and not (work.artifact.path / CONFIG).is_file():
                write_preview(work.artifact.path, source, work.batches)
            among.wait()
        if work.artifact.complete:
            aloud.say(f"{work.artifact.path} is finished; nothing to do")
            return Run(work.artifact.path)
        return _train(work, source, chosen, among, workers, checkpoint_minutes, on, aloud)


def _train(
    work: Work,
    source: Collection,
    chosen: TrainSettings,
    among: Processes,
    workers: int | None,
    checkpoint_minutes: float,
    on: torch.device,
    progress: Progress,
) -> Run:
    run, steps = work.artifact.path, work.plan
    progress.say(_who(work.pairs, chosen))
    dtype = choose_dtype(chosen.precision, on)
    if (run / CONFIG).is_file():
        say_if_precision_changed(run, dtype, progress)
    elif among.leads:
        describe(run, chosen, work.spec, steps, work.pairs, on, dtype, source, among.count)
    torch.set_rng_state(work.state)
    vectors = work.words.vectors
    method = build_method(
        chosen,
        work.backbone,
        work.width,
        queue=steps.queue or 0,
        vector_width=0 if vectors is None else vectors.dimension,
    )
    if among.count > 1:
        share_batch_norms(method, on)
    method.to(on).to(memory_format=torch.channels_last)
    stepper = distributed(method) if among.count > 1 else method
    trainer = Trainer(
        run=run,
        method=method,
        spec=work.spec,
        stepper=stepper,
        optimizer=build_optimizer(
            chosen.optimizer, method, rate=steps.peak_rate, weight_decay=chosen.weight_decay
        ),
        batches=work.batches,
        plan=steps,
        device=on,
        dtype=dtype,
        seed=chosen.seed,
        workers=max(1, default_workers() // (2 * among.here)) if workers is None else workers,
        checkpoint_minutes=checkpoint_minutes,
        among=among,
        scorer=work.scorer if among.leads else None,
        patience=chosen.patience,
        name=lambda position: source[position].id,
    )
    taken, skipped = run_training(trainer, progress)
    if among.leads:
        _finish(work, method, taken, skipped)
    among.wait()
    return Run(run)


def initial_encoder(settings: TrainSettings, file: Path) -> Path:
    """Write the encoder that a run with these settings starts from: the floor for what it learns."""
    spec = spec_of(settings)
    save_encoder(file, initial_backbone(settings, spec)[0], spec)
    return file


def _who(pairs: Pairs, settings: TrainSettings) -> str:
    """Say who is compared with whom."""
    if settings.in_batch:
        return (
            f"images of a batch are compared with each other: the same where captions are at least "
            f"{settings.alike} alike, different where at most {settings.unlike}"
        )
    told = pairs.summary()
    if settings.needs.shown != "anchor":
        return told
    whose = "its own" if pairs.rule.pairs == "self" else "its partner's"
    return f"each image is compared with {whose} caption; {told}"


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that matrix products run in."""
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _finish(work: Work, method: Method, taken: int, skipped: int) -> None:
    """Keep the last encoder, or the best one beside it, and close the run."""
    run = work.artifact.path
    best = run / BEST
    if work.scorer is None:
        keep_encoder(run / RUN_ENCODER, method, work.spec)
    else:
        keep_encoder(run / LAST, method, work.spec)
        if best.is_file():
            best.replace(run / RUN_ENCODER)
    lost = len(work.images) - len(work.images.usable)
    left = {"no longer readable": lost, "batches without a positive or a negative": skipped}
    work.artifact.finish(
        {"steps": taken, "images": len(work.images.usable)},
        {reason: count for reason, count in left.items() if count},
    )
