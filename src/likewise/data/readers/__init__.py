"""Sources of captioned images: every format that is read, and how it is told which one is there."""

import glob
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from likewise.artifacts import MANIFEST
from likewise.data.images import SUFFIXES
from likewise.data.readers.base import Candidate, Fault, ImportOptions, Source, fitness
from likewise.data.readers.folder import has_images, open_images
from likewise.data.readers.huggingface import PREFIX, is_saved, open_hub, open_saved
from likewise.data.readers.tables import Table, TableSource, open_coco, open_parquet, open_table
from likewise.data.readers.text import open_text
from likewise.data.readers.webdataset import open_tars
from likewise.errors import InputError, close_matches

__all__ = ["Candidate", "Fault", "ImportOptions", "Source", "open_source"]

_TABLES: dict[str, Callable[[Path], Table]] = {
    ".csv": open_text,
    ".tsv": open_text,
    ".txt": open_text,
    ".token": open_text,
    ".jsonl": open_text,
    ".ndjson": open_text,
    ".parquet": open_parquet,
    ".json": open_coco,
}
_COMPRESSED = frozenset({".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar"})
_FORMATS = (
    "a folder of images, a table (.csv, .tsv, .jsonl, .parquet), captions in COCO's format (.json), "
    "a Flickr token file, .tar archives, or a Hugging Face dataset (a saved folder, or hf:NAME)"
)


def open_source(source: str, options: ImportOptions) -> Source:
    """Return the captioned images at a path or hub name; the format is told by what is there.

    Raises:
        InputError: where there is nothing, nothing that is known, or options do not fit what is there.
        DependencyError: where a Hugging Face dataset is asked for without its library.
    """
    if source.startswith(PREFIX):
        return _with_told(*open_hub(source), options)
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, options)
    if path.exists():
        return _open_file(path, options)
    if glob.has_magic(source):
        return _open_pattern(path, options)
    beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    raise InputError(f"{path} does not exist.{close_matches(path.name, beside)}")


def _open_pattern(path: Path, options: ImportOptions) -> Source:
    found = [Path(name) for name in sorted(glob.glob(str(path)))]  # noqa: PTH207  # the pattern may be absolute
    if not found:
        raise InputError(f"no file has a name of the form {path}")
    others = [p.name for p in found if p.suffix.lower() != ".tar"]
    if others:
        raise InputError(f"only .tar archives are read by a pattern; {path} also matches {others[0]}")
    return open_tars(found, options)


def _open_file(path: Path, options: ImportOptions) -> Source:
    suffix = path.suffix.lower()
    if suffix == ".tar":
        return open_tars([path], options)
    if suffix in _COMPRESSED:
        raise InputError(f"{path} is compressed; unpack it first (a plain .tar is read as it is)")
    if suffix in SUFFIXES:
        raise InputError(f"{path} is a single image; name the folder or the table that it belongs to")
    if suffix not in _TABLES:
        raise InputError(f"{path} is of no kind that is known: expected {_FORMATS}")
    return _open_known(path, options)


def _open_known(path: Path, options: ImportOptions) -> TableSource:
    if path.suffix.lower() == ".json" and options.id_column is None:
        options = replace(options, id_column="id")
    return open_table(_TABLES[path.suffix.lower()](path), options)


def _with_told(table: Table, told: list[str], options: ImportOptions) -> TableSource:
    opened = open_table(table, options)
    return replace(opened, told=(*told, *opened.told))


def _open_folder(path: Path, options: ImportOptions) -> Source:
    """Tell what a folder is: a saved dataset, a table beside its images, archives, or just images."""
    if (path / MANIFEST).is_file():
        raise InputError(f"{path} was made by likewise; import the images that it was made from")
    if is_saved(path):
        return _with_told(*open_saved(path), options)
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    table = _fitting_table(path, files, options)
    if table is not None:
        opened = _open_known(table, options)
        return replace(opened, told=(f"{path.name} is read as the table {table.name}.", *opened.told))
    if has_images(path):
        return open_images(path, options)
    tars = [p for p in files if p.suffix.lower() == ".tar"]
    if tars:
        return open_tars(tars, options)
    packed = [p.name for p in files if p.suffix.lower() in _COMPRESSED]
    if packed:
        raise InputError(
            f"{path} holds no images, only compressed files such as {packed[0]}; unpack them first"
        )
    for unfit in _tables(files):
        return _open_known(unfit, options)  # raises, and says why the table does not fit
    raise InputError(f"no images, tables or tars in {path}; expected {_FORMATS}")


def _fitting_table(path: Path, files: list[Path], options: ImportOptions) -> Path | None:
    """Return the one table that names images, those with captions before those without.

    Raises:
        InputError: where several tables do so equally well.
    """
    ranks = {file: _rank(file, options) for file in _tables(files)}
    best = max(ranks.values(), default=0)
    fitting = [file for file, rank in ranks.items() if rank == best > 0]
    if len(fitting) > 1:
        names = ", ".join(file.name for file in fitting)
        whole = f", or all as {PREFIX}{path}" if {file.suffix for file in fitting} == {".parquet"} else ""
        raise InputError(f"{path} holds several tables of images ({names}); name the one to import{whole}")
    return fitting[0] if fitting else None


def _tables(files: list[Path]) -> list[Path]:
    """Return the files that may be tables by their names, but for the captions of single images."""
    images = {file.stem for file in files if file.suffix.lower() in SUFFIXES}
    told = [file for file in files if "caption" in file.name.casefold() or ".token" in file.name.casefold()]
    loose = [file for file in told if file.suffix.lower() in {".json", ".txt"} and file.stem not in images]
    return [
        file for file in files if file.suffix.lower() in _TABLES.keys() - {".json", ".txt"} or file in loose
    ]


def _rank(file: Path, options: ImportOptions) -> int:
    try:
        table = _TABLES[file.suffix.lower()](file)
        return fitness(table.columns(), table.embedded(), options)
    except InputError:
        return 0
