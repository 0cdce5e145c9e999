"""Evaluate an encoder on labelled sets: `likewise evaluate`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import Artifact, begin, key_of, read_json, slug, write_array, write_json
from likewise.errors import InputError, LikewiseError
from likewise.evaluation.features import extract_features
from likewise.evaluation.protocols import PROTOCOLS, ProtocolSettings, Score, Task, check_protocols
from likewise.evaluation.suite import LabelledSet, open_set
from likewise.launch import resolve_device
from likewise.models.encoders import ImageEncoder, open_encoder
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
    backbone: str | None = None,
    size: int | None = None,
    out: str | Path | None = None,
    workers: int | None = None,
    device: str | None = None,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Measure a frozen encoder on labelled sets; what was measured before is taken from disk.

    Args:
        target: A finished run, `timm:NAME`, `random:NAME`, or a file of weights.
        on: One or several sets: folders, tables, or opened sets (see `open_set`).
        protocols: Of `linear`, `fewshot`, `knn`, `retrieval`.
        settings: Of the protocols; the paper's by default.
        label_column: The tables' column of labels.
        split_column: The tables' column of splits.
        backbone: For a plain file of weights: the timm model they are for.
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
    device = resolve_device(device)
    single = isinstance(on, str | Path | LabelledSet)
    sets = [
        each
        if isinstance(each, LabelledSet)
        else open_set(each, label_column=label_column, split_column=split_column)
        for each in ([on] if single else on)
    ]
    if not sets or not protocols:
        raise InputError("nothing to evaluate: give at least one set and one protocol")
    encoder = open_encoder(str(target), backbone=backbone, size=size)
    asked = {"target": str(target), "backbone": backbone, "size": size}
    folder = Path(out) if out is not None else _default_out(target)
    chosen = settings or ProtocolSettings()
    results = []
    for images in sets:
        features = extract_features(
            encoder, images, folder / "features", workers=workers, device=device, progress=progress
        )
        artifact = _begin(encoder, images, chosen, folder)
        head = {"asked": asked, "encoder": encoder.told(), "protocols": {}}
        results.append(
            _measure(Task(images=images, features=features), protocols, chosen, artifact, head, progress)
        )
    return results


def _default_out(target: str | Path) -> Path:
    path = Path(target)
    return path / "evaluation" if path.is_dir() else Path(f"evaluation-{slug(str(target).replace(':', '-'))}")


def _begin(encoder: ImageEncoder, images: LabelledSet, chosen: ProtocolSettings, folder: Path) -> Artifact:
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
    artifact.finish({"protocols": len(result["protocols"])}, task.features.skipped)
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
    return {
        "name": images.name,
        "path": str(images.source.resolve()),
        "label_column": images.label_column,
        "split_column": images.split_column,
        "key": images.key,
        "classes": len(images.classes),
        "images": images.counts(),
        "skipped": task.features.skipped,
        "classes_only_in_test": images.unseen(),
    }


def _keep(protocol: str, score: Score, folder: Path) -> dict[str, Any]:
    """Write the items of a score beside the results and return what the results say of it."""
    stem = f"{protocol}-{slug(score.metric.replace(' ', '-').replace('@', '-at-'))}"
    write_array(folder / f"items-{stem}.npy", score.items)
    told: dict[str, Any] = {
        "metric": score.metric,
        **asdict(score.estimate),
        "n": len(score.items),
        "items": f"items-{stem}.npy",
        "groups": None,
        "details": score.details,
    }
    if score.groups is not None:
        write_array(folder / f"groups-{stem}.npy", np.unique(score.groups, return_inverse=True)[1])
        told["groups"] = f"groups-{stem}.npy"
    return told
