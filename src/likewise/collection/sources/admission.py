"""Entries of a source on their way into shards: each id once, captions tidied, cut the same every time."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from likewise.collection.sources.candidates import Candidate, Entry, Fault
from likewise.collection.sources.marks import Marks

_SHARD_BYTES = 256 * 2**20  # images that lie in the source's rows make a shard end early


@dataclass
class Gate:
    """Lets each id pass once, with text that Parquet can hold; counts captions that were empty."""

    seen: Marks = field(default_factory=Marks)
    empty_captions: int = 0

    def admit(self, entry: Entry) -> Entry:
        """Return the entry made tidy, or why it cannot pass."""
        if isinstance(entry, Fault):
            return entry
        fault = _unfit(entry)
        mark = int.from_bytes(hashlib.blake2b(_bytes(entry.id), digest_size=8).digest())
        if fault is None and not self.seen.add(mark):
            fault = "id occurs twice"
        if fault is not None:
            return Fault(id=entry.id, where=entry.where, reason=fault)
        captions = [tidy(caption) for caption in entry.captions]
        self.empty_captions += captions.count("")
        return replace(entry, captions=tuple(filter(None, captions)))


def tidy(caption: str) -> str:
    """Return a caption as one line; characters that UTF-8 cannot hold become question marks."""
    line = " ".join(part.strip() for part in caption.splitlines() if part.strip())
    return line.encode("utf-8", "replace").decode()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _unfit(entry: Candidate) -> str | None:
    """Return why no image can be looked for under the names in an entry, if so."""
    path = entry.image.path or ""
    if "\0" in path:
        return "file name holds a NUL character"
    if "://" in path:
        return "image is a web address, not a file"
    named = (entry.id, path, entry.group or "", entry.label or "")
    if any(_bytes(name) != name.encode("utf-8", "replace") for name in named):
        return "name is not UTF-8"
    return None


def first(entries: Iterable[Entry], limit: int | None) -> Iterator[Entry]:
    """Yield entries up to the last of `limit` candidates."""
    count = 0
    for entry in entries:
        yield entry
        count += isinstance(entry, Candidate)
        if count == limit:
            return


def chunks(entries: Iterable[Entry], rows: int) -> Iterator[list[Entry]]:
    """Cut entries into shards by number and by the bytes that lie in them, the same way every time."""
    chunk: list[Entry] = []
    weight = 0
    for entry in entries:
        chunk.append(entry)
        weight += len(entry.image.bytes or b"") if isinstance(entry, Candidate) else 0
        if len(chunk) == rows or weight >= _SHARD_BYTES:
            yield chunk
            chunk, weight = [], 0
    if chunk:
        yield chunk
