"""From a collection and settings to a trained encoder: `likewise train`."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from likewise.artifacts import (
    Artifact,
    begin,
    fingerprint,
    open_artifact,
    read_lines,
    write_array,
    write_json,
)
from likewise.collection.packed import PackedImages, pack_images
from likewise.collection.records import Collection
from likewise.config import read_yaml, write_yaml
from likewise.errors import ModelError
from likewise.launch import default_workers, resolve_device
from likewise.models.backbones import BackboneSpec, build_backbone, default_stem
from likewise.models.checkpoints import load_state_dict, load_strictly, save_encoder
from likewise.models.encoders import RUN_ENCODER
from likewise.neighbors.neighbors import Neighbors, look_up_neighbors
from likewise.neighbors.pairs import Pairs, make_pairs
from likewise.neighbors.rules import PairRule
from likewise.pretraining.batches import PairBatches
from likewise.pretraining.loop import Trainer, run_training
from likewise.pretraining.methods import build_method, check_method
from likewise.pretraining.methods.base import Method
from likewise.pretraining.monitor import METRICS
from likewise.pretraining.optim import adamw
from likewise.pretraining.settings import Plan, TrainSettings, plan
from likewise.pretraining.views import restore, view_recipe
from likewise.progress import SILENT, Progress

KIND = "run"
PACKED_MARGIN = 1.5  # images are packed half as large again as views, so that small crops keep detail
_PREVIEW_PAIRS = 12
_PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def train(
    collection: Collection | str | Path,
    out: str | Path,
    settings: TrainSettings | None = None,
    *,
    workers: int | None = None,
    device: str | None = None,
    checkpoint_minutes: float = 2.0,
    progress: Progress = SILENT,
) -> Run:
    """Train an image encoder on a collection; an interrupted run goes on where its checkpoint stands.

    Args:
        collection: A collection or its path.
        out: The run's folder.
        settings: What is trained and how; the paper's recipe where not given.
        workers: Threads that make batches; half the processors by default. Does not change the result.
        device: `cpu`, `cuda`, …; chosen by itself where not given.
        checkpoint_minutes: A kill loses at most this much work; 0 writes a checkpoint every step.
        progress: Where to report.

    Raises:
        ArtifactError: where neighbors are missing or `out` holds something else.
        ModelError: where the backbone or initial weights do not fit.
        TrainingError: where there are too few images or the loss stops being a number.
        InterruptedRunError: after Ctrl-C, with a checkpoint written.
    """
    source, chosen, run = Collection.open(collection), settings or TrainSettings(), Path(out)
    on = torch.device(resolve_device(device))
    check_method(chosen.method)
    view_recipe(chosen.view_name)
    spec = _spec(chosen)
    method = _build(chosen, spec)
    # What can fail fails before the images are packed, which may take long.
    plan(chosen, len(source), source.path)
    if chosen.pairs == "language":
        look_up_neighbors(source, chosen.encoder, chosen.k)
    images = pack_images(source, math.ceil(PACKED_MARGIN * chosen.size), workers=workers, progress=progress)
    rule = PairRule(source=chosen.pairs, k=chosen.k)
    pairs, found = make_pairs(source, rule, chosen.encoder, images.usable)
    steps = plan(chosen, len(images.usable), source.path)
    artifact = begin(run, KIND, asdict(chosen), _inputs(source, images, pairs, chosen))
    if artifact.complete:
        progress.say(f"{run} is finished; nothing to do")
        return Run(run)
    progress.say(pairs.summary())

    dtype = _dtype(chosen.precision, on)
    batches = PairBatches(
        images,
        pairs,
        view_recipe(chosen.view_name),
        batch_size=chosen.batch_size,
        size=chosen.size,
        seed=chosen.seed,
    )
    if (run / "config.yaml").is_file():
        _say_if_precision_changed(run, dtype, progress)
    else:
        _write_preview(run, source, batches)
        _describe(run, chosen, spec, steps, pairs, found, on, dtype, source)
    method.to(on).to(memory_format=torch.channels_last)
    trainer = Trainer(
        run=run,
        method=method,
        optimizer=adamw(method, rate=steps.peak_rate, weight_decay=chosen.weight_decay),
        batches=batches,
        plan=steps,
        device=on,
        dtype=dtype,
        seed=chosen.seed,
        workers=max(1, default_workers() // 2) if workers is None else workers,
        checkpoint_minutes=checkpoint_minutes,
    )
    run_training(trainer, progress)
    return _finish(artifact, method, spec, steps, images)


def initial_encoder(settings: TrainSettings, file: Path) -> Path:
    """Write the encoder that a run with these settings starts from: the floor for what it learns."""
    spec = _spec(settings)
    save_encoder(file, _build(settings, spec).backbone, spec)
    return file


def _spec(settings: TrainSettings) -> BackboneSpec:
    stem = settings.stem or default_stem(settings.size)
    return BackboneSpec(name=settings.backbone, size=settings.size, stem=stem)


def _build(settings: TrainSettings, spec: BackboneSpec) -> Method:
    torch.manual_seed(settings.seed)
    backbone, width = build_backbone(spec, pretrained=settings.init == "pretrained")
    if settings.init not in ("scratch", "pretrained"):
        weights = initial_weights(settings.init)
        load_strictly(backbone, load_state_dict(weights), str(weights))
    return build_method(settings, backbone, width)


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
    source: Collection, images: PackedImages, pairs: Pairs, settings: TrainSettings
) -> dict[str, str]:
    inputs = {"collection": source.key, "images": images.key, "pairs": pairs.key}
    if settings.init not in ("scratch", "pretrained"):
        inputs["init"] = fingerprint(initial_weights(settings.init))
    return inputs


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that matrix products run in."""
    if precision != "auto":
        return _PRECISIONS[precision]
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _say_if_precision_changed(run: Path, dtype: torch.dtype, progress: Progress) -> None:
    began, now = read_yaml(run / "config.yaml")["derived"]["precision"], _name(dtype)
    if began != now:
        progress.say(
            f"warning: the run began in {began} and goes on in {now}; --precision {began} would keep it"
        )


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in _PRECISIONS.items() if known == dtype)


def _describe(
    run: Path,
    settings: TrainSettings,
    spec: BackboneSpec,
    steps: Plan,
    pairs: Pairs,
    found: Neighbors | None,
    device: torch.device,
    dtype: torch.dtype,
    source: Collection,
) -> None:
    """Write the settings as given and, apart from them, what followed from them."""
    derived = asdict(steps) | {
        "views": settings.view_name,
        "stem": spec.stem,
        "rule": pairs.summary(),
        "collection": str(source.path.resolve()),
        "neighbors": None if found is None else str(found.path.resolve()),
        "device": str(device),
        "precision": _name(dtype),
    }
    write_yaml(run / "config.yaml", settings, {"derived": derived})


def _write_preview(run: Path, source: Collection, batches: PairBatches) -> None:
    """Keep the first pairs as the network is shown them, for people to look at."""
    batch = batches.batch(0)
    count = min(_PREVIEW_PAIRS, len(batch.anchors))
    views = batch.views(batches.recipe, torch.device("cpu"))[:, :count]
    shown = (restore(views) * 255).round().byte().permute(1, 0, 3, 4, 2)
    write_array(run / "preview.npy", np.ascontiguousarray(shown.numpy()))
    write_json(
        run / "preview.json",
        [
            {
                "anchor": source[int(a)].id,
                "partner": source[int(p)].id,
                "position": int(a),
                "partner_position": int(p),
            }
            for a, p in zip(batch.anchors[:count], batch.partners[:count], strict=True)
        ],
    )


def _finish(artifact: Artifact, method: Method, spec: BackboneSpec, steps: Plan, images: PackedImages) -> Run:
    save_encoder(artifact.path / RUN_ENCODER, method.backbone, spec)
    lost = len(images) - len(images.usable)
    skipped = {"no longer readable": lost} if lost else {}
    artifact.finish({"steps": steps.steps, "images": len(images.usable)}, skipped)
    return Run(artifact.path)
