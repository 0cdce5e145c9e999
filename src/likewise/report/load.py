"""Inputs of the run report: runs, evaluations, datasets and neighbors, all read as untrusted files."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import MANIFEST, Artifact, Manifest, mmap_array, read_json, read_jsonl, read_yaml
from likewise.data.dataset import CaptionDataset
from likewise.errors import ArtifactError, InvalidInputError, LikewiseError
from likewise.evaluation.results import ResultRow, read_results
from likewise.neighbors.index import Neighbors
from likewise.run_directory import RunDirectory

UNTRAINED_PREFIX = "random:"
MAX_NEIGHBORS = 4
# Exceptions from reading files that are damaged or of another version.
READ_ERRORS = (LikewiseError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class PairPreview:
    """The first pairs of a training.

    Attributes:
        views: (m, v, s, s, 3) uint8, the inputs of the network; v is 2, or 1 for methods that pair an image
            with a caption.
        pairs: The ids and positions of anchors and partners, one mapping per pair.
    """

    views: np.ndarray
    pairs: list[dict[str, Any]]

    def views_of(self, anchor_id: str) -> np.ndarray | None:
        """Return the views of an anchor, (v, s, s, 3); None if the preview does not have it."""
        for i, pair in enumerate(self.pairs):
            if pair["anchor"] == anchor_id:
                return self.views[i]
        return None


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Settings, metrics and first pairs of a run."""

    manifest: Manifest
    config: dict[str, Any]
    derived: dict[str, Any]
    metrics: list[dict[str, float | int]]
    preview: PairPreview | None
    blend: float | None = None
    """Weight of the adapted features, 0 if the start was kept; None for a training."""

    @property
    def pair_source(self) -> str:
        """The source of the positive pairs."""
        return str(self.config.get("source"))

    @property
    def is_adapted(self) -> bool:
        """Whether the run adapted a pretrained encoder."""
        return self.config.get("method") == "adapter"

    def metric_series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and the finite values of a logged metric, (m,) each."""
        rows = [(row["step"], row[name]) for row in self.metrics if math.isfinite(row.get(name, math.nan))]
        steps, values = zip(*rows, strict=True) if rows else ((), ())
        return np.asarray(steps, float), np.asarray(values, float)


@dataclass(frozen=True, kw_only=True)
class ReportEntry:
    """One column of the report: a run, or an encoder with an evaluation only.

    Attributes:
        path: Its folder.
        label: Short name, for the header of a table.
        detail: Second line of the name: method, architecture or folder.
        phrase: Name within a sentence.
        rows: Its results, one row per metric.
        results: The contents of its `results.json` files, one per dataset.
        run: The run; None for an evaluation only.
        error: Reason why its results are unreadable.
    """

    path: Path
    label: str
    detail: str
    phrase: str
    rows: list[ResultRow] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    run: RunInfo | None = None
    error: str | None = None

    @cached_property
    def name(self) -> str:
        """Label and detail."""
        return f"{self.label}, {self.detail}" if self.detail else self.label


def read_report_entries(paths: Sequence[Path | str]) -> list[ReportEntry]:
    """Read runs and folders of evaluations, runs first; duplicates are skipped and names are made unique.

    Raises:
        ArtifactError: if a folder is neither a finished run nor has results.
        InvalidInputError: if there is no folder, or the settings of a run are unreadable.
    """
    if not paths:
        raise InvalidInputError("a report needs at least one run", field="runs")
    unique_paths = list(dict.fromkeys(Path(path).resolve() for path in paths))
    entries = [
        _read_evaluation(path) if _is_evaluation_only(path) else _read_run(path) for path in unique_paths
    ]
    return _disambiguate(sorted(entries, key=lambda entry: entry.run is None))


def _is_evaluation_only(path: Path) -> bool:
    return not (path / MANIFEST).is_file() and any(path.glob("*/results.json"))


def _read_run(path: Path) -> ReportEntry:
    manifest = Artifact.open(path, "run").manifest
    config = read_yaml(RunDirectory(path).config_path)
    derived = config.pop("derived", None) or {}
    run = RunInfo(
        manifest=manifest,
        config=config,
        derived=derived,
        metrics=read_jsonl(RunDirectory(path).metrics_path),
        preview=_read_preview(path),
        blend=_read_blend(path),
    )
    pairs, backbone = f"{run.pair_source} pairs", config.get("backbone")
    entry = ReportEntry(
        path=path,
        label=f"adapted {backbone}" if run.is_adapted else pairs,
        detail=pairs if run.is_adapted else str(config.get("method")),
        phrase=f"{backbone} adapted by {pairs}" if run.is_adapted else pairs,
        run=run,
    )
    return _add_results(entry, list(path.glob("evaluation/*/results.json")))


def _read_blend(path: Path) -> float | None:
    try:
        return float(read_json(RunDirectory(path).adaptation_path)["blend"])
    except READ_ERRORS:
        return None


def _read_evaluation(path: Path) -> ReportEntry:
    entry = _add_results(
        ReportEntry(path=path, label=path.name, detail="", phrase=path.name),
        list(path.glob("*/results.json")),
    )
    if not entry.results:
        return entry
    encoder = str(entry.results[0]["encoder"]["name"])
    if encoder.startswith(UNTRAINED_PREFIX):
        architecture = encoder.removeprefix(UNTRAINED_PREFIX)
        return replace(entry, label="untrained", detail=architecture, phrase=f"an untrained {architecture}")
    return replace(entry, label=encoder, phrase=encoder)


def _add_results(entry: ReportEntry, paths: list[Path]) -> ReportEntry:
    if not paths:
        return entry
    try:
        return replace(
            entry,
            rows=list(read_results(entry.path)),
            results=[read_json(result_path) for result_path in sorted(paths)],
        )
    except READ_ERRORS as error:
        return replace(entry, error=f"the results in {entry.path} are unreadable ({error})")


def _read_preview(path: Path) -> PairPreview | None:
    try:
        run_dir = RunDirectory(path)
        views, pairs = mmap_array(run_dir.preview_views_path), read_json(run_dir.preview_pairs_path)
    except READ_ERRORS:
        return None
    is_valid = (
        views.ndim == 5 and views.shape[1] in (1, 2) and views.shape[4] == 3 and views.dtype == np.uint8
    )
    has_keys = all(isinstance(pair, dict) and {"anchor", "position"} <= pair.keys() for pair in pairs)
    return (
        PairPreview(views=views, pairs=pairs) if is_valid and has_keys and len(views) == len(pairs) else None
    )


def _disambiguate(entries: list[ReportEntry]) -> list[ReportEntry]:
    """Make names unique by parts of the path, as many as needed, and phrases by the whole name."""
    for depth in range(1, 6):
        duplicates = {name for name, count in Counter(entry.name for entry in entries).items() if count > 1}
        if not duplicates:
            break
        entries = [_add_path_suffix(entry, depth) if entry.name in duplicates else entry for entry in entries]
    phrase_counts = Counter(entry.phrase for entry in entries)
    return [
        replace(entry, phrase=f"{entry.label} ({entry.detail})") if phrase_counts[entry.phrase] > 1 else entry
        for entry in entries
    ]


def _add_path_suffix(entry: ReportEntry, depth: int) -> ReportEntry:
    suffix = "/".join(entry.path.parts[-depth:])
    detail = entry.detail.split(" · ")[0] if depth > 1 else entry.detail
    return replace(entry, detail=f"{detail} · {suffix}" if detail else suffix)


@dataclass(frozen=True, kw_only=True)
class NeighborSource:
    """Neighbors by caption, with their dataset.

    Attributes:
        style: Index of the first run that used them.
        dataset: The dataset.
        neighbors: The neighbors artifact.
        positions: (n, k) int64, padded with -1.
        similarity: (n, k) float32.
    """

    style: int
    dataset: CaptionDataset
    neighbors: Neighbors
    positions: np.ndarray
    similarity: np.ndarray

    @property
    def nearest_similarity(self) -> np.ndarray:
        """Similarity to the nearest neighbor, (m,), of the images that have one."""
        top1 = self.similarity[:, 0]
        return top1[np.isfinite(top1)]


@dataclass(frozen=True, kw_only=True)
class PairInputs:
    """Dataset and neighbors of the runs, as far as they are readable.

    Attributes:
        dataset: The dataset of the reference run; None if it is unreadable.
        reference_index: Index of the entry whose dataset and first pairs are on the page.
        neighbor_sources: Neighbors by caption, each once; the first are those of `dataset`.
        notes: Sentences about missing parts.
    """

    dataset: CaptionDataset | None = None
    reference_index: int = 0
    neighbor_sources: list[NeighborSource] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_pair_inputs(entries: Sequence[ReportEntry]) -> PairInputs:
    """Open the datasets and the neighbors of the runs, each once."""
    notes: list[str] = []
    datasets: dict[int, CaptionDataset] = {}
    sources: dict[str, NeighborSource] = {}
    for i, entry in enumerate(entries):
        if entry.run is None:
            continue
        try:
            datasets[i] = _open_run_dataset(entry.run)
            refs = entry.run.derived.get("neighbors")
            if refs and refs[0]["path"] not in sources:
                sources[refs[0]["path"]] = _open_neighbor_source(i, datasets[i], refs[0])
        except READ_ERRORS as error:
            notes.append(f"{entry.name}: {error}.")
    if not sources and not notes and datasets:
        notes.append("No run used language pairs, therefore there are no neighbors.")
    reference_index = next((source.style for source in sources.values()), next(iter(datasets), 0))
    return PairInputs(
        dataset=datasets.get(reference_index),
        reference_index=reference_index,
        neighbor_sources=list(sources.values()),
        notes=notes,
    )


def _open_run_dataset(run: RunInfo) -> CaptionDataset:
    path = run.derived.get("dataset")
    if path is None:
        raise ArtifactError("the run has no record of its dataset", field="dataset")
    dataset = CaptionDataset(Path(path))
    if dataset.key != run.manifest.inputs.get("dataset") or len(dataset) == 0:
        raise ArtifactError(f"the dataset at {path} has changed since the training", path=Path(path))
    return dataset


def _open_neighbor_source(style: int, dataset: CaptionDataset, ref: dict[str, str]) -> NeighborSource:
    neighbors = Neighbors(Path(ref["path"]))
    if neighbors.artifact.manifest.key != ref["key"]:
        raise ArtifactError(
            f"the neighbors at {neighbors.path} have changed since the training", path=neighbors.path
        )
    if len(neighbors) != len(dataset):
        raise ArtifactError(
            f"the neighbors at {neighbors.path} are per caption, not per image", path=neighbors.path
        )
    positions, similarity = neighbors.topk(min(MAX_NEIGHBORS, neighbors.k))
    return NeighborSource(
        style=style,
        dataset=dataset,
        neighbors=neighbors,
        positions=positions,
        similarity=similarity,
    )
