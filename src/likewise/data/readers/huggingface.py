"""Hugging Face datasets, saved on disk or from the hub; images are read as bytes or paths, not decoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import pyarrow as pa

from likewise.data.readers.base import SkippedSample
from likewise.data.readers.tables import Table, TableRow, contains_bytes, holds_images, rows_of_batch
from likewise.errors import DependencyError, InvalidInputError
from likewise.hashing import WHOLE_BYTES, hash_files, hash_strings

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB_PREFIX = "hf:"
_BATCH_SIZE = 64  # small, because rows may contain images


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

    def iter_rows(self, columns: Sequence[str]) -> Iterator[TableRow | SkippedSample]:
        """Yield the rows with the requested columns; class indices are replaced by class names.

        Raises:
            InvalidInputError: if the files of the dataset are damaged.
        """
        if not columns:
            yield from (TableRow(i, f"{self.name} row {i}", {}) for i in range(len(self.hf_dataset)))
            return
        index = 0
        # Arrow values are not decoded, so that a damaged image or sound is no error here.
        dataset = cast("Dataset", self.hf_dataset.select_columns(list(columns)).with_format("arrow"))
        try:
            for batch in dataset.iter(batch_size=_BATCH_SIZE):
                for values in rows_of_batch(cast("pa.Table", batch)):
                    location = f"{self.name} row {index}"
                    if values is None:
                        reason = "row has an invalid value"
                        yield SkippedSample(id=f"{index:08d}", location=location, reason=reason)
                    else:
                        yield TableRow(index, location, self._replace_classes(values))
                    index += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(
                f"{self.name} is damaged after row {index}: {_one_line(error)}", field="source"
            ) from error

    def _replace_classes(self, values: dict[str, Any]) -> dict[str, Any]:
        names = {
            column: _class_name(values[column], self.class_names[column])
            for column in values
            if column in self.class_names
        }
        return values | names


def _class_name(value: Any, class_names: list[str]) -> Any:
    if isinstance(value, list):
        return [_class_name(item, class_names) for item in value]
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
    except Exception as error:  # damaged files raise errors of many types
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
        raise InvalidInputError(
            f"expected hf:OWNER/NAME or hf:OWNER/NAME:SPLIT, got {source}", field="source"
        )
    try:
        loaded = load_dataset(name, split=split or None, streaming=False)
    except Exception as error:  # the library, the hub and the network raise errors of many types
        raise InvalidInputError(
            f"cannot load the dataset {name} from the Hugging Face hub: {_one_line(error)}", field="source"
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
        raise InvalidInputError(
            f"{name} has the splits {', '.join(splits)}; select one with {usage}", field="source"
        )
    message = f"{name}: using split train of {', '.join(splits)}; select another with {usage}"
    return loaded["train"], [message]


def _build_table(hf_dataset: "Dataset", name: str, root: Path, data_fingerprint: str) -> HuggingFaceTable:
    from datasets import ClassLabel  # optional, and slow to import

    features = {
        column: getattr(feature, "feature", feature) for column, feature in hf_dataset.features.items()
    }
    table = HuggingFaceTable(
        name=name,
        root=root,
        hf_dataset=hf_dataset,
        image_columns=frozenset(),
        class_names={
            column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)
        },
        data_fingerprint=data_fingerprint,
    )
    return replace(table, image_columns=frozenset(_find_image_columns(table, features)))


def _find_image_columns(table: HuggingFaceTable, features: dict[str, Any]) -> Iterator[str]:
    """Yield the columns of images: those with the feature `Image`, and those of bytes that are images."""
    from datasets import Image

    for field in table.hf_dataset.features.arrow_schema:
        if isinstance(features[field.name], Image):
            yield field.name
        elif contains_bytes(field.type):
            rows = table.iter_rows([field.name])
            if holds_images(row.values[field.name] for row in rows if isinstance(row, TableRow)):
                yield field.name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
