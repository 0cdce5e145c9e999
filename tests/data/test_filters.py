"""Filters: what they leave out, whatever hand has edited them, and what is wrong with one that cannot be."""

import csv
from pathlib import Path

import numpy as np
import pytest

from likewise.data.dataset import CaptionDataset
from likewise.data.filters import FilterRow, read_filter, write_filter
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


def test_what_is_written_is_left_out_again(small: CaptionDataset, tmp_path: Path) -> None:
    rows = [
        FilterRow(id="a.png", caption="my favourite", reason="filler"),
        FilterRow(id="b.png", caption="red, green; and blue", reason="boilerplate"),
        FilterRow(id="c.png", caption='a "face"', reason="boilerplate"),
        FilterRow(id="f.png", caption="", reason="copy"),
    ]
    assert write_filter(tmp_path / "f.csv", rows) == {"boilerplate": 2, "copy": 1, "filler": 1}
    found = read_filter(tmp_path / "f.csv", small)
    assert found.excluded_images.tolist() == [False, False, False, False, False, True]
    assert found.reason_counts == {"boilerplate": 2, "copy": 1, "filler": 1}
    assert found.excludes_caption(0, "my favourite")
    assert not found.excludes_caption(0, "a  grinning face")
    assert found.excludes_caption(5, "ein Gesicht, größer")
    assert not found.excludes_caption(3, "my favourite")
    assert found.caption_mask(small, 0).tolist() == [True, False, False, False, True, True]
    assert found.caption_mask(small, 1).tolist() == [False]


def test_a_text_leaves_out_all_captions_of_its_image_that_read_so(
    small: CaptionDataset, tmp_path: Path
) -> None:
    found = read_filter(write(tmp_path / "f.csv", ("d.png", "twice", "")), small)
    assert found.caption_mask(small, 0).tolist() == [True, True, True, True, False, False]
    assert not found.excluded_images.any()


def test_hands_may_change_spaces_order_and_separators(small: CaptionDataset, tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", ("a.png", "a  grinning face", "x"), ("f.png", "", "y"))
    second = tmp_path / "b.csv"
    second.write_bytes("\ufeffreason;id;caption\r\n;f.png;\r\nmine;a.png;a grinning face \r\n".encode())
    assert read_filter(first, small).key == read_filter(second, small).key
    assert read_filter(second, small).excludes_caption(0, "a  grinning face")
    third = write(tmp_path / "c.csv", ("a.png", "my favourite", "x"), ("f.png", "", "y"))
    assert read_filter(third, small).key != read_filter(first, small).key


def test_a_filter_without_rows_leaves_everything(small: CaptionDataset, tmp_path: Path) -> None:
    found = read_filter(write(tmp_path / "f.csv"), small)
    assert not found.excluded_images.any()
    assert all(found.caption_mask(small, shard).all() for shard in range(2))
    assert found.reason_counts == {}


def test_kept_rows_are_those_of_the_embeddings(collection: CaptionDataset, tmp_path: Path) -> None:
    record = next(record for record in collection if len(record.captions) > 1)
    found = read_filter(write(tmp_path / "f.csv", (record.id, record.captions[1], "test")), collection)
    stored = find_embeddings(collection, None)
    dropped = 0
    for shard in range(stored.num_shards):
        kept, (vectors, ids) = found.caption_mask(collection, shard), stored.load_shard(shard)
        assert kept.shape == (len(vectors),)
        texts = [c for record in collection.samples(shard) for c in record.captions]
        expected = [
            not (collection[int(i)].id == record.id and text == record.captions[1])
            for i, text in zip(ids, texts, strict=True)
        ]
        assert kept.tolist() == expected
        dropped += int((~kept).sum())
    assert dropped == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("id,caption\na.png,\n", "no column `reason`"),
        ("a,b\n1,2\n", "no column `id`, `caption`, `reason`"),
        (
            "id,caption,reason\nx.png,,\na.png,,\ny.png,,\n",
            "2 of its ids are not in .* first is `x.png` .*line 2",
        ),
        (
            "id,caption,reason\na.png,a smiling face,\n",
            "line 2: image `a.png` has no caption `a smiling face`",
        ),
        ("id,caption,reason\na.png,my favourite\n", "line 2: row has too few columns"),
        ('id,caption,reason\na.png,"my favourite,x\n', "line 2: a quotation mark is never closed"),
        ("id,caption,reason\n" + "".join(f"{n}.png,,\n" for n in "abcdef"), "leaves out every image"),
    ],
)
def test_what_is_no_filter_of_this_collection_is_told(
    text: str, told: str, small: CaptionDataset, tmp_path: Path
) -> None:
    (tmp_path / "f.csv").write_text(text)
    with pytest.raises(InvalidInputError, match=told) as fault:
        read_filter(tmp_path / "f.csv", small)
    assert "f.csv" in str(fault.value)
    assert "\n" not in str(fault.value)


def test_other_files_are_told(small: CaptionDataset, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="there is no filter at"):
        read_filter(tmp_path / "nowhere.csv", small)
    with pytest.raises(InvalidInputError, match="there is no filter at"):
        read_filter(tmp_path, small)
    save_png(tmp_path / "picture.csv")
    with pytest.raises(InvalidInputError, match="picture.csv, line 1: not UTF-8"):
        read_filter(tmp_path / "picture.csv", small)


def test_a_full_write_or_none(tmp_path: Path) -> None:
    write_filter(tmp_path / "f.csv", [FilterRow(id="a", caption="", reason="old")])
    before = (tmp_path / "f.csv").read_bytes()

    def broken() -> list[FilterRow]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_filter(tmp_path / "f.csv", (row for _ in range(2) for row in broken()))
    assert (tmp_path / "f.csv").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["f.csv"]


def test_positions_and_masks_are_of_the_promised_types(small: CaptionDataset, tmp_path: Path) -> None:
    found = read_filter(write(tmp_path / "f.csv", ("a.png", "", "x")), small)
    assert found.excluded_images.dtype == np.bool_
    assert found.caption_mask(small, 0).dtype == np.bool_
    assert len(found.key) == 16
