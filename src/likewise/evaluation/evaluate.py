"""Evaluate an image encoder on datasets with one or several protocols."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

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
from likewise.evaluation.datasets.detection import DetectionDataset, open_detection
from likewise.evaluation.datasets.download import download_dataset
from likewise.evaluation.datasets.labeled import LabeledDataset, open_labeled
from likewise.evaluation.datasets.registry import DATASETS, MEAN_CLASS_ACCURACY, check_complete
from likewise.evaluation.datasets.segmentation import (
    DEFAULT_IGNORE_INDEX,
    SegmentationDataset,
    open_segmentation,
)
from likewise.evaluation.protocols import AnnotationType, ProtocolConfig, build_protocol
from likewise.evaluation.protocols.base import EvalContext, EvalDataset, Protocol, Score
from likewise.evaluation.results import RESULTS_FILE, EvalResults, load_results
from likewise.models.encoders import ImageEncoder, count_flops, load_encoder
from likewise.models.features import Features, extract_features
from likewise.parallel import default_num_workers
from likewise.progress import NULL_PROGRESS, Progress

logger = logging.getLogger(__name__)

ARTIFACT_KIND = "evaluation"
DEFAULT_PROTOCOLS = ("linear", "fewshot", "knn")


class ProtocolFailedError(InvalidInputError):
    """One or several protocols failed; the others were evaluated.

    Attributes:
        results: The results of the others.
    """

    def __init__(self, failures: Sequence[LikewiseError], results: EvalResults) -> None:
        """Join the messages of the failures; field and path are those of the first one."""
        message = "\n".join(map(str, failures))
        super().__init__(message, field=failures[0].field, path=failures[0].path)
        self.results = results


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Columns of the tables that datasets are read from, and the ignored values of masks."""

    label: str = "label"
    """Column of labels."""
    split: str = "split"
    """Column of splits: train, val or test."""
    caption: str | None = None
    """Column of captions; detected by its name if None."""
    ignore_index: tuple[int, ...] = (DEFAULT_IGNORE_INDEX,)
    """Values in masks that are ignored in training and in scores."""


def evaluate(
    encoder: ImageEncoder | str | os.PathLike[str],
    datasets: EvalDataset | str | os.PathLike[str] | Sequence[EvalDataset | str | os.PathLike[str]],
    protocols: str | Sequence[str] = DEFAULT_PROTOCOLS,
    *,
    config: ProtocolConfig | None = None,
    columns: ColumnOptions | None = None,
    out: str | Path | None = None,
    num_workers: int | None = None,
    progress: Progress = NULL_PROGRESS,
) -> EvalResults:
    """Evaluate a frozen encoder on datasets; results that exist on disk are not computed again.

    A protocol that fails on a dataset, such as few-shot classification with too few classes, does not end the
    others: its message is stored in the results, and raised after the last protocol.

    Args:
        encoder: An encoder, a finished run or its path, or a name such as `timm:resnet50` (see
            `load_encoder`, which also chooses the device).
        datasets: One or several datasets: folders, tables, names of the registry, or opened datasets.
        protocols: Names of protocols; each reads the annotations it requires: labels, captions, boxes or
            masks.
        config: Options of the protocols; defaults to those of the paper.
        columns: Columns of tables.
        out: Folder of the results; defaults to `evaluation` in the run, or `evaluation-NAME` in the current
            folder.
        num_workers: Threads that read images; defaults to the number of cores.
        progress: Progress reporter.

    Returns:
        All results of these datasets, also those of earlier calls with the same options.

    Raises:
        InvalidInputError: for unknown protocols or datasets that cannot be read.
        ProtocolFailedError: if protocols failed; its attribute `results` has the results of the others.
        ModelError: if the encoder cannot be loaded.
    """
    protocols = (protocols,) if isinstance(protocols, str) else tuple(protocols)
    is_single = isinstance(datasets, EvalDataset | str | os.PathLike)
    datasets = [datasets] if is_single else list(datasets)
    if not datasets or not protocols:
        raise InvalidInputError(
            "`datasets` and `protocols` must not be empty", field="protocols" if datasets else "datasets"
        )
    config = config or ProtocolConfig()
    requirements = [build_protocol(name, config).requires for name in protocols]
    # Datasets are opened before anything is computed: a mistake in the last one is reported at once.
    opened_datasets = [
        (annotation_type, open_dataset(annotation_type, dataset, columns or ColumnOptions(), progress))
        for dataset in datasets
        for annotation_type in dict.fromkeys(requirements)
    ]
    if not isinstance(encoder, ImageEncoder):
        encoder = load_encoder(encoder)
    out_dir = _default_out_dir(encoder) if out is None else Path(out)
    encoder_info = _describe_encoder(encoder)
    result_files: list[Path] = []
    failures: list[LikewiseError] = []
    for annotation_type, dataset in opened_datasets:
        try:
            context = _build_context(encoder, dataset, out_dir / "features", num_workers, progress)
        except InvalidInputError as error:  # of this dataset; an encoder that fails ends the evaluation
            failures.append(error)
            continue
        dataset_config = _config_for(dataset, config)
        protocol_names = [
            name
            for name, required in zip(protocols, requirements, strict=True)
            if required == annotation_type
        ]
        with _open_artifact(encoder, dataset, dataset_config, out_dir) as artifact:
            result_files.append(
                _run_protocols(context, protocol_names, dataset_config, artifact, encoder_info, failures)
            )
    results = load_results(out_dir, result_files)
    if failures:
        raise ProtocolFailedError(failures, results)
    return results


def open_dataset(
    annotation_type: AnnotationType,
    dataset: EvalDataset | str | os.PathLike[str],
    columns: ColumnOptions,
    progress: Progress = NULL_PROGRESS,
) -> EvalDataset:
    """Open a dataset with one type of annotations; named datasets are downloaded first.

    Raises:
        InvalidInputError: if the dataset has no such annotations, cannot be read, or is incomplete.
    """
    if isinstance(dataset, EvalDataset):
        if not isinstance(dataset, _DATASET_TYPES[annotation_type]):
            raise InvalidInputError(f"{dataset.name} has no {annotation_type}", path=dataset.path)
        return dataset
    path = Path(dataset)
    if annotation_type == "captions":
        return open_captioned(path, caption_column=columns.caption)
    if annotation_type == "boxes":
        return open_detection(path)
    if annotation_type == "masks":
        return open_segmentation(path, columns.ignore_index)
    name = os.fspath(dataset)
    if name in DATASETS and not path.exists():
        labeled_dataset = open_labeled(download_dataset(name, progress=progress))
        check_complete(name, labeled_dataset)
        return replace(labeled_dataset, name=name, is_registered=True)
    return open_labeled(path, label_column=columns.label, split_column=columns.split)


_DATASET_TYPES = {
    "labels": LabeledDataset,
    "captions": CaptionedDataset,
    "boxes": DetectionDataset,
    "masks": SegmentationDataset,
}


def _build_context(
    encoder: ImageEncoder, dataset: EvalDataset, cache_dir: Path, num_workers: int | None, progress: Progress
) -> EvalContext:
    features = None
    if isinstance(dataset, LabeledDataset | CaptionedDataset):
        features = extract_features(encoder, dataset, cache_dir, num_workers=num_workers, progress=progress)
        _check_readable(dataset, features)
    return EvalContext(
        encoder=encoder,
        dataset=dataset,
        precomputed_features=features,
        device=encoder.device,
        num_workers=default_num_workers() if num_workers is None else num_workers,
        progress=progress,
    )


def _config_for(dataset: EvalDataset, config: ProtocolConfig) -> ProtocolConfig:
    """Return the options with the metric that a named dataset is reported with."""
    is_registered = isinstance(dataset, LabeledDataset) and dataset.is_registered
    if is_registered and DATASETS[dataset.name].metric == MEAN_CLASS_ACCURACY:
        return config.with_mean_class_accuracy()
    return config


def _check_readable(dataset: LabeledDataset | CaptionedDataset, features: Features) -> None:
    """Raise InvalidInputError if no image of a required split is readable."""
    splits = dataset.splits[features.indices] if isinstance(dataset, LabeledDataset) else np.array(["test"])
    for split in ("train", "test") if isinstance(dataset, LabeledDataset) else ("test",):
        if split not in splits or not len(features.indices):
            reasons = ", ".join(f"{count} {reason}" for reason, count in features.skipped.items())
            raise InvalidInputError(
                f"no {split} image of {dataset.root} can be read: {reasons}", path=dataset.root
            )


def _default_out_dir(encoder: ImageEncoder) -> Path:
    source = encoder.load_args.get("encoder", encoder.name)
    if Path(source).is_dir():
        return Path(source) / "evaluation"
    return Path(f"evaluation-{slugify(source.replace(':', '-'))}")


def _describe_encoder(encoder: ImageEncoder) -> dict[str, Any]:
    """Return the part of `results.json` that is about the encoder."""
    defaults = {"backbone": None, "weights_prefix": "", "weights_exclude": [], "image_size": None}
    return {
        "requested": {"encoder": encoder.name} | defaults | dict(encoder.load_args),
        "encoder": encoder.to_dict()
        | {
            "num_parameters": sum(p.numel() for p in encoder.model.parameters()),
            "flops": count_flops(encoder),
        },
    }


def _open_artifact(
    encoder: ImageEncoder, dataset: EvalDataset, config: ProtocolConfig, out_dir: Path
) -> AbstractContextManager[Artifact]:
    """Create or resume the results, which other processes do not write meanwhile."""
    settings = {
        "dataset": dataset.name,
        "encoder": encoder.name,
        "transform": encoder.to_dict()["transform"],
        # Other options get another folder: existing results are never overwritten.
        "protocols": asdict(config),
    }
    inputs = {"encoder": encoder.fingerprint, "dataset": dataset.key}
    key = config_hash(ARTIFACT_KIND, {k: v for k, v in settings.items() if k != "encoder"}, inputs)
    return Artifact.exclusive(
        out_dir / f"{dataset.name}-{key[:8]}", ARTIFACT_KIND, settings, inputs, non_hashed=("encoder",)
    )


def _run_protocols(
    context: EvalContext,
    protocols: Sequence[str],
    config: ProtocolConfig,
    artifact: Artifact,
    encoder_info: dict[str, Any],
    failures: list[LikewiseError],
) -> Path:
    """Run the protocols that have no results yet; write the results after each, and return their file.

    Failures are appended to `failures`, and their messages stored under `failures` in the file.
    """
    path = artifact.path / RESULTS_FILE
    stored = read_json(path) if path.is_file() else encoder_info | {"protocols": {}}
    # Counts of what was skipped may change without a change of the data.
    result = stored | {"dataset": _describe_dataset(context, stored["protocols"])}
    if artifact.is_complete and all(name in result["protocols"] for name in protocols):
        logger.info("results on %s exist: %s", context.dataset.name, path)
        if result != stored:
            write_json(path, result)
        return path
    failed = result.setdefault("failures", {})
    with context.progress.task(f"evaluating on {context.dataset.name}", len(protocols), "protocols") as bar:
        for name in protocols:
            if name not in result["protocols"]:
                protocol = build_protocol(name, config)
                try:
                    scores = _run_protocol(protocol, context)
                except LikewiseError as error:
                    failures.append(error)
                    failed[name] = str(error)
                else:
                    failed.pop(name, None)
                    result["protocols"][name] = {
                        "config": protocol.config_dict(),
                        "scores": [_save_score(name, score, artifact.path) for score in scores],
                    }
                result["dataset"] = _describe_dataset(context, result["protocols"])
                write_json(path, result)
            bar.update(postfix=name)
    artifact.finish(
        {"protocols": len(result["protocols"])}, result["dataset"]["skipped"], context.dataset.ignored
    )
    return path


def _run_protocol(protocol: Protocol, context: EvalContext) -> list[Score]:
    """Run a protocol; errors about its input name the protocol and the dataset."""
    try:
        return protocol.run(context)
    except (ValueError, LikewiseError) as error:
        field, path = getattr(error, "field", None), getattr(error, "path", None) or context.dataset.path
        message = f"{protocol.name} on {context.dataset.name}: {error}"
        raise InvalidInputError(message, field=field, path=path) from error


def _describe_dataset(context: EvalContext, protocols: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `results.json` that is about the dataset, given the results of protocols."""
    dataset = context.dataset
    header = {"name": dataset.name, "path": str(dataset.path.resolve()), "key": dataset.key}
    if isinstance(dataset, CaptionedDataset):
        details = {
            "caption_column": dataset.caption_column,
            "num_captions": sum(map(len, dataset.captions)),
            "num_images": {"test": len(dataset)},
        }
    elif isinstance(dataset, LabeledDataset):
        details = {
            "label_column": dataset.label_column,
            "split_column": dataset.split_column,
            "num_classes": len(dataset.classes),
            "num_images": dataset.split_counts(),
            "test_only_classes": dataset.test_only_classes(),
        }
    else:
        counts = {split: int((dataset.splits == split).sum()) for split in ("train", "test")}
        details = {"num_classes": len(dataset.classes), "num_images": counts}
    skipped = {} if context.precomputed_features is None else dict(context.precomputed_features.skipped)
    for protocol in protocols.values():  # detection and segmentation read the images themselves
        for score in protocol["scores"]:
            skipped |= score["details"].get("skipped", {})
    return header | details | {"skipped": skipped | dataset.skipped, "ignored": dataset.ignored}


def _save_score(protocol: str, score: Score, out_dir: Path) -> dict[str, Any]:
    """Write the per-item scores to files, and return the entry of `results.json`."""
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
