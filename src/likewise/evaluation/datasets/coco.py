"""Boxes in the format of COCO."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from likewise.data.readers.files import IgnoredFiles, resolve_image_path
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.annotations import (
    AnnotatedBox,
    AnnotatedImage,
    add_box,
    clean_label,
    is_true,
    parse_numbers,
    parse_size,
)
from likewise.evaluation.datasets.base import (
    SPLIT_ALIASES,
    SkippedEntries,
    find_split,
    parse_split,
    same_file_id,
)

_NUM_PROBED_FILES = 20
_ROBOFLOW_NAME = "_annotations.coco.json"


def find_coco_files(path: Path) -> list[Path]:
    """Return the annotation files of boxes: `instances_*.json`, or those of Roboflow."""
    folder = path / "annotations"
    return sorted(folder.glob("instances_*.json")) or sorted(path.glob(f"*/{_ROBOFLOW_NAME}"))


def read_coco(path: Path, skipped: SkippedEntries, ignored: IgnoredFiles) -> Iterator[AnnotatedImage]:
    """Read the images and boxes of all annotation files whose name holds a split.

    Crowd boxes are marked. An annotation that refers to no image or class, or has no box of four numbers, is
    counted as skipped.

    Raises:
        InvalidInputError: if a file is not in the format, or no name holds a split.
    """
    files = find_coco_files(path)
    for other in sorted(set((path / "annotations").glob("*.json")) - set(files)):
        ignored.add("COCO file of another task", other.relative_to(path).as_posix())
    splits = {file: _split_of(file) for file in files}
    if not any(splits.values()):
        names = ", ".join(file.relative_to(path).as_posix() for file in files)
        raise InvalidInputError(
            f"no split is in the name of {names}; rename the files such as instances_train.json and "
            "instances_val.json",
            path=path,
        )
    for file, split in splits.items():
        if split is None:
            skipped.add("annotation files whose name holds no split", file.relative_to(path).as_posix())
        else:
            yield from _read_file(path, file, split, skipped)


def _split_of(file: Path) -> str | None:
    if file.name == _ROBOFLOW_NAME:
        return parse_split(file.parent.name)
    return find_split(file.stem.removeprefix("instances_"))


def _read_file(path: Path, file: Path, split: str, skipped: SkippedEntries) -> list[AnnotatedImage]:
    coco = _load(file)
    images = _read_images(path, file, split, coco["images"], skipped)
    class_names = _read_categories(file, coco["categories"], skipped)
    for index, entry in enumerate(coco["annotations"]):
        location = f"{file.name}, annotation {index}"
        if not isinstance(entry, dict):
            skipped.add("annotations that are no mapping", location)
            continue
        image = images.get(_id_key(entry.get("image_id")))
        class_name = class_names.get(_id_key(entry.get("category_id")))
        bbox = parse_numbers(entry.get("bbox"), 4)
        if image is None:
            skipped.add("annotations of an image that is not listed", location)
        elif class_name is None:
            skipped.add("annotations of a class that is not listed", location)
        elif bbox is None:
            skipped.add("annotations without a box of four numbers", location)
        else:
            x, y, width, height = bbox
            box = AnnotatedBox(
                label=class_name,
                xyxy=(x, y, x + width, y + height),
                location=location,
                is_crowd=is_true(entry.get("iscrowd")),
            )
            add_box(image, box, skipped)
    return list({id(image): image for image in images.values()}.values())


def _load(file: Path) -> dict[str, Any]:
    """Return the content of an annotation file; byte order marks and UTF-16 are recognized."""
    try:
        coco = json.loads(file.read_bytes())
    except OSError as error:
        raise InvalidInputError(f"cannot read {file}: {error.strerror}", path=file) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{file} is not valid JSON: {error}", path=file) from error
    keys = ("images", "annotations", "categories")
    if not isinstance(coco, dict) or not all(isinstance(coco.get(key), list) for key in keys):
        raise InvalidInputError(
            f"{file} is not a COCO instances file: it must have the lists {', '.join(keys)}", path=file
        )
    return coco


def _read_images(
    path: Path, file: Path, split: str, entries: list[Any], skipped: SkippedEntries
) -> dict[str, AnnotatedImage]:
    """Return the images by id; several ids of one file lead to the same image."""
    named = []
    for index, entry in enumerate(entries):
        location = f"{file.name}, image {index}"
        file_name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(file_name, str) or not file_name.strip() or _id_key(entry.get("id")) == "":
            skipped.add("images without an id or a file name", location)
        else:
            named.append((file_name.strip(), entry, location))
    folder = _image_folder(path, file, split, [name for name, _, _ in named])
    images: dict[str, AnnotatedImage] = {}
    by_file: dict[str, AnnotatedImage] = {}
    for file_name, entry, location in named:
        key = _id_key(entry["id"])
        if key in images:
            skipped.add("images with the id of another image", location)
            continue
        image_file = str(folder / resolve_image_path(path / folder, file_name)[0])
        file_id = same_file_id(path, image_file)
        if file_id in by_file:
            skipped.add("images listed twice", location)
        else:
            by_file[file_id] = AnnotatedImage(
                file=image_file,
                split=split,
                unit="pixels",
                declared_size=parse_size(entry.get("width"), entry.get("height")),
            )
        images[key] = by_file[file_id]
    return images


def _read_categories(file: Path, entries: list[Any], skipped: SkippedEntries) -> dict[str, str]:
    names: dict[str, str] = {}
    for index, entry in enumerate(entries):
        location = f"{file.name}, category {index}"
        name = clean_label(entry.get("name")) if isinstance(entry, dict) else ""
        key = _id_key(entry.get("id")) if isinstance(entry, dict) else ""
        if not name or not key:
            skipped.add("classes without an id or a name", location)
        elif key in names and names[key] != name:
            skipped.add("classes with the id of another class", location)
        else:
            if name in names.values():
                skipped.add("classes with the name of another class, merged", location)
            names[key] = name
    return names


def _id_key(value: object) -> str:
    """Return an id as text, so that 7, 7.0 and "7" are the same; empty if it is absent."""
    if value is None or isinstance(value, dict | list):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _image_folder(path: Path, file: Path, split: str, names: list[str]) -> Path:
    """Return the folder that contains most of the images, relative to `path`.

    Raises:
        InvalidInputError: if several folders contain as many, which are different files.
    """
    # Roboflow's annotation file is among the images.
    is_roboflow = file.name == _ROBOFLOW_NAME
    stem = file.parent.name if is_roboflow else file.stem.removeprefix("instances_")
    aliases = SPLIT_ALIASES[split]
    folders = (stem, f"images/{stem}", *aliases, *(f"images/{alias}" for alias in aliases), "images", ".")
    probed = names[:: max(1, len(names) // _NUM_PROBED_FILES)][:_NUM_PROBED_FILES]
    found: dict[str, list[str]] = {}
    for folder in dict.fromkeys(folders):
        if (path / folder).is_dir():
            resolved = [resolve_image_path(path / folder, name) for name in probed]
            found[folder] = [
                os.path.realpath(path / folder / name) for name, is_found, _ in resolved if is_found
            ]
    most = max(map(len, found.values()))
    complete = [folder for folder, images in found.items() if len(images) == most]
    # A folder with the name of the annotation file comes before others, as in COCO itself.
    best = [folder for folder in complete if folder in folders[:2]] or complete
    if most and any(found[folder] != found[best[0]] for folder in best):
        raise InvalidInputError(
            f"the images of {file} are in several folders: {' and '.join(best)}; move all but one away",
            path=file,
        )
    return Path(best[0])
