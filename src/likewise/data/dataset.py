"""The dataset of captioned images: Parquet shards with one row per image, which refer to the image bytes."""

import builtins
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from likewise.artifacts import MANIFEST, Artifact, atomic_write, damaged_as_error, shard_name
from likewise.data.config import BandSelection, select_bands
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
    """Location of an encoded image: a file, a byte range of an archive, or the bytes themselves."""

    path: str | None = None
    """File or archive, relative to the root of the dataset, or absolute."""
    offset: int | None = None
    """First byte in an archive; None for a whole file."""
    size: int | None = None
    """Number of bytes in an archive; None for a whole file."""
    bytes: builtins.bytes | None = None
    """Encoded image; the names `bytes` and `path` are those of Hugging Face datasets."""
    bands: BandSelection | None = None
    """Choice of the bands of TIFF images of several bands; an option of the import."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its captions."""

    id: str
    """Unique in the dataset."""
    image: ImageRef
    """Location of the encoded image."""
    captions: tuple[str, ...]
    """Captions in the order of the source; may be empty."""
    group: str | None = None
    """Group that constrains pairs, such as a subreddit or a year."""
    label: str | None = None
    """Class label, used for evaluation only, unless pairs are sampled by label."""
    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""


def write_samples(path: Path, samples: list[Sample]) -> None:
    """Write one shard of samples atomically."""
    rows = [
        {
            "id": sample.id,
            "image": {name: getattr(sample.image, name) for name in SCHEMA.field("image").type.names},
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
    """An imported dataset, read shard by shard.

    Opening it reads the manifest only. `dataset[i]` returns a `Sample`; iteration yields all samples.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the dataset at a path.

        Raises:
            ArtifactError: if the path holds no complete dataset.
        """
        self.artifact: Artifact = Artifact.open(Path(path), ARTIFACT_KIND)
        self.path = self.artifact.path

    @classmethod
    def open(cls, dataset: "str | Path | CaptionDataset") -> "CaptionDataset":
        """Return the dataset itself, or open the one at a path."""
        return dataset if isinstance(dataset, CaptionDataset) else cls(dataset)

    def __len__(self) -> int:
        return self.shard_offsets[-1]

    def __repr__(self) -> str:
        return f"CaptionDataset({str(self.path)!r}, {len(self):,} images)"

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def key(self) -> str:
        """Fingerprint of the source and of the import settings."""
        return self.artifact.manifest.key

    @property
    def root(self) -> Path:
        """Folder that image paths are relative to."""
        with damaged_as_error(self.path / MANIFEST):
            return Path(self.artifact.manifest.settings["root"])

    @cached_property
    def bands(self) -> BandSelection | None:
        """Choice of the bands of TIFF images of several bands, as imported."""
        settings = self.artifact.manifest.settings
        with damaged_as_error(self.path / MANIFEST):
            return select_bands(tuple(settings["bands"]), tuple(settings["band_percentiles"]))

    def require_images(self) -> None:
        """Check that the folder of the images still exists, unless the images are in the dataset itself.

        Raises:
            ArtifactError: if the folder is missing.
        """
        # `Path.is_dir` raises OSError for long names.
        if not os.path.isdir(self.root) and not (  # noqa: PTH112
            len(self) and self[0].image.bytes is not None
        ):
            raise ArtifactError(
                f"{self.root}, the image folder of {self.path}, does not exist", path=self.root
            )

    @cached_property
    def shard_paths(self) -> list[Path]:
        """Parquet files in order."""
        num_shards = self.artifact.manifest.counts["shards"]
        paths = []
        for index in range(num_shards):  # a damaged number must not fill the memory
            paths.append(self.path / shard_name("samples", index, "parquet"))
            if not paths[-1].is_file():
                raise ArtifactError(f"{paths[-1]} is missing; import the dataset again", path=paths[-1])
        return paths

    @cached_property
    def shard_offsets(self) -> list[int]:
        """Index of the first sample of each shard, followed by the number of samples."""
        offsets = [0]
        for path in self.shard_paths:
            with damaged_as_error(path):
                offsets.append(offsets[-1] + pq.read_metadata(path).num_rows)
        return offsets

    def read_columns(self, shard: int, names: list[str]) -> dict[str, list[Any]]:
        """Read columns of one shard as lists of Python values."""
        with damaged_as_error(self.shard_paths[shard]):
            return pq.read_table(self.shard_paths[shard], columns=names).to_pydict()

    def samples(self, shard: int) -> list[Sample]:
        """Read all samples of one shard."""
        with damaged_as_error(self.shard_paths[shard]):
            return [_to_sample(row, self.bands) for row in pq.read_table(self.shard_paths[shard]).to_pylist()]

    def __iter__(self) -> Iterator[Sample]:
        for shard in range(len(self.shard_paths)):
            yield from self.samples(shard)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample by its index, through a small cache of row groups."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        shard = bisect_right(self.shard_offsets, index) - 1
        row_group, row = divmod(index - self.shard_offsets[shard], _ROW_GROUP_SIZE)
        return _read_row_group(str(self.shard_paths[shard]), self.key, row_group, self.bands)[row]

    def image_refs(self, start: int, stop: int) -> list[ImageRef]:
        """Return the locations of the images from `start` to `stop`, or their bytes if they are embedded."""
        return [self[index].image for index in range(start, stop)]

    def skipped_entries(self) -> Iterator[dict[str, Any]]:
        """Yield each skipped entry of the source with its `id`, `location`, `reason` and `num_captions`."""
        return read_skipped_entries(self.path)

    def summary(self) -> dict[str, Any]:
        """Return the counts of images and captions, and skipped entries and ignored files by reason."""
        manifest = self.artifact.manifest
        reasons = {name: dict(getattr(manifest, name)) for name in ("skipped", "ignored", "ignored_examples")}
        return {"images": len(self), **manifest.counts, **reasons}


def read_skipped_entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the skipped entries of a dataset, complete or not."""
    for file in sorted(path.glob("skipped-*.jsonl")):
        with damaged_as_error(file), file.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _to_sample(row: dict[str, Any], bands: BandSelection | None) -> Sample:
    image = ImageRef(**row["image"], bands=bands)
    return Sample(**row | {"image": image, "captions": tuple(row["captions"])})


@lru_cache(maxsize=4)  # small, because rows may contain image bytes
def _read_row_group(path: str, _key: str, row_group: int, bands: BandSelection | None) -> list[Sample]:
    with damaged_as_error(Path(path)):
        rows = pq.ParquetFile(path).read_row_group(row_group).to_pylist()
        return [_to_sample(row, bands) for row in rows]
