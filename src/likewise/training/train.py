"""From a collection and settings to a trained encoder: `likewise train`."""

import logging
from pathlib import Path

import torch

from likewise.artifacts import Artifact, read_jsonl
from likewise.data.dataset import CaptionDataset
from likewise.distributed import (
    DistributedContext,
    convert_to_sync_batchnorm,
    init_distributed,
    local_device,
    wrap_ddp,
)
from likewise.models.checkpoints import save_encoder
from likewise.models.encoders import ENCODER_FILE
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import Pairs
from likewise.parallel import default_num_workers, resolve_device
from likewise.progress import NULL_PROGRESS, Progress
from likewise.training.checkpoint import BEST_ENCODER_FILE, TrainState, save_method_encoder
from likewise.training.config import TrainConfig, validate_combination
from likewise.training.methods.base import Method
from likewise.training.methods.registry import build_method
from likewise.training.optim import build_optimizer
from likewise.training.run_dir import (
    CONFIG_FILE,
    DTYPES,
    METRICS_FILE,
    VALIDATION_FILE,
    warn_precision_change,
    write_config,
    write_preview,
)
from likewise.training.trainer import (
    ARTIFACT_KIND,
    TrainSetup,
    fit,
    get_backbone_config,
    init_backbone,
    setup_training,
)
from likewise.training.validation import best_step

logger = logging.getLogger(__name__)

LAST_ENCODER_FILE = "encoder-last.safetensors"


class Run:
    """A finished training run."""

    def __init__(self, path: str | Path) -> None:
        """Open a run; raises ArtifactError where there is none or it is unfinished."""
        self.artifact = Artifact.open(Path(path), ARTIFACT_KIND)
        self.path = self.artifact.path

    def __fspath__(self) -> str:
        """Return the path of the run, so that a run can be passed wherever a path can."""
        return str(self.path)

    @property
    def encoder_path(self) -> Path:
        """The file with the trained backbone."""
        return self.path / ENCODER_FILE

    def metrics(self) -> list[dict[str, int | float]]:
        """Return what was logged, in the order of steps."""
        return read_jsonl(self.path / METRICS_FILE)

    def validation_metrics(self) -> list[dict[str, int | float]]:
        """Return the scores on held-out pairs, in the order of steps; none where nothing was held out."""
        return read_jsonl(self.path / VALIDATION_FILE)

    @property
    def best_step(self) -> int:
        """The step whose encoder was kept: that of the best score, or the last one."""
        return best_step(self.validation_metrics()) or self.artifact.manifest.counts["steps"]


def train(
    dataset: CaptionDataset | str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    pair_config: PairConfig | None = None,
    *,
    num_workers: int | None = None,
    device: str | None = None,
    checkpoint_minutes: float = 2.0,
    progress: Progress = NULL_PROGRESS,
) -> Run:
    """Train an image encoder on a collection; an interrupted run goes on where its checkpoint stands.

    Under torchrun, each process takes a part of every batch; `batch_size` is that of all together, and the
    result is that of one process but for rounding. A run may go on with another number of processes.

    Args:
        dataset: A collection or its path.
        out: The run's folder.
        config: What is trained and how; the paper's recipe where not given.
        pair_config: Who is shown with whom; `PairRule()` where not given. Missing neighbors are searched for.
        num_workers: Threads that make batches; half the processors by default. Does not change the result.
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
    config, pair_config = config or TrainConfig(), pair_config or PairConfig()
    validate_combination(config, pair_config)
    torch_device = local_device(torch.device(resolve_device(device)))
    with init_distributed(torch_device) as dist:
        progress = progress if dist.is_main_process else NULL_PROGRESS
        dataset = CaptionDataset.open(dataset)
        if not dist.is_main_process:
            # The one that leads has packed, searched and begun the run: everything is found there.
            dist.barrier()
        setup = setup_training(
            dataset, Path(out), config, pair_config, dist, num_workers, torch_device, progress
        )
        if dist.is_main_process:
            if not setup.artifact.is_complete and not (setup.artifact.path / CONFIG_FILE).is_file():
                write_preview(setup.artifact.path, dataset, setup.loader)
            dist.barrier()
        if setup.artifact.is_complete:
            logger.info(f"{setup.artifact.path} is finished; nothing to do")
            return Run(setup.artifact.path)
        return _run_training(
            setup, dataset, config, dist, num_workers, checkpoint_minutes, torch_device, progress
        )


def _run_training(
    setup: TrainSetup,
    dataset: CaptionDataset,
    config: TrainConfig,
    dist: DistributedContext,
    num_workers: int | None,
    checkpoint_minutes: float,
    device: torch.device,
    progress: Progress,
) -> Run:
    run_dir, schedule = setup.artifact.path, setup.schedule
    logger.info(_pairing_summary(setup.pairs, config))
    dtype = choose_dtype(config.precision, device)
    if (run_dir / CONFIG_FILE).is_file():
        warn_precision_change(run_dir, dtype)
    elif dist.is_main_process:
        write_config(
            run_dir,
            config,
            setup.backbone_config,
            schedule,
            setup.pairs,
            device,
            dtype,
            dataset,
            dist.world_size,
        )
    torch.set_rng_state(setup.rng_state)
    vectors = setup.caption_inputs.vectors
    method = build_method(
        config,
        setup.backbone,
        setup.feature_dim,
        memory_bank_size=schedule.memory_bank_size or 0,
        caption_embedding_dim=0 if vectors is None else vectors.dim,
    )
    if dist.world_size > 1:
        convert_to_sync_batchnorm(method, device)
    method.to(device).to(memory_format=torch.channels_last)
    ddp_method = wrap_ddp(method) if dist.world_size > 1 else method
    train_state = TrainState(
        run_dir=run_dir,
        method=method,
        backbone_config=setup.backbone_config,
        ddp_method=ddp_method,
        optimizer=build_optimizer(
            config.optimizer, method, lr=schedule.peak_lr, weight_decay=config.weight_decay
        ),
        loader=setup.loader,
        schedule=schedule,
        device=device,
        dtype=dtype,
        seed=config.seed,
        num_workers=max(1, default_num_workers() // (2 * dist.local_world_size))
        if num_workers is None
        else num_workers,
        checkpoint_minutes=checkpoint_minutes,
        dist=dist,
        evaluator=setup.evaluator if dist.is_main_process else None,
        early_stopping_patience=config.early_stopping_patience,
        image_id=lambda position: dataset[position].id,
    )
    num_steps, num_skipped = fit(train_state, progress)
    if dist.is_main_process:
        _finalize(setup, method, num_steps, num_skipped)
    dist.barrier()
    return Run(run_dir)


def save_untrained_encoder(config: TrainConfig, path: Path) -> Path:
    """Write the encoder that a run with these settings starts from: the floor for what it learns."""
    backbone_config = get_backbone_config(config)
    save_encoder(path, init_backbone(config, backbone_config)[0], backbone_config)
    return path


def _pairing_summary(pairs: Pairs, config: TrainConfig) -> str:
    """Say who is compared with whom."""
    if config.mine_in_batch:
        return (
            f"images of a batch are compared with each other: the same where captions are at least "
            f"{config.positive_threshold} alike, different where at most {config.negative_threshold}"
        )
    summary = pairs.summary()
    if config.method_options.inputs != "anchor":
        return summary
    caption_source = "its own" if pairs.pair_config.source == "self" else "its partner's"
    return f"each image is compared with {caption_source} caption; {summary}"


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that matrix products run in."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return (
            torch.bfloat16
            if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
            else torch.float32
        )
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _finalize(setup: TrainSetup, method: Method, num_steps: int, num_skipped: int) -> None:
    """Keep the last encoder, or the best one beside it, and close the run."""
    run_dir = setup.artifact.path
    best_path = run_dir / BEST_ENCODER_FILE
    if setup.evaluator is None:
        save_method_encoder(run_dir / ENCODER_FILE, method, setup.backbone_config)
    else:
        save_method_encoder(run_dir / LAST_ENCODER_FILE, method, setup.backbone_config)
        if best_path.is_file():
            best_path.replace(run_dir / ENCODER_FILE)
    num_unreadable = len(setup.image_cache) - len(setup.image_cache.readable)
    skipped = {"no longer readable": num_unreadable, "batches without a positive or a negative": num_skipped}
    setup.artifact.finish(
        {"steps": num_steps, "images": len(setup.image_cache.readable)},
        {reason: count for reason, count in skipped.items() if count},
    )
