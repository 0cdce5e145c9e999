"""Filters: exclusions, edits by users and spreadsheet editors, and invalid files."""

import csv
from pathlib import Path

import numpy as np
import pytest

from likewise.data.dataset import CaptionDataset
from likewise.data.filters import DatasetFilter, DatasetView, FilterRow, open_view, read_filter, write_filter
from likewise.data.importing import import_dataset
from likewise.embeddings.store import find_embeddings
from likewise.errors import InvalidInputError
from support import save_png


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> CaptionDataset:
    """Six images in shards of four: with two captions, a comma, a quotation mark, one twice, none."""
    folder = tmp_path_factory.mktemp("small")
    rows = [
        ("a.png", "a  grinning face"),
        ("a.png", "my favourite"),
        ("b.png", "red, green; and blue"),
        ("c.png", 'a "face"'),
        ("d.png", "twice"),
        ("d.png", "twice"),
        ("e.png", ""),
        ("f.png", "ein Gesicht, größer"),
    ]
    for name, _ in rows:
        save_png(folder / name)
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("file", "caption"), *rows])
    return import_dataset(folder / "captions.csv", folder / "c", shard_rows=4)


def write(
    path: Path, *rows: tuple[str, str, str], header: tuple[str, ...] = ("id", "caption", "reason")
) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def caption_mask(dataset: CaptionDataset, dataset_filter: DatasetFilter) -> np.ndarray:
    mask = DatasetView(dataset, dataset_filter).caption_mask
    assert mask is not None
    return mask


def test_open_view_masks_images_and_captions(small: CaptionDataset, tmp_path: Path) -> None:
    view = open_view(small, write(tmp_path / "f.csv", ("f.png", "", "copy"), ("d.png", "twice", "")))
    assert view.image_mask.tolist() == [True, True, True, True, True, False]
    assert view.caption_mask is not None
    assert view.caption_mask.tolist() == [True, True, True, True, False, False, False]
    whole = open_view(small)
    assert whole.image_mask.all()
    assert whole.caption_mask is None


def test_written_exclusions_are_read_back(small: CaptionDataset, tmp_path: Path) -> None:
    rows = [
        FilterRow(id="a.png", caption="my favourite", reason="filler"),
        FilterRow(id="b.png", caption="red, green; and blue", reason="boilerplate"),
        FilterRow(id="c.png", caption='a "face"', reason="boilerplate"),
        FilterRow(id="f.png", caption="", reason="copy"),
    ]
    assert write_filter(tmp_path / "f.csv", rows) == {"boilerplate": 2, "copy": 1, "filler": 1}
    dataset_filter = read_filter(tmp_path / "f.csv", small)
    assert dataset_filter.excluded_images.tolist() == [False, False, False, False, False, True]
    assert dataset_filter.reason_counts == {"boilerplate": 2, "copy": 1, "filler": 1}
    assert dataset_filter.excludes_caption(0, "my favourite")
    assert not dataset_filter.excludes_caption(0, "a  grinning face")
    assert dataset_filter.excludes_caption(5, "ein Gesicht, größer")
    assert not dataset_filter.excludes_caption(3, "my favourite")
    assert caption_mask(small, dataset_filter).tolist() == [True, False, False, False, True, True, False]


def test_caption_excludes_all_equal_captions_of_its_image(small: CaptionDataset, tmp_path: Path) -> None:
    dataset_filter = read_filter(write(tmp_path / "f.csv", ("d.png", "twice", "")), small)
    assert caption_mask(small, dataset_filter).tolist()[:6] == [True, True, True, True, False, False]
    assert not dataset_filter.excluded_images.any()


def test_filter_tolerates_whitespace_order_and_delimiter_changes(
    small: CaptionDataset, tmp_path: Path
) -> None:
    first = write(tmp_path / "a.csv", ("a.png", "a  grinning face", "x"), ("f.png", "", "y"))
    second = tmp_path / "b.csv"
    second.write_bytes("\ufeffreason;id;caption\r\n;f.png;\r\nmine;a.png;a grinning face \r\n".encode())
    assert read_filter(first, small).key == read_filter(second, small).key
    assert read_filter(second, small).excludes_caption(0, "a  grinning face")
    third = write(tmp_path / "c.csv", ("a.png", "my favourite", "x"), ("f.png", "", "y"))
    assert read_filter(third, small).key != read_filter(first, small).key


@pytest.mark.parametrize("line_end", ["\r", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_filter_saved_by_spreadsheet_editors(
    small: CaptionDataset, tmp_path: Path, line_end: str, encoding: str
) -> None:
    lines = ["id\tcaption\treason", "f.png\tein Gesicht, größer\tx", 'c.png\t"a ""face"""\tx', "d.png\t\tx"]
    (tmp_path / "f.csv").write_bytes(line_end.join(lines).encode(encoding))
    dataset_filter = read_filter(tmp_path / "f.csv", small)
    assert caption_mask(small, dataset_filter).tolist() == [True, True, True, False, False, False, False]
    (tmp_path / "f.jsonl").write_text('{"id": "d.png", "caption": null, "reason": "x"}\n')
    assert (
        read_filter(tmp_path / "f.jsonl", small).excluded_images.tolist()
        == [False] * 3 + [True] + [False] * 2
    )


def test_filter_without_rows_excludes_nothing(small: CaptionDataset, tmp_path: Path) -> None:
    dataset_filter = read_filter(write(tmp_path / "f.csv"), small)
    assert not dataset_filter.excluded_images.any()
    assert caption_mask(small, dataset_filter).all()
    assert dataset_filter.reason_counts == {}


def test_caption_mask_is_aligned_with_embeddings(dataset: CaptionDataset, tmp_path: Path) -> None:
    sample = next(sample for sample in dataset if len(sample.captions) > 1)
    dataset_filter = read_filter(write(tmp_path / "f.csv", (sample.id, sample.captions[1], "test")), dataset)
    embeddings = find_embeddings(dataset, None)
    num_excluded = start = 0
    masks = caption_mask(dataset, dataset_filter)
    for shard in range(embeddings.num_shards):
        vectors, ids = embeddings.load_shard(shard)
        mask = masks[start : start + len(vectors)]
        start += len(vectors)
        assert mask.shape == (len(vectors),)
        texts = [c for sample in dataset.samples(shard) for c in sample.captions]
        expected = [
            not (dataset[int(i)].id == sample.id and text == sample.captions[1])
            for i, text in zip(ids, texts, strict=True)
        ]
        assert mask.tolist() == expected
        num_excluded += int((~mask).sum())
    assert num_excluded == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("id,caption\na.png,\n", "no column 'reason'"),
        ("a,b\n1,2\n", "no column 'id', 'caption', 'reason'"),
        (
            "id,caption,reason\nx.png,,\na.png,,\ny.png,,\n",
            "2 ids are not in .* first one is 'x.png' .*line 2",
        ),
        (
            "id,caption,reason\na.png,a smiling face,\n",
            "line 2: image 'a.png' has no caption 'a smiling face'",
        ),
        ("id,caption,reason\na.png,my favourite\n", "line 2: row has too few columns"),
        ('id,caption,reason\na.png,"my favourite,x\n', "line 2: image 'a.png' has no caption '\"my"),
        ("id,caption,reason\r\rf.png,,\rg\0.png,,", "line 4: row contains a NUL character"),
        ("id,caption,reason\n" + "".join(f"{n}.png,,\n" for n in "abcdef"), "excludes all images"),
    ],
)
def test_invalid_filters_raise(text: str, message: str, small: CaptionDataset, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(InvalidInputError, match=message) as error:
        read_filter(tmp_path / "f.csv", small)
    assert error.value.path == tmp_path / "f.csv"
    assert "f.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_filters_raise(small: CaptionDataset, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no filter at"):
        read_filter(tmp_path / "nowhere.csv", small)
    with pytest.raises(InvalidInputError, match="there is no filter at"):
        read_filter(tmp_path, small)
    save_png(tmp_path / "picture.csv")
    with pytest.raises(InvalidInputError, match="picture.csv, line 1: not UTF-8"):
        read_filter(tmp_path / "picture.csv", small)


def test_write_is_atomic(tmp_path: Path) -> None:
    write_filter(tmp_path / "f.csv", [FilterRow(id="a", caption="", reason="old")])
    before = (tmp_path / "f.csv").read_bytes()

    def interrupt() -> list[FilterRow]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_filter(tmp_path / "f.csv", (row for _ in range(2) for row in interrupt()))
    assert (tmp_path / "f.csv").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["f.csv"]


def test_masks_are_bool(small: CaptionDataset, tmp_path: Path) -> None:
    dataset_filter = read_filter(write(tmp_path / "f.csv", ("a.png", "", "x")), small)
    assert dataset_filter.excluded_images.dtype == np.bool_
    assert caption_mask(small, dataset_filter).dtype == np.bool_
    assert len(dataset_filter.key) == 16
