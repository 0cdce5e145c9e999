"""Fetch well-known sets by name: downloaded once, then a folder with a `labels.csv` like any other."""

import csv
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from likewise.artifacts import atomic, told_if_full, write_json
from likewise.errors import InputError, LikewiseError
from likewise.evaluation.sets.catalog import KnownSet, known
from likewise.evaluation.sets.readers import READERS, Item, Job
from likewise.progress import SILENT, Progress

_TABLE = "labels.csv"
_BEGUN = "begun.json"


def fetch(name: str, folder: Path | None = None, progress: Progress = SILENT) -> Path:
    """Return the folder of a known set, for `open_set`; what is not there yet is downloaded.

    Args:
        name: A name of the catalogue.
        folder: Where the set lies or shall lie; by default $LIKEWISE_SETS or ~/.cache/likewise/sets, /NAME.
        progress: Where to tell what is downloaded and written.

    Raises:
        InputError: where the name is unknown, or the set is not there and cannot be downloaded; the message
            says what to put where.
        DependencyError: where a package that reads the set is missing.
    """
    told = known(name)
    folder = folder or place(name)
    if (folder / _TABLE).is_file():
        return folder
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    progress.say(
        f"fetching {told.title} into {folder}: about {told.megabytes:,} MB where not there yet, from "
        f"{told.homepage} (licence: {told.licence})"
    )
    try:
        with told_if_full(source), _patience(), _clean(source, told.files):
            items = READERS[told.source.adapter](Job(told=told.source, folder=source, progress=progress))
    except LikewiseError:
        raise
    except Exception as fault:  # each library and each server raises its own
        raise InputError(_by_hand(name, told, source, fault)) from fault
    _write_table(folder, items)
    return folder


def place(name: str) -> Path:
    """Return where a known set lies by default: $LIKEWISE_SETS or ~/.cache/likewise/sets, /NAME."""
    return Path(os.environ.get("LIKEWISE_SETS") or "~/.cache/likewise/sets").expanduser() / name


def is_here(name: str) -> bool:
    """Tell whether a known set was fetched."""
    return (place(name) / _TABLE).is_file()


def _by_hand(name: str, told: KnownSet, source: Path, fault: Exception) -> str:
    reason = " ".join(f"{type(fault).__name__}: {fault}".split())[:200]
    files = f"{', '.join(told.files)} from {told.homepage} into {source}"
    return f"to make {name}, put {files} (at these paths; delete damaged copies) and run again ({reason})"


@contextmanager
def _patience(seconds: float = 60.0) -> Iterator[None]:
    """Give up a server that stays silent: by default Python waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _clean(source: Path, archives: tuple[str, ...]) -> Iterator[None]:
    """Remove what a failed or killed run unpacked, but neither archives nor what the user had put there.

    torchvision takes a folder that exists for a finished one, so a half-unpacked one must not stay.
    """
    begun = source / _BEGUN
    if begun.is_file():
        _sweep(source, {*json.loads(begun.read_text()), *archives})
    else:
        write_json(begun, [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()])
    try:
        yield
    except BaseException:
        _sweep(source, {*json.loads(begun.read_text()), *archives})
        begun.unlink()
        raise
    begun.unlink()


def _sweep(source: Path, kept: set[str]) -> None:
    for path in sorted(source.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        # Whole shards of the hub are kept: their names cannot be known beforehand.
        elif path.relative_to(source).as_posix() not in kept | {_BEGUN} and path.suffix != ".parquet":
            path.unlink()


def _write_table(folder: Path, items: Iterable[Item]) -> None:
    rows = [(Path(os.path.relpath(item.file, folder)).as_posix(), item.split, item.label) for item in items]
    with atomic(folder / _TABLE) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("file", "split", "label"))
        writer.writerows(sorted(rows))
