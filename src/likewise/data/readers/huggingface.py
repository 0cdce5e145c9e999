"""Hugging Face datasets, saved on disk or from the hub; images are read as bytes or paths, not decoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from likewise.data.readers.tables import Table, TableRow
from likewise.errors import DependencyError, InvalidInputError
from likewise.hashing import WHOLE_BYTES, hash_files, hash_strings

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB_PREFIX = "hf:"


@final
@dataclass(frozen=True, kw_only=True)
class HuggingFaceTable(Table):
    """A dataset of the `datasets` library."""

    hf_dataset: "Dataset"
    image_columns: frozenset[str]
    class_names: dict[str, list[str]]
    """Class names by column."""
    data_fingerprint: str

    def column_names(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.hf_dataset.column_names)

    def embedded_columns(self) -> frozenset[str]:
        """Return the columns of images."""
        return self.image_columns

    def fingerprint(self) -> str:
        """Return the fingerprint of the files of the dataset."""
        return self.data_fingerprint

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow]:
        """Yield the rows with the requested columns; class indices are replaced by class names."""
        if not columns:
            yield from (TableRow(i, f"{self.name} row {i}", {}) for i in range(len(self.hf_dataset)))
            return
        for index, row in enumerate(self.hf_dataset.select_columns(list(columns))):
            values = cast("dict[str, Any]", row)
            labels = {
                column: _class_name(values[column], self.class_names[column])
                for column in columns
                if column in self.class_names
            }
            yield TableRow(index, f"{self.name} row {index}", values | labels)


def _class_name(value: Any, class_names: list[str]) -> Any:
    return class_names[value] if isinstance(value, int) and 0 <= value < len(class_names) else None


def is_saved_dataset(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    is_single_split = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return is_single_split or (path / "dataset_dict.json").is_file()


def open_saved_dataset(path: Path) -> tuple[HuggingFaceTable, list[str]]:
    """Open a dataset written by `save_to_disk`.

    Returns:
        The table, and messages on the inferred split.

    Raises:
        InvalidInputError: if the folder is damaged, or has several splits without `train`.
    """
    _require_datasets()
    from datasets import load_from_disk  # optional, and slow to import

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInputError(f"cannot open the dataset {path}: {_one_line(error)}", path=path) from error
    files = sorted(file for file in path.rglob("*") if file.is_file())
    data_fingerprint = hash_files(path, (file.relative_to(path).as_posix() for file in files), WHOLE_BYTES)
    hf_dataset, messages = _select_split(loaded, path.name, f"{path}/SPLIT")
    return _build_table(hf_dataset, path.name, path, data_fingerprint), messages


def open_hub_dataset(source: str) -> tuple[HuggingFaceTable, list[str]]:
    """Open a dataset of the hub by `hf:NAME` or `hf:NAME:SPLIT`.

    Returns:
        The table, and messages on the inferred split.

    Raises:
        InvalidInputError: if the dataset or split does not exist or cannot be loaded.
    """
    _require_datasets()
    from datasets import load_dataset  # optional, and slow to import

    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    if not name:
        raise InvalidInputError(f"expected hf:OWNER/NAME or hf:OWNER/NAME:SPLIT, got {source}")
    try:
        loaded = load_dataset(name, split=split or None, streaming=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"cannot load the dataset {name} from the Hugging Face hub: {_one_line(error)}"
        ) from error
    hf_dataset, messages = _select_split(loaded, name, f"hf:{name}:SPLIT")
    return _build_table(
        hf_dataset, name, Path.cwd(), hash_strings([name, str(hf_dataset.split), hf_dataset._fingerprint])
    ), messages


def _require_datasets() -> None:
    if find_spec("datasets") is None:
        raise DependencyError(
            "Hugging Face datasets require the package 'datasets': pip install 'likewise[huggingface]'"
        )


def _select_split(loaded: "Dataset | DatasetDict", name: str, usage: str) -> tuple["Dataset", list[str]]:
    if not isinstance(loaded, dict):
        return loaded, []
    splits = [str(split) for split in loaded]
    if len(splits) == 1:
        return loaded[splits[0]], []
    if "train" not in splits:
        raise InvalidInputError(f"{name} has the splits {', '.join(splits)}; select one with {usage}")
    message = f"{name}: using split train of {', '.join(splits)}; select another with {usage}"
    return loaded["train"], [message]


def _build_table(hf_dataset: "Dataset", name: str, root: Path, data_fingerprint: str) -> HuggingFaceTable:
    from datasets import ClassLabel, Image  # optional, and slow to import

    image_columns = [column for column, feature in hf_dataset.features.items() if isinstance(feature, Image)]
    for column in image_columns:
        hf_dataset = hf_dataset.cast_column(column, Image(decode=False))
    class_names = {
        column: feature.names
        for column, feature in hf_dataset.features.items()
        if isinstance(feature, ClassLabel)
    }
    return HuggingFaceTable(
        name=name,
        root=root,
        hf_dataset=hf_dataset.with_format(None),
        image_columns=frozenset(image_columns),
        class_names=class_names,
        data_fingerprint=data_fingerprint,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
