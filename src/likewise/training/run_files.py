"""Files that a run writes beside weights: config, metrics, and a preview of the first pairs."""

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from likewise.artifacts import read_jsonl, read_yaml, write_array, write_json, write_text, write_yaml
from likewise.data.dataset import CaptionDataset
from likewise.pairs.config import PairConfig
from likewise.pairs.sampling import Pairs
from likewise.run_directory import RunDirectory
from likewise.training.augmentations import denormalize
from likewise.training.config import (
    TrainConfig,
    parse_train_config,
    train_config_to_dict,
    with_default_backbone,
)
from likewise.training.loader import PairLoader

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NUM_PREVIEW_PAIRS = 12


class MetricsLogger:
    """Appends rows of metrics to a JSON Lines file and to TensorBoard."""

    def __init__(self, path: Path, tensorboard_dir: Path, resume_step: int) -> None:
        """Open the files, and remove the rows after the step from which the run resumes."""
        self.rows = [row for row in read_jsonl(path) if row["step"] <= resume_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = path.open("a", encoding="utf-8")
        # Two writers must not share a directory.
        self._writer = _open_tensorboard(tensorboard_dir / path.stem, resume_step)

    def write(self, row: dict[str, int | float]) -> None:
        """Append a row; it has a key `step`."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def flush(self) -> None:
        """Write the rows to the disk, before a checkpoint says that they are there."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close both files."""
        self._file.close()
        self._writer.close()


def _open_tensorboard(log_dir: Path, resume_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(log_dir), purge_step=resume_step + 1 if resume_step else None)


def pair_config_to_dict(pair_config: PairConfig) -> dict[str, Any]:
    """Return a pair config as settings, with paths as strings."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in asdict(pair_config).items()
    }


def run_settings(config: TrainConfig, pair_config: PairConfig) -> dict[str, Any]:
    """Return the flat settings of a run: pairs, training and options of the method."""
    return pair_config_to_dict(pair_config) | train_config_to_dict(config)


def non_default_settings(config: TrainConfig, pair_config: PairConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults of the method, and always `source` and `seed`."""
    settings = run_settings(config, pair_config)
    default_config = with_default_backbone(parse_train_config({"method": config.method_options.name}))
    defaults = run_settings(default_config, PairConfig())
    defaults["method"] = TrainConfig.method
    return {
        name: value
        for name, value in settings.items()
        if value != defaults[name] or name in ("source", "seed")
    }


def write_config(
    run_dir: RunDirectory,
    settings: dict[str, Any],
    pairs: Pairs,
    dataset: CaptionDataset,
    derived: dict[str, Any],
) -> None:
    """Write the settings of a run and, under `derived`, the values that follow from them.

    Args:
        run_dir: The run.
        settings: The settings as given, such as those of `run_settings`.
        pairs: The pairs.
        dataset: The dataset.
        derived: Further derived values, such as the schedule.
    """
    derived = derived | {
        "pairs": pairs.summary(),
        "dataset": str(dataset.path.resolve()),
        "neighbors": [
            {"path": str(neighbors.path.resolve()), "key": neighbors.manifest.key}
            for neighbors in pairs.neighbors
        ],
    }
    write_yaml(run_dir.config_path, settings | {"derived": derived})


def warn_precision_change(run_dir: RunDirectory, dtype: torch.dtype) -> None:
    """Warn if a run resumes with another precision."""
    initial, current = read_yaml(run_dir.config_path)["derived"]["precision"], precision_name(dtype)
    if initial != current:
        logger.warning(
            "the run started in %s and resumes in %s; set `precision` to %s to keep it",
            initial,
            current,
            initial,
        )


def precision_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in `DTYPES`."""
    return next(name for name, known_dtype in DTYPES.items() if known_dtype == dtype)


def write_preview(run_dir: RunDirectory, dataset: CaptionDataset, loader: PairLoader) -> None:
    """Write the first pairs as the network receives them: at most two views of each."""
    batch = loader.batch_at(0)
    views = batch.to_device(loader.dataset.augmentations, torch.device("cpu")).views[:2]
    num_pairs = min(_NUM_PREVIEW_PAIRS, len(views[0]))
    mean, std = batch.preprocessing.mean, batch.preprocessing.std
    pixels = denormalize(torch.stack(list(views))[:, :num_pairs], mean, std) * 255
    pixels = pixels.round().byte().permute(1, 0, 3, 4, 2)
    write_array(run_dir.preview_views_path, np.ascontiguousarray(pixels.numpy()))
    write_json(
        run_dir.preview_pairs_path,
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
