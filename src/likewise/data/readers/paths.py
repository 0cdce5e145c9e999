"""Image paths of tables: the folder that they are relative to, and other ways to write them."""

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from likewise.errors import InvalidInputError

# Image folders of Flickr8k, Flickr30k and COCO, next to the folder of the annotations, in lower case.
_IMAGE_FOLDER_NAMES = frozenset(
    {"images", "flicker8k_dataset", "flickr8k_dataset", "flickr30k_images", "flickr30k-images", "flickr30k"}
    | {f"{split}{year}" for split in ("train", "val", "test") for year in (2014, 2015, 2017)}
)

_FILE_URL = re.compile(r"file:(?://[^/]*)?(.+)", re.IGNORECASE | re.DOTALL)


def resolve_image_path(root: Path, path: str) -> tuple[str, bool, str | None]:
    """Find the file of an image path as a table has it.

    The path as written comes first. Only where there is no such file, these are tried in this order, alone
    and together: the path of a `file://` URL, `/` for backslashes, decoded percent signs, and the same
    characters composed or decomposed (NFC, NFD).

    Args:
        root: Folder that the path is relative to.
        path: The path in the table.

    Returns:
        The path of the file, whether it exists, and a phrase on how it differs from the table's, if it does.
        Without any such file, the path is that of the table, or of its URL.
    """
    if _is_file(root, path):
        return path, True, None
    written = _parse_file_url(path)
    if written is not None:
        path = written
    for candidate, change in _iter_spellings(path):
        if (candidate, written) != (path, None) and _is_file(root, candidate):
            changes = [*(["`file://` URLs"] if written is not None else []), *([change] if change else [])]
            return candidate, True, " and ".join(changes)
    return path, False, None


def _is_file(root: Path, path: str) -> bool:
    # Creating a Path per row is slow; names that are too long or contain a NUL character are no files.
    return os.path.isfile(os.path.join(root, path))  # noqa: PTH113, PTH118


def _parse_file_url(path: str) -> str | None:
    match = _FILE_URL.fullmatch(path)
    return None if match is None else unquote(match[1])


def _iter_spellings(path: str) -> Iterator[tuple[str, str]]:
    """Yield each other way to write a path with a phrase for it, and first the path itself without one."""
    seen = set()
    for separated, separators in ((path, ""), (path.replace("\\", "/"), "backslashes")):
        for decoded, escapes in ((separated, ""), (unquote(separated), "percent signs")):
            for form in ("", "NFC", "NFD"):
                spelling = unicodedata.normalize(form, decoded) if form else decoded
                if spelling not in seen:
                    seen.add(spelling)
                    unicode_form = "another Unicode form" if form else ""
                    yield spelling, " and ".join(filter(None, (separators, escapes, unicode_form)))


def find_image_root(paths: list[str], table_dir: Path) -> tuple[Path, int]:
    """Find the folder near a table that contains most of the image paths.

    Candidates are the folder of the table, its subfolders, its parent and siblings with common names. The
    folder of the table is preferred to others with as many images.

    Args:
        paths: Image paths of some rows.
        table_dir: Folder of the table.

    Returns:
        The folder and the number of paths that it contains; the folder of the table for none.

    Raises:
        InvalidInputError: if several other folders contain most of the paths.
    """
    best_dirs, max_hits = [table_dir], 0
    for candidate_dir in dict.fromkeys(_candidate_dirs(table_dir)) if paths else ():
        num_hits = sum(resolve_image_path(candidate_dir, path)[1] for path in paths)
        if num_hits > max_hits:
            best_dirs, max_hits = [candidate_dir], num_hits
        elif num_hits == max_hits > 0:
            best_dirs.append(candidate_dir)
        if best_dirs[0] == table_dir.resolve() and max_hits == len(paths):
            break  # most paths of most tables are relative to the table
    if len(best_dirs) > 1 and best_dirs[0] != table_dir.resolve():
        names = " and ".join(str(folder) for folder in best_dirs[:3])
        raise InvalidInputError(
            f"the images of the table in {table_dir} may be in several folders: {names}; set `images` to one",
            field="images",
            path=best_dirs[0],
        )
    return best_dirs[0], max_hits


def _candidate_dirs(table_dir: Path) -> Iterator[Path]:
    table_dir = table_dir.resolve()
    yield table_dir
    yield from _subdirs(table_dir)
    yield table_dir.parent
    for sibling in _subdirs(table_dir.parent):
        if sibling.name.casefold() in _IMAGE_FOLDER_NAMES:
            yield sibling
            yield from _subdirs(sibling)


def _subdirs(parent: Path) -> list[Path]:
    try:
        return sorted(path.resolve() for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []
