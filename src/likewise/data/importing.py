"""Import of captioned images of any format into a dataset; every image is decoded once to validate it."""

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from likewise.artifacts import MANIFEST, Artifact, shard_name, write_json, write_text
from likewise.data.config import BandSelection
from likewise.data.dataset import (
    ARTIFACT_KIND,
    SHARD_ROWS,
    CaptionDataset,
    Sample,
    read_skipped_entries,
    write_samples,
)
from likewise.data.images import UnreadableImageError, decode_image, read_image_bytes
from likewise.data.readers import ImportOptions, Reader, open_reader
from likewise.data.readers.base import Entry, RawSample, SkippedSample, UInt64Set
from likewise.data.readers.files import IgnoredFiles
from likewise.errors import InvalidInputError
from likewise.parallel import default_num_workers, prefetch_map
from likewise.progress import NULL_PROGRESS, Progress, ProgressBar
from likewise.strings import count_noun

logger = logging.getLogger(__name__)

_SHARD_BYTES = 256 * 2**20  # maximum bytes of embedded images per shard


@dataclass
class SampleValidator:
    """Rejects duplicate ids and invalid names, normalizes captions, and counts empty captions."""

    seen_ids: UInt64Set = field(default_factory=UInt64Set)
    num_empty_captions: int = 0

    def check(self, entry: Entry) -> Entry:
        """Return the sample with normalized captions, or a skipped sample with the reason."""
        if isinstance(entry, SkippedSample):
            return entry
        reason = _reject_reason(entry)
        id_hash = int.from_bytes(hashlib.blake2b(_encode_utf8(entry.id), digest_size=8).digest())
        if reason is None and not self.seen_ids.add(id_hash):
            reason = "duplicate id"
        if reason is not None:
            return _skip(entry, reason)
        captions = [normalize_caption(caption) for caption in entry.captions]
        self.num_empty_captions += captions.count("")
        return replace(entry, captions=tuple(filter(None, captions)))


def _skip(entry: RawSample, reason: str, location: str | None = None) -> SkippedSample:
    return SkippedSample(
        id=entry.id,
        location=entry.location if location is None else location,
        reason=reason,
        num_captions=len(entry.captions),
    )


def normalize_caption(caption: str) -> str:
    """Return a caption as one line; characters that UTF-8 cannot encode become question marks."""
    line = " ".join(part.strip() for part in caption.splitlines() if part.strip())
    return line.encode("utf-8", "replace").decode()


def _encode_utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _reject_reason(entry: RawSample) -> str | None:
    """Return the reason to reject the names in an entry, or None if they are valid."""
    path = entry.image.path or ""
    if "\0" in path:
        return "file name contains a NUL character"
    if path.startswith("data:image/") or (len(path) > 255 and path.startswith(_BASE64_STARTS)):
        return "image is base64 text, not a file"
    if "://" in path:
        return "image is a URL, not a file"
    names = (entry.id, path, entry.group or "", entry.label or "")
    if any(_encode_utf8(name) != name.encode("utf-8", "replace") for name in names):
        return "name is not UTF-8"
    return None


def take(entries: Iterable[Entry], limit: int | None) -> Iterator[Entry]:
    """Yield entries up to and including the sample number `limit`."""
    num_samples = 0
    for entry in entries:
        yield entry
        num_samples += isinstance(entry, RawSample)
        if num_samples == limit:
            return


def shard_chunks(entries: Iterable[Entry], shard_rows: int) -> Iterator[list[Entry]]:
    """Split entries into shards by their number and the size of embedded images, deterministically."""
    chunk: list[Entry] = []
    num_bytes = 0
    for entry in entries:
        chunk.append(entry)
        num_bytes += len(entry.image.bytes or b"") if isinstance(entry, RawSample) else 0
        if len(chunk) == shard_rows or num_bytes >= _SHARD_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


_DECODE_BATCH_SIZE = 16  # images per task of a worker thread
_NUM_EXAMPLES = 3
_MAX_PATH_CHARS = 300
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # of JPEG, PNG, GIF and WebP files
_DEFAULT_OPTIONS = ImportOptions()
# Counts of a reader that a user may have to act on.
COUNT_MESSAGES = {
    "rows_excluded_by_where": "{:,} rows do not match `where`",
    "repeated_keys": "{:,} samples repeat the key of an earlier one in their archive; ids end in #2, ...",
    "joined_captions": "{:,} text files have several lines, which were joined; see `caption_lines`",
    "unused_text_files": "{:,} text files were not used, because `caption_column` names other keys",
    "overridden_captions": "{:,} text files differ from the captions of the .json file, which were used",
}
_NON_HASHED = ("root", "images", "source", "inferred")


def import_dataset(
    source: str | Path,
    target: str | Path,
    options: ImportOptions = _DEFAULT_OPTIONS,
    *,
    shard_rows: int = SHARD_ROWS,
    num_workers: int | None = None,
    progress: Progress = NULL_PROGRESS,
) -> CaptionDataset:
    """Import captioned images as a dataset.

    The dataset refers to the image files in place; images that are embedded in a table are copied. Unreadable
    images are skipped and counted. An interrupted import resumes; a complete one is returned as it is.

    Args:
        source: A folder, table, tar archive, glob pattern, saved Hugging Face dataset, or `hf:NAME`.
        target: The dataset directory to create.
        options: How to read the source.
        shard_rows: Maximum number of samples per shard.
        num_workers: Threads that decode images; defaults to the number of CPU cores.
        progress: Receives the progress.

    Raises:
        InvalidInputError: if the source does not exist, has an unknown format, or has no readable image.
        ArtifactError: if the target holds something else.
        DependencyError: if a Hugging Face dataset is imported and `datasets` is not installed.
    """
    target = Path(target)
    if shard_rows < 1:
        raise InvalidInputError(f"`shard_rows` must be at least 1, got {shard_rows}", field="shard_rows")
    reader = open_reader(str(source), options)
    for inferred in reader.inferred_settings():
        logger.info(inferred)
    settings = _import_settings(str(source), reader, options, shard_rows)
    inputs = {"source": reader.fingerprint()}
    existed = target.exists()
    num_workers = default_num_workers() if num_workers is None else num_workers
    importer = _Importer(target, reader.root, num_workers, shard_rows, options.band_selection)
    with Artifact.exclusive(target, ARTIFACT_KIND, settings, inputs, non_hashed=_NON_HASHED) as opened:
        artifact = _update_root(opened, str(reader.root))
        if artifact.is_complete:
            dataset = CaptionDataset(target)
            logger.info(f"{target} is already complete: {len(dataset):,} images")
            return dataset
        try:
            importer.run(reader, options.limit, progress)
        except InvalidInputError:
            if not any(target.glob("samples-*.parquet")):
                _remove_output(target, keep_dir=existed)
            raise
        counts, skipped = _count_samples(target, importer.num_shards)
        if not counts.pop("images"):
            message = _no_usable_message(str(source), target, skipped, reader.ignored)
            _remove_output(target, keep_dir=existed)
            raise InvalidInputError(message, path=Path(source))
        counts |= {"empty_captions": importer.validator.num_empty_captions, **_reader_counts(reader)}
        artifact.finish(counts, skipped, reader.ignored.counts, reader.ignored.examples)
    dataset = CaptionDataset(target)
    _log_summary(dataset, counts, skipped, reader.ignored)
    return dataset


def _import_settings(source: str, reader: Reader, options: ImportOptions, shard_rows: int) -> dict[str, Any]:
    """Return the settings of the manifest: those that determine the result, and those in `_NON_HASHED`."""
    settings = asdict(options) | {
        "caption_column": list(options.caption_column),
        "where": list(options.where),
        "bands": list(options.bands),
        "band_percentiles": list(options.band_percentiles),
    }
    settings["images"] = None if options.images is None else str(options.images)
    recorded = {"root": str(reader.root), "source": source, "inferred": reader.inferred_settings()}
    return settings | {"shard_rows": shard_rows} | recorded


def _update_root(artifact: Artifact, root: str) -> Artifact:
    """Update the recorded image folder if the same source was moved."""
    if artifact.manifest.settings["root"] == root:
        return artifact
    manifest = replace(artifact.manifest, settings=artifact.manifest.settings | {"root": root})
    write_json(artifact.path / MANIFEST, asdict(manifest))
    return replace(artifact, manifest=manifest)


@dataclass
class _Importer:
    """Writes the shards of one dataset."""

    target: Path
    root: Path
    num_workers: int
    shard_rows: int
    bands: BandSelection | None
    validator: SampleValidator = field(default_factory=SampleValidator)
    num_shards: int = 0

    def run(self, reader: Reader, limit: int | None, progress: Progress) -> None:
        """Write the missing shards; the entries of complete shards are read again, but not their images."""
        total = reader.count() if limit is None else min(reader.count(), limit)
        entries = map(self.validator.check, take(reader.iter_samples(), limit))
        num_done = sum(map(_count_entries, _shard_files(self.target)))
        with progress.task("import", total, "images", completed=min(num_done, total)) as bar:
            for index, chunk in enumerate(shard_chunks(entries, self.shard_rows)):
                self.num_shards = index + 1
                if not (self.target / shard_name("samples", index, "parquet")).is_file():
                    self._write_shard(index, chunk, bar)

    def _write_shard(self, index: int, chunk: list[RawSample | SkippedSample], bar: ProgressBar) -> None:
        """Write the skipped entries, then the samples: a shard is complete if its samples exist."""
        samples: list[Sample] = []
        skipped: list[SkippedSample] = []
        batches = [chunk[i : i + _DECODE_BATCH_SIZE] for i in range(0, len(chunk), _DECODE_BATCH_SIZE)]
        for decoded in prefetch_map(self._decode_batch, batches, self.num_workers):
            samples += [entry for entry in decoded if isinstance(entry, Sample)]
            skipped += [entry for entry in decoded if isinstance(entry, SkippedSample)]
            bar.update(len(decoded), postfix=f"{len(skipped):,} skipped in this shard" if skipped else None)
        skipped_path = self.target / shard_name("skipped", index, "jsonl")
        skipped_path.unlink(missing_ok=True)
        if skipped:
            lines = [json.dumps(asdict(skipped_sample), sort_keys=True) + "\n" for skipped_sample in skipped]
            write_text(skipped_path, "".join(lines))
        write_samples(self.target / shard_name("samples", index, "parquet"), samples)

    def _decode_batch(self, batch: list[RawSample | SkippedSample]) -> list[Sample | SkippedSample]:
        return [
            entry if isinstance(entry, SkippedSample) else _decode_sample(entry, self.root, self.bands)
            for entry in batch
        ]


def _decode_sample(entry: RawSample, root: Path, bands: BandSelection | None) -> Sample | SkippedSample:
    """Validate an image by decoding it in full."""
    try:
        height, width, _ = decode_image(read_image_bytes(entry.image, root), bands=bands).shape
    except UnreadableImageError as error:
        location = entry.location
        if entry.image.path is not None and entry.image.path not in location:
            location = f"{location}: {str(root / entry.image.path)[:_MAX_PATH_CHARS]}"
        return _skip(entry, str(error), location)
    return Sample(
        id=entry.id,
        image=entry.image,
        captions=entry.captions,
        group=entry.group,
        label=entry.label,
        width=width,
        height=height,
    )


def _shard_files(target: Path) -> list[Path]:
    """Return the files of samples and of skipped entries."""
    return [*target.glob("samples-*.parquet"), *target.glob("skipped-*.jsonl")]


def _count_entries(path: Path) -> int:
    """Return the number of entries in a file of samples or of skipped entries."""
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    return path.read_bytes().count(b"\n")


def _count_samples(target: Path, num_shards: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the counts of samples and captions over all shards, and of skipped entries by reason."""
    counts = Counter(shards=num_shards, images=0, captions=0, without_caption=0, with_several_captions=0)
    for index in range(num_shards):
        rows = pq.read_table(target / shard_name("samples", index, "parquet"), columns=["captions"])
        lengths = [len(captions) for captions in rows.column("captions").to_pylist()]
        counts["images"] += len(lengths)
        counts["captions"] += sum(lengths)
        counts["without_caption"] += lengths.count(0)
        counts["with_several_captions"] += sum(length > 1 for length in lengths)
    skipped = Counter[str]()
    for skipped_entry in read_skipped_entries(target):
        skipped[skipped_entry["reason"]] += 1
        if skipped_entry.get("num_captions"):
            counts["skipped_captions"] += skipped_entry["num_captions"]
    return dict(counts), dict(sorted(skipped.items()))


def _reader_counts(reader: Reader) -> dict[str, int]:
    """Return the counts of a reader that are not zero, and the number of files that it saw."""
    files = {"files": reader.ignored.num_seen} if reader.ignored.num_seen else {}
    return files | {name: count for name, count in sorted(reader.counts.items()) if count}


def _no_usable_message(source: str, target: Path, skipped: dict[str, int], ignored: IgnoredFiles) -> str:
    """Return an error message with the most frequent reasons and an example of each."""
    messages = [_format_skipped(target, skipped, max_reasons=_NUM_EXAMPLES)] if skipped else []
    if ignored.counts:
        messages.append(f"ignored: {ignored.summary()}")
    return f"no readable image in {source}: {'; '.join(messages) or 'no entry matches `where`'}"


def _format_skipped(target: Path, skipped: dict[str, int], max_reasons: int | None = None) -> str:
    """Return the most frequent reasons, each with its count and its first entry."""
    examples: dict[str, str] = {}
    for entry in read_skipped_entries(target):
        examples.setdefault(entry["reason"], entry["location"].encode("utf-8", "backslashreplace").decode())
    reasons = sorted(skipped, key=lambda reason: -skipped[reason])
    return "; ".join(
        f"{reason} ({skipped[reason]:,}, such as {examples[reason]})" for reason in reasons[:max_reasons]
    )


def _remove_output(target: Path, *, keep_dir: bool) -> None:
    """Remove the output folder, or, if it existed before, only the files that the import wrote."""
    if not keep_dir:
        shutil.rmtree(target)
        return
    for path in [*_shard_files(target), target / MANIFEST]:
        path.unlink()


def _log_summary(
    dataset: CaptionDataset, counts: dict[str, int], skipped: dict[str, int], ignored: IgnoredFiles
) -> None:
    num_skipped = sum(skipped.values())
    if num_skipped:
        if num_skipped > len(dataset):
            logger.warning("more than half of the entries were skipped: check the source before you use this")
        captions = ""
        if "skipped_captions" in counts:
            captions = f" with {count_noun(counts['skipped_captions'], 'caption')}"
        entries = count_noun(num_skipped, "entry", "entries")
        logger.warning(f"skipped {entries}{captions}: {_format_skipped(dataset.path, skipped)}")
    if ignored.counts:
        logger.info(f"ignored {count_noun(ignored.counts.total(), 'file')}: {ignored.summary()}")
    for name, message in COUNT_MESSAGES.items():
        if counts.get(name):
            logger.info(message.format(counts[name]))
    if not counts["captions"]:
        logger.warning("no image has a caption: each image can only be paired with itself")
