"""Formats: what a file or a folder contains, and which reader or table opens it."""

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePosixPath

from likewise.artifacts import MANIFEST
from likewise.data.config import ImportOptions
from likewise.data.images import is_image_name
from likewise.data.readers.base import Reader, UInt64Set
from likewise.data.readers.columns import match_score
from likewise.data.readers.encodings import decode_text, read_head
from likewise.data.readers.files import (
    Folder,
    IgnoredFiles,
    file_type_reason,
    resolve_image_path,
    walk_files,
    walk_folders,
)
from likewise.data.readers.folder import open_image_folder
from likewise.data.readers.huggingface import HUB_PREFIX
from likewise.data.readers.json_tables import LINES_SUFFIXES, open_json_table
from likewise.data.readers.parquet import open_parquet_table
from likewise.data.readers.sidecars import is_sidecar, pair_sidecars, split_suffix
from likewise.data.readers.table_reader import ChainedReader, TableReader, open_table
from likewise.data.readers.tables import Table, TableRow, cell_image
from likewise.data.readers.text import open_text_table
from likewise.data.readers.webdataset import is_tar, open_tar_archives
from likewise.errors import InvalidInputError
from likewise.strings import count_noun

TEXT_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".token", ".tab"})
JSON_SUFFIXES = LINES_SUFFIXES | {".json"}
PARQUET_SUFFIXES = frozenset({".parquet", ".pq"})
TABLE_SUFFIXES = TEXT_SUFFIXES | JSON_SUFFIXES | PARQUET_SUFFIXES
_PARQUET_MAGIC = b"PAR1"
COMPRESSED_SUFFIXES = frozenset(
    {".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar"}
)
SUPPORTED_FORMATS = (
    "a folder of images, a table (.csv, .tsv, .jsonl, .parquet), COCO captions (.json), "
    "a Flickr token file, .tar archives, or a Hugging Face dataset (a saved folder, or hf:NAME)"
)
_NUM_PROBED_ROWS = 100  # rows whose images decide whether a table belongs to the folder
_MAX_LISTED_TABLES = 6
_UNLISTED_IMAGE = "image that the table does not list"


def open_table_file(path: Path) -> Table:
    """Open a table: CSV and other delimited text, JSON, COCO captions, a Flickr token file, or Parquet.

    The format is that of the suffix; files with another suffix are opened by their content.

    Raises:
        InvalidInputError: if the file cannot be read or is not a table.
    """
    suffix = path.suffix.lower()
    if suffix in PARQUET_SUFFIXES:
        return open_parquet_table(path)
    if suffix in JSON_SUFFIXES:
        return open_json_table(path)
    if suffix in TEXT_SUFFIXES:
        return open_text_table(path)
    head = read_head(path, 64)
    if head.startswith(_PARQUET_MAGIC):
        return open_parquet_table(path)
    return open_json_table(path) if _starts_as_json(head) else open_text_table(path)


def _starts_as_json(head: bytes) -> bool:
    try:
        return decode_text(head).lstrip().startswith(("{", "["))
    except UnicodeDecodeError:
        return head.lstrip().startswith((b"{", b"["))


@dataclass
class FolderContents:
    """Candidates for the content of a folder, from the names of its files."""

    num_images: int = 0
    captioned_image: str | None = None
    """The first image with a caption file."""
    tables: list[str] = field(default_factory=list)
    """Files that may be tables."""
    tars: list[str] = field(default_factory=list)
    compressed: list[str] = field(default_factory=list)


def inspect_folder(path: Path) -> FolderContents:
    """Walk a folder and list what it may contain."""
    contents = FolderContents()
    for folder in walk_folders(path, IgnoredFiles()):
        images = [name for name in folder.files if is_image_name(name)]
        contents.num_images += len(images)
        if contents.captioned_image is None:
            assigned, _ = pair_sidecars(images, filter(is_sidecar, folder.files))
            captioned = next((name for name in images if assigned[name]), None)
            contents.captioned_image = None if captioned is None else folder.prefix + captioned
        contents.tables += [folder.prefix + name for name in _table_names(folder, images)]
        contents.tars += [folder.prefix + name for name in folder.files if is_tar(name)]
        contents.compressed += [
            folder.prefix + name for name in folder.files if split_suffix(name)[1] in COMPRESSED_SUFFIXES
        ]
    return contents


def _table_names(folder: Folder, images: list[str]) -> list[str]:
    """Return the files that may be tables by their names, without the files of single images."""
    image_stems = {split_suffix(name)[0] for name in images}
    names = []
    for name in folder.files:
        stem, suffix = split_suffix(name)
        if suffix in {".json", ".txt"}:
            is_table = (
                any(word in name.casefold() for word in ("caption", ".token")) and stem not in image_stems
            )
        else:
            # Below the top level, `a.csv` beside `a.jpg` is about one image.
            is_table = suffix in TABLE_SUFFIXES and (not folder.prefix or stem not in image_stems)
        if is_table:
            names.append(name)
    return names


def open_folder(path: Path, options: ImportOptions) -> Reader:
    """Return the reader of a folder of images with caption files, of tables, or of tar archives.

    Tables are read if they have captions or if no image has a caption file. Two possible readings are errors
    unless `source_format` decides: captions in a table and in caption files, a table of few of the images, or
    archives beside images or tables.

    Raises:
        InvalidInputError: if there is nothing to read, or two readings are possible.
    """
    if (path / MANIFEST).is_file():
        raise InvalidInputError(f"{path} was written by likewise; import its source instead", path=path)
    contents = inspect_folder(path)
    source_format, tables = options.source_format, list[str]()
    if source_format in ("auto", "table"):
        tables = _best_tables(path, contents, options)
    if source_format == "auto":
        source_format = _choose_format(path, contents, tables, options)
    elif not tables:
        tables = contents.tables[:1]  # its error is reported
    if source_format == "table" and contents.tables:
        return _open_tables(path, tables, contents, options)
    if source_format == "folder" and contents.num_images:
        return open_image_folder(path, options)
    if source_format == "tar" and contents.tars:
        return open_tar_archives([path / name for name in contents.tars], options, path)
    if options.source_format != "auto":
        raise InvalidInputError(
            f"`source_format` is {source_format}, but {path} has {_describe_contents(contents)}",
            field="source_format",
            path=path,
        )
    if contents.compressed:
        raise InvalidInputError(
            f"{path} contains only compressed files such as {contents.compressed[0]}; unpack them first",
            path=path,
        )
    for name in contents.tables:
        open_table_reader(path / name, options)  # raises the error of the table
    raise InvalidInputError(
        f"no images, tables or tar archives in {path}; expected {SUPPORTED_FORMATS}", path=path
    )


def _describe_contents(contents: FolderContents) -> str:
    return (
        f"{count_noun(contents.num_images, 'image')}, {count_noun(len(contents.tables), 'table')} and "
        f"{count_noun(len(contents.tars), 'tar archive')}"
    )


def _choose_format(path: Path, contents: FolderContents, tables: list[str], options: ImportOptions) -> str:
    """Return the only possible reading of a folder: `table`, `folder`, `tar`, or an empty string for none."""
    names_table = options.image_column is not None or options.images is not None
    if names_table and tables:
        return "table"
    readings = {
        "table": f"the table {', '.join(tables[:_MAX_LISTED_TABLES])}" if tables else "",
        "folder": count_noun(contents.num_images, "image") if contents.num_images else "",
        "tar": f"tar archives such as {contents.tars[0]}" if contents.tars else "",
    }
    if contents.captioned_image is not None:
        readings["folder"] += f", with caption files such as that of {contents.captioned_image},"
    elif tables and not contents.tars:
        readings["folder"] = ""  # the images of the table
    possible = {name: description for name, description in readings.items() if description}
    if len(possible) > 1:
        raise InvalidInputError(
            f"{path} contains {' and '.join(possible.values())}; set `source_format` to "
            f"{' or '.join(possible)}, or import one of them by its path",
            field="source_format",
            path=path,
        )
    return next(iter(possible), "")


def _best_tables(path: Path, contents: FolderContents, options: ImportOptions) -> list[str]:
    """Return the tables of images in a folder, preferring tables with captions.

    Beside images, a table counts only if it lists at least one of them and, beside caption files, if it has
    captions.

    Raises:
        InvalidInputError: if several tables match equally well in one folder and its subfolders.
    """
    names_table = options.image_column is not None or options.images is not None
    scores = {name: _score_table(path / name, options) for name in contents.tables}
    if options.source_format == "auto" and not names_table:
        min_score = 1 if contents.captioned_image is None else 2
        scores = {
            name: score
            for name, score in scores.items()
            if score >= min_score
            and not (
                (contents.captioned_image or contents.tars or (contents.num_images and score == 1))
                and _lists_nothing(path / name, options)
            )
        }
    best_score = max(scores.values(), default=0)
    best = [name for name, score in scores.items() if score == best_score > 0]
    folders = Counter(PurePosixPath(name).parent for name in best)
    is_nested = any(not folders.keys().isdisjoint(folder.parents) for folder in folders)
    if is_nested or max(folders.values(), default=0) > 1:
        all_parquet = {split_suffix(name)[1] for name in best} <= PARQUET_SUFFIXES
        hint = f", or all of them as {HUB_PREFIX}{path}" if all_parquet else ""
        more = ", ..." if len(best) > _MAX_LISTED_TABLES else ""
        raise InvalidInputError(
            f"{path} contains several tables of images ({', '.join(best[:_MAX_LISTED_TABLES])}{more}); "
            f"import one of them{hint}",
            path=path,
        )
    return best


def _score_table(file: Path, options: ImportOptions) -> int:
    try:
        return match_score(open_table_file(file), options)
    except (InvalidInputError, OSError):
        return 0  # an unreadable file beside images is no table of them


def _lists_nothing(file: Path, options: ImportOptions) -> bool:
    """Return whether no probed row of a table has an existing image."""
    try:
        reader = open_table_reader(file, options)
    except InvalidInputError:
        return False  # its own error is reported
    if reader.columns.image in reader.table.embedded_columns():
        return False
    rows = islice(reader.table.iter_rows([reader.columns.image or ""]), _NUM_PROBED_ROWS)
    try:
        cells = [row.values.get(reader.columns.image or "") for row in rows if isinstance(row, TableRow)]
    except (InvalidInputError, OSError):
        return True
    images = [image for image in map(cell_image, cells) if image is not None and image.path is not None]
    return not any(resolve_image_path(reader.root, str(image.path))[1] for image in images)


def open_table_reader(path: Path, options: ImportOptions) -> TableReader:
    """Return the reader of a table in a file.

    Raises:
        InvalidInputError: if an option does not apply, or a column or the folder of the images is missing.
    """
    if options.caption_lines != "auto":
        raise InvalidInputError(
            f"`caption_lines` does not apply: {path} is a table, not a folder of images with caption files",
            field="caption_lines",
        )
    return open_table(open_table_file(path), options)


def _open_tables(path: Path, names: list[str], contents: FolderContents, options: ImportOptions) -> Reader:
    readers = tuple(open_table_reader(path / name, options) for name in names)
    message = f"{path.name}: reading table {', '.join(names)}"
    ignored, num_listed = _ignored_files(path, readers, names, contents)
    num_unlisted = ignored.counts[_UNLISTED_IMAGE]
    is_requested = (
        options.source_format == "table" or options.image_column is not None or options.images is not None
    )
    lists_paths = any(reader.columns.image not in reader.table.embedded_columns() for reader in readers)
    if lists_paths and num_unlisted > num_listed and not is_requested:
        raise InvalidInputError(
            f"{path} contains {contents.num_images:,} images, of which the table {', '.join(names)} lists "
            f"{contents.num_images - num_unlisted:,}; set `source_format` to table to import those, or to "
            "folder to import all",
            field="source_format",
            path=path,
        )
    if len(readers) == 1 and os.path.dirname(names[0]) == "":  # noqa: PTH120
        reader: Reader = replace(readers[0], notes=(message, *readers[0].notes))
    else:
        reader = ChainedReader(root=path.resolve(), readers=readers, names=tuple(names))
    reader.ignored.update(ignored)
    return reader


def _ignored_files(
    path: Path, readers: tuple[TableReader, ...], names: list[str], contents: FolderContents
) -> tuple[IgnoredFiles, int]:
    """Return the files of a folder that its tables do not use, and the number of images that they list."""
    listed, num_listed = UInt64Set(), 0
    for reader in readers:
        column = reader.columns.image or ""
        if column in reader.table.embedded_columns():
            continue
        for row in reader.table.iter_rows([column]):
            image = cell_image(row.values.get(column)) if isinstance(row, TableRow) else None
            if image is not None and image.path is not None:
                file = resolve_image_path(reader.root, image.path)[0]
                num_listed += listed.add(_path_hash(os.path.join(reader.root, file)))  # noqa: PTH118
    ignored, root, unused_tables = IgnoredFiles(), str(path.resolve()), set(contents.tables) - set(names)
    for name in walk_files(path, ignored):
        if name in unused_tables:
            ignored.add("table that is not used", name)
        elif is_image_name(name):
            # `add` tells whether a value is new; unlisted images are never asked for again.
            if listed.add(_path_hash(f"{root}/{name}")):
                ignored.add(_UNLISTED_IMAGE, name)
        elif name not in names:
            ignored.add(file_type_reason(name), name)
    return ignored, num_listed


def _path_hash(path: str) -> int:
    return hash(os.path.realpath(path)) % 2**64
