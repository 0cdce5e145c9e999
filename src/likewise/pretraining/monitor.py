"""Watching a run: metrics to disk as they come, and whether the features still tell images apart."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from likewise.artifacts import read_lines, write_text

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
