"""What a run tells of itself: its settings, what followed from them, and the first pairs as it saw them."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from likewise.artifacts import read_jsonl, read_yaml, write_array, write_json, write_text, write_yaml
from likewise.data.dataset import CaptionDataset
from likewise.models.backbones import BackboneConfig
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import Pairs
from likewise.training.augmentations import denormalize
from likewise.training.config import TrainConfig, TrainSchedule, resolve_augmentation
from likewise.training.loader import PairLoader

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "scores.jsonl"
COLLAPSE_RANK = 2.0
COLLAPSE_STD = 0.01


def feature_std(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return how far unit features spread: 1 for even directions, 0 where all are the same.

    The standard deviation of each coordinate of the normalised features, averaged and multiplied by the
    square root of d (Chen and He 2021, "Exploring Simple Siamese", section 4.1).
    """
    normalized = normalize(features.float(), dim=1)
    return normalized.std(dim=0).mean() * normalized.shape[1] ** 0.5


def effective_rank(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return the effective rank of the centred features: the exponential of the entropy of their spectrum.

    Roy and Vetterli 2007, definition 1, with singular values that sum to 1; between 1 and min(n - 1, d).
    (RankMe, Garrido et al. 2023, takes the same of features that are not centred.)
    """
    centered = features.float() - features.float().mean(dim=0)
    singular_values = torch.linalg.svdvals(centered)
    p = singular_values / singular_values.sum().clamp(min=1e-12)
    return torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum())


def has_collapsed(*, rank: float, std: float) -> bool:
    """Tell whether features have lost nearly all difference between images."""
    return rank < COLLAPSE_RANK or std < COLLAPSE_STD


class MetricsLogger:
    """Appends rows to a file of JSON lines and to TensorBoard."""

    def __init__(self, run_dir: Path, resume_step: int, filename: str = METRICS_FILE) -> None:
        """Open a log of a run, forgetting what was logged after the step it goes on from."""
        self.rows = [row for row in read_jsonl(run_dir / filename) if row["step"] <= resume_step]
        write_text(run_dir / filename, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = (run_dir / filename).open("a", encoding="utf-8")
        # Each log has a folder of its own, as two writers must not share one.
        self._writer = _open_tensorboard(run_dir / "tensorboard" / filename.partition(".")[0], resume_step)

    def write(self, row: dict[str, int | float]) -> None:
        """Write one row; `step` is its place."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._writer.close()


def _open_tensorboard(log_dir: Path, resume_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(log_dir), purge_step=resume_step + 1 if resume_step else None)


CONFIG_FILE = "config.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NUM_PREVIEW_PAIRS = 12


def pair_config_to_dict(pair_config: PairConfig) -> dict[str, Any]:
    """Return a rule as it is recorded beside the other settings."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(pair_config).items()
    }


def _non_default_settings(config: TrainConfig, pair_config: PairConfig) -> dict[str, Any]:
    """Return pairs, seed and the settings that are not the usual ones, as a command would give them."""
    defaults = pair_config_to_dict(PairConfig()) | asdict(TrainConfig())
    values = pair_config_to_dict(pair_config) | asdict(config)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != defaults[name] or name in ("source", "seed")
    }


def write_config(
    run_dir: Path,
    config: TrainConfig,
    backbone_config: BackboneConfig,
    schedule: TrainSchedule,
    pairs: Pairs,
    device: torch.device,
    dtype: torch.dtype,
    dataset: CaptionDataset,
    world_size: int,
) -> None:
    """Write the settings as given and, apart from them, what followed from them."""
    derived = asdict(schedule) | {
        "augmentation": resolve_augmentation(config, pairs.pair_config),
        "stem": backbone_config.stem,
        "rule": pairs.summary(),
        "collection": str(dataset.path.resolve()),
        "neighbors": [
            {"path": str(neighbors.path.resolve()), "key": neighbors.manifest.key}
            for neighbors in pairs.neighbors
        ],
        "asked": _non_default_settings(config, pairs.pair_config),
        "device": str(device),
        "precision": _precision_name(dtype),
        "processes": world_size,
    }
    config_dict = asdict(config) | {
        "projector_dims": None if config.projector_dims is None else list(config.projector_dims)
    }
    write_yaml(
        run_dir / CONFIG_FILE, pair_config_to_dict(pairs.pair_config) | config_dict | {"derived": derived}
    )


def warn_precision_change(run_dir: Path, dtype: torch.dtype) -> None:
    """Warn where a run goes on in another precision than it began in."""
    initial, current = read_yaml(run_dir / CONFIG_FILE)["derived"]["precision"], _precision_name(dtype)
    if initial != current:
        logger.info(
            f"warning: the run began in {initial} and goes on in {current}; --precision {initial} "
            f"would keep it"
        )


def _precision_name(dtype: torch.dtype) -> str:
    return next(name for name, known_dtype in DTYPES.items() if known_dtype == dtype)


def write_preview(run_dir: Path, dataset: CaptionDataset, loader: PairLoader) -> None:
    """Keep the first pairs as the network is shown them, for people to look at: at most two views each."""
    batch = loader.batch_at(0)
    views = batch.to_device(loader.augmentations, torch.device("cpu")).views[:2]
    num_pairs = min(_NUM_PREVIEW_PAIRS, len(views[0]))
    pixels = (
        (denormalize(torch.stack(list(views))[:, :num_pairs]) * 255).round().byte().permute(1, 0, 3, 4, 2)
    )
    write_array(run_dir / "preview.npy", np.ascontiguousarray(pixels.numpy()))
    write_json(
        run_dir / "preview.json",
        [
            {
                "anchor": dataset[int(a)].id,
                "partner": dataset[int(p)].id,
                "position": int(a),
                "partner_position": int(p),
            }
            for a, p in zip(batch.anchors[:num_pairs], batch.partners[0][:num_pairs], strict=True)
        ],
    )
