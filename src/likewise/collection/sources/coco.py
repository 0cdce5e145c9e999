"""Captions in the JSON format of COCO: `images` and `annotations`, joined by the number of the image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from likewise.artifacts import read_json
from likewise.collection.sources.candidates import Fault, file_digest
from likewise.collection.sources.tables import Row, Table
from likewise.errors import InputError


@final
@dataclass(frozen=True, kw_only=True)
class CocoTable(Table):
    """A row an image, with all its captions; the file is held in memory, as its two lists must be joined."""

    path: Path

    def columns(self) -> list[str]:
        """Return the keys of the images, and `caption`."""
        first = next((image for image in self._told["images"] if isinstance(image, dict)), {})
        return list(dict.fromkeys([*first, "caption"]))

    def embedded(self) -> frozenset[str]:
        """Return nothing: JSON holds no images."""
        return frozenset()

    def digest(self) -> str:
        """Return the file's fingerprint."""
        return file_digest(self.path)

    def rows(self, wanted: Sequence[str]) -> Iterator[Row | Fault]:
        """Yield the images in the order of the file, then the captions that belong to none."""
        captions: dict[Any, list[Any]] = {}
        for number, told in enumerate(self._told["annotations"]):
            where = f"{self.name} annotation {number}"
            if isinstance(told, dict) and isinstance(told.get("image_id"), int | str):
                captions.setdefault(told["image_id"], []).append(told.get("caption"))
            else:
                yield Fault(id=f"annotation {number}", where=where, reason="annotation names no image")
        for number, image in enumerate(self._told["images"]):
            where = f"{self.name} image {number}"
            if isinstance(image, dict) and isinstance(image.get("id"), int | str):
                yield Row(number, where, image | {"caption": captions.pop(image["id"], [])})
            else:
                yield Fault(id=f"image {number}", where=where, reason="image has no id")
        for name in captions:
            yield Fault(id=str(name), where=self.name, reason="caption of an image that is not listed")

    @cached_property
    def _told(self) -> dict[str, Any]:
        return _read(self.path)


def _read(path: Path) -> dict[str, Any]:
    told = read_json(path)
    lists = isinstance(told, dict) and all(
        isinstance(told.get(key), list) for key in ("images", "annotations")
    )
    if not lists:
        raise InputError(
            f"{path} holds no captions in COCO's format: a mapping with the lists `images` and `annotations` "
            "is needed (a plain list of rows is read from a .jsonl file, one row a line)"
        )
    if not any(isinstance(item, dict) and "caption" in item for item in told["annotations"]):
        raise InputError(
            f"{path}: none of its annotations has a `caption`; take the file of captions, not of boxes"
        )
    return told


def open_coco(path: Path) -> CocoTable:
    """Return the table of captioned images in a JSON file.

    Raises:
        InputError: where the file is no JSON or not of this format.
    """
    table = CocoTable(path=path, name=path.name, folder=path.parent)
    table.columns()
    return table
