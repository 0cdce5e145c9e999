"""From pairs to an image encoder: `train`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from likewise.cli.app import COMMON, app
from likewise.launch import leads
from likewise.neighbors.rules import PairRule
from likewise.pretraining.settings import TrainSettings
from likewise.terminal import Common

_TRAIN = TrainSettings()
_RULE = PairRule()
TrainFlags = Annotated[TrainSettings, Parameter(name="*", group="Training", consume_multiple=True)]
RuleFlags = Annotated[PairRule, Parameter(name="*", group="Who is shown with whom")]


@app.command(
    help_epilogue="Example: `likewise train photos.likewise --out run --backbone resnet18 --size 64 "
    "--epochs 20 --batch-size 128`"
)
def train(
    collection: Path,
    /,
    *,
    out: Path,
    rule: RuleFlags = _RULE,
    settings: TrainFlags = _TRAIN,
    workers: int | None = None,
    device: str | None = None,
    checkpoint_minutes: float = 2.0,
    common: Common = COMMON,
) -> None:
    """Train an image encoder; run it again after an interruption, and it goes on.

    On several GPUs or machines: `torchrun --nproc-per-node 8 -m likewise.cli train …` with the same flags;
    each process takes its part of every batch.

    Args:
        collection: A collection; `--pairs language` needs embeddings of its captions.
        out: The run's folder.
        workers: Threads that make batches; half the processors by default.
        device: `cpu`, `cuda`, …; chosen by itself.
        checkpoint_minutes: A kill loses at most this much work.
    """
    from likewise.pretraining.train import train as train_encoder

    run = train_encoder(
        collection,
        out,
        settings,
        rule,
        workers=workers,
        device=device,
        checkpoint_minutes=checkpoint_minutes,
        progress=common.progress(),
    )
    if not leads():
        return
    last = (run.metrics() or [{}])[-1]
    common.tell(
        {"run": str(run.path), "encoder": str(run.encoder), "last": last, "kept": run.kept_step},
        f"trained: {run.path} (loss {last.get('loss', float('nan')):.3f}, effective rank "
        f"{last.get('effective_rank', float('nan')):.0f}; encoder of step {run.kept_step:,})\n"
        f"  next: likewise evaluate {run.path} --on FOLDER; likewise report {run.path}",
    )


@app.command(help_epilogue="Example: `likewise methods`")
def methods(*, common: Common = COMMON) -> None:
    """List the methods of `train`: what each asks, what it tells an image from, and what it needs besides."""
    from likewise.pretraining.catalog import METHODS

    rows = {
        name: {"asks": needs.what, "negatives": needs.negatives, "needs": list(needs.besides)}
        for name, needs in METHODS.items()
    }
    lines = []
    for name, needs in METHODS.items():
        told_from = "nothing" if needs.negatives == "none" else needs.negatives
        besides = f"; needs: {', '.join(needs.besides)}" if needs.besides else ""
        lines += [f"{name:<16}{needs.what}", f"{'':<16}tells images from: {told_from}{besides}"]
    common.tell({"methods": rows}, "\n".join(lines))
