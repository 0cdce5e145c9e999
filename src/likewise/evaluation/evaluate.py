"""Evaluate an encoder on labelled sets: `likewise evaluate`."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from likewise.artifacts import (
    Artifact,
    config_hash,
    read_json,
    slugify,
    write_array,
    write_json,
)
from likewise.errors import InvalidInputError, LikewiseError
from likewise.evaluation.datasets.captioned import CaptionedDataset, open_captioned
from likewise.evaluation.datasets.dense import DEFAULT_IGNORE_INDEX, open_detection, open_segmentation
from likewise.evaluation.datasets.download import download_dataset
from likewise.evaluation.datasets.labeled import LabeledDataset, open_labeled
from likewise.evaluation.datasets.registry import DATASETS, MEAN_CLASS_ACCURACY, check_complete
from likewise.evaluation.features import Features, extract_features
from likewise.evaluation.protocols import PROTOCOLS, AnnotationType, ProtocolConfig, validate_protocols
from likewise.evaluation.protocols.base import EvalContext, EvalDataset, Score
from likewise.models.encoders import ImageEncoder, count_flops, load_encoder
from likewise.parallel import resolve_device
from likewise.progress import NULL_PROGRESS, Progress

logger = logging.getLogger(__name__)

ARTIFACT_KIND = "evaluation"
RESULTS_FILE = "results.json"
DEFAULT_PROTOCOLS = ("linear", "fewshot", "knn")


def evaluate(
    encoder: str | Path,
    datasets: str | Path | LabeledDataset | Sequence[str | Path | LabeledDataset],
    protocols: Sequence[str] = DEFAULT_PROTOCOLS,
    *,
    config: ProtocolConfig | None = None,
    label_column: str = "label",
    split_column: str = "split",
    caption_column: str | None = None,
    ignore_index: Sequence[int] = (DEFAULT_IGNORE_INDEX,),
    backbone: str | None = None,
    weights_prefix: str = "",
    weights_exclude: Sequence[str] = (),
    image_size: int | None = None,
    out: str | Path | None = None,
    num_workers: int | None = None,
    device: str | None = None,
    progress: Progress = NULL_PROGRESS,
) -> list[dict[str, Any]]:
    """Measure a frozen encoder on labelled sets; what was measured before is taken from disk.

    Args:
        encoder: A finished run, `timm:NAME`, `random:NAME`, a file of weights, … (see `open_encoder`).
        datasets: One or several sets: folders, tables, names of the catalogue, or opened sets (see
            `open_set`,
            `open_captioned` and `fetch`).
        protocols: Of `PROTOCOLS`; each reads of a set what it needs, labels or captions.
        config: Of the protocols; the paper's by default.
        label_column: The tables' column of labels.
        split_column: The tables' column of splits.
        caption_column: The tables' column of captions.
        ignore_index: Numbers in masks that count neither way.
        backbone: For a plain file of weights: the model they are for.
        weights_prefix: For the same: what stands before the names of the backbone's weights.
        weights_exclude: For the same: beginnings of names that are left out.
        image_size: Side of the input; by default what the model was trained with.
        out: Where results go; by default `evaluation` in the run, or `evaluation-TARGET` here.
        num_workers: Threads that read images.
        device: Where features are computed.
        progress: Where to report.

    Returns:
        One result a set, as in its `results.json`.

    Raises:
        InputError: for unknown protocols or sets that cannot be read.
        ModelError: where the encoder cannot be opened.
    """
    validate_protocols(tuple(protocols))
    datasets = [datasets] if isinstance(datasets, str | Path | LabeledDataset) else list(datasets)
    if not datasets or not protocols:
        raise InvalidInputError("nothing to evaluate: give at least one set and one protocol")
    columns = ColumnOptions(
        label=label_column, split=split_column, caption=caption_column, ignore_index=tuple(ignore_index)
    )
    # All are opened before anything is computed: a mistake in the last one shows at once.
    opened_datasets = [
        (annotation_type, open_dataset(annotation_type, dataset, columns, progress))
        for dataset in datasets
        for annotation_type in dict.fromkeys(PROTOCOLS[name].requires for name in protocols)
    ]
    torch_device = torch.device(resolve_device(device))
    image_encoder = load_encoder(
        str(encoder), backbone=backbone, image_size=image_size, prefix=weights_prefix, exclude=weights_exclude
    )
    encoder_args = {
        "encoder": str(encoder),
        "backbone": backbone,
        "weights_prefix": weights_prefix,
        "weights_exclude": list(weights_exclude),
        "image_size": image_size,
    }
    out_dir = Path(out) if out is not None else _default_out_dir(encoder)
    config = config or ProtocolConfig()
    num_parameters = sum(p.numel() for p in image_encoder.model.parameters())
    encoder_info = image_encoder.to_dict() | {
        "num_parameters": num_parameters,
        "flops": count_flops(image_encoder),
    }
    results = []
    for annotation_type, dataset in opened_datasets:
        features = None
        if isinstance(dataset, LabeledDataset | CaptionedDataset):
            features = extract_features(
                image_encoder,
                dataset,
                out_dir / "features",
                num_workers=num_workers,
                device=device,
                progress=progress,
            )
            _check_readable(dataset, features)
        context = EvalContext(
            encoder=image_encoder,
            dataset=dataset,
            precomputed_features=features,
            device=torch_device,
            requested_workers=num_workers,
            progress=progress,
        )
        dataset_config = _config_for(dataset, config)
        artifact = _create_artifact(image_encoder, dataset, dataset_config, out_dir)
        header = {"requested": encoder_args, "encoder": encoder_info, "protocols": {}}
        protocol_names = [name for name in protocols if PROTOCOLS[name].requires == annotation_type]
        results.append(_run_protocols(context, protocol_names, dataset_config, artifact, header, progress))
    return results


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Which columns of a table to read, and which numbers in masks count neither way."""

    label: str = "label"
    split: str = "split"
    caption: str | None = None
    ignore_index: tuple[int, ...] = (DEFAULT_IGNORE_INDEX,)


def open_dataset(
    annotation_type: AnnotationType,
    path: str | Path | LabeledDataset,
    columns: ColumnOptions,
    progress: Progress = NULL_PROGRESS,
) -> EvalDataset:
    """Open a set for the protocols of a kind; a name of the catalogue is fetched first, and must be whole."""
    if isinstance(path, LabeledDataset):
        if annotation_type != "labels":
            raise InvalidInputError(f"{path.name} has labels and no {annotation_type}")
        return path
    if annotation_type == "captions":
        return open_captioned(path, caption_column=columns.caption)
    if annotation_type == "boxes":
        return open_detection(path)
    if annotation_type == "masks":
        return open_segmentation(path, columns.ignore_index)
    if str(path) in DATASETS and not Path(path).exists():
        dataset = open_labeled(download_dataset(str(path), progress=progress))
        check_complete(str(path), dataset)
        return replace(dataset, name=str(path))
    return open_labeled(path, label_column=columns.label, split_column=columns.split)


def _config_for(dataset: EvalDataset, config: ProtocolConfig) -> ProtocolConfig:
    """Return the settings with the measure that a well-known set is reported by."""
    info = DATASETS.get(dataset.name)
    if info is None or info.metric != MEAN_CLASS_ACCURACY:
        return config
    return replace(config, linear=replace(config.linear, mean_class_accuracy=True))


def _check_readable(dataset: LabeledDataset | CaptionedDataset, features: Features) -> None:
    """Refuse a set of which a part that is needed cannot be read at all."""
    splits = dataset.splits[features.indices] if isinstance(dataset, LabeledDataset) else np.array(["test"])
    for split in ("train", "test") if isinstance(dataset, LabeledDataset) else ("test",):
        if split not in splits or not len(features.indices):
            reasons = ", ".join(f"{count} {reason}" for reason, count in features.skipped.items())
            raise InvalidInputError(f"no {split} image of {dataset.root} can be read: {reasons}")


def _default_out_dir(encoder: str | Path) -> Path:
    path = Path(encoder)
    return (
        path / "evaluation"
        if path.is_dir()
        else Path(f"evaluation-{slugify(str(encoder).replace(':', '-'))}")
    )


def _create_artifact(
    encoder: ImageEncoder, dataset: EvalDataset, config: ProtocolConfig, out_dir: Path
) -> Artifact:
    settings = {"dataset": dataset.name, "encoder": encoder.name, "transform": encoder.to_dict()["transform"]}
    # Other settings get another folder: what was measured before is never overwritten.
    settings["protocols"] = asdict(config)
    inputs = {"encoder": encoder.fingerprint, "dataset": dataset.key}
    key = config_hash(ARTIFACT_KIND, {k: v for k, v in settings.items() if k != "encoder"}, inputs)
    return Artifact.create_or_resume(
        out_dir / f"{dataset.name}-{key[:8]}", ARTIFACT_KIND, settings, inputs, non_hashed=("encoder",)
    )


def _run_protocols(
    context: EvalContext,
    protocols: Sequence[str],
    config: ProtocolConfig,
    artifact: Artifact,
    header: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Run the protocols that have not been run yet, writing the results after each."""
    path = artifact.path / RESULTS_FILE
    result = read_json(path) if path.is_file() else header | {"dataset": _describe_dataset(context)}
    if artifact.is_complete and all(name in result["protocols"] for name in protocols):
        logger.info(f"{context.dataset.name} was measured before: {path}")
        return result
    with progress.task(f"probing {context.dataset.name}", len(protocols), "protocols") as bar:
        for name in protocols:
            if name not in result["protocols"]:
                scores = _run_protocol(name, context, config)
                result["protocols"][name] = {
                    "config": PROTOCOLS[name].config_dict(config),
                    "scores": [_save_score(name, score, artifact.path) for score in scores],
                }
                write_json(path, result)
            bar.update(postfix=name)
    artifact.finish({"protocols": len(result["protocols"])}, result["dataset"]["skipped"])
    return read_json(path)


def _run_protocol(name: str, context: EvalContext, config: ProtocolConfig) -> list[Score]:
    try:
        return PROTOCOLS[name].run(context, config)
    except LikewiseError:
        raise
    except ValueError as error:
        raise InvalidInputError(f"{name} on {context.dataset.name}: {error}") from error


def _describe_dataset(context: EvalContext) -> dict[str, Any]:
    dataset = context.dataset
    header = {"name": dataset.name, "path": str(dataset.path.resolve()), "key": dataset.key}
    if isinstance(dataset, CaptionedDataset):
        excluded = {"without a file or a caption": dataset.num_skipped}
        details = {
            "caption_column": dataset.caption_column,
            "num_captions": sum(map(len, dataset.captions)),
            "num_images": {"test": len(dataset)},
        }
    elif isinstance(dataset, LabeledDataset):
        excluded = dataset.skipped
        details = {
            "label_column": dataset.label_column,
            "split_column": dataset.split_column,
            "num_classes": len(dataset.classes),
            "num_images": dataset.split_counts(),
            "test_only_classes": dataset.test_only_classes(),
        }
    else:
        excluded = dataset.skipped
        counts = {split: int((dataset.splits == split).sum()) for split in ("train", "test")}
        details = {"num_classes": len(dataset.classes), "num_images": counts}
    skipped = {} if context.precomputed_features is None else dict(context.precomputed_features.skipped)
    return (
        header
        | details
        | {"skipped": skipped | {reason: count for reason, count in excluded.items() if count}}
    )


def _save_score(protocol: str, score: Score, out_dir: Path) -> dict[str, Any]:
    """Write the items of a score beside the results and return what the results say of it."""
    stem = f"{protocol}-{slugify(score.metric.replace(' ', '-').replace('@', '-at-'))}"
    write_array(out_dir / f"per-item-{stem}.npy", score.per_item)
    entry: dict[str, Any] = {
        "metric": score.metric,
        **asdict(score.estimate),
        "n": len(score.per_item) if score.n is None else score.n,
        "per_item": f"per-item-{stem}.npy",
        "groups": None,
        "pairing": "no" if score.metric == MEAN_CLASS_ACCURACY else score.pairing,
        "details": score.details,
    }
    if score.groups is not None:
        write_array(out_dir / f"groups-{stem}.npy", np.unique(score.groups, return_inverse=True)[1])
        entry["groups"] = f"groups-{stem}.npy"
    return entry
