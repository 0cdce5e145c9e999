"""Boxes in the format of Pascal VOC."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

from likewise.data.images import is_image_name
from likewise.data.readers.encodings import iter_lines
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
from likewise.evaluation.datasets.base import SkippedEntries, parse_split

_LISTS = "ImageSets/Main"


def is_voc(path: Path) -> bool:
    """Return whether a folder holds annotations of Pascal VOC."""
    return any((path / "Annotations").glob("*.xml"))


def read_voc(path: Path, skipped: SkippedEntries, ignored: IgnoredFiles) -> Iterator[AnnotatedImage]:
    """Read the images that the lists of train, val and test name; difficult objects are marked as crowds.

    The image of an annotation is the one of the same stem, whatever its file name says.

    Raises:
        InvalidInputError: if there is no list of a split.
    """
    lists = _split_lists(path, ignored)
    image_folder = next((name for name in ("JPEGImages", "images", "Images") if (path / name).is_dir()), ".")
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in sorted((path / image_folder).iterdir()):
        if is_image_name(file) and not file.name.startswith("."):
            by_stem[_composed(file.stem)].append(f"{image_folder}/{file.name}")
    listed = set()
    for split, list_file in lists:
        for line in iter_lines(list_file):
            if not line.text.strip():
                continue
            if line.error is not None:
                skipped.add("lines of a list that cannot be decoded", f"{list_file.name}, line {line.number}")
                continue
            name = line.text.split()[0]
            stem = name.rpartition(".")[0] if is_image_name(name) or name.endswith(".xml") else name
            listed.add(_composed(stem))
            xml_path = path / "Annotations" / resolve_image_path(path / "Annotations", f"{stem}.xml")[0]
            image = _read_annotation(xml_path, split, image_folder, by_stem, skipped)
            if image is not None:
                yield image
    for xml_path in sorted((path / "Annotations").glob("*.xml")):
        if _composed(xml_path.stem) not in listed and not xml_path.name.startswith("."):
            skipped.add(f"annotations that no list in {_LISTS} names", xml_path.name)


def _composed(stem: str) -> str:
    """Return a name in the composed Unicode form, so that names of file systems and texts are equal."""
    return unicodedata.normalize("NFC", stem)


def _split_lists(path: Path, ignored: IgnoredFiles) -> list[tuple[str, Path]]:
    lists = []
    for file in sorted((path / _LISTS).glob("*.txt")):
        split = parse_split(file.stem)
        if split is not None:
            lists.append((split, file))
        elif file.stem != "trainval":
            ignored.add("list that is not of train, val or test", f"{_LISTS}/{file.name}")
    trainval = path / _LISTS / "trainval.txt"
    if trainval.is_file() and not any(split == "train" for split, _ in lists):
        lists.append(("train", trainval))
    if not lists:
        raise InvalidInputError(
            f"{path} has Pascal VOC annotations but no split: {_LISTS}/train.txt and {_LISTS}/val.txt or "
            "test.txt are needed, with the name of an annotation per line, without its suffix",
            path=path,
        )
    order = ("train", "val", "test")
    return sorted(lists, key=lambda item: order.index(item[0]))


def _read_annotation(
    xml_path: Path, split: str, image_folder: str, by_stem: Mapping[str, list[str]], skipped: SkippedEntries
) -> AnnotatedImage | None:
    try:
        tree = ElementTree.fromstring(xml_path.read_bytes())  # noqa: S314  # expat resolves no external entities
    except FileNotFoundError:
        skipped.add("images without an annotation file", xml_path.name)
        return None
    except (OSError, ElementTree.ParseError, ValueError, LookupError):
        skipped.add("annotation files that are damaged", xml_path.name)
        return None
    file_name = Path((tree.findtext("filename") or "").strip().replace("\\", "/")).name
    files = by_stem.get(_composed(xml_path.stem)) or by_stem.get(_composed(Path(file_name).stem), [])
    if len(files) > 1:
        named = [file for file in files if Path(file).name == file_name]
        if not named:
            skipped.add("annotations with several images of the same stem", xml_path.name)
            return None
        files = named
    image = AnnotatedImage(
        file=files[0] if files else f"{image_folder}/{file_name or f'{xml_path.stem}.jpg'}",
        split=split,
        unit="pixels",
        declared_size=parse_size(tree.findtext("size/width"), tree.findtext("size/height")),
    )
    for number, node in enumerate(tree.iter("object"), start=1):
        _read_object(image, node, f"{xml_path.name}, object {number}", skipped)
    return image


def _read_object(
    image: AnnotatedImage, node: ElementTree.Element, location: str, skipped: SkippedEntries
) -> None:
    bounds = parse_numbers([node.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")], 4)
    if bounds is None:
        skipped.add("objects without a box of four numbers", location)
        return
    x0, y0, x1, y1 = bounds
    box = AnnotatedBox(
        label=clean_label(node.findtext("name")),
        # Pixels are numbered from 1, and the last one belongs to the box.
        xyxy=(x0 - 1, y0 - 1, x1, y1),
        location=location,
        is_crowd=is_true(node.findtext("difficult")),
    )
    add_box(image, box, skipped)
