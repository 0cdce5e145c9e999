"""Reader of WebDataset tar archives: members with the same key form a sample; images are read in place."""

import contextlib
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, final

from likewise.data.dataset import ImageRef
from likewise.data.images import is_image_name
from likewise.data.readers.base import (
    ImportOptions,
    SkippedSample,
    reject_table_options,
)
from likewise.data.readers.files import IgnoredFiles, file_type_reason, hidden_reason, walk_files
from likewise.data.readers.folder import image_ids
from likewise.data.readers.sidecars import (
    MAX_SIDECAR_BYTES,
    ImageFile,
    Sidecar,
    SidecarError,
    SidecarReader,
    first_of_each_kind,
    is_sidecar,
    pair_sidecars,
    split_suffix,
    unused_reason,
)
from likewise.errors import InvalidInputError
from likewise.hashing import WHOLE_BYTES, content_fingerprint, hash_strings

COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_TAR_BLOCK_SIZE = 512
_MAX_LINKS = 16  # links that lead to a link
SEVERAL_IMAGES = "several images of one sample share a caption file; set `image_column`"
SEVERAL_CAPTION_FILES = "several caption files of one sample fit the image"
UNCLEAR_REPETITION = "key is repeated, and its caption files fit several images"
_CAPTION_PARTS = frozenset({"caption", "captions", "text", "txt"})  # as in `0.caption.txt`


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """A file of an archive."""

    name: str
    """Name without a leading `./`."""
    offset: int = 0
    """First byte in the archive."""
    size: int = 0
    """Number of bytes."""
    link: str | None = None
    """Name of the member that a link refers to; None for a file, and after links are resolved."""
    error: str | None = None
    """Why the content cannot be read, or None."""
    ignored_reason: str | None = None
    """Why the member is ignored whatever its name ends with, or None."""


def read_members(path: Path) -> tuple[list[TarMember], str | None]:
    """Return the members of an archive except folders, in order, and an error message if it is damaged."""
    members: list[TarMember] = []
    try:
        with path.open("rb") as stream:
            if stream.read(8).startswith(COMPRESSED_MAGIC):
                return [], "archive is compressed"
            stream.seek(0)
            message = _append_members(stream, members)
    except OSError:
        message = "archive cannot be read"
    return _resolve_links(members), message


def _append_members(stream: BinaryIO, members: list[TarMember]) -> str | None:
    try:
        members.extend(map(_to_member, _iter_headers(stream)))
    except tarfile.TarError as error:
        is_truncated = "unexpected end" in str(error)
        return "archive is truncated" if is_truncated else f"archive is damaged: {error}"
    except (ValueError, OverflowError) as error:  # numbers and encodings of extended headers
        return f"archive is damaged: {error}"
    return None


def _iter_headers(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive except folders, reading only their headers.

    Raises:
        tarfile.TarError: if the archive is truncated or damaged.
    """
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        end = stream.seek(0, os.SEEK_END)
        while (member := archive.next()) is not None:
            archive.members = []  # pyrefly: ignore[missing-attribute]  # free the headers
            if member.isreg() and member.offset_data + member.size > end:
                raise tarfile.ReadError("unexpected end of data")
            if not member.isdir():
                yield member
        # tarfile treats a damaged header as the end of the archive; a real end is a block of zeros.
        if os.pread(stream.fileno(), _TAR_BLOCK_SIZE, archive.offset).strip(b"\0"):
            raise tarfile.ReadError("invalid header")


def _to_member(info: tarfile.TarInfo) -> TarMember:
    name = _strip_dot(info.name)
    parts = [part for part in name.split("/") if part not in {"", ".", ".."}]
    ignored_reason = next(filter(None, map(hidden_reason, parts)), None)
    if info.islnk():
        return TarMember(name=name, link=_strip_dot(info.linkname), ignored_reason=ignored_reason)
    if info.issym():
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))
        return TarMember(name=name, link=target, ignored_reason=ignored_reason)
    if not info.isreg():
        return TarMember(name=name, ignored_reason=ignored_reason or "special file")
    error = "sparse member of an archive" if info.issparse() else None
    return TarMember(
        name=name, offset=info.offset_data, size=info.size, error=error, ignored_reason=ignored_reason
    )


def _strip_dot(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _resolve_links(members: list[TarMember]) -> list[TarMember]:
    """Replace links by the byte ranges of the members that they refer to; the last one of a name counts."""
    by_name = {member.name: member for member in members}
    return [member if member.link is None else _resolve_link(member, by_name) for member in members]


def _resolve_link(member: TarMember, by_name: dict[str, TarMember]) -> TarMember:
    target: TarMember | None = member
    for _ in range(_MAX_LINKS):
        if target is None or target.link is None:
            break
        target = by_name.get(target.link)
    if target is None or target.link is not None:
        return replace(member, link=None, error="link to nothing in the archive")
    return replace(member, link=None, offset=target.offset, size=target.size, error=target.error)


Unused = list[tuple[TarMember, str]]
"""Members that no sample uses, with the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TarSample:
    """One image of an archive with its caption files."""

    key: str
    """Unique in the archive."""
    image: TarMember
    sidecars: tuple[TarMember, ...] = ()
    error: str | None = None
    """Why the sample cannot be used, or None."""
    is_repeated: bool = False
    """Whether an earlier sample has the same key."""


@dataclass(slots=True)
class _Group:
    """Members with one key, in the order of the archive."""

    key: str
    members: list[TarMember] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)
    """Number of the uninterrupted run of this key that each member belongs to."""


def group_members(members: Iterable[TarMember], image_column: str | None) -> tuple[list[TarSample], Unused]:
    """Group images and caption files into samples.

    As in WebDataset, the key of a member is its name up to the first dot after the last slash. Members of one
    key form a sample even if others are between them, with these rules:

    - If a member name is repeated, or a key returns with another image and caption file, each uninterrupted
      run of the key is a sample, as in WebDataset. Where a run has no image, the first occurrences of all
      names form a sample, the second ones the next, if every name occurs equally often.
    - Caption files belong to the image with the same name up to the last dot (`v2.0.jpg` and `v2.0.txt`).
    - The only image of a key without such a file owns the remaining ones (`0.image.jpg` and `0.caption.txt`).
    - Beside an image named by the key alone (`0.jpg`), images with further parts (`0.mask.png`) that have no
      caption file of their own are ignored.
    - Other images of one key are samples of their own, unless a remaining caption file fits several of them:
      then `image_column` selects the image.

    Args:
        members: Images and caption files of one archive.
        image_column: Part of the name between the first dot and the suffix of the images to use, or None.

    Returns:
        The samples in the order of their images, and the members that no sample uses.
    """
    members = list(members)
    groups: dict[str, _Group] = {}
    last_key, run = None, 0
    for member in members:
        key = _key(member.name)
        run += key != last_key
        last_key = key
        group = groups.setdefault(key, _Group(key))
        group.members.append(member)
        group.runs.append(run)
    samples: list[TarSample] = []
    unused: Unused = []
    for group in groups.values():
        _add_samples(group, image_column, samples, unused)
    positions = {id(member): position for position, member in enumerate(members)}
    return sorted(samples, key=lambda sample: positions[id(sample.image)]), unused


def _key(name: str) -> str:
    folder, separator, base = name.rpartition("/")
    return folder + separator + base.partition(".")[0]


def _add_samples(group: _Group, image_column: str | None, samples: list[TarSample], unused: Unused) -> None:
    parts, error = _split_repeated(group)
    num_samples: Counter[str] = Counter()
    for part in parts:
        for sample in _pair(group.key, part, image_column, unused):
            num_samples[sample.key] += 1
            number = num_samples[sample.key]
            samples.append(
                replace(
                    sample,
                    key=sample.key if number == 1 else f"{sample.key}#{number}",
                    sidecars=() if error else sample.sidecars,
                    error=error or sample.error,
                    is_repeated=number > 1,
                )
            )


def _split_repeated(group: _Group) -> tuple[list[list[TarMember]], str | None]:
    """Split the members of a key into samples without repeated names, or return an error."""
    by_run: dict[int, list[TarMember]] = {}
    for member, run in zip(group.members, group.runs, strict=True):
        by_run.setdefault(run, []).append(member)
    counts = Counter(member.name for member in group.members)
    is_repeated = max(counts.values()) > 1
    num_captioned = sum(
        _has_image(run) and not all(is_image_name(m.name) for m in run) for run in by_run.values()
    )
    if (is_repeated or num_captioned > 1) and all(_is_complete(run) for run in by_run.values()):
        return list(by_run.values()), None
    if not is_repeated:
        return [group.members], None
    by_repetition: list[list[TarMember]] = [[] for _ in range(max(counts.values()))]
    seen: Counter[str] = Counter()
    for member in group.members:
        by_repetition[seen[member.name]].append(member)
        seen[member.name] += 1
    is_even = len(set(counts.values())) == 1
    return by_repetition, None if is_even else UNCLEAR_REPETITION


def _has_image(members: list[TarMember]) -> bool:
    return any(is_image_name(member.name) for member in members)


def _is_complete(members: list[TarMember]) -> bool:
    """Return whether a run is a sample by itself: it has an image, and no repeated name."""
    return _has_image(members) and len({member.name for member in members}) == len(members)


def _pair(key: str, members: list[TarMember], image_column: str | None, unused: Unused) -> list[TarSample]:
    """Return the samples of the members of one key, whose names are distinct."""
    by_name = {member.name: member for member in members}
    images = [name for name in by_name if is_image_name(name)]
    assigned, remaining = pair_sidecars(images, [name for name in by_name if name not in images])
    selected = _select_images(key, images, assigned, image_column)
    reasons = {name: "another image of a sample" for name in images if name not in selected}
    used = {sidecar for name in selected for sidecar in assigned[name]}
    reasons |= {
        sidecar: "caption file of another image"
        for name in reasons
        for sidecar in assigned[name]
        if sidecar not in used
    }
    errors: dict[str, str] = {}
    ids = image_ids(selected)
    without_sidecar = [name for name in selected if not assigned[name]]
    candidates = [name for name in remaining if _part(key, name) in _CAPTION_PARTS] or remaining
    if len(without_sidecar) == 1 and remaining:
        (image,) = without_sidecar
        assigned[image] = first_of_each_kind(candidates)
        if len(assigned[image]) < len(candidates):
            errors[image] = SEVERAL_CAPTION_FILES
        ids[image] = key if key not in ids.values() else ids[image]
        used.update(candidates)
    elif without_sidecar and remaining:
        errors = dict.fromkeys(without_sidecar, SEVERAL_IMAGES)
        used.update(remaining)
    reasons |= {name: unused_reason(name, images) for name in remaining if name not in used}
    unused += [(by_name[name], reason) for name, reason in reasons.items()]
    return [
        TarSample(
            key=ids[name],
            image=by_name[name],
            sidecars=tuple(by_name[sidecar] for sidecar in assigned[name]),
            error=errors.get(name),
        )
        for name in selected
    ]


def _select_images(
    key: str, images: list[str], assigned: dict[str, list[str]], image_column: str | None
) -> list[str]:
    """Return the images of a key that are samples."""
    if image_column is not None:
        return [name for name in images if image_column in {_part(key, name), name[len(key) + 1 :]}]
    if not any(split_suffix(name)[0] == key for name in images):
        return images
    return [name for name in images if split_suffix(name)[0] == key or assigned[name]]


def _part(key: str, name: str) -> str:
    """Return the part of a member name between the key and the suffix."""
    return split_suffix(name)[0][len(key) + 1 :]


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
