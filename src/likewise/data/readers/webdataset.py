"""Reader of WebDataset tar archives: members with the same stem form a sample; images are read in place."""

import contextlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, final

from likewise.data.dataset import ImageRef
from likewise.data.images import IMAGE_SUFFIXES
from likewise.data.readers.base import (
    MAX_SIDECAR_BYTES,
    SIDECAR_SUFFIXES,
    ColumnMapping,
    Entry,
    ImportOptions,
    Reader,
    SidecarError,
    SkippedSample,
    read_sidecar,
    reject_table_options,
    sidecar_columns,
)
from likewise.errors import InvalidInputError
from likewise.hashing import WHOLE_BYTES, content_fingerprint, hash_strings

_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_TAR_BLOCK_SIZE = 512


@dataclass(frozen=True, slots=True)
class _TarSample:
    """Offsets and sizes of the images and caption files of a sample in an archive."""

    images: list[tuple[int, int]] = field(default_factory=list)
    sidecars: dict[str, tuple[int, int]] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class TarReader(Reader):
    """Reader of tar archives; the archive is the group."""

    archives: tuple[str, ...]
    """Paths relative to the root."""
    columns: ColumnMapping

    def inferred_settings(self) -> list[str]:
        """Return a message on the source of the captions."""
        keys = " or ".join(map(repr, self.columns.captions))
        source_name = self.archives[0] if len(self.archives) == 1 else f"{len(self.archives)} archives"
        return [f"{source_name}: captions are {keys} of the .json member of a sample, or its .txt member"]

    def count(self) -> int:
        """Return the number of samples with an image, from the headers of the archives."""
        return sum(
            bool(sample.images)
            for name in self.archives
            for sample in _read_headers(self.root / name)[0].values()
        )

    def fingerprint(self) -> str:
        """Hash the names and the content of the archives; of large ones, the captions and the headers."""
        return hash_strings(
            part for name in self.archives for part in (name, self._archive_fingerprint(name))
        )

    def _archive_fingerprint(self, name: str) -> str:
        path = self.root / name
        parts = [content_fingerprint(path, WHOLE_BYTES)]
        if path.stat().st_size > WHOLE_BYTES:
            for key, sample in _read_headers(path)[0].items():
                parts += [key, repr(sample)]
                for byte_range in sample.sidecars.values():
                    with contextlib.suppress(SidecarError):  # it is skipped when it is read again
                        parts.append(repr(self._read_sidecar_bytes(name, byte_range)))
        return hash_strings(parts)

    def iter_samples(self) -> Iterator[Entry]:
        """Yield the samples; the headers of one archive are in memory, as its samples may be scattered."""
        for name in self.archives:
            samples, error = _read_headers(self.root / name)
            for key, sample in samples.items():
                if sample.images and not _is_extra_view(key, sample, samples):
                    entry = self._make_entry(name, key, sample)
                    if entry is not None:
                        yield entry
            if error is not None:
                yield SkippedSample(id=name, location=name, reason=error)

    def _make_entry(self, archive: str, key: str, sample: _TarSample) -> Entry | None:
        stem = archive.removesuffix(".tar")
        default_id, location = f"{stem}/{key}", f"{archive}: {key}"
        offset, size = sample.images[0]
        try:
            values = read_sidecar(
                *(
                    self._read_sidecar_bytes(archive, sample.sidecars.get(suffix))
                    for suffix in (".json", ".txt")
                )
            )
            if not self.columns.matches(values):
                return None
        except SidecarError as error:
            return SkippedSample(id=default_id, location=location, reason=str(error))
        except ValueError:
            reason = "value of a `where` column is not text"
            return SkippedSample(id=default_id, location=location, reason=reason)
        image = ImageRef(path=archive, offset=offset, size=size)
        return self.columns.build_sample(
            values, image, default_id, location, stem.rsplit("/", maxsplit=1)[-1]
        )

    def _read_sidecar_bytes(self, archive: str, byte_range: tuple[int, int] | None) -> bytes | None:
        if byte_range is None:
            return None
        if byte_range[1] > MAX_SIDECAR_BYTES:
            raise SidecarError("caption file is too large")
        try:
            with (self.root / archive).open("rb") as stream:
                return os.pread(stream.fileno(), byte_range[1], byte_range[0])
        except OSError as error:
            raise SidecarError("caption file cannot be read") from error


def _is_extra_view(key: str, sample: _TarSample, samples: dict[str, _TarSample]) -> bool:
    """Return whether an image such as `a.mask.png` belongs to the sample `a`, as in WebDataset."""
    folder, separator, name = key.rpartition("/")
    main_key = folder + separator + name.partition(".")[0]
    return not sample.sidecars and main_key != key and main_key in samples and bool(samples[main_key].images)


def _read_headers(path: Path) -> tuple[dict[str, _TarSample], str | None]:
    """Return the samples of an archive by key, in order, and an error message if it is damaged."""
    samples: dict[str, _TarSample] = {}
    message = None
    try:
        with path.open("rb") as stream:
            try:
                for member in _iter_members(stream):
                    _add_member(member, samples)
            except tarfile.TarError as error:
                message = (
                    "archive is truncated"
                    if "unexpected end" in str(error)
                    else f"archive is damaged: {error}"
                )
    except OSError:
        message = "archive cannot be read"
    return samples, message


def _iter_members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the files of an archive, reading only their headers.

    Raises:
        tarfile.TarError: if the archive is truncated or damaged.
    """
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        end = stream.seek(0, os.SEEK_END)
        while (member := archive.next()) is not None:
            archive.members = []  # pyrefly: ignore[missing-attribute]  # free the headers
            if member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            if member.isfile() and not member.issparse():
                yield member
        # tarfile treats a damaged header as the end of the archive; a real end is a block of zeros.
        if os.pread(stream.fileno(), _TAR_BLOCK_SIZE, archive.offset).strip(b"\0"):
            raise tarfile.ReadError("invalid header")


def _add_member(member: tarfile.TarInfo, samples: dict[str, _TarSample]) -> None:
    stem, suffix = os.path.splitext(member.name)  # noqa: PTH122
    if os.path.basename(stem).startswith("."):  # noqa: PTH119
        return
    byte_range = (member.offset_data, member.size)
    if suffix.lower() in IMAGE_SUFFIXES:
        samples.setdefault(stem, _TarSample()).images.append(byte_range)
    elif suffix.lower() in SIDECAR_SUFFIXES:
        samples.setdefault(stem, _TarSample()).sidecars[suffix.lower()] = byte_range


def open_tar_archives(paths: list[Path], options: ImportOptions) -> TarReader:
    """Return the reader of tar archives.

    Raises:
        InvalidInputError: if an archive is compressed, or an option requires a table.
    """
    reject_table_options(options, "tar archives contain their images")
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        with path.open("rb") as stream:
            head = stream.read(8)
        if head.startswith(_COMPRESSED_MAGIC):
            raise InvalidInputError(
                f"{path} is compressed and cannot be read in place; convert it to a plain .tar first",
                path=path,
            )
    root = Path(os.path.commonpath([path.parent for path in resolved]))
    archives = tuple(sorted(path.relative_to(root).as_posix() for path in resolved))
    return TarReader(root=root, archives=archives, columns=sidecar_columns(options))
