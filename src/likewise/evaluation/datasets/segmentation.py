"""Images with masks of class numbers, read from a table or from folders."""

import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image
from PIL.ImageFile import ImageFile

from likewise.data.image_formats import quiet_libraries
from likewise.data.images import UnreadableImageError, is_image_name, read_orientation
from likewise.data.pixels import UPRIGHT, exif_orientation, orient_pixels
from likewise.data.readers.files import IgnoredFiles, file_type_reason, resolve_image_path, walk_files
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.annotations import read_frame
from likewise.evaluation.datasets.base import (
    ImageDataset,
    SkippedEntries,
    content_key,
    count_unused_images,
    dataset_name,
    find_table,
    open_dataset_table,
    parse_split,
    read_text,
    same_file_id,
    unknown_split_reason,
)
from likewise.evaluation.datasets.detection import merge_val

DEFAULT_IGNORE_INDEX = 255
_MASK_MODES = ("1", "L", "P")
_GRAY_SCALES = {"L;2": 85, "L;4": 17}


@dataclass(frozen=True, kw_only=True)
class SegmentationDataset(ImageDataset):
    """Images with a mask and a split each."""

    mask_files: tuple[str, ...]
    """n paths, relative to `root` or absolute."""
    mask_orientations: tuple[int, ...]
    """n EXIF orientations that lead from a mask to its image as shown; 1 if the mask has its frame."""
    splits: np.ndarray
    """(n,) of `train` and `test`."""
    class_ids: tuple[int, ...]
    """Values of the classes in masks, ascending."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of their values."""
    ignore_index: tuple[int, ...]
    """Ignored values in masks."""

    def load_mask(self, index: int) -> Int[np.ndarray, "h w"]:
        """Return the mask of an image as shown: the index of each pixel's class, int64, -1 if ignored."""
        with _open_mask(self.root / self.mask_files[index]) as image:
            values = orient_pixels(_class_numbers(image), self.mask_orientations[index])
        lookup = np.full(256, -1)
        lookup[list(self.class_ids)] = np.arange(len(self.class_ids))
        return lookup[values]


@dataclass(kw_only=True)
class _MaskedImage:
    file: str
    mask: str
    split: str
    orientation: int = 1


def open_segmentation(
    path: str | Path, ignore_index: tuple[int, ...] = (DEFAULT_IGNORE_INDEX,)
) -> SegmentationDataset:
    """Open a dataset of images with masks: 1-bit, 8-bit gray or palette images of class numbers.

    A mask has the size of its image as shown, or that of the stored image before its EXIF orientation is
    applied; then it is rotated, too. The classes are the distinct values of all masks, or those that
    `classes.txt` names.

    Args:
        path: A table, or a folder with an `index.csv`, with columns of files, `mask` and `split`; or a folder
            with the layout `train/images`, `train/masks`, `test/images` and so on, with equal names. An
            optional `classes.txt` beside it has the names of the classes, one per line, in the order of their
            values or after their value. `val` is the test split if there is no `test`, else part of `train`.
        ignore_index: Ignored values in masks.

    Raises:
        InvalidInputError: if there is no such dataset, train or test has no usable mask, or fewer than two
            classes are left.
    """
    path = Path(path)
    if not path.exists():
        raise InvalidInputError(
            f"{path} does not exist; a folder with an index.csv or train/images and train/masks is needed",
            path=path,
        )
    skipped, ignored = SkippedEntries(), IgnoredFiles()
    table = find_table(path, "index") if path.is_dir() else path
    if table is not None:
        (root, images), name = _read_table(table, skipped), dataset_name(table)
        count_unused_images(
            path, root, [file for image in images for file in (image.file, image.mask)], ignored
        )
    else:
        root, images, name = path, _read_folders(path, skipped, ignored), path.resolve().name
    values_of = {
        id(image): values for image in images if (values := _check_mask(root, image, skipped)) is not None
    }
    # A row with a usable mask is preferred to an earlier one without.
    images = _unique_images(root, [image for image in images if id(image) in values_of], skipped)
    checked = [(image, values_of[id(image)]) for image in images]
    splits = merge_val(path, [image.split for image in images], skipped)
    values = sorted({value for _, mask_values in checked for value in mask_values})
    classes_file = (table.parent if table is not None else path) / "classes.txt"
    class_names = _find_classes(path, classes_file, values, ignore_index)
    for split in ("train", "test"):
        _check_labeled(
            path,
            split,
            [found for (_, found), s in zip(checked, splits, strict=True) if s == split],
            class_names,
        )
    image_key = content_key((root / image.file for image in images), splits.tolist())
    mask_key = content_key(
        (root / image.mask for image in images),
        [(image.orientation, image_key, ignore_index, tuple(class_names.items())) for image in images],
        whole=True,
    )
    return SegmentationDataset(
        name=name,
        path=path,
        root=root,
        files=tuple(image.file for image in images),
        key=mask_key,
        mask_files=tuple(image.mask for image in images),
        mask_orientations=tuple(image.orientation for image in images),
        splits=splits,
        class_ids=tuple(class_names),
        classes=tuple(class_names.values()),
        ignore_index=ignore_index,
        skipped=skipped.to_dict(),
        ignored=dict(ignored.counts),
    )


def _read_table(path: Path, skipped: SkippedEntries) -> tuple[Path, list[_MaskedImage]]:
    """Return the folder of the images, and an image per row with a file, a mask and a split."""
    table = open_dataset_table(path)
    fields = {name: table.require_column(name) for name in ("mask", "split")}
    images = []
    for location, cells, _ in table.iter_rows(
        fields, skipped, missing_reason="rows without a file or a mask"
    ):
        split = parse_split(cells["split"])
        if not cells["mask"]:
            skipped.add("rows without a file or a mask")
        elif split is None:
            skipped.add(unknown_split_reason(cells["split"]), location)
        else:
            images.append(_MaskedImage(file=cells["file"], mask=cells["mask"], split=split))
    mask_root = table.find_root(fields["mask"])
    is_same_root = mask_root.resolve() == table.root.resolve()
    for image in images:
        mask = resolve_image_path(mask_root, image.mask)[0]
        image.mask = mask if is_same_root else str(mask_root / mask)
    return table.root, images


def _read_folders(path: Path, skipped: SkippedEntries, ignored: IgnoredFiles) -> list[_MaskedImage]:
    """Pair the images and the masks of equal names in split/images and split/masks."""
    image_files: list[tuple[str, str, str]] = []
    masks: dict[str, list[str]] = defaultdict(list)
    for file in walk_files(path, ignored):
        parts = file.split("/")
        kind = parts[1].lower() if len(parts) > 2 else ""
        if not is_image_name(file):
            if file != "classes.txt":
                ignored.add(file_type_reason(file), file)
        elif parse_split(parts[0]) is None or kind not in ("images", "masks"):
            skipped.add("images outside of the folders images and masks of train, val and test", file)
        else:
            name = "/".join((parts[0], *parts[2:]))
            stem = unicodedata.normalize("NFC", name.rpartition(".")[0])
            if kind == "images":
                image_files.append((file, stem, parse_split(parts[0]) or ""))
            else:
                masks[stem].append(file)
    images = []
    for file, stem, split in image_files:
        found = masks.get(stem, [])
        if len(found) == 1:
            images.append(_MaskedImage(file=file, mask=found[0], split=split))
        else:
            skipped.add(
                "images with several masks" if found else "images without a mask of the same name", file
            )
    for stem in masks.keys() - {stem for _, stem, _ in image_files}:
        skipped.add("masks without an image of the same name", masks[stem][0])
    if not images:
        raise InvalidInputError(
            f"{path} holds neither an index.csv nor train/images and train/masks with files of equal names"
            f"{skipped.summary()}",
            path=path,
        )
    return images


def _unique_images(root: Path, images: list[_MaskedImage], skipped: SkippedEntries) -> list[_MaskedImage]:
    """Keep the first entry of each image; later ones are counted."""
    first_entries: dict[str, _MaskedImage] = {}
    for image in images:
        first = first_entries.setdefault(same_file_id(root, image.file), image)
        if first is not image:
            is_same = first.split == image.split
            reason = (
                "repeated rows of an image"
                if is_same
                else "rows of an image that is in another split already"
            )
            skipped.add(reason, image.file)
    return list(first_entries.values())


@contextmanager
def _open_mask(path: Path) -> Iterator[Image.Image]:
    # Pillow maps uncompressed TIFF files that are opened by path with the width as shown: garbage if rotated.
    with quiet_libraries(), Image.open(io.BytesIO(path.read_bytes())) as image:
        yield image


def _raw_mode(image: Image.Image) -> str:
    """Return how the file of an image that is not loaded stores values, such as `L;4` for 4-bit gray."""
    args = image.tile[0].args if isinstance(image, ImageFile) and image.tile else None
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else image.mode


def _mask_problem(image: Image.Image) -> str | None:
    """Return why the class numbers in an opened mask are unknown, or None."""
    if image.mode not in _MASK_MODES:
        return f"masks of mode {image.mode}, not 1-bit, 8-bit gray or palette"
    if image.format == "JPEG":
        return "masks in JPEG, whose values are not exact"
    if image.mode == "L" and "I" in _raw_mode(image).partition(";")[2]:
        return "masks whose gray values are inverted (white is 0)"
    # The decoders of PGM scale values to 255 unless their maximum is 255.
    if image.format == "PPM" and image.mode == "L" and image.tile[0].args not in ("L", ("L", 255)):  # pyrefly: ignore[missing-attribute]
        return "masks in PGM whose maximum is not 255"
    return None


def _class_numbers(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """Return the class numbers of an opened mask as shown, as they are stored."""
    # Pillow multiplies gray values of 2 and 4 bits.
    scale = next((factor for mode, factor in _GRAY_SCALES.items() if _raw_mode(image).startswith(mode)), 1)
    image.load()
    return orient_pixels(np.asarray(image), exif_orientation(image)).astype(np.uint8) // scale


def _check_mask(root: Path, image: _MaskedImage, skipped: SkippedEntries) -> set[int] | None:
    """Return the values in a mask and set its orientation; None, counted, for an unusable mask."""
    try:
        frame = read_frame(root / image.file)
    except UnreadableImageError as error:
        skipped.add(f"missing or damaged images ({error})", image.file)
        return None
    try:
        with _open_mask(root / image.mask) as mask_image:
            problem = _mask_problem(mask_image)
            if problem is not None:
                skipped.add(problem, image.mask)
                return None
            mask = _class_numbers(mask_image)
        is_upright = frame.orientation == UPRIGHT
        mask_orientation = UPRIGHT if is_upright else read_orientation(root / image.mask)
    except Exception:  # noqa: BLE001  # decoders of Pillow raise many types of errors on damaged input
        skipped.add("missing or damaged masks", image.mask)
        return None
    size = (mask.shape[1], mask.shape[0])
    if size not in (frame.size, frame.stored_size):
        skipped.add("masks whose size differs from their image", image.mask)
        return None
    if frame.size == frame.stored_size and frame.orientation not in (UPRIGHT, mask_orientation):
        skipped.add(f"EXIF orientation {frame.orientation}, mask read as displayed", image.file)
    image.orientation = UPRIGHT if size == frame.size else frame.orientation
    return set(np.flatnonzero(np.bincount(mask.ravel())).tolist())


def _find_classes(
    path: Path, classes_file: Path, values: list[int], ignore_index: tuple[int, ...]
) -> dict[int, str]:
    """Return the names of the classes by their value: those in `classes.txt`, or else the values in masks."""
    class_ids = [value for value in values if value not in ignore_index]
    names = _read_class_names(classes_file)
    unnamed = [value for value in class_ids if value not in names]
    if names and unnamed:
        raise InvalidInputError(
            f"{classes_file} names {len(names)} classes, but masks hold class {unnamed[-1]}; "
            "name it, or add it to `ignore_index`",
            field="ignore_index",
            path=classes_file,
        )
    if len(class_ids) < 2:
        ignored_values = [value for value in values if value in ignore_index]
        message = (
            f"the masks of {path} hold only the class {', '.join(map(str, class_ids)) or 'none'}; at least 2 "
            "are needed"
        )
        if ignored_values:
            message = (
                f"the masks of {path} hold the values {', '.join(map(str, values))}. With `ignore_index` "
                f"{', '.join(map(str, ignored_values))}, {len(class_ids)} class is left, and at least 2 are "
                "needed. If the ignored value is a class, set `ignore_index` to a value that no mask holds, "
                "such as -1; if it marks unlabeled pixels, the masks lack the other classes"
            )
        raise InvalidInputError(message, field="ignore_index", path=path)
    return {
        value: names.get(value, str(value))
        for value in sorted({*class_ids, *names})
        if value not in ignore_index and value < 256
    }


def _read_class_names(path: Path) -> dict[int, str]:
    """Return the names in `classes.txt` by value; every line may have the value before the name."""
    if not path.is_file():
        return {}
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    numbered = [re.fullmatch(r"([0-9]{1,9})[\s:,;]+(.+)", line) for line in lines]
    if all(numbered) and len({match[1] for match in numbered if match}) == len(lines):
        return {int(match[1]): match[2] for match in numbered if match}
    return dict(enumerate(lines))


def _check_labeled(path: Path, split: str, values: list[set[int]], class_names: dict[int, str]) -> None:
    """Raise InvalidInputError if no mask of a split has a labeled pixel."""
    if not any(found & class_names.keys() for found in values):
        raise InvalidInputError(f"no {split} mask of {path} has a pixel that is not ignored", path=path)
