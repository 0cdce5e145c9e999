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

from likewise.artifacts import Artifact, atomic, open_artifact, shard_name
from likewise.errors import ArtifactError

KIND = "collection"
SHARD_ROWS = 4096
_ROW_GROUP = 512

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
class Record:
    """One captioned image; `captions` may be empty."""

    id: str
    image: ImageRef
    captions: tuple[str, ...]
    group: str | None = None
    label: str | None = None
    width: int
    height: int


def write_records(path: Path, records: list[Record]) -> None:
    """Write one shard of records, whole or not at all."""
    rows = [
        {
            "id": record.id,
            "image": vars(record.image),
            "captions": list(record.captions),
            "group": record.group,
            "label": record.label,
            "width": record.width,
            "height": record.height,
        }
        for record in records
    ]
    with atomic(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary, row_group_size=_ROW_GROUP)


class Collection:
    """A finished collection, read shard by shard; opening it reads no rows."""

    def __init__(self, path: str | Path) -> None:
        """Open the collection at `path`; raises ArtifactError where there is none."""
        self.artifact: Artifact = open_artifact(Path(path), KIND)
        self.path = self.artifact.path

    @classmethod
    def open(cls, source: "str | Path | Collection") -> "Collection":
        """Return the collection itself, or the one at a path."""
        return source if isinstance(source, Collection) else cls(source)

    def __len__(self) -> int:
        return self.starts[-1]

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
    def shards(self) -> list[Path]:
        """The record files, in order."""
        count = self.artifact.manifest.counts["shards"]
        paths = [self.path / shard_name("records", i, "parquet") for i in range(count)]
        for path in paths:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing; import the collection anew into another folder")
        return paths

    @cached_property
    def starts(self) -> list[int]:
        """The index of each shard's first record, and last the number of records."""
        starts = [0]
        for path in self.shards:
            starts.append(starts[-1] + pq.read_metadata(path).num_rows)
        return starts

    def columns(self, shard: int, names: list[str]) -> dict[str, list[Any]]:
        """Read some columns of one shard as Python lists."""
        return pq.read_table(self.shards[shard], columns=names).to_pydict()

    def records(self, shard: int) -> list[Record]:
        """Read one shard of records."""
        return [_record(row) for row in pq.read_table(self.shards[shard]).to_pylist()]

    def __iter__(self) -> Iterator[Record]:
        for shard in range(len(self.shards)):
            yield from self.records(shard)

    def __getitem__(self, index: int) -> Record:
        """Read one record by its position, through a small cache of row groups."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect_right(self.starts, index) - 1
        group, row = divmod(index - self.starts[shard], _ROW_GROUP)
        return _row_group(str(self.shards[shard]), self.key, group)[row]

    def skipped(self) -> Iterator[dict[str, str]]:
        """Yield every entry that was left out, with its `id`, `where` and `reason`."""
        return skipped_entries(self.path)

    def summary(self) -> dict[str, Any]:
        """Return counts as the import found them: images, captions, and what was skipped, by reason."""
        manifest = self.artifact.manifest
        return {"images": len(self), **manifest.counts, "skipped": dict(manifest.skipped)}


def skipped_entries(path: Path) -> Iterator[dict[str, str]]:
    """Yield what the shards of a collection, finished or not, say was left out."""
    for file in sorted(path.glob("skipped-*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _record(row: dict[str, Any]) -> Record:
    return Record(**row | {"image": ImageRef(**row["image"]), "captions": tuple(row["captions"])})


@lru_cache(maxsize=4)  # rows may hold the images themselves
def _row_group(path: str, _key: str, group: int) -> list[Record]:
    return [_record(row) for row in pq.ParquetFile(path).read_row_group(group).to_pylist()]
