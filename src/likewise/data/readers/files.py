"""Files of readers: folders in a fixed order, counts of ignored files, and the image paths of tables."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

from likewise.artifacts import MANIFEST
from likewise.errors import InvalidInputError

# Written by operating systems, file managers and archivers; compared in lower case.
_SYSTEM_NAMES = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)
_MAX_SUFFIX_LENGTH = 10  # longer suffixes are parts of names, and would be a reason each
# Image folders of Flickr8k, Flickr30k and COCO, next to the folder of the annotations, in lower case.
_IMAGE_FOLDER_NAMES = frozenset(
    {"images", "flicker8k_dataset", "flickr8k_dataset", "flickr30k_images", "flickr30k-images", "flickr30k"}
    | {f"{split}{year}" for split in ("train", "val", "test") for year in (2014, 2015, 2017)}
)
_FILE_URL = re.compile(r"file:(?://[^/]*)?(.+)", re.IGNORECASE | re.DOTALL)


@dataclass
class IgnoredFiles:
    """Number of files that were ignored by reason, with the first file of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    num_seen: int = 0
    """Files and ignored entries that a walk found, used ones included."""

    def add(self, reason: str, path: str) -> None:
        """Count a file; `reason` is a short phrase such as `hidden file` or `file type .docx`."""
        self.counts[reason] += 1
        # Names that are not UTF-8 could be neither logged nor written as JSON.
        self.examples.setdefault(reason, path.encode("utf-8", "backslashreplace").decode())

    def update(self, other: "IgnoredFiles") -> None:
        """Add the counts of another walk."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples
        self.num_seen += other.num_seen

    def clear(self) -> None:
        """Forget all counts, at the start of another walk."""
        self.counts.clear()
        self.examples.clear()
        self.num_seen = 0

    def summary(self) -> str:
        """Return one line with the counts, most frequent first, with an example of each reason."""
        return format_ignored(self.counts, self.examples)


def format_ignored(counts: dict[str, int], examples: dict[str, str]) -> str:
    """Return one line with the number of ignored files by reason, most frequent first, with examples."""
    return "; ".join(
        f"{reason} ({count:,}{f', such as {examples[reason]}' if reason in examples else ''})"
        for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def hidden_reason(name: str) -> str | None:
    """Return why a file or folder of this name is ignored everywhere, or None."""
    if name.startswith("."):
        return "hidden file"
    return "system file" if name.casefold() in _SYSTEM_NAMES else None


def file_type_reason(name: str) -> str:
    """Return why a file that is neither an image nor a caption file is ignored: its type."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
    if not suffix:
        return "file without a suffix"
    is_type = len(suffix) <= _MAX_SUFFIX_LENGTH and suffix[1:].isascii() and suffix[1:].isalnum()
    return f"file type {suffix}" if is_type and not suffix[1:].isdigit() else "other file type"


@dataclass(frozen=True, slots=True)
class Folder:
    """The visible entries of one folder, without its subfolders."""

    prefix: str
    """Path relative to the root of the walk, with a trailing slash; empty for the root."""
    files: tuple[str, ...]
    """Names of files, sorted."""
    broken: tuple[str, ...]
    """Names of links without a target, links to themselves and special files, sorted."""


def walk_folders(
    root: Path, ignored: IgnoredFiles, prefix: str = "", ancestors: tuple[str, ...] = ()
) -> Iterator[Folder]:
    """Yield a folder and all folders below it, sorted by name; parents come before their subfolders.

    Hidden and system files are counted as ignored (a hidden folder counts once), and so are unreadable
    folders, links to a folder that contains them, and folders that this package wrote, such as a dataset
    inside its source. Other links to folders are followed.

    Args:
        root: The folder.
        ignored: Receives the counts.
        prefix: Folder below the root to start at, with a trailing slash.
        ancestors: Real paths of the folders that contain `prefix`.

    Raises:
        InvalidInputError: if `root` cannot be read.
    """
    real_path = os.path.realpath(root / prefix)
    ancestors = (*(ancestors or map(str, Path(real_path).parents)), real_path)
    try:
        with os.scandir(real_path) as entries:
            children = sorted((entry.name, _entry_type(entry)) for entry in entries)
    except OSError as error:
        if not prefix:
            raise InvalidInputError(f"cannot read the folder {root}: {error.strerror}", path=root) from error
        ignored.num_seen += 1
        ignored.add("unreadable folder", prefix)
        return
    names: dict[str, list[str]] = {"file": [], "folder": [], "broken": []}
    for name, entry_type in children:
        reason = hidden_reason(name)
        if reason is None and entry_type == "folder":
            reason = _ignored_folder_reason(os.path.join(real_path, name), ancestors)  # noqa: PTH118
        if reason is None:
            names[entry_type].append(name)
        else:
            ignored.add(reason, prefix + name)
        ignored.num_seen += reason is not None or entry_type != "folder"
    yield Folder(prefix, tuple(names["file"]), tuple(names["broken"]))
    for name in names["folder"]:
        yield from walk_folders(root, ignored, f"{prefix}{name}/", ancestors)


def _entry_type(entry: "os.DirEntry[str]") -> str:
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "broken"
    except OSError:  # a link to itself
        return "broken"


def _ignored_folder_reason(path: str, ancestors: tuple[str, ...]) -> str | None:
    if os.path.realpath(path) in ancestors:
        return "link to a parent folder"
    # Its shards are no images, and are written while the folder around them is read.
    is_artifact = os.path.isfile(os.path.join(path, MANIFEST))  # noqa: PTH113, PTH118
    return "folder written by likewise" if is_artifact else None


def walk_files(root: Path, ignored: IgnoredFiles) -> Iterator[str]:
    """Yield the files below a folder as paths relative to it, in the order of `walk_folders`.

    Files are ignored as in `walk_folders`; broken links are ignored, too.

    Raises:
        InvalidInputError: if `root` cannot be read.
    """
    for folder in walk_folders(root, ignored):
        for name in folder.broken:
            ignored.add("broken link or special file", folder.prefix + name)
        yield from (folder.prefix + name for name in folder.files)


def resolve_image_path(root: Path, path: str) -> tuple[str, bool, str | None]:
    """Find the file of an image path as a table has it.

    The path as written comes first. Only where there is no such file, these are tried in this order, alone
    and together: the path of a `file://` URL, `/` for backslashes, decoded percent signs, and the same
    characters composed or decomposed (NFC, NFD). The last resort is the only file whose path differs in
    letter case.

    Args:
        root: Folder that the path is relative to.
        path: The path in the table.

    Returns:
        The path of the file, whether it exists, and a phrase on how the path differs from the table's, if it
        does. Without any such file, the path is that of the table, or of its URL.
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
    other_case = _find_other_case(root, unquote(path.replace("\\", "/")))
    return (path, False, None) if other_case is None else (other_case, True, "another letter case")


def _is_file(root: Path, path: str) -> bool:
    # A Path per row would be slow. `isfile` is False for names that are too long or contain a NUL character.
    return os.path.isfile(os.path.join(root, path))  # noqa: PTH113, PTH118


def _find_other_case(root: Path, path: str) -> str | None:
    """Return the only file below a folder whose path differs in letter case or in its Unicode form."""
    found = ""
    for part in path.split("/"):
        if part in ("", ".", "..") or not part.isprintable():
            return None
        folder = os.path.join(root, found)  # noqa: PTH118
        try:
            names = _names_by_folded_name(folder, os.stat(folder).st_mtime_ns).get(_fold(part), [])  # noqa: PTH116
        except OSError:
            return None
        if len(names) != 1:
            return None
        found = f"{found}/{names[0]}" if found else names[0]
    return found if _is_file(root, found) else None


@lru_cache(maxsize=64)
def _names_by_folded_name(folder: str, _mtime: int) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder):  # noqa: PTH208  # paths of a large folder would be slow
        names.setdefault(_fold(name), []).append(name)
    return names


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


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
