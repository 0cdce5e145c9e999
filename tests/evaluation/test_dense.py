"""Datasets with boxes: all formats give equal boxes, and invalid boxes are counted and located."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from likewise.errors import InvalidInputError
from likewise.evaluation.datasets.detection import DetectionDataset, open_detection

# Two images of 100 x 50 with their boxes in pixels.
BOXES = {"a": [("cat", 10, 5, 60, 45), ("dog", 0, 0, 20, 50)], "b": [("cat", 30, 10, 50, 40)]}


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in BOXES:
        Image.new("RGB", (100, 50)).save(folder / f"{name}.jpg")


def write_csv(root: Path, *, pixels: bool) -> Path:
    write_images(root)
    scale = (1, 1) if pixels else (100, 50)
    lines = [
        f"{name}.jpg,{'train' if name == 'a' else 'test'},{label},"
        f"{x0 / scale[0]},{y0 / scale[1]},{x1 / scale[0]},{y1 / scale[1]}"
        for name, boxes in BOXES.items()
        for label, x0, y0, x1, y1 in boxes
    ]
    (root / "boxes.csv").write_text("file,split,label,x0,y0,x1,y1\n" + "\n".join(lines) + "\n")
    return root


def write_coco(root: Path) -> Path:
    names = {"cat": 7, "dog": 3}
    for name, split in (("a", "train2017"), ("b", "val2017")):
        write_images(root / split)
        (root / "annotations").mkdir(exist_ok=True)
        annotations = {
            "images": [{"id": 5, "file_name": f"{name}.jpg", "width": 100, "height": 50}],
            "categories": [{"id": i, "name": n} for n, i in names.items()],
            "annotations": [
                {"id": i, "image_id": 5, "category_id": names[label], "bbox": [x0, y0, x1 - x0, y1 - y0]}
                for i, (label, x0, y0, x1, y1) in enumerate(BOXES[name])
            ],
        }
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(annotations))
    return root


def write_voc(root: Path) -> Path:
    write_images(root / "JPEGImages")
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "Annotations").mkdir()
    for name, split in (("a", "train"), ("b", "test")):
        (root / f"ImageSets/Main/{split}.txt").write_text(f"{name}\n")
        objects = "".join(
            f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin>"
            f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, x0, y0, x1, y1 in BOXES[name]
        )
        size = "<size><width>100</width><height>50</height></size>"
        text = f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
        (root / f"Annotations/{name}.xml").write_text(text)
    return root


def write_yolo(root: Path) -> Path:
    (root / "data.yaml").parent.mkdir(parents=True)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: {0: dog, 1: cat}\n")
    for name, split in (("a", "train"), ("b", "val")):
        write_images(root / "images" / split)
        unused = "b" if name == "a" else "a"
        (root / f"images/{split}/{unused}.jpg").unlink()
        (root / "labels" / split).mkdir(parents=True)
        lines = [
            f"{('dog', 'cat').index(label)} {(x0 + x1) / 200} {(y0 + y1) / 100} "
            f"{(x1 - x0) / 100} {(y1 - y0) / 50}"
            for label, x0, y0, x1, y1 in BOXES[name]
        ]
        (root / f"labels/{split}/{name}.txt").write_text("\n".join(lines))
    return root


def boxes_in_pixels(dataset: DetectionDataset) -> dict[str, list[tuple]]:
    return {
        Path(file).stem: [
            (dataset.classes[label], *np.round(box * (100, 50, 100, 50), 6).tolist())
            for box, label in zip(boxes, labels, strict=True)
        ]
        for file, boxes, labels in zip(dataset.files, dataset.boxes, dataset.labels, strict=True)
    }


@pytest.mark.parametrize("name", ["fractions", "pixels", "coco", "voc", "yolo"])
def test_all_formats_give_equal_boxes(name: str, tmp_path: Path) -> None:
    writers = {
        "fractions": lambda p: write_csv(p, pixels=False),
        "pixels": lambda p: write_csv(p, pixels=True),
        "coco": write_coco,
        "voc": write_voc,
        "yolo": write_yolo,
    }
    dataset = open_detection(writers[name](tmp_path / "dataset"))
    assert boxes_in_pixels(dataset) == BOXES
    assert dataset.classes == ("cat", "dog")
    assert dataset.splits.tolist() == ["train", "test"]
    assert dataset.skipped == {}
    assert all((dataset.root / file).is_file() for file in dataset.files)


def test_clipped_and_excluded_boxes_are_counted(tmp_path: Path) -> None:
    root = write_csv(tmp_path / "dataset", pixels=False)
    with (root / "boxes.csv").open("a") as stream:
        stream.write("a.jpg,train,cat,0.5,0.5,1.3,0.9\nb.jpg,test,cat,0.5,0.5,0.5,0.9\n")
        stream.write("b.jpg,test,dog,1.1,0.1,1.2,0.9\nempty.jpg,train,,,,,\n")
    dataset = open_detection(root)
    assert dataset.skipped == {
        "boxes beyond the edge of the image, clipped (first: boxes.csv line 5)": 1,
        "boxes without area inside the image, excluded (first: boxes.csv line 6)": 2,
    }
    np.testing.assert_allclose(dataset.boxes[0][-1], [0.5, 0.5, 1.0, 0.9])
    assert [len(boxes) for boxes in dataset.boxes] == [3, 1, 0]


def test_crowds_and_difficult_objects_are_marked(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    file = root / "annotations/instances_train2017.json"
    annotations = json.loads(file.read_text())
    annotations["annotations"][1]["iscrowd"] = 1
    file.write_text(json.dumps(annotations))
    assert open_detection(root).is_crowd[0].tolist() == [False, True]
    root = write_voc(tmp_path / "voc")
    file = root / "Annotations/a.xml"
    file.write_text(file.read_text().replace("<difficult>0", "<difficult> 1 ", 1))
    assert open_detection(root).is_crowd[0].tolist() == [True, False]


def test_invalid_annotations_raise(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no boxes") as excinfo:
        open_detection(tmp_path)
    assert excinfo.value.path == tmp_path
    root = write_csv(tmp_path / "dataset", pixels=False)
    table = root / "boxes.csv"
    text = table.read_text()
    table.write_text(text.replace("0.1,", "left,", 1))
    assert open_detection(root).skipped == {
        "boxes that are not four numbers, excluded (first: boxes.csv line 2)": 1
    }
    table.write_text(text.replace(",x1", ",right"))
    with pytest.raises(InvalidInputError, match="no column 'x1'"):
        open_detection(root)
    table.write_text(text.replace(",test,", ",train,"))
    with pytest.raises(InvalidInputError, match="no test images"):
        open_detection(root)
    coco = write_coco(tmp_path / "coco")
    (coco / "annotations/instances_val2017.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="instances_val2017"):
        open_detection(coco)
    voc = write_voc(tmp_path / "voc")
    (voc / "Annotations/a.xml").write_text("<annotation>")
    with pytest.raises(InvalidInputError, match=r"no train images.*damaged \(first: a\.xml\)"):
        open_detection(voc)
    yolo = write_yolo(tmp_path / "yolo")
    (yolo / "labels/train/a.txt").write_text("9 0.5 0.5 0.1 0.1")
    with pytest.raises(InvalidInputError, match=r"no train image .*\(first: a\.txt, line 1\)"):
        open_detection(yolo)
