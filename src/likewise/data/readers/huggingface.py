"""Datasets of the Hugging Face library, saved on disk or from the hub; images are not decoded here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from likewise.data.readers.base import digest_of, state_of
from likewise.data.readers.tables import Row, Table
from likewise.errors import DependencyError, InputError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

PREFIX = "hf:"


@final
@dataclass(frozen=True, kw_only=True)
class DatasetTable(Table):
    """A dataset with its image columns told as bytes or paths."""

    data: "Dataset"
    images: frozenset[str]
    classes: dict[str, list[str]]  # the names of the classes, by column
    identity: str

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        return list(self.data.column_names)

    def embedded(self) -> frozenset[str]:
        """Return the columns of images."""
        return self.images

    def digest(self) -> str:
        """Return the identity of the files that the dataset was read from."""
        return self.identity

    def rows(self, wanted: Sequence[str]) -> Iterator[Row]:
        """Yield the rows with the wanted columns; numbers of classes are told by their names."""
        if not wanted:
            yield from (Row(i, f"{self.name} row {i}", {}) for i in range(len(self.data)))
            return
        for number, told in enumerate(self.data.select_columns(list(wanted))):
            values = cast("dict[str, Any]", told)
            named = {c: _class_name(values[c], self.classes[c]) for c in wanted if c in self.classes}
            yield Row(number, f"{self.name} row {number}", values | named)


def _class_name(value: Any, classes: list[str]) -> Any:
    return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else None


def is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    single = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return single or (path / "dataset_dict.json").is_file()


def open_saved(path: Path) -> tuple[DatasetTable, list[str]]:
    """Return a dataset written by `save_to_disk`, and what was guessed about its splits.

    Raises:
        InputError: where the folder is damaged, or has several splits and none is `train`.
    """
    _require()
    from datasets import load_from_disk  # optional, and slow to load

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as fault:
        raise InputError(f"the dataset in {path} cannot be opened: {_line(fault)}") from fault
    files = sorted(file for file in path.rglob("*") if file.is_file())
    identity = digest_of(
        part for file in files for part in (file.relative_to(path).as_posix(), state_of(file))
    )
    data, told = _one_split(loaded, path.name, f"{path}/SPLIT")
    return _table(data, path.name, path, identity), told


def open_hub(source: str) -> tuple[DatasetTable, list[str]]:
    """Return a dataset of the hub, told as `hf:NAME` or `hf:NAME:SPLIT`, and what was guessed of its splits.

    Raises:
        InputError: where there is no such dataset or split, or it cannot be reached.
    """
    _require()
    from datasets import load_dataset  # optional, and slow to load

    name, _, split = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise InputError("a dataset of the hub is named as hf:OWNER/NAME or hf:OWNER/NAME:SPLIT")
    try:
        loaded = load_dataset(name, split=split or None, streaming=False)
    except (OSError, ValueError, RuntimeError) as fault:
        raise InputError(f"the dataset {name} cannot be loaded from the hub: {_line(fault)}") from fault
    data, told = _one_split(loaded, name, f"hf:{name}:SPLIT")
    return _table(data, name, Path.cwd(), digest_of([name, str(data.split), data._fingerprint])), told


def _require() -> None:
    if find_spec("datasets") is None:
        raise DependencyError(
            "Hugging Face datasets need the package `datasets`: pip install 'likewise[huggingface]'"
        )


def _one_split(loaded: "Dataset | DatasetDict", name: str, form: str) -> tuple["Dataset", list[str]]:
    if not isinstance(loaded, dict):
        return loaded, []
    splits = [str(split) for split in loaded]
    if len(splits) == 1:
        return loaded[splits[0]], []
    if "train" not in splits:
        raise InputError(f"{name} has the splits {', '.join(splits)}; name one, as {form}")
    return loaded["train"], [
        f"{name}: of the splits {', '.join(splits)}, train is taken; another is named as {form}."
    ]


def _table(data: "Dataset", name: str, folder: Path, identity: str) -> DatasetTable:
    from datasets import ClassLabel, Image  # optional, and slow to load

    images = [column for column, kind in data.features.items() if isinstance(kind, Image)]
    for column in images:
        data = data.cast_column(column, Image(decode=False))
    classes = {column: kind.names for column, kind in data.features.items() if isinstance(kind, ClassLabel)}
    return DatasetTable(
        name=name,
        folder=folder,
        data=data.with_format(None),
        images=frozenset(images),
        classes=classes,
        identity=identity,
    )


def _line(fault: Exception) -> str:
    return " ".join(str(fault).split())
