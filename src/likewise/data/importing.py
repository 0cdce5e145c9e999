"""Import: any set of captioned images becomes a collection; every image is decoded once, to be sure of it."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from likewise.artifacts import MANIFEST, Artifact, begin, shard_name, write_json, write_text
from likewise.data.dataset import KIND, SHARD_ROWS, Collection, Record, skipped_entries, write_records
from likewise.data.images import BadImageError, decode, read_bytes
from likewise.data.readers import ImportOptions, Source, open_source
from likewise.data.readers.base import Candidate, Entry, Fault, Marks
from likewise.errors import InputError
from likewise.parallel import default_workers, ordered_map
from likewise.progress import SILENT, Progress, Task

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


_BLOCK = 16  # images decoded by a thread before it hands back
_EXAMPLES = 3
_GUESSED = ImportOptions()
_VOLATILE = ("root", "images", "source", "guesses")


def import_collection(
    source: str | Path,
    target: str | Path,
    options: ImportOptions = _GUESSED,
    *,
    shard_rows: int = SHARD_ROWS,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Collection:
    """Make a collection of the captioned images at a path or hub name, and open it.

    Images stay where they are, unless they lie in the rows of a table. Broken ones are left out and
    counted. Run again after a kill, it decodes only what is missing; on a finished target it does nothing.

    Raises:
        InputError: where the source is not there, not of a known format, or without a single usable image.
        ArtifactError: where the target holds something else.
        DependencyError: where a Hugging Face dataset is asked for without its library.
    """
    target = Path(target)
    _check(options, shard_rows)
    opened = open_source(str(source), options)
    for sentence in opened.guesses():
        progress.say(sentence)
    settings = _settings(str(source), opened, options, shard_rows)
    inputs = {"source": opened.fingerprint()}
    found = target.exists()
    artifact = _at_root(begin(target, KIND, settings, inputs, volatile=_VOLATILE), str(opened.root))
    if artifact.complete:
        collection = Collection(target)
        progress.say(f"{target} already holds this collection of {len(collection):,} images; nothing to do.")
        return collection
    work = _Import(target, opened.root, default_workers() if workers is None else workers, shard_rows)
    try:
        work.run(opened, options.limit, progress)
    except InputError:
        if not any(target.glob("records-*.parquet")):
            _undo(target, keep=found)
        raise
    counts, skipped = _tally(target, work.shards)
    if not counts.pop("images"):
        message = _nothing_usable(str(source), target, skipped)
        _undo(target, keep=found)
        raise InputError(message)
    artifact.finish({**counts, "empty_captions": work.gate.empty_captions}, skipped)
    _say_outcome(counts, skipped, progress)
    return Collection(target)


def _check(options: ImportOptions, shard_rows: int) -> None:
    for name, value in (("limit", options.limit), ("shard_rows", shard_rows)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")


def _settings(source: str, opened: Source, options: ImportOptions, shard_rows: int) -> dict[str, Any]:
    """Return what decides the result, and what is only recorded: where things lie, and what was guessed."""
    told = asdict(options) | {"caption_column": list(options.caption_column), "where": list(options.where)}
    told["images"] = None if options.images is None else str(options.images)
    recorded = {"root": str(opened.root), "source": source, "guesses": opened.guesses()}
    return told | {"shard_rows": shard_rows} | recorded


def _at_root(artifact: Artifact, root: str) -> Artifact:
    """Record where the images lie now, should the same source have been moved since."""
    if artifact.manifest.settings["root"] == root:
        return artifact
    manifest = replace(artifact.manifest, settings=artifact.manifest.settings | {"root": root})
    write_json(artifact.path / MANIFEST, asdict(manifest))
    return replace(artifact, manifest=manifest)


@dataclass
class _Import:
    """Writes the shards of one collection."""

    target: Path
    root: Path
    workers: int
    shard_rows: int
    gate: Gate = field(default_factory=Gate)
    shards: int = 0

    def run(self, source: Source, limit: int | None, progress: Progress) -> None:
        """Write every shard that is missing; entries before it are read again, but not their images."""
        total = source.count() if limit is None else min(source.count(), limit)
        entries = map(self.gate.admit, first(source.candidates(), limit))
        done = sum(map(_entries_in, _files(self.target)))
        with progress.task("import", total, "images", done=min(done, total)) as task:
            for index, chunk in enumerate(chunks(entries, self.shard_rows)):
                self.shards = index + 1
                if not (self.target / shard_name("records", index, "parquet")).is_file():
                    self._write(index, chunk, task)

    def _write(self, index: int, chunk: list[Candidate | Fault], task: Task) -> None:
        """Write what was skipped, then the records: a shard whose records are there is whole."""
        records: list[Record] = []
        skipped: list[Fault] = []
        blocks = [chunk[i : i + _BLOCK] for i in range(0, len(chunk), _BLOCK)]
        for looked_at in ordered_map(self._look, blocks, self.workers):
            records += [entry for entry in looked_at if isinstance(entry, Record)]
            skipped += [entry for entry in looked_at if isinstance(entry, Fault)]
            task.advance(len(looked_at), note=f"{len(skipped):,} skipped in this shard" if skipped else None)
        told = self.target / shard_name("skipped", index, "jsonl")
        told.unlink(missing_ok=True)
        if skipped:
            lines = [json.dumps(asdict(fault), sort_keys=True) + "\n" for fault in skipped]
            write_text(told, "".join(lines))
        write_records(self.target / shard_name("records", index, "parquet"), records)

    def _look(self, block: list[Candidate | Fault]) -> list[Record | Fault]:
        return [entry if isinstance(entry, Fault) else _look_at(entry, self.root) for entry in block]


def _look_at(entry: Candidate, root: Path) -> Record | Fault:
    """Decode an image in full, which is the only honest check, and return its record or what is wrong."""
    try:
        height, width, _ = decode(read_bytes(entry.image, root)).shape
    except BadImageError as fault:
        return Fault(id=entry.id, where=entry.where, reason=str(fault))
    return Record(
        id=entry.id,
        image=entry.image,
        captions=entry.captions,
        group=entry.group,
        label=entry.label,
        width=width,
        height=height,
    )


def _files(target: Path) -> list[Path]:
    """Return the files of records and of what was skipped."""
    return [*target.glob("records-*.parquet"), *target.glob("skipped-*.jsonl")]


def _entries_in(path: Path) -> int:
    """Return the number of entries in a file of records or of what was skipped."""
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    return path.read_bytes().count(b"\n")


def _tally(target: Path, shards: int) -> tuple[dict[str, int], dict[str, int]]:
    """Count over all shards, also of earlier runs: records, captions, and what was skipped by reason."""
    counts = Counter(shards=shards, images=0, captions=0, without_caption=0, with_several_captions=0)
    for index in range(shards):
        rows = pq.read_table(target / shard_name("records", index, "parquet"), columns=["captions"])
        lengths = [len(captions) for captions in rows.column("captions").to_pylist()]
        counts["images"] += len(lengths)
        counts["captions"] += sum(lengths)
        counts["without_caption"] += lengths.count(0)
        counts["with_several_captions"] += sum(length > 1 for length in lengths)
    skipped = Counter(told["reason"] for told in skipped_entries(target))
    return dict(counts), dict(sorted(skipped.items()))


def _nothing_usable(source: str, target: Path, skipped: dict[str, int]) -> str:
    """Say what was wrong with most entries, with an example of each fault."""
    example: dict[str, str] = {}
    for entry in skipped_entries(target):
        example.setdefault(entry["reason"], entry["where"].encode("utf-8", "backslashreplace").decode())
    common = sorted(skipped, key=lambda reason: -skipped[reason])[:_EXAMPLES]
    told = [f"{reason} ({skipped[reason]:,} times, such as {example[reason]})" for reason in common]
    return f"not one usable image in {source}: {'; '.join(told) or 'no entry fulfils the conditions'}"


def _undo(target: Path, *, keep: bool) -> None:
    """Remove the folder that this import made, or of one that was there before only what imports write."""
    if not keep:
        shutil.rmtree(target)
        return
    for path in [*_files(target), target / MANIFEST]:
        path.unlink()


def _say_outcome(counts: dict[str, int], skipped: dict[str, int], progress: Progress) -> None:
    if skipped:
        told = "; ".join(
            f"{reason} ({count:,})" for reason, count in sorted(skipped.items(), key=lambda i: -i[1])
        )
        progress.say(f"skipped {sum(skipped.values()):,}: {told}.")
    if not counts["captions"]:
        progress.say(
            "no image has a caption: only pairs of an image with itself can be made of this collection."
        )
