"""The collection: one row an image, in Parquet shards; images stay where they are, captions come along."""

import builtins
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from likewise.artifacts import Artifact, atomic_write, shard_name
from likewise.errors import ArtifactError

ARTIFACT_KIND = "dataset"
SHARD_ROWS = 4096
_ROW_GROUP_SIZE = 512

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field(
            "image",
            pa.struct(
                [
                    pa.field("path", pa.string()),
                    pa.field("offset", pa.int64()),
                    pa.field("size", pa.int64()),
                    pa.field("bytes", pa.binary()),
                ]
            ),
            nullable=False,
        ),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("group", pa.string()),
        pa.field("label", pa.string()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """Where an image's bytes lie: a file, a stretch of an archive, or the bytes themselves.

    `path` is relative to the collection's source folder, or absolute.
    """

    path: str | None = None
    offset: int | None = None
    size: int | None = None
    bytes: builtins.bytes | None = None  # the name that Hugging Face uses


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One captioned image; `captions` may be empty."""

    id: str
    image: ImageRef
    captions: tuple[str, ...]
    group: str | None = None
    label: str | None = None
    width: int
    height: int


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write one shard of records, whole or not at all."""
    rows = [
        {
            "id": sample.id,
            "image": vars(sample.image),
            "captions": list(sample.captions),
            "group": sample.group,
            "label": sample.label,
            "width": sample.width,
            "height": sample.height,
        }
        for sample in samples
    ]
    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary, row_group_size=_ROW_GROUP_SIZE)


class CaptionDataset:
    """A finished collection, read shard by shard; opening it reads no rows."""

    def __init__(self, path: str | Path) -> None:
        """Open the collection at `path`; raises ArtifactError where there is none."""
        self.artifact: Artifact = Artifact.open(Path(path), ARTIFACT_KIND)
        self.path = self.artifact.path

    @classmethod
    def open(cls, dataset: "str | Path | CaptionDataset") -> "CaptionDataset":
        """Return the collection itself, or the one at a path."""
        return dataset if isinstance(dataset, CaptionDataset) else cls(dataset)

    def __len__(self) -> int:
        return self.shard_offsets[-1]

    def __repr__(self) -> str:
        return f"Collection({str(self.path)!r}, {len(self):,} images)"

    @property
    def key(self) -> str:
        """The fingerprint of the source and of the settings it was imported with."""
        return self.artifact.manifest.key

    @property
    def root(self) -> Path:
        """The folder that image paths are relative to."""
        return Path(self.artifact.manifest.settings["root"])

    @cached_property
    def shard_paths(self) -> list[Path]:
        """The record files, in order."""
        num_shards = self.artifact.manifest.counts["shards"]
        paths = [self.path / shard_name("samples", i, "parquet") for i in range(num_shards)]
        for path in paths:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing; import the collection anew into another folder")
        return paths

    @cached_property
    def shard_offsets(self) -> list[int]:
        """The index of each shard's first record, and last the number of records."""
        offsets = [0]
        for path in self.shard_paths:
            offsets.append(offsets[-1] + pq.read_metadata(path).num_rows)
        return offsets

    def read_columns(self, shard: int, names: list[str]) -> dict[str, list[Any]]:
        """Read some columns of one shard as Python lists."""
        return pq.read_table(self.shard_paths[shard], columns=names).to_pydict()

    def samples(self, shard: int) -> list[Sample]:
        """Read one shard of records."""
        return [_to_sample(row) for row in pq.read_table(self.shard_paths[shard]).to_pylist()]

    def __iter__(self) -> Iterator[Sample]:
        for shard in range(len(self.shard_paths)):
            yield from self.samples(shard)

    def __getitem__(self, index: int) -> Sample:
        """Read one record by its position, through a small cache of row groups."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect_right(self.shard_offsets, index) - 1
        row_group, row = divmod(index - self.shard_offsets[shard], _ROW_GROUP_SIZE)
        return _read_row_group(str(self.shard_paths[shard]), self.key, row_group)[row]

    def skipped_entries(self) -> Iterator[dict[str, str]]:
        """Yield every entry that was left out, with its `id`, `where` and `reason`."""
        return read_skipped_entries(self.path)

    def summary(self) -> dict[str, Any]:
        """Return counts as the import found them: images, captions, and what was skipped, by reason."""
        manifest = self.artifact.manifest
        return {"images": len(self), **manifest.counts, "skipped": dict(manifest.skipped)}


def read_skipped_entries(path: Path) -> Iterator[dict[str, str]]:
    """Yield what the shards of a collection, finished or not, say was left out."""
    for file in sorted(path.glob("skipped-*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _to_sample(row: dict[str, Any]) -> Sample:
    return Sample(**row | {"image": ImageRef(**row["image"]), "captions": tuple(row["captions"])})


@lru_cache(maxsize=4)  # rows may hold the images themselves
def _read_row_group(path: str, _key: str, row_group: int) -> list[Sample]:
    return [_to_sample(row) for row in pq.ParquetFile(path).read_row_group(row_group).to_pylist()]
