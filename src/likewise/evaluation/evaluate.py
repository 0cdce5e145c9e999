"""Evaluate an encoder on labelled sets: `likewise evaluate`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from likewise.artifacts import Artifact, begin, key_of, read_json, slug, write_array, write_json
from likewise.errors import InputError, LikewiseError
from likewise.evaluation.datasets.captioned import CaptionedSet, open_captioned
from likewise.evaluation.datasets.dense import UNLABELLED, open_boxes, open_masks
from likewise.evaluation.datasets.download import fetch
from likewise.evaluation.datasets.labeled import LabelledSet, open_set
from likewise.evaluation.datasets.registry import CATALOG, PER_CLASS, check_known
from likewise.evaluation.features import Features, extract_features
from likewise.evaluation.protocols import PROTOCOLS, Kind, ProtocolSettings, check_protocols
from likewise.evaluation.protocols.base import AnySet, Score, Task
from likewise.models.encoders import ImageEncoder, open_encoder, operations
from likewise.parallel import resolve_device
from likewise.progress import SILENT, Progress

KIND = "evaluation"
RESULTS = "results.json"
DEFAULT_PROTOCOLS = ("linear", "fewshot", "knn")


def evaluate(
    target: str | Path,
    on: str | Path | LabelledSet | Sequence[str | Path | LabelledSet],
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
    *,
    settings: ProtocolSettings | None = None,
    label_column: str = "label",
    split_column: str = "split",
    caption_column: str | None = None,
    ignored: Sequence[int] = (UNLABELLED,),
    backbone: str | None = None,
    prefix: str = "",
    drop: Sequence[str] = (),
    size: int | None = None,
    out: str | Path | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Measure a frozen encoder on labelled sets; what was measured before is taken from disk.

    Args:
        target: A finished run, `timm:NAME`, `random:NAME`, a file of weights, … (see `open_encoder`).
        on: One or several sets: folders, tables, names of the catalogue, or opened sets (see `open_set`,
            `open_captioned` and `fetch`).
        protocols: Of `PROTOCOLS`; each reads of a set what it needs, labels or captions.
        settings: Of the protocols; the paper's by default.
        label_column: The tables' column of labels.
        split_column: The tables' column of splits.
        caption_column: The tables' column of captions.
        ignored: Numbers in masks that count neither way.
        backbone: For a plain file of weights: the model they are for.
        prefix: For the same: what stands before the names of the backbone's weights.
        drop: For the same: beginnings of names that are left out.
        size: Side of the input; by default what the model was trained with.
        out: Where results go; by default `evaluation` in the run, or `evaluation-TARGET` here.
        workers: Threads that read images.
        device: Where features are computed.
        progress: Where to report.

    Returns:
        One result a set, as in its `results.json`.

    Raises:
        InputError: for unknown protocols or sets that cannot be read.
        ModelError: where the encoder cannot be opened.
    """
    check_protocols(tuple(protocols))
    asked_for = [on] if isinstance(on, str | Path | LabelledSet) else list(on)
    if not asked_for or not protocols:
        raise InputError("nothing to evaluate: give at least one set and one protocol")
    columns = Columns(label=label_column, split=split_column, caption=caption_column, ignored=tuple(ignored))
    # All are opened before anything is computed: a mistake in the last one shows at once.
    sets = [
        (kind, open_as(kind, each, columns, progress))
        for each in asked_for
        for kind in dict.fromkeys(PROTOCOLS[name].kind for name in protocols)
    ]
    place = torch.device(resolve_device(device))
    encoder = open_encoder(str(target), backbone=backbone, size=size, prefix=prefix, drop=drop)
    asked = {"target": str(target), "backbone": backbone, "prefix": prefix, "drop": list(drop), "size": size}
    folder = Path(out) if out is not None else _default_out(target)
    chosen = settings or ProtocolSettings()
    parameters = sum(p.numel() for p in encoder.model.parameters())
    told = encoder.told() | {"parameters": parameters, "operations": operations(encoder)}
    results = []
    for kind, images in sets:
        features = None
        if isinstance(images, LabelledSet | CaptionedSet):
            features = extract_features(
                encoder, images, folder / "features", workers=workers, device=device, progress=progress
            )
            _require_readable(images, features)
        task = Task(
            encoder=encoder,
            images=images,
            features=features,
            device=place,
            workers=workers,
            progress=progress,
        )
        fitting = _settings_for(images, chosen)
        artifact = _begin(encoder, images, fitting, folder)
        head = {"asked": asked, "encoder": told, "protocols": {}}
        names = [name for name in protocols if PROTOCOLS[name].kind == kind]
        results.append(_measure(task, names, fitting, artifact, head, progress))
    return results


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table to read, and which numbers in masks count neither way."""

    label: str = "label"
    split: str = "split"
    caption: str | None = None
    ignored: tuple[int, ...] = (UNLABELLED,)


def open_as(
    kind: Kind, where: str | Path | LabelledSet, columns: Columns, progress: Progress = SILENT
) -> AnySet:
    """Open a set for the protocols of a kind; a name of the catalogue is fetched first, and must be whole."""
    if isinstance(where, LabelledSet):
        if kind != "labels":
            raise InputError(f"{where.name} has labels and no {kind}")
        return where
    if kind == "captions":
        return open_captioned(where, caption_column=columns.caption)
    if kind == "boxes":
        return open_boxes(where)
    if kind == "masks":
        return open_masks(where, columns.ignored)
    if str(where) in CATALOG and not Path(where).exists():
        images = open_set(fetch(str(where), progress=progress))
        check_known(str(where), images)
        return replace(images, name=str(where))
    return open_set(where, label_column=columns.label, split_column=columns.split)


def _settings_for(images: AnySet, chosen: ProtocolSettings) -> ProtocolSettings:
    """Return the settings with the measure that a well-known set is reported by."""
    told = CATALOG.get(images.name)
    if told is None or told.metric != PER_CLASS:
        return chosen
    return replace(chosen, linear=replace(chosen.linear, mean_per_class=True))


def _require_readable(images: LabelledSet | CaptionedSet, features: Features) -> None:
    """Refuse a set of which a part that is needed cannot be read at all."""
    splits = images.splits[features.rows] if isinstance(images, LabelledSet) else np.array(["test"])
    for split in ("train", "test") if isinstance(images, LabelledSet) else ("test",):
        if split not in splits or not len(features.rows):
            reasons = ", ".join(f"{n} {reason}" for reason, n in features.skipped.items())
            raise InputError(f"no {split} image of {images.root} can be read: {reasons}")


def _default_out(target: str | Path) -> Path:
    path = Path(target)
    return path / "evaluation" if path.is_dir() else Path(f"evaluation-{slug(str(target).replace(':', '-'))}")


def _begin(encoder: ImageEncoder, images: AnySet, chosen: ProtocolSettings, folder: Path) -> Artifact:
    settings = {"set": images.name, "encoder": encoder.name, "transform": encoder.told()["transform"]}
    # Other settings get another folder: what was measured before is never overwritten.
    settings["protocols"] = asdict(chosen)
    inputs = {"weights": encoder.identity, "set": images.key}
    key = key_of(KIND, {k: v for k, v in settings.items() if k != "encoder"}, inputs)
    return begin(folder / f"{images.name}-{key[:8]}", KIND, settings, inputs, volatile=("encoder",))


def _measure(
    task: Task,
    protocols: Sequence[str],
    settings: ProtocolSettings,
    artifact: Artifact,
    head: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Run the protocols that have not been run yet, writing the results after each."""
    path = artifact.path / RESULTS
    result = read_json(path) if path.is_file() else head | {"set": _about(task)}
    if artifact.complete and all(name in result["protocols"] for name in protocols):
        progress.say(f"{task.images.name} was measured before: {path}")
        return result
    with progress.task(f"probing {task.images.name}", len(protocols), "protocols") as bar:
        for name in protocols:
            if name not in result["protocols"]:
                scores = _run(name, task, settings)
                result["protocols"][name] = {
                    "settings": PROTOCOLS[name].settings(settings),
                    "scores": [_keep(name, score, artifact.path) for score in scores],
                }
                write_json(path, result)
            bar.advance(note=name)
    artifact.finish({"protocols": len(result["protocols"])}, result["set"]["skipped"])
    return read_json(path)


def _run(name: str, task: Task, settings: ProtocolSettings) -> list[Score]:
    try:
        return PROTOCOLS[name].run(task, settings)
    except LikewiseError:
        raise
    except ValueError as fault:
        raise InputError(f"{name} on {task.images.name}: {fault}") from fault


def _about(task: Task) -> dict[str, Any]:
    images = task.images
    head = {"name": images.name, "path": str(images.source.resolve()), "key": images.key}
    if isinstance(images, CaptionedSet):
        left = {"without a file or a caption": images.without}
        told = {
            "caption_column": images.caption_column,
            "captions": sum(map(len, images.captions)),
            "images": {"test": len(images)},
        }
    elif isinstance(images, LabelledSet):
        left = images.faults
        told = {
            "label_column": images.label_column,
            "split_column": images.split_column,
            "classes": len(images.classes),
            "images": images.counts(),
            "classes_only_in_test": images.unseen(),
        }
    else:
        left = images.faults
        counts = {split: int((images.splits == split).sum()) for split in ("train", "test")}
        told = {"classes": len(images.classes), "images": counts}
    skipped = {} if task.features is None else dict(task.features.skipped)
    return head | told | {"skipped": skipped | {reason: count for reason, count in left.items() if count}}


def _keep(protocol: str, score: Score, folder: Path) -> dict[str, Any]:
    """Write the items of a score beside the results and return what the results say of it."""
    stem = f"{protocol}-{slug(score.metric.replace(' ', '-').replace('@', '-at-'))}"
    write_array(folder / f"items-{stem}.npy", score.items)
    told: dict[str, Any] = {
        "metric": score.metric,
        **asdict(score.estimate),
        "n": len(score.items) if score.n is None else score.n,
        "items": f"items-{stem}.npy",
        "groups": None,
        "paired": "no" if score.metric == PER_CLASS else score.paired,
        "details": score.details,
    }
    if score.groups is not None:
        write_array(folder / f"groups-{stem}.npy", np.unique(score.groups, return_inverse=True)[1])
        told["groups"] = f"groups-{stem}.npy"
    return told
