"""Boxes in the format of YOLO, read as its makers' tool reads it."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from likewise.data.images import is_image_name
from likewise.data.readers.encodings import decode_text, iter_lines
from likewise.data.readers.files import IgnoredFiles, file_type_reason, resolve_image_path, walk_files
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.annotations import (
    AnnotatedBox,
    AnnotatedImage,
    add_box,
    clean_label,
    parse_class_number,
    parse_numbers,
)
from likewise.evaluation.datasets.base import SkippedEntries, read_text

_MAX_CLASSES = 100_000  # of a file that says only how many there are
_SPLIT_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True, kw_only=True)
class YoloConfig:
    """A data file of YOLO; all its values are text, as written."""

    path: Path
    """The YAML file."""
    folders: tuple[Path, ...]
    """Folders that the images may be relative to, in order of preference."""
    sources: Mapping[str, tuple[str, ...]]
    """Folders or lists of images by split."""
    class_names: Mapping[int, str]
    has_keypoints: bool
    """Whether the numbers after the box are keypoints."""


def is_yolo_file(path: Path) -> bool:
    """Return whether a file is YAML by its name."""
    return path.suffix.lower() in {".yaml", ".yml"} and not path.name.startswith(".")


def find_yolo_config(path: Path, ignored: IgnoredFiles) -> YoloConfig | None:
    """Return the data file of a folder, or of a path to the file itself; None if there is none.

    Raises:
        InvalidInputError: if there are several, or the only YAML file is damaged.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_yolo_file(file) and not file.is_dir())
    else:
        files = [path]
    configs, errors = [], []
    for file in files:
        try:
            config = _read_config(file)
        except InvalidInputError as error:
            errors.append(error)
            continue
        if config is None:
            ignored.add("YAML file without train, val and names", file.name)
        else:
            configs.append(config)
    if len(configs) > 1:
        names = " and ".join(config.path.name for config in configs)
        raise InvalidInputError(
            f"{path} has several data files of YOLO: {names}; give the path of one of them", path=path
        )
    if not configs and errors:
        raise errors[0]
    for error in errors:
        ignored.add("YAML file that is damaged", str(error.path))
    return configs[0] if configs else None


def _read_config(file: Path) -> YoloConfig | None:
    try:
        # Without YAML's types: `no`, `007` and `1.10` are names of classes.
        values = yaml.load(read_text(file), Loader=yaml.BaseLoader)  # noqa: S506  # builds text, lists and mappings only
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        message = " ".join(str(error).split())
        raise InvalidInputError(f"{file} is not valid YAML: {message}", path=file) from error
    if not isinstance(values, dict):
        return None
    sources = {
        split: source
        for split, keys in _SPLIT_KEYS.items()
        if (source := next((s for key in keys if (s := _source_list(values.get(key)))), ()))
    }
    if "train" not in sources or len(sources) < 2 or not ({"names", "nc"} & values.keys()):
        return None
    path = values.get("path")
    folders = [file.parent / path] if isinstance(path, str) and path.strip() else []
    return YoloConfig(
        path=file,
        folders=(*folders, file.parent),
        sources=sources,
        class_names=_read_class_names(file, values),
        has_keypoints="kpt_shape" in values,
    )


def _source_list(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(item.strip() for item in items if isinstance(item, str) and item.strip())


def _read_class_names(file: Path, values: Mapping[str, Any]) -> dict[int, str]:
    names = values.get("names")
    if names is None:
        count = parse_class_number(str(values["nc"])) if isinstance(values["nc"], str) else None
        names = None if count is None or count > _MAX_CLASSES else list(map(str, range(count)))
    if isinstance(names, list):
        names = {str(index): name for index, name in enumerate(names)}
    numbers = [parse_class_number(str(key)) for key in names] if isinstance(names, dict) else [None]
    if not isinstance(names, dict) or None in numbers:
        raise InvalidInputError(
            f"{file}: `names` must be a list of class names, or a mapping of class numbers to names",
            path=file,
        )
    return {int(index): clean_label(name) for index, name in names.items()}  # all keys are class numbers


def read_yolo(
    path: Path, config: YoloConfig, skipped: SkippedEntries, ignored: IgnoredFiles
) -> Iterator[AnnotatedImage]:
    """Read the images of all splits with the boxes in their label files.

    A line is a class with a box, with a box and a score, which is ignored, or with a polygon, whose bounding
    box is used. Other lines, and classes below zero or without a name, are counted as skipped.

    Raises:
        InvalidInputError: if a folder or list of images does not exist.
    """
    names = list(config.class_names.values())
    for name in sorted({name for name in names if names.count(name) > 1}):
        skipped.add("classes with the name of another class, merged", f"{config.path.name}, {name}")
    reader = _LabelReader(config, skipped)
    for split, sources in config.sources.items():
        for source in sources:
            for image_path in _iter_images(config, split, source, skipped, ignored):
                image = AnnotatedImage(file=_file_name(path, image_path), split=split, unit="fractions")
                reader.read(image, image_path)
                yield image
    reader.count_unused()


def _file_name(root: Path, image_path: Path) -> str:
    """Return the path relative to the root if it is below it, else the absolute path."""
    absolute_path, absolute_root = (Path(os.path.abspath(path)) for path in (image_path, root))  # noqa: PTH100  # without following links
    if absolute_path.is_relative_to(absolute_root):
        return absolute_path.relative_to(absolute_root).as_posix()
    return str(absolute_path)


def _iter_images(
    config: YoloConfig, split: str, source: str, skipped: SkippedEntries, ignored: IgnoredFiles
) -> Iterator[Path]:
    """Yield the images of a folder, with its subfolders, or those that a list names."""
    location = _locate(config, split, source)
    if location.is_dir():
        for file in walk_files(location, ignored):
            if is_image_name(file):
                yield location / file
            elif not file.lower().endswith(".txt"):
                ignored.add(file_type_reason(file), file)
        return
    for line in iter_lines(location):
        name = line.text.strip()
        if not name:
            continue
        if line.error is not None:
            skipped.add("lines of a list that cannot be decoded", f"{location.name}, line {line.number}")
            continue
        folders = (location.parent, *config.folders)
        candidates = [(folder, *resolve_image_path(folder, name)[:2]) for folder in folders]
        folder, file, is_found = next((entry for entry in candidates if entry[2]), candidates[0])
        if not is_image_name(file) or "\0" in file or ("://" in file and not is_found):
            skipped.add("lines that name no image file", f"{location.name}, {name[:80]}")
        else:
            yield _normalize(folder / file)


def _locate(config: YoloConfig, split: str, source: str) -> Path:
    """Return a folder or list of images; Roboflow writes `../train/images` for `train/images`."""
    candidates = [folder / source for folder in config.folders]
    if source.startswith("../"):
        candidates += [folder / source.removeprefix("../") for folder in config.folders]
    for candidate in candidates:
        if _is_dir(candidate) or (_is_file(candidate) and candidate.suffix.lower() == ".txt"):
            return _normalize(candidate)
    tried = " and ".join(str(path) for path in dict.fromkeys(map(_normalize, candidates)))
    raise InvalidInputError(
        f"{config.path} names {source} for {split}, but there is no folder or .txt list at {tried}",
        path=config.path,
    )


def _normalize(path: Path) -> Path:
    """Resolve `..` without following links."""
    return Path(os.path.normpath(path))


def _is_dir(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # False for a name that is too long


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  # False for a name that is too long


@dataclass
class _LabelReader:
    """Reads label files, and remembers which were read."""

    config: YoloConfig
    skipped: SkippedEntries
    used: dict[Path, set[str]] = field(default_factory=dict)
    """Names of the label files that were looked for, by folder."""

    def read(self, image: AnnotatedImage, image_path: Path) -> None:
        """Add the boxes in the label file of an image."""
        folder, written_name = _label_path(image_path).parent, _label_path(image_path).name
        label_path = folder / resolve_image_path(folder, written_name)[0]
        self.used.setdefault(folder, set()).add(label_path.name)
        try:
            text = decode_text(label_path.read_bytes())
        except FileNotFoundError:
            self.skipped.add("images without a label file, used without boxes", image.file)
            return
        except (OSError, UnicodeDecodeError):
            self.skipped.add("label files that cannot be read or decoded", label_path.name)
            return
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                self._read_line(image, line.split(), f"{label_path.name}, line {number}")

    def _read_line(self, image: AnnotatedImage, cells: list[str], location: str) -> None:
        numbers = parse_numbers(cells, len(cells))
        if numbers is None or len(numbers) < 5:
            self.skipped.add("lines that are not a class with a box or a polygon", location)
            return
        class_number, *values = numbers
        class_name = self.config.class_names.get(int(class_number))
        if class_number < 0 or class_number != int(class_number):
            self.skipped.add("lines whose class is not a whole number from 0", location)
            return
        if class_name is None:
            self.skipped.add("lines whose class has no name", location)
            return
        if len(values) == 5:
            self.skipped.add("scores after the box, ignored", location)
        elif len(values) > 4 and len(values) % 2 and not self.config.has_keypoints:
            self.skipped.add("lines that are not a class with a box or a polygon", location)
            return
        if len(values) > 5 and not self.config.has_keypoints:
            xyxy = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
        else:
            x, y, width, height = values[:4]
            xyxy = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        add_box(image, AnnotatedBox(label=class_name, xyxy=xyxy, location=location), self.skipped)

    def count_unused(self) -> None:
        """Count the label files without an image."""
        for folder, names in self.used.items():
            for file in sorted(folder.glob("*.txt")):
                if file.name not in names | {"classes.txt", "train.txt", "val.txt", "test.txt"}:
                    self.skipped.add("label files without an image", file.name)


def _label_path(image_path: Path) -> Path:
    """Return the label file of an image: `labels` instead of the last `images` in its path, or beside it."""
    beside = image_path.with_suffix(".txt")
    parts = list(beside.parts)
    for index in range(len(parts) - 2, 0, -1):
        if parts[index].lower() == "images":
            folder = Path(*parts[:index])
            for name in ("labels", "Labels", "LABELS"):
                if (folder / name).is_dir():
                    return folder.joinpath(name, *parts[index + 1 :])
            break
    return beside
