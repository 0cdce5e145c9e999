"""What is said of runs in figures and small tables: size, pace, settings, what was left out."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from likewise.report import figures
from likewise.report.guidance import Found
from likewise.report.sources import Entry


def facts(entries: Sequence[Entry], found: Found) -> list[tuple[str, str]]:
    """Return what the page is about in figures; a setting that differs between runs is told of each."""
    facts = []
    if found.collection is not None:
        facts.append(("images", f"{len(found.collection):,}"))
        facts.append(("captions", f"{found.collection.artifact.manifest.counts['captions']:,}"))
    runs = [entry.trained for entry in entries if entry.trained]
    if found.collection is None and runs:
        facts.append(("images", _each(f"{run.manifest.counts.get('images', 0):,}" for run in runs)))
    if runs:
        facts += [
            ("backbone", _each(figures.plain(run.settings.get("backbone")) for run in runs)),
            ("views", _each(f"{run.settings.get('size')} px" for run in runs)),
            ("steps", _each(f"{run.manifest.counts.get('steps', 0):,}" for run in runs)),
            ("pairs a step", _each(figures.plain(run.settings.get("batch_size")) for run in runs)),
        ]
    return facts


def _each(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def pace(entry: Entry) -> dict[str, Any]:
    """Return how fast a run was, as the median of its rows, and how long it waited for data."""
    if entry.trained is None:
        return {}
    speed, wait = _middle(entry, "images_per_second"), _middle(entry, "data_wait")
    last = {name: entry.trained.column(name)[1][-1:] for name in ("loss", "effective_rank", "spread")}
    return {
        "entry": entry,
        "pace": figures.ABSENT if speed is None else f"{speed:,.0f}",
        "wait": figures.ABSENT if wait is None else f"{100 * wait:.1f} %",
        "device": figures.plain(entry.trained.derived.get("device")),
        **{name: f"{values[0]:.4g}" if len(values) else figures.ABSENT for name, values in last.items()},
    }


def _middle(entry: Entry, name: str) -> float | None:
    values = entry.trained.column(name)[1] if entry.trained else ()
    return float(np.median(values)) if len(values) else None


def settings(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the settings as given and what followed from them, a row a name, marked where runs differ."""
    runs = [entry.trained for entry in entries if entry.trained]
    rows = []
    for kind, tables in (("given", [r.settings for r in runs]), ("derived", [r.derived for r in runs])):
        for name in dict.fromkeys(name for table in tables for name in table):
            values = [figures.plain(table.get(name)) for table in tables]
            rows.append(
                {
                    "kind": kind,
                    "name": name.replace("_", " "),
                    "told": values,
                    "differs": len(set(values)) > 1,
                }
            )
    return rows


def skipped(entries: Sequence[Entry], found: Found) -> list[tuple[str, str, int]]:
    """Return what was left out: where, why, how many."""
    told = []
    if found.collection is not None:
        told += [("import", why, n) for why, n in sorted(found.collection.artifact.manifest.skipped.items())]
    for entry in entries:
        if entry.trained is not None:
            told += [(entry.name, why, n) for why, n in sorted(entry.trained.manifest.skipped.items())]
    return told


def versions(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Return the versions of libraries, several where runs differ."""
    tables = [entry.trained.manifest.versions for entry in entries if entry.trained]
    names = sorted({name for table in tables for name in table})
    return [(name, _each(table.get(name, figures.ABSENT) for table in tables)) for name in names]
