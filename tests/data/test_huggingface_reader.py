"""Hugging Face datasets, saved on disk and from the hub."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from helpers.pictures import Picture, expected_samples, samples_by_id
from likewise.data.importing import import_dataset
from likewise.data.readers import ImportOptions
from likewise.errors import DependencyError, InvalidInputError


def hf_dataset(pictures: list[Picture]) -> datasets.Dataset:
    # A broken image: decoding it on the way would be fatal.
    rows = [*pictures, ("broken", b"no image", "of nothing")]
    columns = {
        "picture": [{"bytes": d, "path": None} for _, d, _ in rows],
        "text": [c for _, _, c in rows],
        "kind": [i % 2 for i in range(len(rows))],
    }
    kinds = datasets.ClassLabel(names=["even", "odd"])
    features = datasets.Features(
        {"picture": datasets.Image(), "text": datasets.Value("string"), "kind": kinds}
    )
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("no_progress_bars")
@pytest.mark.parametrize("splits", [False, True])
def test_saved_dataset(
    tmp_path: Path, pictures: list[Picture], log: pytest.LogCaptureFixture, *, splits: bool
) -> None:
    data: Any = hf_dataset(pictures)
    (datasets.DatasetDict({"test": data.select([0]), "train": data}) if splits else data).save_to_disk(
        tmp_path / "src"
    )
    options = ImportOptions(label_column="kind", where=("kind=odd",))
    dataset = import_dataset(tmp_path / "src", tmp_path / "out", options)
    assert samples_by_id(dataset) == {f"{i:08d}": (pictures[i][1], (pictures[i][2],)) for i in (1, 3, 5)}
    assert [sample.label for sample in dataset] == ["odd"] * 3
    assert ("using split train" in log.messages[0]) == splits
    all_samples = import_dataset(tmp_path / "src", tmp_path / "out2")
    assert len(all_samples) == 6
    assert all_samples.artifact.manifest.skipped == {"not an image": 1}


@pytest.mark.usefixtures("no_progress_bars")
def test_columns_of_other_bytes_lists_and_missing_values(tmp_path: Path, pictures: list[Picture]) -> None:
    """Hashes are no images; lists of classes are names; missing values are absent."""
    data = [{"bytes": d, "path": None} for _, d, _ in pictures[:3]]
    columns = {
        "phash": [b"\1" * 8] * 3,
        "photos": [data[:1], data[1:2], data[:2]],
        "text": ["one", None, "three"],
        "kinds": [[0, 1], [], [1]],
    }
    features = datasets.Features(
        {
            "phash": datasets.Value("binary"),
            "photos": datasets.Sequence(datasets.Image()),
            "text": datasets.Value("string"),
            "kinds": datasets.Sequence(datasets.ClassLabel(names=["even", "odd"])),
        }
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "src")
    imported = import_dataset(tmp_path / "src", tmp_path / "out", ImportOptions(label_column="kinds"))
    assert [(s.captions, s.label) for s in imported] == [(("one",), "even, odd"), ((), None)]
    assert imported.artifact.manifest.skipped == {"row has several images": 1}


@pytest.mark.usefixtures("no_progress_bars")
def test_hub_dataset(tmp_path: Path, pictures: list[Picture], monkeypatch: pytest.MonkeyPatch) -> None:
    """The library loads a local folder by the same call as a name of the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "src").mkdir()
    for split in ("train", "test"):
        hf_dataset(pictures[:2] if split == "test" else pictures).to_parquet(
            tmp_path / "src" / f"{split}.parquet"
        )
    train = import_dataset(f"hf:{tmp_path}/src", tmp_path / "out")
    test = import_dataset(f"hf:{tmp_path}/src:test", tmp_path / "out2")
    assert list(samples_by_id(train).values()) == list(expected_samples(pictures).values())
    assert list(samples_by_id(test).values()) == list(expected_samples(pictures[:2]).values())
    with pytest.raises(InvalidInputError, match="cannot load the dataset"):
        import_dataset(f"hf:{tmp_path}/src:nothing", tmp_path / "out3")
    with pytest.raises(InvalidInputError, match="hf:OWNER/NAME"):
        import_dataset("hf:", tmp_path / "out3")


def test_hub_dataset_without_datasets_library_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("likewise.data.readers.huggingface.find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"pip install 'likewise\[huggingface\]'"):
        import_dataset("hf:a/b", tmp_path / "out")
