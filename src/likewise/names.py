"""Lists of names in text: separated by commas, which a name may contain itself."""

import os
from collections.abc import Callable, Iterable


def split_at_commas(text: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def split_unknown_names(names: Iterable[str], is_known: Callable[[str], bool]) -> tuple[str, ...]:
    """Split names at their commas, except those known as a whole, such as the column `caption, en`."""
    return tuple(part for name in names for part in ((name,) if is_known(name) else split_at_commas(name)))


def path_exists(name: str) -> bool:
    """Return whether a name is a path that exists; long lists of names are no paths."""
    return os.path.exists(name)  # noqa: PTH110  # `Path.exists` raises OSError for long names
