"""Tar archives in the manner of WebDataset: members of one name are a sample; read in place."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, final

from likewise.data.dataset import ImageRef
from likewise.data.images import SUFFIXES
from likewise.data.readers.base import (
    KINDS,
    MAX_SIZE,
    Columns,
    Entry,
    Fault,
    ImportOptions,
    SidecarError,
    Source,
    digest_of,
    sidecar_columns,
    state_of,
    told_beside,
)
from likewise.errors import InputError

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class _Sample:
    """Where the parts of a sample lie in an archive: offset and size of the image and of what tells of it."""

    images: list[tuple[int, int]] = field(default_factory=list)
    beside: dict[str, tuple[int, int]] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class TarSource(Source):
    """The images in tar archives; the archive is their group."""

    archives: tuple[str, ...]  # relative to the root
    parts: Columns

    def guesses(self) -> list[str]:
        """Return where captions are looked for."""
        keys = " or ".join(f"`{key}`" for key in self.parts.captions)
        what = self.archives[0] if len(self.archives) == 1 else f"{len(self.archives)} archives"
        return [f"{what}: captions are taken from {keys} in a sample's .json, or from its .txt."]

    def count(self) -> int:
        """Return the number of samples with an image, from the headers in the archives."""
        return sum(
            bool(s.images) for name in self.archives for s in _read_headers(self.root / name)[0].values()
        )

    def fingerprint(self) -> str:
        """Return a digest of the name, size and time of every archive."""
        return digest_of(part for name in self.archives for part in (name, state_of(self.root / name)))

    def candidates(self) -> Iterator[Entry]:
        """Yield the samples; headers are held an archive at a time, as parts of a sample may lie apart."""
        for name in self.archives:
            samples, fault = _read_headers(self.root / name)
            for key, sample in samples.items():
                if sample.images and not _is_further_view(key, sample, samples):
                    entry = self._entry(name, key, sample)
                    if entry is not None:
                        yield entry
            if fault is not None:
                yield Fault(id=name, where=name, reason=fault)

    def _entry(self, archive: str, key: str, sample: _Sample) -> Entry | None:
        stem = archive.removesuffix(".tar")
        name, where = f"{stem}/{key}", f"{archive}: {key}"
        offset, size = sample.images[0]
        try:
            values = told_beside(
                *(self._read(archive, sample.beside.get(kind)) for kind in (".json", ".txt"))
            )
            if not self.parts.keep(values):
                return None
        except SidecarError as fault:
            return Fault(id=name, where=where, reason=str(fault))
        except ValueError:
            return Fault(id=name, where=where, reason="a condition's key holds no text")
        image = ImageRef(path=archive, offset=offset, size=size)
        return self.parts.candidate(values, image, name, where, stem.rsplit("/", maxsplit=1)[-1])

    def _read(self, archive: str, stretch: tuple[int, int] | None) -> bytes | None:
        if stretch is None:
            return None
        if stretch[1] > MAX_SIZE:
            raise SidecarError("caption file is too large")
        try:
            with (self.root / archive).open("rb") as stream:
                return os.pread(stream.fileno(), stretch[1], stretch[0])
        except OSError as fault:
            raise SidecarError("caption file cannot be read") from fault


def _is_further_view(key: str, sample: _Sample, samples: dict[str, _Sample]) -> bool:
    """Whether `a.mask.png` belongs to a sample `a`, as WebDataset has it, and is no image of its own."""
    folder, slash, name = key.rpartition("/")
    first = folder + slash + name.partition(".")[0]
    return not sample.beside and first != key and first in samples and bool(samples[first].images)


def _read_headers(path: Path) -> tuple[dict[str, _Sample], str | None]:
    """Return an archive's samples by name, in order, and what is wrong with the archive, if anything."""
    samples: dict[str, _Sample] = {}
    fault = None
    try:
        with path.open("rb") as stream:
            try:
                for member in _members(stream):
                    _place(member, samples)
            except tarfile.TarError as error:
                fault = (
                    "archive is cut short"
                    if "unexpected end" in str(error)
                    else f"archive is damaged: {error}"
                )
    except OSError:
        fault = "archive cannot be read"
    return samples, fault


def _members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the files in an archive from their headers alone.

    Raises:
        tarfile.TarError: where the archive ends early or is damaged.
    """
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        end = stream.seek(0, os.SEEK_END)
        while (member := archive.next()) is not None:
            archive.members = []  # pyrefly: ignore[missing-attribute]  # or every header would be kept
            if member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            if member.isfile() and not member.issparse():
                yield member
        # tarfile takes a damaged header for the end of the archive; the true end is a block of zeros.
        if os.pread(stream.fileno(), _BLOCK, archive.offset).strip(b"\0"):
            raise tarfile.ReadError("no header where one should be")


def _place(member: tarfile.TarInfo, samples: dict[str, _Sample]) -> None:
    stem, suffix = os.path.splitext(member.name)  # noqa: PTH122
    if os.path.basename(stem).startswith("."):  # noqa: PTH119
        return
    stretch = (member.offset_data, member.size)
    if suffix.lower() in SUFFIXES:
        samples.setdefault(stem, _Sample()).images.append(stretch)
    elif suffix.lower() in KINDS:
        samples.setdefault(stem, _Sample()).beside[suffix.lower()] = stretch


def open_tars(paths: list[Path], options: ImportOptions) -> TarSource:
    """Return the images in tar archives.

    Raises:
        InputError: where an archive is compressed, or options have no meaning for archives.
    """
    if options.image_column is not None or options.images is not None:
        raise InputError("tar archives hold their images themselves: leave out --image-column and --images")
    resolved = [path.resolve() for path in paths]
    for path in resolved:
        with path.open("rb") as stream:
            head = stream.read(8)
        if head.startswith(_COMPRESSED):
            raise InputError(
                f"{path} is compressed, so images cannot be read in place; unpack it to a plain .tar first"
            )
    root = Path(os.path.commonpath([path.parent for path in resolved]))
    names = tuple(sorted(path.relative_to(root).as_posix() for path in resolved))
    return TarSource(root=root, archives=names, parts=sidecar_columns(options))
