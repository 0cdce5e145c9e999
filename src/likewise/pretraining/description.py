"""What a run tells of itself: its settings, what followed from them, and the first pairs as it saw them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from likewise.artifacts import write_array, write_json
from likewise.collection.records import Collection
from likewise.config import read_yaml, write_yaml
from likewise.models.backbones import BackboneSpec
from likewise.neighbors.pairs import Pairs
from likewise.neighbors.rules import PairRule
from likewise.pretraining.batches import PairBatches
from likewise.pretraining.settings import Plan, TrainSettings, view_name
from likewise.pretraining.views import restore
from likewise.progress import Progress

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
