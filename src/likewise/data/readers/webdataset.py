"""Reader of WebDataset tar archives: members with the same key form a sample; images are read in place."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from likewise.data.dataset import ImageRef
from likewise.data.images import is_image_name
from likewise.data.readers.base import (
    ImportOptions,
    SkippedSample,
    reject_table_options,
)
from likewise.data.readers.files import IgnoredFiles, file_type_reason, walk_files
from likewise.data.readers.sidecars import (
    MAX_SIDECAR_BYTES,
    ImageFile,
    Sidecar,
    SidecarError,
    SidecarReader,
    is_sidecar,
    split_suffix,
)
from likewise.data.readers.tar_members import COMPRESSED_MAGIC, TarMember, read_members
from likewise.data.readers.tar_samples import TarSample, group_members
from likewise.errors import InvalidInputError
from likewise.hashing import WHOLE_BYTES, content_fingerprint, hash_strings


@final
@dataclass(frozen=True, kw_only=True)
class TarReader(SidecarReader):
    """Reader of tar archives; the archive is the group."""

    archives: tuple[str, ...]
    """Paths relative to the root."""
    is_folder: bool = False
    """Whether the archives are all those below the root; other files there are then counted as ignored."""

    @property
    def name(self) -> str:
        """Name of the archive, or of the folder of several archives."""
        return (
            self.archives[0]
            if len(self.archives) == 1
            else f"{self.root.name} ({len(self.archives)} archives)"
        )

    def count(self) -> int:
        """Return the number of images, from the headers of the archives."""
        image_files = self.iter_image_files(IgnoredFiles(), Counter())
        return sum(isinstance(image_file, ImageFile) for image_file in image_files)

    def fingerprint(self) -> str:
        """Hash the names and the content of the archives; of large ones, the captions and the headers."""
        return hash_strings(
            part for name in self.archives for part in (name, self._archive_fingerprint(name))
        )

    def _archive_fingerprint(self, name: str) -> str:
        path = self.root / name
        parts = [content_fingerprint(path, WHOLE_BYTES)]
        if path.stat().st_size > WHOLE_BYTES:
            for member in read_members(path)[0]:
                parts.append(repr(member))
                if is_sidecar(member.name):
                    with contextlib.suppress(SidecarError):  # it is skipped when it is read again
                        parts.append(repr(self.read_sidecar(_to_sidecar(name, member))))
        return hash_strings(parts)

    def iter_image_files(
        self, ignored: IgnoredFiles, counts: Counter[str]
    ) -> Iterator[ImageFile | SkippedSample]:
        """Yield the images; the headers of one archive are in memory, as its samples may be scattered."""
        if self.is_folder:
            for path in walk_files(self.root, ignored):
                if not is_tar(path):
                    reason = "image outside the archives" if is_image_name(path) else file_type_reason(path)
                    ignored.add(reason, path)
            ignored.num_seen -= len(self.archives)  # their members count instead
        for name in self.archives:
            members, error = read_members(self.root / name)
            yield from self._iter_archive(name, members, ignored, counts)
            if error is not None:
                yield SkippedSample(id=name, location=name, reason=error)

    def _iter_archive(
        self, archive: str, members: list[TarMember], ignored: IgnoredFiles, counts: Counter[str]
    ) -> Iterator[ImageFile | SkippedSample]:
        ignored.num_seen += len(members)
        candidates = []
        for member in members:
            reason = member.ignored_reason
            if reason is None and not (is_image_name(member.name) or is_sidecar(member.name)):
                reason = file_type_reason(member.name)
            if reason is None:
                candidates.append(member)
            else:
                ignored.add(reason, f"{archive}: {member.name}")
        samples, unused = group_members(candidates, self.options.image_column)
        for member, reason in unused:
            ignored.add(reason, f"{archive}: {member.name}")
        counts["caption_files"] += sum(not is_image_name(member.name) for member in candidates) - sum(
            not is_image_name(member.name) for member, _ in unused
        )
        counts["repeated_keys"] += sum(sample.is_repeated for sample in samples)
        for sample in samples:
            yield self._to_image_file(archive, sample)

    def _to_image_file(self, archive: str, sample: TarSample) -> ImageFile | SkippedSample:
        stem = os.path.splitext(archive)[0]  # noqa: PTH122
        location = f"{archive}: {sample.image.name}"
        sample_id = f"{stem}/{sample.key}"
        error = sample.error if sample.image.error is None else sample.image.error
        if error is not None:
            return SkippedSample(id=sample_id, location=location, reason=error)
        return ImageFile(
            id=sample_id,
            location=location,
            image=ImageRef(path=archive, offset=sample.image.offset, size=sample.image.size),
            group=stem.rsplit("/", maxsplit=1)[-1],
            sidecars=tuple(_to_sidecar(archive, member) for member in sample.sidecars),
        )

    def read_sidecar(self, sidecar: Sidecar) -> bytes:
        """Return the content of a caption file.

        Raises:
            SidecarError: if it cannot be read or is too large.
        """
        if (sidecar.size or 0) > MAX_SIDECAR_BYTES:
            raise SidecarError("caption file is too large")
        try:
            with (self.root / sidecar.path).open("rb") as stream:
                return os.pread(stream.fileno(), sidecar.size or 0, sidecar.offset or 0)
        except OSError as error:
            raise SidecarError("caption file cannot be read") from error


def _to_sidecar(archive: str, member: TarMember) -> Sidecar:
    return Sidecar(archive, split_suffix(member.name)[1], member.offset, member.size, member.error)


def is_tar(name: str) -> bool:
    """Return whether a file is a tar archive by its suffix."""
    return split_suffix(name)[1] == ".tar"


def open_tar_archives(paths: list[Path], options: ImportOptions, folder: Path | None = None) -> TarReader:
    """Return the reader of tar archives.

    Args:
        paths: The archives.
        options: The import options.
        folder: The folder, if the archives are all those below it.

    Raises:
        InvalidInputError: if all archives are compressed, or an option requires a table.
    """
    reject_table_options(options, "tar archives contain their images", fields=("images",))
    resolved = [path.resolve() for path in paths]
    compressed = [path for path in resolved if _is_compressed(path)]
    if len(compressed) == len(resolved):
        raise InvalidInputError(
            f"{compressed[0]} is compressed and cannot be read in place; convert it to a plain .tar first",
            path=compressed[0],
        )
    if folder is not None:
        root = folder.resolve()
        archives = tuple(sorted(path.relative_to(folder).as_posix() for path in paths))
    else:
        root = Path(os.path.commonpath([path.parent for path in resolved]))
        archives = tuple(sorted(path.relative_to(root).as_posix() for path in resolved))
    return TarReader(root=root, archives=archives, options=options, is_folder=folder is not None)


def _is_compressed(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(8).startswith(COMPRESSED_MAGIC)
    except OSError:
        return False
