"""Members of tar archives: names and byte ranges from the headers, with links resolved inside the archive."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from likewise.data.readers.files import hidden_reason

COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_TAR_BLOCK_SIZE = 512
_MAX_LINKS = 16  # links that lead to a link


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
