"""Masks: which pixels count, which masks are excluded, and when nothing can be measured."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from likewise.data.pixels import orient_pixels
from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.segmentation import SegmentationDataset, open_segmentation
from likewise.evaluation.protocols.dense import bootstrap_score
from likewise.evaluation.protocols.detection import (
    Boxes,
    average_precision,
    bootstrap_average_precision,
    match_detections,
)
from likewise.evaluation.protocols.segmentation import segmentation_metrics

MASK = np.zeros((30, 40), np.uint8)
MASK[4:12, 5:25] = 1


def write_masks(root: Path, masks: list[Image.Image], suffix: str = "png") -> Path:
    """Write four images with masks, two per split; the last mask is repeated."""
    for i in range(4):
        folder = root / ("train" if i < 2 else "test")
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (i, 0, 0)).save(folder / f"images/{i}.jpg")
        masks[min(i, len(masks) - 1)].save(folder / f"masks/{i}.{suffix}")
    return root


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_class_numbers_of_every_mode_are_read(mode: str, suffix: str, tmp_path: Path) -> None:
    mask = Image.fromarray(MASK * (255 if mode == "1" else 1)).convert(mode)
    if mode == "P":
        mask = Image.fromarray(MASK)
        mask.putpalette([255, 0, 0, 0, 0, 255, *[7] * 762])
    dataset = open_segmentation(write_masks(tmp_path, [mask], suffix))
    assert dataset.classes == ("0", "1")
    np.testing.assert_array_equal(dataset.load_mask(0), MASK)


def test_sparse_class_numbers_are_classes_of_their_own(tmp_path: Path) -> None:
    mask = Image.fromarray(MASK * 200)
    dataset = open_segmentation(write_masks(tmp_path, [mask]))
    assert (dataset.class_ids, dataset.classes) == ((0, 200), ("0", "200"))
    np.testing.assert_array_equal(dataset.load_mask(3), MASK)
    (tmp_path / "classes.txt").write_text("\ufeff0: floor\n200: Tür\n7: wall\n", encoding="utf-8")
    dataset = open_segmentation(tmp_path)
    assert (dataset.class_ids, dataset.classes) == ((0, 7, 200), ("floor", "wall", "Tür"))
    np.testing.assert_array_equal(dataset.load_mask(3), 2 * MASK.astype(int))


def test_masks_of_zero_and_255_name_both_readings(tmp_path: Path) -> None:
    write_masks(tmp_path, [Image.fromarray(MASK * 255)])
    with pytest.raises(InvalidInputError, match="0, 255.*is a class.*`ignore_index`.*unlabeled") as error:
        open_segmentation(tmp_path)
    assert error.value.field == "ignore_index"
    assert open_segmentation(tmp_path, (-1,)).classes == ("0", "255")
    with pytest.raises(InvalidInputError, match="only the class 0"):
        open_segmentation(write_masks(tmp_path, [Image.fromarray(MASK * 0)]))


def test_a_split_without_labeled_pixels_raises(tmp_path: Path) -> None:
    good, ignored = Image.fromarray(MASK), Image.fromarray(MASK * 0 + 255)
    with pytest.raises(InvalidInputError, match="no test mask"):
        open_segmentation(write_masks(tmp_path, [good, good, ignored]))


@pytest.mark.parametrize("mode", ["RGB", "LA", "I;16", "JPEG", "damaged", "missing"])
def test_one_unusable_mask_is_counted(mode: str, tmp_path: Path) -> None:
    write_masks(tmp_path, [Image.fromarray(MASK)])
    path = tmp_path / "train/masks/0.png"
    if mode == "missing":
        path.unlink()
    elif mode == "damaged":
        path.write_bytes(path.read_bytes()[:40])
    elif mode == "JPEG":
        path.unlink()
        Image.fromarray(MASK).save(path.with_suffix(".jpg"))
    elif mode == "I;16":
        Image.fromarray(MASK.astype(np.uint16)).save(path)
    else:
        Image.fromarray(MASK).convert(mode).save(path)
    dataset = open_segmentation(tmp_path)
    assert len(dataset) == 3
    assert list(dataset.skipped.values()) == [1]


def test_hidden_and_unpaired_files_are_counted(tmp_path: Path) -> None:
    write_masks(tmp_path, [Image.fromarray(MASK)])
    for name in ("train/images/._0.jpg", "train/masks/._0.png", "test/images/Thumbs.db", "readme.md"):
        (tmp_path / name).write_bytes(b"x")
    shutil.copy(tmp_path / "train/masks/0.png", tmp_path / "train/masks/0_mask.png")
    shutil.copy(tmp_path / "train/masks/0.png", tmp_path / "train/extra.png")
    dataset = open_segmentation(tmp_path)
    assert len(dataset) == 4
    assert dataset.ignored == {"hidden file": 2, "system file": 1, "file type .md": 1}
    assert list(dataset.skipped.values()) == [1, 1]


def as_stored(image: Image.Image) -> Image.Image:
    """Return the stored pixels of an image that EXIF orientation 6 turns into this one."""
    return image.transpose(Image.Transpose.ROTATE_90)


@pytest.mark.parametrize("frame", ["shown", "stored"])
def test_masks_of_rotated_images_are_those_as_displayed(frame: str, tmp_path: Path) -> None:
    mask = Image.fromarray(MASK)
    write_masks(tmp_path, [mask if frame == "shown" else as_stored(mask)])
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in tmp_path.glob("*/images/*.jpg"):
        with Image.open(path) as image:
            rotated = as_stored(image)
        rotated.save(path, exif=exif)
    dataset = open_segmentation(tmp_path)
    assert len(dataset) == 4
    np.testing.assert_array_equal(dataset.load_mask(0), MASK)


def test_table_finds_images_and_masks_in_different_folders(tmp_path: Path) -> None:
    write_masks(tmp_path / "data", [Image.fromarray(MASK)])
    rows = []
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            for path in (tmp_path / "data" / split / kind).iterdir():
                shutil.copy(path, tmp_path / kind / path.name)
        rows += [f"{p.name};{p.stem}.png;{split}" for p in (tmp_path / f"data/{split}/images").iterdir()]
    shutil.rmtree(tmp_path / "data")
    lines = ["file;mask;split", *sorted(rows), "9.jpg;;train", "9.jpg;9.png;dunno", rows[0]]
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    dataset = open_segmentation(tmp_path)
    assert len(dataset) == 4
    assert sum(dataset.skipped.values()) == 3


def keys(dataset: SegmentationDataset) -> tuple[str, str]:
    return dataset.key, dataset.name


def test_key_follows_a_mask_that_is_mended_in_place(tmp_path: Path) -> None:
    write_masks(tmp_path / "a/s", [Image.fromarray(MASK)])
    first = keys(open_segmentation(tmp_path / "a/s"))
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    assert keys(open_segmentation(tmp_path / "b/s")) == first
    mended = MASK.copy()
    mended[20, 20] = 1
    Image.fromarray(mended).save(tmp_path / "b/s/test/masks/3.png")
    assert open_segmentation(tmp_path / "b/s").key != first[0]
    assert open_segmentation(tmp_path / "a/s", (254,)).key != first[0]


def test_no_figure_where_nothing_can_be_measured() -> None:
    metrics = segmentation_metrics(np.stack([np.eye(2), np.zeros((2, 2))]))
    np.testing.assert_array_equal(metrics["mean IoU"], [1, np.nan])
    np.testing.assert_array_equal(metrics["pixel accuracy"], [1, np.nan])
    empty = Boxes(
        xyxy=np.zeros((0, 4)), labels=np.zeros(0, int), scores=np.zeros(0), is_crowd=np.zeros(0, bool)
    )
    box = Boxes(
        xyxy=np.array([[0.0, 0, 9, 9]]),
        labels=np.zeros(1, int),
        scores=np.ones(1),
        is_crowd=np.zeros(1, bool),
    )
    assert np.isnan(average_precision(match_detections([box], [empty], 1)).ap)
    # Resamples without any true box are no zeros: the value on all others is 1.
    resampled = bootstrap_average_precision(match_detections([box, empty], [box, empty], 1), 50)[:, 0]
    assert np.isnan(resampled).any()
    score = bootstrap_score("AP", 1.0, resampled, 2, {})
    assert (score.estimate.low, score.estimate.high) == (1, 1)
    with pytest.raises(InvalidInputError, match="cannot be measured"):
        bootstrap_score("AP", float("nan"), resampled, 2, {})


def encode_gray(values: np.ndarray, bits: int) -> bytes:
    """Return a gray PNG of 2 or 4 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    per_byte = 8 // bits
    shifted = [values[:, i::per_byte] << (8 - bits * (i + 1)) for i in range(per_byte)]
    packed = np.sum(shifted, axis=0).astype(np.uint8)
    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in packed))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [2, 4])
def test_class_numbers_of_few_bits_are_read_as_stored(bits: int, tmp_path: Path) -> None:
    write_masks(tmp_path, [Image.fromarray(MASK)])
    mask = MASK * (2**bits - 1)
    for path in tmp_path.glob("*/masks/*.png"):
        path.write_bytes(encode_gray(mask, bits))
    dataset = open_segmentation(tmp_path)
    assert dataset.class_ids == (0, 2**bits - 1)
    np.testing.assert_array_equal(dataset.load_mask(0), MASK)


@pytest.mark.parametrize("maximum", [1, 20, 255])
@pytest.mark.parametrize("kind", ["P2", "P5"])
def test_pgm_masks_are_read_only_without_scaling(kind: str, maximum: int, tmp_path: Path) -> None:
    write_masks(tmp_path, [Image.fromarray(MASK)])
    pixels = MASK.tobytes() if kind == "P5" else " ".join(map(str, MASK.ravel())).encode()
    (tmp_path / "train/masks/0.png").write_bytes(f"{kind}\n40 30\n{maximum}\n".encode() + pixels)
    dataset = open_segmentation(tmp_path)
    assert len(dataset) == (4 if maximum == 255 else 3)
    assert dataset.classes == ("0", "1")


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_with_an_orientation_of_their_own(orientation: int, suffix: str, tmp_path: Path) -> None:
    write_masks(tmp_path, [Image.fromarray(MASK)], suffix)
    # The inverse of every orientation is itself, except of 6 and 8.
    stored = orient_pixels(MASK, {6: 8, 8: 6}.get(orientation, orientation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in tmp_path.glob(f"*/masks/*.{suffix}"):
        Image.fromarray(stored).save(path, exif=exif)
    dataset = open_segmentation(tmp_path)
    assert dataset.skipped == {}
    np.testing.assert_array_equal(dataset.load_mask(0), MASK)


@pytest.mark.parametrize("orientation", [2, 3, 4, 7])
def test_undecidable_orientations_are_counted(orientation: int, tmp_path: Path) -> None:
    mask = MASK[:, :30]
    write_masks(tmp_path, [Image.fromarray(mask)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in tmp_path.glob("*/images/*.jpg"):
        Image.new("RGB", (30, 30)).save(path, exif=exif)
    dataset = open_segmentation(tmp_path)
    assert list(dataset.skipped.values()) == [4]
    assert f"EXIF orientation {orientation}, mask read as displayed" in next(iter(dataset.skipped))


def test_masks_are_found_as_import_finds_files_and_class_names_in_utf16(tmp_path: Path) -> None:
    write_masks(tmp_path, [Image.fromarray(MASK)])
    lines = ["file;mask;split"]
    for i, split in enumerate(("train", "train", "test", "test")):
        lines.append(rf"{split}\images\{i}.jpg;{split}%2Fmasks%2F{i}.png;{split}")
    (tmp_path / "index.csv").write_text("\n".join(lines))
    classes = tmp_path / "classes.txt"
    classes.write_text("Straße\nTür\n", encoding="utf-16")
    dataset = open_segmentation(tmp_path)
    assert (len(dataset), dataset.classes) == (4, ("Straße", "Tür"))
    classes.write_bytes("Straße\nTür\n".encode("latin-1"))
    with pytest.raises(InvalidInputError, match=r"classes\.txt is not text"):
        open_segmentation(tmp_path)
