"""COCO captions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from likewise.data.readers.base import SkippedSample
from likewise.data.readers.cells import JSON_DECODER, DuplicateKeyError
from likewise.data.readers.encodings import decode_text
from likewise.data.readers.tables import FileTable, TableRow
from likewise.errors import InvalidInputError


def read_json_document(path: Path) -> Any:
    """Read a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        InvalidInputError: if the file cannot be read or is not valid JSON.
    """
    try:
        return JSON_DECODER.decode(decode_text(path.read_bytes()))
    except DuplicateKeyError as error:
        raise InvalidInputError(f"{path}: {error} in an object", path=path) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not valid JSON: {error}", path=path) from error
    except OSError as error:
        raise InvalidInputError(f"cannot read {path}: {error.strerror}", path=path) from error


def is_coco(value: Any) -> bool:
    """Return whether a JSON value has the lists of a COCO file."""
    return isinstance(value, dict) and all(
        isinstance(value.get(key), list) for key in ("images", "annotations")
    )


def _join_key(image_id: Any) -> str | None:
    """Return an id as text, the same for `1`, `1.0` and `"1"`; None if it is no id."""
    if isinstance(image_id, bool) or not isinstance(image_id, int | float | str):
        return None
    if isinstance(image_id, float) and float(image_id).is_integer():
        return str(int(image_id))
    return str(image_id).strip() or None


@final
@dataclass(frozen=True, kw_only=True)
class CocoTable(FileTable):
    """COCO captions: one row per image with all its captions.

    The file is in memory, because its lists of images and annotations must be joined.
    """

    document: Any = field(repr=False, compare=False)
    """Content of the file."""

    def __post_init__(self) -> None:
        """Check the format.

        Raises:
            InvalidInputError: if the lists of COCO or the captions are missing.
        """
        if not is_coco(self.document):
            raise InvalidInputError(
                f"{self.path} is not in a format for captions: expected a list of objects, one object per "
                "line, or COCO captions (an object with the lists 'images' and 'annotations')",
                path=self.path,
            )
        if not any(isinstance(item, dict) and "caption" in item for item in self.document["annotations"]):
            raise InvalidInputError(
                f"{self.path}: no annotation has a 'caption'; use the captions file, not the file of boxes",
                path=self.path,
            )

    @property
    def default_id_column(self) -> str | None:
        """The ids of COCO."""
        return "id"

    def column_names(self) -> list[str]:
        """Return the keys of the images, and `caption`."""
        images = (image for image in self.document["images"] if isinstance(image, dict))
        return list(dict.fromkeys([*(key for image in images for key in image), "caption"]))

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the images in the order of the file, then the captions that belong to no image."""
        captions: dict[str, list[tuple[int, Any]]] = {}
        for index, annotation in enumerate(self.document["annotations"]):
            reason = _annotation_error(annotation)
            if reason is None:
                captions.setdefault(str(_join_key(annotation["image_id"])), []).append(
                    (index, annotation["caption"])
                )
            else:
                yield self._skip("annotation", index, reason)
        seen_ids: set[str] = set()
        for index, image in enumerate(self.document["images"]):
            image_id = _join_key(image.get("id")) if isinstance(image, dict) else None
            if image_id is None:
                yield self._skip("image", index, "image has no id")
            elif image_id in seen_ids:
                yield self._skip("image", index, "image id is listed twice")
            else:
                seen_ids.add(image_id)
                texts = [caption for _, caption in captions.pop(image_id, [])]
                yield TableRow(
                    index, f"{self.name} image {index}", image | {"id": image_id, "caption": texts}
                )
        for orphans in captions.values():
            for index, _ in orphans:
                yield self._skip("annotation", index, "caption of an unknown image")

    def _skip(self, kind: str, index: int, reason: str) -> SkippedSample:
        return SkippedSample(id=f"{kind} {index}", location=f"{self.name} {kind} {index}", reason=reason)


def _annotation_error(annotation: Any) -> str | None:
    if not isinstance(annotation, dict) or _join_key(annotation.get("image_id")) is None:
        return "annotation has no image id"
    return "annotation has no caption" if annotation.get("caption") is None else None
