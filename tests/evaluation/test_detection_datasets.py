"""Boxes of foreign annotation files: rotated images, bad entries, and every layout that makers write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.annotations import read_frame
from likewise.evaluation.datasets.detection import DetectionDataset, open_detection

SIZE, BOX = (120, 80), (10, 8, 50, 32)
SPLITS = ("train", "train", "val", "val")
# How Pillow undoes each orientation, so that the stored image is shown as drawn.
_STORE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def draw(path: Path, orientation: int = 1) -> None:
    """Write a white image with a red box, as shown with this EXIF orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", SIZE, "white")
    x0, y0, x1, y1 = BOX
    ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), fill="red")
    transpose, exif = _STORE[orientation], Image.Exif()
    exif[0x0112] = orientation
    (image if transpose is None else image.transpose(transpose)).save(path, exif=exif)


def red_share(dataset: DetectionDataset, index: int = 0) -> float:
    """Return the share of red pixels in the only box of an image as shown, times the red it covers."""
    with Image.open(dataset.root / dataset.files[index]) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    is_red = (pixels[..., 0] > 200) & (pixels[..., 1] < 80)
    ((x0, y0, x1, y1),) = (dataset.boxes[index] * (width, height, width, height)).round().astype(int)
    inside = is_red[y0:y1, x0:x1]
    return float(inside.mean() * inside.sum() / is_red.sum())


def write_coco(
    root: Path, edit: Callable[[dict[str, Any]], object] = lambda _: None, orientation: int = 1
) -> Path:
    for split in ("train", "val"):
        draw(root / split / "ü0.png", orientation)
        draw(root / split / "1.png", orientation)
        x0, y0, x1, y1 = BOX
        content = {
            "images": [
                {"id": 100 + i, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
                for i, name in enumerate(("ü0.png", "1.png"))
            ],
            "annotations": [
                {"id": i, "image_id": 100 + i, "category_id": 7, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                for i in range(2)
            ],
            "categories": [{"id": 7, "name": "Käfer"}],
        }
        edit(content)
        path = root / f"annotations/instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8-sig")
    return root


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_on_their_object_in_the_image_as_displayed(orientation: int, tmp_path: Path) -> None:
    dataset = open_detection(write_coco(tmp_path / "shown", orientation=orientation))
    assert red_share(dataset) == pytest.approx(1)
    # The declared size tells the frames apart only if the orientation exchanges width and height.
    assert list(dataset.skipped.values()) == ([4] if orientation in (2, 3, 4) else [])
    assert all(f"EXIF orientation {orientation}," in reason for reason in dataset.skipped)
    if orientation >= 5:
        # Boxes and size of the stored image, whose width and height are exchanged.
        stored = {
            5: (8, 10, 32, 50), 6: (8, 70, 32, 110), 7: (48, 70, 72, 110), 8: (48, 10, 72, 50),
        }[orientation]  # fmt: skip

        def edit(content: dict[str, Any]) -> None:
            for image in content["images"]:
                image["width"], image["height"] = SIZE[::-1]
            for entry in content["annotations"]:
                x0, y0, x1, y1 = stored
                entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]

        dataset = open_detection(write_coco(tmp_path / "stored", edit, orientation))
        assert red_share(dataset) == pytest.approx(1)
        assert dataset.skipped == {}


def test_pixels_in_a_table_are_those_of_the_image_as_displayed(tmp_path: Path) -> None:
    lines = ["image;split;label;x0;y0;x1;y1"]
    for i, split in enumerate(SPLITS):
        draw(tmp_path / f"images/{i}.jpg", orientation=6)
        lines.append(f"{i}.jpg;{split};thing;10;8;50;32")
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    dataset = open_detection(tmp_path)
    np.testing.assert_allclose(dataset.boxes[0], [np.array(BOX) / np.tile(SIZE, 2)])
    assert dataset.classes == ("thing",)


def add_box(bbox: object, image_id: int = 100, category_id: int = 7) -> Callable[[dict[str, Any]], object]:
    entry = {"image_id": image_id, "category_id": category_id, "bbox": bbox}
    return lambda content: content["annotations"].append(entry)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], int]] = {
    "orphan": (add_box([1, 1, 9, 9], image_id=9), 2),
    "no class": (add_box([1, 1, 9, 9], category_id=0), 2),
    "empty box": (add_box([]), 2),
    "text box": (add_box("1 2 3 4"), 2),
    "nan box": (add_box([float("nan")] * 4), 2),
    "no mapping": (lambda c: c["annotations"].append(None), 2),
    "repeated": (lambda c: c["annotations"].append(dict(c["annotations"][0])), 2),
    "image twice": (lambda c: c["images"].append({"id": 5, "file_name": "1.png"}), 2),
    "id twice": (lambda c: c["images"].append({"id": 100, "file_name": "2.png"}), 2),
    "image without id": (lambda c: c["images"].append({"file_name": "2.png"}), 2),
    "class without name": (lambda c: c["categories"].append({"id": 8, "name": None}), 2),
    "text ids": (lambda c: [a.update(image_id=f"{a['image_id']}") for a in c["annotations"]], 0),
    "float ids": (lambda c: [a.update(image_id=float(a["image_id"])) for a in c["annotations"]], 0),
    "no size": (lambda c: [i.pop("width") for i in c["images"]], 0),
    "size zero": (lambda c: [i.update(width=0, height=0) for i in c["images"]], 0),
    "exchanged size": (lambda c: [i.update(width=80, height=120) for i in c["images"]], 4),
    "crowd text": (lambda c: [a.update(iscrowd="0") for a in c["annotations"]], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_bad_entries_of_coco_are_counted_and_the_others_used(name: str, tmp_path: Path) -> None:
    edit, num_counted = EDITS[name]
    dataset = open_detection(write_coco(tmp_path, edit))
    assert sum(dataset.skipped.values()) == num_counted
    assert len(set(dataset.files)) == len(dataset) == 4
    assert dataset.classes == ("Käfer",)
    assert [red_share(dataset, i) for i in range(4)] == pytest.approx([1] * 4)
    assert not any(is_crowd.any() for is_crowd in dataset.is_crowd)


def test_images_of_another_size_than_declared_are_counted(tmp_path: Path) -> None:
    root = write_coco(tmp_path, lambda c: c["images"][0].update(width=60, height=40))
    dataset = open_detection(root)
    assert len(dataset) == 2
    assert list(dataset.skipped.values()) == [2]
    assert "differs from the declared" in next(iter(dataset.skipped))


@pytest.mark.parametrize("layout", ["cvat", "suffix", "roboflow"])
def test_names_and_layouts_of_coco(layout: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    for split, other in (("train", "train"), ("val", "valid")):
        file = root / f"annotations/instances_{split}.json"
        if layout == "cvat":
            (root / "images").mkdir(exist_ok=True)
            (root / split).rename(root / "images" / split)
        elif layout == "suffix":
            file.rename(file.with_name(f"instances_{split}_v1.json"))
        else:
            (root / split).rename(root / other)
            file.rename(root / other / "_annotations.coco.json")
    dataset = open_detection(root)
    assert dataset.splits.tolist() == ["train", "train", "test", "test"]
    assert red_share(dataset) == pytest.approx(1)


def test_coco_without_a_split_in_its_name_raises(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    (root / "annotations/instances_val.json").unlink()
    (root / "annotations/instances_train.json").rename(root / "annotations/instances_default.json")
    with pytest.raises(InvalidInputError, match=r"no split is in the name of .*instances_train\.json and"):
        open_detection(root)


def write_voc(
    root: Path, filename: str = "{stem}.png", size: tuple[int, int] = SIZE, extra: str = ""
) -> Path:
    x0, y0, x1, y1 = BOX
    for i, split in enumerate(SPLITS):
        draw(root / f"JPEGImages/{i}.png")
        xml = (
            f"<annotation><filename>{filename.format(stem=i)}</filename>"
            f"<size><width>{size[0]}</width><height>{size[1]}</height></size>{extra}"
            f"<object><name>\n thing{' ' * i}\n</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object></annotation>"
        )
        for folder in ("Annotations", "ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / f"Annotations/{i}.xml").write_text(xml)
        with (root / f"ImageSets/Main/{split}.txt").open("a") as stream:
            stream.write(f"{i}\n")
    return root


@pytest.mark.parametrize("filename", ["{stem}", "", "IMG_0001.jpg", "{stem}.jpg", r"C:\photos\{stem}.png"])
@pytest.mark.parametrize("size", [SIZE, (0, 0)])
def test_voc_uses_the_image_of_the_stem_and_its_size(
    filename: str, size: tuple[int, int], tmp_path: Path
) -> None:
    dataset = open_detection(write_voc(tmp_path, filename, size))
    assert dataset.classes == ("thing",)
    assert dataset.skipped == {}
    assert [red_share(dataset, i) for i in range(4)] == pytest.approx([1] * 4)


def test_voc_counts_bad_objects_and_files(tmp_path: Path) -> None:
    bad = "<object><name>thing</name><bndbox><xmin>a</xmin></bndbox></object><object><name/></object>"
    root = write_voc(tmp_path / "a", extra=bad)
    (root / "Annotations/1.xml").write_text("<annotation>")
    (root / "Annotations/9.xml").write_text("<annotation/>")
    with (root / "ImageSets/Main/train.txt").open("a") as stream:
        stream.write("absent\n")
    dataset = open_detection(root)
    assert len(dataset) == 3
    assert sorted(dataset.skipped.values()) == [1, 1, 1, 6]
    for file in (root / "ImageSets/Main").iterdir():
        file.unlink()
    with pytest.raises(InvalidInputError, match=r"no split: ImageSets/Main/train\.txt and"):
        open_detection(root)


def write_yolo(root: Path, config: str = "", *, line: str = "0 0.25 0.25 0.333333 0.3") -> Path:
    for i, split in enumerate(SPLITS):
        draw(root / f"images/{split}/{i}.png")
        label = root / f"labels/{split}/{i}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(f"{line}\n")
    text = config or "train: images/train\nval: images/val\nnames: [thing]\n"
    (root / "data.yaml").write_text(text.replace("ROOT", str(root)))
    return root


POLYGON = "0 0.083333 0.1 0.416667 0.1 0.416667 0.4 0.083333 0.4"


@pytest.mark.parametrize(
    "config",
    [
        "train: [images/train]\nval: [images/val]\nnames: {'0': thing}\n",
        "path: ROOT\ntrain: images/train\nval: images/val\nnames: [thing]\n",
        "path: elsewhere/data\ntrain: images/train\nval: images/val\nnc: 1\nnames: ['thing']\n",
        "train: ../images/train\nval: ../images/val\nnames: [thing]\n",
        "train: train.txt\nval: val.txt\nnames: [thing]\n",
    ],
)
def test_yolo_reads_what_its_makers_write(config: str, tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "yolo", config, line=POLYGON)
    for split in ("train", "val"):
        names = "".join(f"./images/{split}/{p.name}\n" for p in sorted((root / f"images/{split}").iterdir()))
        (root / f"{split}.txt").write_text(names)
    for path in (root, root / "data.yaml"):
        dataset = open_detection(path)
        assert dataset.name == "yolo"
        assert sorted(dataset.files) == [f"images/{split}/{i}.png" for i, split in enumerate(SPLITS)]
        assert red_share(dataset) == pytest.approx(1)
        assert dataset.skipped == {}


@pytest.mark.parametrize("names", ["[no, yes]", "[007, 1.10]", "{0: ~, 1: 1e3}", "[true, null]"])
def test_yolo_class_names_are_text_as_written(names: str, tmp_path: Path) -> None:
    root = write_yolo(tmp_path, f"train: images/train\nval: images/val\nnames: {names}\n")
    expected = names.strip("[]{}").split(", ")[0].removeprefix("0: ")
    assert open_detection(root).classes == (expected,)


def test_yolo_lines_are_used_or_counted(tmp_path: Path) -> None:
    root = write_yolo(tmp_path)
    (root / "labels/train/0.txt").write_text(
        "0.0 0.25 0.25 0.333333 0.3\n0 0.25 0.25 0.333333 0.3\n-1 0.5 0.5 0.1 0.1\n3 0.5 0.5 0.1 0.1\n"
        "0.5 0.5 0.5 0.1 0.1\n0 nan 0.5 0.1 0.1\n0 0.5 0.5\n0,0.5,0.5,0.1,0.1\n0 30 20 40 24\n"
        "0 0.1 0.1 0.2 0.2 0.3 0.3 0.4\n\n"
    )
    (root / "labels/train/1.txt").write_text("0 0.25 0.25 0.333333 0.3 0.93\n")
    (root / "labels/train/gone.txt").write_text(POLYGON)
    (root / "labels/val/2.txt").unlink()
    dataset = open_detection(root)
    assert [len(boxes) for boxes in dataset.boxes] == [1, 1, 0, 1]
    counts = {reason.partition(" (first")[0]: count for reason, count in dataset.skipped.items()}
    assert counts == {
        "lines whose class is not a whole number from 0": 2,
        "lines whose class has no name": 1,
        "lines that are not a class with a box or a polygon": 4,
        "boxes without area inside the image, excluded": 1,
        "repeated boxes, excluded": 1,
        "scores after the box, ignored": 1,
        "images without a label file, used without boxes": 1,
        "label files without an image": 1,
    }


def test_two_readings_raise_and_name_both(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "a")
    (root / "old.yml").write_text((root / "data.yaml").read_text())
    with pytest.raises(InvalidInputError, match=r"data\.yaml and old\.yml"):
        open_detection(root)
    root = write_coco(write_yolo(tmp_path / "b"))
    with pytest.raises(InvalidInputError, match="COCO and YOLO"):
        open_detection(root)
    root = write_yolo(tmp_path / "c", "train: images/train\nval: images/none\nnames: [thing]\n")
    with pytest.raises(InvalidInputError, match="images/none for val, but there is no folder"):
        open_detection(root)
    (root / "data.yaml").write_text("train: [\n")
    with pytest.raises(InvalidInputError, match="not valid YAML"):
        open_detection(root)


def test_an_image_in_two_splits_is_counted_and_a_split_without_boxes_raises(tmp_path: Path) -> None:
    lines = ["file,split,label,x0,y0,x1,y1"]
    for i, split in enumerate(SPLITS):
        draw(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{split},thing,0.1,0.1,0.5,0.5")
    lines += ["./0.png,test,thing,0.1,0.1,0.5,0.5", "3.png,test,,0.1,0.1,0.5,0.5"]
    table = tmp_path / "boxes.csv"
    table.write_text("\n".join(lines) + "\n")
    dataset = open_detection(tmp_path)
    assert dataset.splits.tolist() == ["train", "train", "test", "test"]
    assert dataset.skipped == {
        "boxes without a label (first: boxes.csv line 7)": 1,
        "entries of an image that is in another split already (first: ./0.png)": 2,
    }
    table.write_text("\n".join([*lines[:-2], "4.png,val,,0.1,0.1,0.5,0.5"]) + "\n")
    dataset = open_detection(tmp_path)
    assert dataset.skipped == {"boxes without a label (first: boxes.csv line 6)": 1}
    table.write_text("\n".join([*lines[:3], "2.png,val,,,,,", "3.png,val,,,,,"]) + "\n")
    with pytest.raises(InvalidInputError, match="no test image of .* has a box"):
        open_detection(tmp_path)


def test_key_follows_boxes_and_images(tmp_path: Path) -> None:
    key = open_detection(write_yolo(tmp_path / "a")).key
    assert open_detection(write_yolo(tmp_path / "b", "path: ROOT\ntrain: images/train\nval: images/val\n"
                                     "names: [thing]\n")).key == key  # fmt: skip
    assert open_detection(write_yolo(tmp_path / "c", line=POLYGON)).key != key


@pytest.mark.parametrize("spelling", [r".\{}", "%C3%BC0.png", "u\u03080.png", "./{}"])
def test_coco_file_names_are_found_as_import_finds_them(spelling: str, tmp_path: Path) -> None:
    name = spelling.format("ü0.png")
    dataset = open_detection(write_coco(tmp_path, lambda c: c["images"][0].update(file_name=name)))
    assert len(dataset) == 4
    assert [red_share(dataset, i) for i in range(4)] == pytest.approx([1] * 4)
    assert dataset.skipped == {}


def test_coco_images_in_two_folders_raise_unless_they_are_the_same(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    (root / "images").symlink_to(root / "train")
    assert len(open_detection(root)) == 4
    (root / "images").unlink()
    for name in ("ü0.png", "1.png"):
        draw(root / "images" / "train" / name)
    with pytest.raises(InvalidInputError, match="train and images/train"):
        open_detection(root)


def test_coco_counts_a_name_that_is_too_long(tmp_path: Path) -> None:
    root = write_coco(tmp_path, lambda c: c["images"][0].update(file_name="x" * 300 + ".png"))
    dataset = open_detection(root)
    assert (len(dataset), list(dataset.skipped.values())) == (2, [2])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_texts_of_yolo_and_voc_in_other_encodings(encoding: str, tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "yolo", "train: train.txt\nval: val.txt\nnames: [Käfer]\n")
    for split in ("train", "val"):
        names = "".join(rf".\images\{split}\{p.name}" + "\r\n" for p in (root / f"images/{split}").iterdir())
        (root / f"{split}.txt").write_text(names)
    voc = write_voc(tmp_path / "voc")
    texts = [*root.rglob("*.txt"), root / "data.yaml", *voc.rglob("*.txt")]
    for path in texts:
        path.write_text(path.read_text(), encoding=encoding)
    for folder, classes in ((root, ("Käfer",)), (voc, ("thing",))):
        dataset = open_detection(folder)
        assert (len(dataset), dataset.classes, dataset.skipped) == (4, classes, {})
    for path in (root / "labels/train/0.txt", voc / "ImageSets/Main/train.txt"):
        path.write_bytes(path.read_text(encoding=encoding).encode() + b"\nK\xe4fer\n")
    assert list(open_detection(root).skipped.values()) == [1]
    assert list(open_detection(voc).skipped.values()) == [1]
    (root / "data.yaml").write_bytes("train: train.txt\nval: val.txt\nnames: [Käfer]".encode("latin-1"))
    with pytest.raises(InvalidInputError, match=r"data\.yaml is not text"):
        open_detection(root)


BAD_YAML = {
    "broken link": lambda path: path.symlink_to(path.parent / "gone"),
    "nested": lambda path: path.write_text("[" * 20_000),
    "nc": lambda path: path.write_text("train: images/train\nval: images/val\nnc: '²'\n"),
    "many": lambda path: path.write_text(f"train: images/train\nval: images/val\nnc: {10**12}\n"),
    "key": lambda path: path.write_text("train: images/train\nval: images/val\nnames: {²: a}\n"),
    "long": lambda path: path.write_text(f"train: {'x' * 300}\nval: images/val\nnames: [a]\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_YAML)
def test_unreadable_data_files_of_yolo_raise_an_error_with_their_path(name: str, tmp_path: Path) -> None:
    root = write_yolo(tmp_path)
    (root / "data.yaml").unlink()
    BAD_YAML[name](root / "data.yaml")
    with pytest.raises(InvalidInputError, match=r"data\.yaml") as error:
        open_detection(root)
    assert error.value.path == root / "data.yaml"


def test_folders_and_broken_links_instead_of_files_raise_no_other_error(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "yolo")
    (root / "more.yaml").mkdir()
    (root / "gone.yaml").symlink_to(root / "gone")
    dataset = open_detection(root)
    assert (len(dataset), dataset.ignored) == (4, {"YAML file that is damaged": 1})
    root = write_voc(tmp_path / "voc")
    (root / "ImageSets/Main/train.txt").unlink()
    (root / "ImageSets/Main/train.txt").mkdir()
    with pytest.raises(InvalidInputError, match=r"cannot read .*train\.txt"):
        open_detection(root)
    root = write_coco(tmp_path / "coco")
    (root / "annotations/instances_val.json").unlink()
    (root / "annotations/instances_val.json").symlink_to(root / "gone")
    with pytest.raises(InvalidInputError, match=r"cannot read .*instances_val\.json"):
        open_detection(root)


def test_boxes_of_rotated_tiffs_that_only_tifffile_reads(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.zeros((80, 120, 5), np.float64)
    for i in range(4):
        tag = [(274, "H", 1, 6, True)]
        tifffile.imwrite(tmp_path / f"{i}.tif", pixels, planarconfig="contig", extratags=tag)
    frame = read_frame(tmp_path / "0.tif")
    assert (frame.size, frame.stored_size, frame.orientation) == ((80, 120), (120, 80), 6)
