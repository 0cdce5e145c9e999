"""From a collection and settings to a trained encoder: `likewise train`."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

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
from likewise.collection.filters import read_filter
from likewise.collection.packed import PackedImages, pack_images
from likewise.collection.records import Collection
from likewise.config import read_yaml, write_yaml
from likewise.embeddings.embed import look_up_embeddings
from likewise.errors import ModelError
from likewise.launch import default_workers, resolve_device
from likewise.models.backbones import BackboneSpec, build_backbone, default_stem
from likewise.models.checkpoints import load_state_dict, load_strictly, save_encoder
from likewise.models.encoders import RUN_ENCODER
from likewise.neighbors.pairs import Pairs
from likewise.neighbors.rules import PairRule
from likewise.neighbors.sources import make_pairs
from likewise.neighbors.space import kept_captions
from likewise.neighbors.vectors import RecordVectors
from likewise.pretraining.batches import PairBatches
from likewise.pretraining.loop import Trainer, run_training
from likewise.pretraining.methods import build_method, check_method, needs_captions
from likewise.pretraining.methods.base import Method
from likewise.pretraining.monitor import METRICS
from likewise.pretraining.optim import adamw
from likewise.pretraining.settings import Plan, TrainSettings, plan, view_name
from likewise.pretraining.views import restore, view_recipe
from likewise.progress import SILENT, Progress

KIND = "run"
PACKED_MARGIN = 1.5  # images are packed half as large again as views, so that small crops keep detail
_PREVIEW_PAIRS = 12
_NAMES = ("encoder", "image_encoder", "filter", "pairs_file", "index")
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
    rule: PairRule | None = None,
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
        rule: Who is shown with whom; `PairRule()` where not given. Missing neighbors are searched for.
        workers: Threads that make batches; half the processors by default. Does not change the result.
        device: `cpu`, `cuda`, …; chosen by itself where not given.
        checkpoint_minutes: A kill loses at most this much work; 0 writes a checkpoint every step.
        progress: Where to report.

    Raises:
        ArtifactError: where embeddings are missing or `out` holds something else.
        InputError: where the rule leaves nobody with a partner.
        ModelError: where the backbone or initial weights do not fit.
        TrainingError: where there are too few images or the loss stops being a number.
        InterruptedRunError: after Ctrl-C, with a checkpoint written.
    """
    source, chosen, run = Collection.open(collection), settings or TrainSettings(), Path(out)
    shown = rule or PairRule()
    on = torch.device(resolve_device(device))
    check_method(chosen.method)
    recipe = view_recipe(view_name(chosen, shown))
    spec = _spec(chosen)
    method = _build(chosen, spec)
    # What can fail fails before the images are packed, which may take long.
    plan(chosen, len(source), source.path)
    captions = _caption_vectors(source, chosen, shown)
    pairs = make_pairs(source, shown, device=on.type, progress=progress)
    images = pack_images(source, math.ceil(PACKED_MARGIN * chosen.size), workers=workers, progress=progress)
    if len(images.usable) < len(source):
        pairs = make_pairs(source, shown, images.usable, device=on.type, progress=progress)
    batches = PairBatches(
        images,
        pairs,
        recipe,
        batch_size=chosen.batch_size,
        size=chosen.size,
        seed=chosen.seed,
        captions=captions,
    )
    steps = plan(chosen, len(batches.anchors), source.path)
    inputs = _inputs(source, images, pairs, captions, chosen)
    # Where partners come from is told by the inputs, however it was named.
    artifact = begin(run, KIND, _told(shown) | asdict(chosen), inputs, volatile=_NAMES)
    if artifact.complete:
        progress.say(f"{run} is finished; nothing to do")
        return Run(run)
    progress.say(pairs.summary())
    dtype = _dtype(chosen.precision, on)
    if (run / "config.yaml").is_file():
        _say_if_precision_changed(run, dtype, progress)
    else:
        _write_preview(run, source, batches)
        _describe(run, chosen, spec, steps, pairs, on, dtype, source)
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
    source: Collection,
    images: PackedImages,
    pairs: Pairs,
    captions: RecordVectors | None,
    settings: TrainSettings,
) -> dict[str, str]:
    inputs = {"collection": source.key, "images": images.key, "pairs": pairs.key}
    if captions is not None:
        inputs["captions"] = captions.key
    if settings.init not in ("scratch", "pretrained"):
        inputs["init"] = fingerprint(initial_weights(settings.init))
    return inputs


def _told(rule: PairRule) -> dict[str, Any]:
    """Return a rule as it is recorded beside the other settings."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(rule).items()}


def _changed(settings: TrainSettings, rule: PairRule) -> dict[str, Any]:
    """Return pairs, seed and the settings that are not the usual ones, as a command would give them."""
    usual = _told(PairRule()) | asdict(TrainSettings())
    given = _told(rule) | asdict(settings)
    return {name: value for name, value in given.items() if value != usual[name] or name in ("pairs", "seed")}


def _caption_vectors(source: Collection, settings: TrainSettings, rule: PairRule) -> RecordVectors | None:
    """Open the embeddings that tell which negatives are alike, where the settings ask for that."""
    if not needs_captions(settings):
        return None
    left_out = None if rule.filter is None else read_filter(rule.filter, source)
    return RecordVectors(
        look_up_embeddings(source, rule.encoder), len(source), kept_captions(source, left_out)
    )


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
    device: torch.device,
    dtype: torch.dtype,
    source: Collection,
) -> None:
    """Write the settings as given and, apart from them, what followed from them."""
    derived = asdict(steps) | {
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
    }
    write_yaml(run / "config.yaml", _told(pairs.rule) | asdict(settings) | {"derived": derived})


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
