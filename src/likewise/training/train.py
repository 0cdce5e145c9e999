"""`train`: from a dataset and configs to a trained encoder, and `Run`, its result."""

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from likewise.artifacts import Artifact, read_jsonl
from likewise.data.dataset import CaptionDataset
from likewise.distributed import init_distributed, local_device
from likewise.errors import ArtifactError
from likewise.locks import lock_directory
from likewise.pairs.config import PairConfig
from likewise.parallel import resolve_device
from likewise.progress import NULL_PROGRESS, Progress
from likewise.run_directory import RunDirectory
from likewise.training.config import TrainConfig
from likewise.training.trainer import ARTIFACT_KIND, Trainer
from likewise.training.validation import best_step

logger = logging.getLogger(__name__)


class Run:
    """A finished training run."""

    def __init__(self, path: str | Path) -> None:
        """Open a run.

        Raises:
            ArtifactError: if there is no run at the path, or it is unfinished.
        """
        self.artifact = Artifact.open(Path(path), ARTIFACT_KIND)
        self.path = self.artifact.path

    def __fspath__(self) -> str:
        """Return the path of the run, so that a run can be passed wherever a path can."""
        return str(self.path)

    @property
    def encoder_path(self) -> Path:
        """The file of the trained encoder."""
        return RunDirectory(self.path).encoder_path

    def metrics(self) -> list[dict[str, int | float]]:
        """Return the training metrics in the order of steps."""
        return read_jsonl(RunDirectory(self.path).metrics_path)

    def validation_metrics(self) -> list[dict[str, int | float]]:
        """Return the validation metrics in the order of steps; empty without validation pairs."""
        return read_jsonl(RunDirectory(self.path).validation_path)

    @property
    def best_step(self) -> int:
        """The step of the encoder: that of the best validation, or the last one."""
        return best_step(self.validation_metrics()) or self.artifact.manifest.counts["steps"]


def train(
    dataset: CaptionDataset | str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    pair_config: PairConfig | None = None,
    *,
    num_workers: int | None = None,
    device: str | None = None,
    checkpoint_minutes: float | None = 2.0,
    progress: Progress = NULL_PROGRESS,
) -> Run:
    """Train an image encoder; an interrupted run resumes from its last checkpoint.

    Under torchrun each process takes a part of every batch; the result is that of one process up to rounding,
    and a run may resume with another number of processes.

    Args:
        dataset: The dataset or its path.
        out: The directory of the run.
        config: The training config; defaults to `TrainConfig()`, the paper's recipe.
        pair_config: The pair config; defaults to `PairConfig()`. Missing neighbors are searched for.
        num_workers: Threads that make batches; defaults to half of the cores. They do not change the result.
        device: `cpu`, `cuda`, …; defaults to `cuda` if it is available.
        checkpoint_minutes: Minutes between checkpoints; 0 writes one after every step, None only
            one after a signal.
        progress: Progress bars.

    Raises:
        ArtifactError: if embeddings are missing, `out` holds something else, or another process trains it.
        InvalidInputError: if no image has a partner.
        ModelError: if the backbone or the initial weights do not fit.
        DependencyError: if the method has a text tower and open_clip is not installed.
        TrainingError: if there are too few images or the loss is not finite.
        InterruptedRunError: after Ctrl-C, with a checkpoint written.
    """
    torch_device = local_device(torch.device(resolve_device(device)))
    with init_distributed(torch_device) as dist_context, _lock_run(Path(out)):
        trainer = Trainer.setup(
            dataset,
            out,
            TrainConfig() if config is None else config,
            PairConfig() if pair_config is None else pair_config,
            dist_context=dist_context,
            device=torch_device,
            num_workers=num_workers,
            progress=progress if dist_context.is_main_process else NULL_PROGRESS,
        )
        if trainer.is_finished:
            logger.info("%s is finished already", out)
        else:
            trainer.fit(checkpoint_minutes)
            trainer.finalize()
    return Run(out)


def _lock_run(path: Path) -> AbstractContextManager[None]:
    """Lock a run that is not finished; a second process fails at once, because the first may take days."""
    try:
        Artifact.open(path, ARTIFACT_KIND)
    except ArtifactError:
        return lock_directory(path, ARTIFACT_KIND, wait=False)
    return nullcontext()
