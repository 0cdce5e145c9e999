"""What the page is made from: the files of runs and of evaluations, read once and never trusted."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from likewise.artifacts import MANIFEST, Manifest, open_artifact, read_array, read_json, read_lines, read_yaml
from likewise.errors import InputError, LikewiseError
from likewise.evaluation.results import Row, read_results

METRICS = "metrics.jsonl"
UNTRAINED = "random:"
# What files that were damaged or written by other versions raise when they are read.
FAULTS = (LikewiseError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError)
_ALIKE = {"self": "pairs of views of one image", "language": "pairs by language"}


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The first pairs as the network was shown them: views (m, v, s, s, 3) uint8, and whose they are.

    v is 2, or 1 where a method shows an image with a caption.
    """

    views: np.ndarray
    pairs: list[dict[str, Any]]

    def of(self, anchor: str) -> np.ndarray | None:
        """Return the views of an anchor's pair, (v, s, s, 3), or None where it is not among them."""
        for row, pair in enumerate(self.pairs):
            if pair["anchor"] == anchor:
                return self.views[row]
        return None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's settings, curves and first pairs."""

    manifest: Manifest
    settings: dict[str, Any]
    derived: dict[str, Any]
    metrics: list[dict[str, float | int]]
    preview: Preview | None

    @property
    def pairs(self) -> str:
        """Who was shown with whom."""
        return str(self.settings.get("pairs"))

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and values (m,) of a logged figure, where it is a number."""
        rows = [(row["step"], row[name]) for row in self.metrics if math.isfinite(row.get(name, math.nan))]
        steps, values = zip(*rows, strict=True) if rows else ((), ())
        return np.asarray(steps, float), np.asarray(values, float)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One column of the page: a run, or an encoder that was only evaluated.

    Attributes:
        path: Its folder.
        short: What it is called in a table's head.
        detail: What is said below that.
        phrase: What it is called within a sentence.
        rows: What was measured of it.
        results: The same as stored, a mapping an evaluated set.
        trained: What a run holds besides, or None.
        fault: Why its results cannot be read, or None.
    """

    path: Path
    short: str
    detail: str
    phrase: str
    rows: list[Row] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    trained: Trained | None = None
    fault: str | None = None

    @cached_property
    def name(self) -> str:
        """The whole name."""
        return f"{self.short}, {self.detail}" if self.detail else self.short


def read_entries(paths: Sequence[Path | str]) -> list[Entry]:
    """Read runs and evaluation folders, runs first, each once, and name them so that they can be told apart.

    Raises:
        ArtifactError: where a folder is neither a finished run nor holds results.
        InputError: where there is none, or a run's settings cannot be read.
    """
    if not paths:
        raise InputError("there is nothing to report on: give at least one run")
    unique = list(dict.fromkeys(Path(path).resolve() for path in paths))
    entries = [_read_measured(path) if _only_measured(path) else _read_run(path) for path in unique]
    return _told_apart(sorted(entries, key=lambda entry: entry.trained is None))


def _only_measured(path: Path) -> bool:
    return not (path / MANIFEST).is_file() and any(path.glob("*/results.json"))


def _read_run(path: Path) -> Entry:
    manifest = open_artifact(path, "run").manifest
    settings = read_yaml(path / "config.yaml")
    derived = settings.pop("derived", None) or {}
    trained = Trained(
        manifest=manifest,
        settings=settings,
        derived=derived,
        metrics=read_lines(path / METRICS),
        preview=_read_preview(path),
    )
    entry = Entry(
        path=path,
        short=f"{trained.pairs} pairs",
        detail=str(settings.get("method")),
        phrase=_ALIKE.get(trained.pairs, f"{trained.pairs} pairs"),
        trained=trained,
    )
    return _with_results(entry, list(path.glob("evaluation/*/results.json")))


def _read_measured(path: Path) -> Entry:
    found = _with_results(
        Entry(path=path, short=path.name, detail="", phrase=path.name), list(path.glob("*/results.json"))
    )
    if not found.results:
        return found
    encoder = str(found.results[0]["encoder"]["name"])
    if encoder.startswith(UNTRAINED):
        kind = encoder.removeprefix(UNTRAINED)
        return replace(found, short="untrained", detail=kind, phrase=f"an untrained {kind}")
    return replace(found, short=encoder, phrase=encoder)


def _with_results(entry: Entry, files: list[Path]) -> Entry:
    if not files:
        return entry
    try:
        return replace(
            entry, rows=read_results(entry.path), results=[read_json(file) for file in sorted(files)]
        )
    except FAULTS as fault:
        return replace(entry, fault=f"the results in {entry.path} cannot be read ({fault})")


def _read_preview(path: Path) -> Preview | None:
    try:
        views, pairs = read_array(path / "preview.npy"), read_json(path / "preview.json")
    except FAULTS:
        return None
    sound = views.ndim == 5 and views.shape[1] in (1, 2) and views.shape[4] == 3 and views.dtype == np.uint8
    told = all(isinstance(pair, dict) and {"anchor", "position"} <= pair.keys() for pair in pairs)
    return Preview(views=views, pairs=pairs) if sound and told and len(views) == len(pairs) else None


def _told_apart(entries: list[Entry]) -> list[Entry]:
    """Add folder names, as many parts as needed, to the names that several have."""
    for depth in range(1, 6):
        common = {name for name, count in Counter(entry.name for entry in entries).items() if count > 1}
        if not common:
            break
        entries = [_located(entry, depth) if entry.name in common else entry for entry in entries]
    return entries


def _located(entry: Entry, depth: int) -> Entry:
    place = "/".join(entry.path.parts[-depth:])
    usual = entry.detail.split(" · ")[0] if depth > 1 else entry.detail
    phrase = entry.phrase.split(" (", maxsplit=1)[0]
    return replace(entry, detail=f"{usual} · {place}" if usual else place, phrase=f"{phrase} ({place})")
