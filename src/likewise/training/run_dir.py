"""What a run tells of itself: its settings, what followed from them, and the first pairs as it saw them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from likewise.artifacts import read_lines, read_yaml, write_array, write_json, write_text, write_yaml
from likewise.data.dataset import Collection
from likewise.models.backbones import BackboneSpec
from likewise.pairs.config import PairRule
from likewise.pairs.sampling import Pairs
from likewise.progress import Progress
from likewise.training.augmentations import restore
from likewise.training.config import Plan, TrainSettings, view_name
from likewise.training.loader import PairBatches

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
SCORES = "scores.jsonl"
COLLAPSED_RANK = 2.0
COLLAPSED_SPREAD = 0.01


def spread(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return how far unit features spread: 1 for even directions, 0 where all are the same.

    The standard deviation of each coordinate of the normalised features, averaged and multiplied by the
    square root of d (Chen and He 2021, "Exploring Simple Siamese", section 4.1).
    """
    unit = normalize(features.float(), dim=1)
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5


def effective_rank(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return the effective rank of the centred features: the exponential of the entropy of their spectrum.

    Roy and Vetterli 2007, definition 1, with singular values that sum to 1; between 1 and min(n - 1, d).
    (RankMe, Garrido et al. 2023, takes the same of features that are not centred.)
    """
    centred = features.float() - features.float().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    share = values / values.sum().clamp(min=1e-12)
    return torch.exp(-(share * torch.log(share.clamp(min=1e-12))).sum())


def has_collapsed(*, rank: float, spread: float) -> bool:
    """Tell whether features have lost nearly all difference between images."""
    return rank < COLLAPSED_RANK or spread < COLLAPSED_SPREAD


class MetricsLog:
    """Appends rows to a file of JSON lines and to TensorBoard."""

    def __init__(self, run: Path, from_step: int, file: str = METRICS) -> None:
        """Open a log of a run, forgetting what was logged after the step it goes on from."""
        self.rows = [row for row in read_lines(run / file) if row["step"] <= from_step]
        write_text(run / file, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._lines = (run / file).open("a", encoding="utf-8")
        # Each log has a folder of its own, as two writers must not share one.
        self._board = _tensorboard(run / "tensorboard" / file.partition(".")[0], from_step)

    def write(self, row: dict[str, int | float]) -> None:
        """Write one row; `step` is its place."""
        self.rows.append(row)
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flush and close both files."""
        self._lines.close()
        self._board.close()


def _tensorboard(folder: Path, from_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else None)


CONFIG = "config.yaml"
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PREVIEW_PAIRS = 12


def told(rule: PairRule) -> dict[str, Any]:
    """Return a rule as it is recorded beside the other settings."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(rule).items()}


def _changed(settings: TrainSettings, rule: PairRule) -> dict[str, Any]:
    """Return pairs, seed and the settings that are not the usual ones, as a command would give them."""
    usual = told(PairRule()) | asdict(TrainSettings())
    given = told(rule) | asdict(settings)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if value != usual[name] or name in ("pairs", "seed")
    }


def describe(
    run: Path,
    settings: TrainSettings,
    spec: BackboneSpec,
    plan: Plan,
    pairs: Pairs,
    device: torch.device,
    dtype: torch.dtype,
    source: Collection,
    processes: int,
) -> None:
    """Write the settings as given and, apart from them, what followed from them."""
    derived = asdict(plan) | {
        "views": view_name(settings, pairs.rule),
        "stem": spec.stem,
        "rule": pairs.summary(),
        "collection": str(source.path.resolve()),
        "neighbors": [
            {"path": str(each.path.resolve()), "key": each.manifest.key} for each in pairs.neighbors
        ],
        "asked": _changed(settings, pairs.rule),
        "device": str(device),
        "precision": _name(dtype),
        "processes": processes,
    }
    given = asdict(settings) | {"head": None if settings.head is None else list(settings.head)}
    write_yaml(run / CONFIG, told(pairs.rule) | given | {"derived": derived})


def say_if_precision_changed(run: Path, dtype: torch.dtype, progress: Progress) -> None:
    """Warn where a run goes on in another precision than it began in."""
    began, now = read_yaml(run / CONFIG)["derived"]["precision"], _name(dtype)
    if began != now:
        progress.say(
            f"warning: the run began in {began} and goes on in {now}; --precision {began} would keep it"
        )


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in PRECISIONS.items() if known == dtype)


def write_preview(run: Path, source: Collection, batches: PairBatches) -> None:
    """Keep the first pairs as the network is shown them, for people to look at: at most two views each."""
    batch = batches.batch(0)
    shown = batch.shown(batches.recipes, torch.device("cpu")).views[:2]
    count = min(_PREVIEW_PAIRS, len(shown[0]))
    views = (restore(torch.stack(list(shown))[:, :count]) * 255).round().byte().permute(1, 0, 3, 4, 2)
    write_array(run / "preview.npy", np.ascontiguousarray(views.numpy()))
    write_json(
        run / "preview.json",
        [
            {
                "anchor": source[int(a)].id,
                "partner": source[int(p)].id,
                "position": int(a),
                "partner_position": int(p),
            }
            for a, p in zip(batch.anchors[:count], batch.partners[0][:count], strict=True)
        ],
    )
