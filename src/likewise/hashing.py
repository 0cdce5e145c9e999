"""Fingerprints of files by content: a copied, moved or touched file keeps its fingerprint."""

import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from likewise.parallel import default_num_workers, prefetch_map

_BLOCK_BYTES = 64 * 2**10
_NUM_BLOCKS = 4
SAMPLED_BYTES = _NUM_BLOCKS * _BLOCK_BYTES
"""Bytes that are read of a large image: 256 KiB."""
WHOLE_BYTES = 64 * 2**20
"""Size up to which annotations and tables are read completely: 64 MiB."""
_COMPRESSED_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".gif"}
)
_FILES_PER_TASK = 64
_CHUNK_BYTES = 2**20


def hash_strings(strings: Iterable[str]) -> str:
    """Hash strings: 16 hexadecimal digits of BLAKE2b."""
    digest = hashlib.blake2b(digest_size=8)
    for string in strings:
        digest.update(string.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def content_fingerprint(path: Path | str, whole_bytes: int | None = None) -> str:
    """Return the size and a hash of the content of a file, or `missing` if it cannot be read.

    A larger file is hashed in four blocks of 64 KiB: its head, its tail, and two evenly spaced between them.

    Args:
        path: The file.
        whole_bytes: Size up to which the file is read completely, in bytes; defaults to 256 KiB for
            compressed images, in which a change of pixels moves the bytes behind it, and else to any size.
    """
    if whole_bytes is None:
        is_compressed = os.path.splitext(path)[1].lower() in _COMPRESSED_SUFFIXES  # noqa: PTH122
        whole_bytes = SAMPLED_BYTES if is_compressed else sys.maxsize
    try:
        # Without O_NONBLOCK, opening a named pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError):
        return "missing"
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return "missing"
        digest = hashlib.blake2b(digest_size=8)
        for offset, length in _byte_ranges(status.st_size, whole_bytes):
            os.lseek(descriptor, offset, os.SEEK_SET)
            stop = offset + length
            while offset < stop and (chunk := os.read(descriptor, min(stop - offset, _CHUNK_BYTES))):
                digest.update(chunk)
                offset += len(chunk)  # noqa: PLW2901  # a read may return fewer bytes
    except OSError:
        return "missing"
    finally:
        os.close(descriptor)
    return f"{status.st_size}:{digest.hexdigest()}"


def _byte_ranges(size: int, whole_bytes: int) -> list[tuple[int, int]]:
    """Return the offsets and lengths of the bytes that are hashed."""
    if size <= max(whole_bytes, SAMPLED_BYTES):
        return [(0, size)]
    last_offset = size - _BLOCK_BYTES
    return [(last_offset * i // (_NUM_BLOCKS - 1), _BLOCK_BYTES) for i in range(_NUM_BLOCKS)]


def hash_files(root: Path, names: Iterable[str], whole_bytes: int | None = None) -> str:
    """Hash the names and the content fingerprints of files: 16 hexadecimal digits of BLAKE2b.

    Files are read by several threads, and the names are consumed while the files are read.

    Args:
        root: Folder that the names are relative to.
        names: Paths of the files; missing files count as such.
        whole_bytes: Size up to which a file is read completely, as in `content_fingerprint`.
    """

    def fingerprint_batch(batch: list[str]) -> list[str]:
        # A Path per file would take as long as reading a small file.
        return [
            part
            for name in batch
            for part in (name, content_fingerprint(os.path.join(root, name), whole_bytes))  # noqa: PTH118
        ]

    batches = prefetch_map(fingerprint_batch, _batches(names), default_num_workers())
    return hash_strings(part for batch in batches for part in batch)


def _batches(names: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(names)
    while batch := list(islice(iterator, _FILES_PER_TASK)):
        yield batch
