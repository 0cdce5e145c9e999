"""What the page is made from: the files of runs and of evaluations, read once and never trusted."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import MANIFEST, Artifact, Manifest, mmap_array, read_json, read_jsonl, read_yaml
from likewise.errors import InvalidInputError, LikewiseError
from likewise.evaluation.results import ResultRow, read_results
from likewise.run_directory import RunDirectory

UNTRAINED_PREFIX = "random:"
# What files that were damaged or written by other versions raise when they are read.
READ_ERRORS = (LikewiseError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError)
_PAIR_PHRASES = {"self": "pairs of views of one image", "language": "pairs by language"}


@dataclass(frozen=True, kw_only=True)
class PairPreview:
    """The first pairs as the network was shown them: views (m, v, s, s, 3) uint8, and whose they are.

    v is 2, or 1 where a method shows an image with a caption.
    """

    views: np.ndarray
    pairs: list[dict[str, Any]]

    def views_of(self, anchor_id: str) -> np.ndarray | None:
        """Return the views of an anchor's pair, (v, s, s, 3), or None where it is not among them."""
        for i, pair in enumerate(self.pairs):
            if pair["anchor"] == anchor_id:
                return self.views[i]
        return None


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run's settings, curves and first pairs."""

    manifest: Manifest
    config: dict[str, Any]
    derived: dict[str, Any]
    metrics: list[dict[str, float | int]]
    preview: PairPreview | None

    @property
    def pair_source(self) -> str:
        """The source of pairs."""
        return str(self.config.get("source"))

    def metric_series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and values (m,) of a logged figure, where it is a number."""
        rows = [(row["step"], row[name]) for row in self.metrics if math.isfinite(row.get(name, math.nan))]
        steps, values = zip(*rows, strict=True) if rows else ((), ())
        return np.asarray(steps, float), np.asarray(values, float)


@dataclass(frozen=True, kw_only=True)
class ReportEntry:
    """One column of the page: a run, or an encoder that was only evaluated.

    Attributes:
        path: Its folder.
        label: What it is called in a table's head.
        detail: What is said below that.
        phrase: What it is called within a sentence.
        rows: What was measured of it.
        results: The same as stored, a mapping an evaluated set.
        run: The contents of a run, or None for an evaluation.
        error: Why its results cannot be read, or None.
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
        """The whole name."""
        return f"{self.label}, {self.detail}" if self.detail else self.label


def read_report_entries(paths: Sequence[Path | str]) -> list[ReportEntry]:
    """Read runs and evaluation folders, runs first, each once, and name them uniquely.

    Raises:
        ArtifactError: where a folder is neither a finished run nor holds results.
        InputError: where there is none, or a run's settings cannot be read.
    """
    if not paths:
        raise InvalidInputError("there is nothing to report on: give at least one run")
    unique_paths = list(dict.fromkeys(Path(path).resolve() for path in paths))
    entries = [
        _read_evaluation(path) if _is_evaluation_only(path) else _read_run(path) for path in unique_paths
    ]
    return _disambiguate(sorted(entries, key=lambda entry: entry.run is None))


def _is_evaluation_only(path: Path) -> bool:
    return not (path / MANIFEST).is_file() and any(path.glob("*/results.json"))


def _read_run(path: Path) -> ReportEntry:
    manifest = Artifact.open(path, "run").manifest
    config = read_yaml(RunDirectory(path).config)
    derived = config.pop("derived", None) or {}
    run = RunInfo(
        manifest=manifest,
        config=config,
        derived=derived,
        metrics=read_jsonl(RunDirectory(path).metrics),
        preview=_read_preview(path),
    )
    entry = ReportEntry(
        path=path,
        label=f"{run.pair_source} pairs",
        detail=str(config.get("method")),
        phrase=_PAIR_PHRASES.get(run.pair_source, f"{run.pair_source} pairs"),
        run=run,
    )
    return _add_results(entry, list(path.glob("evaluation/*/results.json")))


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
        return replace(entry, error=f"the results in {entry.path} cannot be read ({error})")


def _read_preview(path: Path) -> PairPreview | None:
    try:
        run_dir = RunDirectory(path)
        views, pairs = mmap_array(run_dir.preview_views), read_json(run_dir.preview_pairs)
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
    """Add folder names, as many parts as needed, to the names that several have."""
    for depth in range(1, 6):
        duplicates = {name for name, count in Counter(entry.name for entry in entries).items() if count > 1}
        if not duplicates:
            break
        entries = [_add_path_suffix(entry, depth) if entry.name in duplicates else entry for entry in entries]
    return entries


def _add_path_suffix(entry: ReportEntry, depth: int) -> ReportEntry:
    suffix = "/".join(entry.path.parts[-depth:])
    detail = entry.detail.split(" · ")[0] if depth > 1 else entry.detail
    phrase = entry.phrase.split(" (", maxsplit=1)[0]
    return replace(entry, detail=f"{detail} · {suffix}" if detail else suffix, phrase=f"{phrase} ({suffix})")
