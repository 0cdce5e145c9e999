"""Walk folders: files in a fixed order, and counts of the files that are ignored."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from likewise.errors import InvalidInputError

# Written by operating systems, file managers and archivers; compared in lower case.
_SYSTEM_NAMES = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)


@dataclass
class IgnoredFiles:
    """Number of files that were ignored by reason, with the first file of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        """Count a file; `reason` is a short phrase such as `hidden file` or `file type .docx`."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, path)

    def update(self, other: "IgnoredFiles") -> None:
        """Add the counts of another walk."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples

    def summary(self) -> str:
        """Return one line with the counts, most frequent first, with an example of each reason."""
        return "; ".join(
            f"{reason} ({count:,}, such as {self.examples[reason]})"
            for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        )


def hidden_reason(name: str) -> str | None:
    """Return why a file or folder of this name is ignored everywhere, or None."""
    if name.startswith("."):
        return "hidden file"
    return "system file" if name.casefold() in _SYSTEM_NAMES else None


def walk_files(
    root: Path, ignored: IgnoredFiles, subfolder: str = "", ancestors: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield the files below a folder as paths relative to it, folder by folder, sorted by name.

    Hidden and system files are counted as ignored (a hidden folder counts once), and so are broken links and
    links to a folder that contains them. Other links to folders are followed.

    Args:
        root: The folder.
        ignored: Receives the counts.
        subfolder: Folder below the root to start at, with a trailing slash.
        ancestors: Real paths of the folders that contain `subfolder`.

    Raises:
        InvalidInputError: if `root` cannot be read; unreadable folders below it are counted as ignored.
    """
    real_path = os.path.realpath(root / subfolder)
    if real_path in ancestors:
        ignored.add("link to a parent folder", subfolder)
        return
    try:
        names = sorted(entry.name for entry in os.scandir(real_path))
    except OSError as error:
        if not subfolder:
            raise InvalidInputError(f"cannot read the folder {root}: {error.strerror}", path=root) from error
        ignored.add("unreadable folder", subfolder)
        return
    for name in names:
        path = f"{subfolder}{name}"
        reason = hidden_reason(name)
        if reason is not None:
            ignored.add(reason, path)
        elif os.path.isdir(root / path):  # noqa: PTH112  # False, without an error, for a link to itself
            yield from walk_files(root, ignored, f"{path}/", (*ancestors, real_path))
        elif os.path.isfile(root / path):  # noqa: PTH113
            yield path
        else:
            ignored.add("broken link or special file", path)
