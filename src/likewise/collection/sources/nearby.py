"""Finding the folder of images that a table speaks of, where it lies near the table."""

from collections.abc import Iterator
from pathlib import Path

from likewise.collection.sources.candidates import state_of

# Where Flickr8k, Flickr30k and COCO keep images beside the folder of their annotations, in lower case.
_IMAGE_FOLDERS = frozenset(
    {"images", "flicker8k_dataset", "flickr8k_dataset", "flickr30k_images", "flickr30k-images", "flickr30k"}
    | {f"{split}{year}" for split in ("train", "val", "test") for year in (2014, 2015, 2017)}
)


def folder_of(paths: list[str], folder: Path) -> Path:
    """Return the folder, at or near a table's own, in which most of some images are found."""
    best, most = folder, 0
    for near in _near(folder) if paths else ():
        hits = sum(state_of(near / path) != "missing" for path in paths)
        if hits > most:
            best, most = near, hits
        if most == len(paths):
            break
    return best


def _near(folder: Path) -> Iterator[Path]:
    """Yield the folder, the folders in it, the one above, and those beside it that are usually of images."""
    folder = folder.resolve()
    yield folder
    yield from _below(folder)
    yield folder.parent
    for sibling in _below(folder.parent):
        if sibling.name.casefold() in _IMAGE_FOLDERS:
            yield sibling
            yield from _below(sibling)


def _below(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []
