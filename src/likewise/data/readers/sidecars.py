"""Caption files beside images (sidecars): which belong to which image, what they contain, and their keys."""

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from likewise.data.dataset import ImageRef
from likewise.data.readers.base import (
    ColumnMapping,
    Entry,
    ImportOptions,
    Reader,
    SkippedSample,
    parse_where,
)
from likewise.data.readers.cells import JSON_DECODER, DuplicateKeyError, cell_texts
from likewise.data.readers.columns import match_caption_columns
from likewise.data.readers.encodings import decode_text
from likewise.data.readers.files import IgnoredFiles
from likewise.errors import InvalidInputError, did_you_mean
from likewise.strings import split_unknown_names

MAX_SIDECAR_BYTES = 16 * 2**20  # larger caption files are errors, and would exhaust the memory
SIDECAR_SUFFIXES = (".json", ".txt", ".caption")  # in order of precedence
_DEFAULT_KEYS = ("caption", "captions")
_TEXT_KEY = "caption"  # text files have this key
_NUM_PROBED_IMAGES = 1000  # images whose caption files decide what is inferred
_MAX_LISTED_VALUES = 8
_MIN_WRAP_WIDTH = 40  # characters; nobody wraps text in narrower lines
_MIN_WRAPPED_LINES = 3  # lines that fill the width
_MIN_CAPTION_LINES = 3  # lines per file that are captions if all files have as many
_SENTENCE_ENDS = tuple(".!?。！？…")


class SidecarError(ValueError):
    """An invalid caption file; skipped images are counted by the message."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A caption file: a file, or a byte range of an archive."""

    path: str
    """File or archive, relative to the root of the reader."""
    suffix: str
    """Suffix in lower case."""
    offset: int | None = None
    size: int | None = None
    error: str | None = None
    """Why the file cannot be read, or None."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image with its caption files, before they are read."""

    id: str
    location: str
    """File or member, for messages."""
    image: ImageRef
    group: str | None
    sidecars: tuple[Sidecar, ...]
    """At most one JSON file and one text file."""


def split_suffix(name: str) -> tuple[str, str]:
    """Split a file name into stem and suffix in lower case; the suffix starts at the last dot."""
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    return stem, suffix.lower()


def is_sidecar(name: str) -> bool:
    """Return whether a file may be a caption file by its suffix."""
    return split_suffix(name)[1] in SIDECAR_SUFFIXES


def pair_sidecars(images: Sequence[str], sidecars: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Assign the caption files of one folder to its images.

    `a.jpg.txt` belongs to `a.jpg`. `a.txt` belongs to every image whose stem is `a`. An image has at most one
    `.json` file and one `.txt` or `.caption` file; a file with the full name of the image precedes one with
    its stem, and `.txt` precedes `.caption`.

    Args:
        images: Distinct names of images.
        sidecars: Distinct names of caption files.

    Returns:
        The caption files of each image in `images`, and those that no image uses.
    """
    by_base: dict[str, list[str]] = {}
    for name in sorted(sidecars):
        by_base.setdefault(os.path.splitext(name)[0], []).append(name)  # noqa: PTH122
    assigned: dict[str, list[str]] = {}
    used: set[str] = set()
    for image in images:
        candidates = [
            name
            for base in (image, split_suffix(image)[0])
            for name in sorted(by_base.get(base, ()), key=_rank)
        ]
        assigned[image] = first_of_each_kind(candidates)
        used.update(assigned[image])
    return assigned, [name for names in by_base.values() for name in names if name not in used]


def first_of_each_kind(names: Iterable[str]) -> list[str]:
    """Return the first JSON file and the first text file."""
    first: dict[bool, str] = {}
    for name in names:
        first.setdefault(split_suffix(name)[1] == ".json", name)
    return list(first.values())


def _rank(name: str) -> int:
    return SIDECAR_SUFFIXES.index(split_suffix(name)[1])


def unused_reason(name: str, images: Iterable[str]) -> str:
    """Return why a caption file that `pair_sidecars` did not assign is ignored."""
    base = os.path.splitext(name)[0]  # noqa: PTH122
    has_image = any(base in (image, split_suffix(image)[0]) for image in images)
    return "another caption file of the same image" if has_image else "caption file without an image"


def parse_json_sidecar(data: bytes) -> dict[str, Any]:
    """Return the keys and values of a JSON caption file; a text or list of texts is the value of `caption`.

    Raises:
        SidecarError: if the file is not valid JSON, or neither an object nor texts.
    """
    try:
        values = JSON_DECODER.decode(decode_text(data))
        is_text = _is_text(values)
    except DuplicateKeyError as error:
        raise SidecarError("caption file has a key twice") from error
    except (ValueError, RecursionError) as error:
        raise SidecarError("caption file is not valid JSON") from error
    if is_text:
        return {_TEXT_KEY: values}
    if not isinstance(values, dict):
        raise SidecarError("caption file is neither a JSON object nor a list of texts")
    return values


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))


def parse_text_sidecar(data: bytes) -> list[str]:
    """Return the lines of a text file without surrounding space; blank ones occur only between others.

    Raises:
        SidecarError: if it is not UTF-8, UTF-16 or UTF-32.
    """
    try:
        text = decode_text(data)
    except UnicodeDecodeError as error:
        raise SidecarError("caption file is not UTF-8, UTF-16 or UTF-32") from error
    return [line.strip() for line in text.strip().splitlines()]


def are_separate_captions(texts: Sequence[Sequence[str]]) -> bool | None:
    """Infer whether the lines of text files are captions each, or one wrapped text per file.

    Lines are captions if every line ends as a sentence, or if several files have equally many lines, at least
    three. They are one text if at least three of them fill a common width of at least 40 characters: no line
    has space for the first word of the next line.

    Args:
        texts: The lines of the files with several lines, at least one file.

    Returns:
        The answer, or None if no rule or both apply, or if blank lines separate paragraphs.
    """
    if any("" in lines for lines in texts):
        return None
    if all(line.endswith(_SENTENCE_ENDS) for lines in texts for line in lines):
        return True
    num_lines = {len(lines) for lines in texts}
    have_equally_many = len(texts) > 1 and len(num_lines) == 1 and min(num_lines) >= _MIN_CAPTION_LINES
    if have_equally_many == _fill_common_width(texts):
        return None
    return have_equally_many


def _fill_common_width(texts: Sequence[Sequence[str]]) -> bool:
    width = max(len(line) for lines in texts for line in lines)
    pairs = [pair for lines in texts for pair in pairwise(lines)]
    next_words = [following.split(maxsplit=1)[0] for _, following in pairs]
    fill_width = all(
        len(line) + 1 + len(word) > width for (line, _), word in zip(pairs, next_words, strict=True)
    )
    # Captions of a template have similar lengths, too, but they begin with the same word.
    is_running_text = len(set(next_words)) > 1 and any(word[0].islower() for word in next_words)
    # Few lines fill the width of the longest by accident.
    return fill_width and is_running_text and width >= _MIN_WRAP_WIDTH and len(pairs) >= _MIN_WRAPPED_LINES


@dataclass(frozen=True, kw_only=True)
class _Inferred:
    columns: ColumnMapping
    separate_lines: bool | None
    """None if no probed text file has several lines."""
    message: str


@dataclass(frozen=True, kw_only=True)
class SidecarReader(Reader):
    """Reader of images with caption files; the keys of the JSON files take the place of columns."""

    options: ImportOptions

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the source for messages."""

    @abstractmethod
    def iter_image_files(
        self, ignored: IgnoredFiles, counts: Counter[str]
    ) -> Iterator[ImageFile | SkippedSample]:
        """Yield the images with their caption files in a deterministic order.

        Args:
            ignored: Receives all files that are neither images nor caption files of images.
            counts: Receives the number of `caption_files`.
        """

    @abstractmethod
    def read_sidecar(self, sidecar: Sidecar) -> bytes:
        """Return the content of a caption file.

        Raises:
            SidecarError: if it cannot be read or is too large.
        """

    @property
    def columns(self) -> ColumnMapping:
        """The keys of the JSON files that are read."""
        return self._inferred.columns

    def inferred_settings(self) -> list[str]:
        """Return a message on the source of the captions."""
        return [self._inferred.message]

    def iter_samples(self) -> Iterator[Entry]:
        """Yield the images that match `where`, and the skipped entries.

        Raises:
            InvalidInputError: if no image matches `where`.
        """
        self.ignored.clear()
        self.counts.clear()
        num_matching = 0
        other_values: dict[str, None] = {}
        columns = self.columns
        for image_file in self.iter_image_files(self.ignored, self.counts):
            if isinstance(image_file, SkippedSample):
                yield image_file
                continue
            try:
                values = self._read_values(image_file)
                matches = columns.matches(values)
            except SidecarError as error:
                yield _skip(image_file, str(error))
            except ValueError:
                yield _skip(image_file, "value of a `where` column is not text")
            else:
                if matches:
                    num_matching += 1
                    yield columns.build_sample(
                        values, image_file.image, image_file.id, image_file.location, image_file.group
                    )
                else:
                    self.ignored.add("image that does not match `where`", image_file.location)
                    other_values.update(dict.fromkeys(_condition_values(columns, values)))
        if other_values and not num_matching:
            self._raise_no_match(list(other_values))

    def _raise_no_match(self, other_values: list[str]) -> None:
        conditions = " and ".join(f"{name}={value}" for name, value in self.columns.where)
        more = ", ..." if len(other_values) > _MAX_LISTED_VALUES else ""
        raise InvalidInputError(
            f"{self.name} has no image with {conditions}; "
            f"it has {', '.join(other_values[:_MAX_LISTED_VALUES])}{more}",
            field="where",
        )

    def _read_values(self, image_file: ImageFile) -> dict[str, Any]:
        """Return the values of the caption files of an image by key.

        Raises:
            SidecarError: if a caption file is invalid.
        """
        values, text_lines = self._read_sidecars(image_file)
        lines = [line for line in text_lines if line]
        if not lines:
            return values
        if _TEXT_KEY not in self.columns.captions:
            self.counts["unused_text_files"] += 1
            return values
        text = " ".join(lines)
        separate = self._inferred.separate_lines
        json_captions = [
            caption
            for key in self.columns.captions
            for caption in _texts_or_none(values.get(key))
            if caption.strip()
        ]
        if not json_captions:
            self.counts["joined_captions"] += len(lines) > 1 and separate is None
            return values | {_TEXT_KEY: lines if separate else [text]}
        from_json = _normalized([*json_captions, " ".join(json_captions)])
        self.counts["overridden_captions"] += (
            not _normalized([text]) <= from_json and not set(lines) <= from_json
        )
        return values

    def _read_sidecars(self, image_file: ImageFile) -> tuple[dict[str, Any], list[str]]:
        """Return the values of the JSON file of an image and the lines of its text file."""
        values: dict[str, Any] = {}
        lines: list[str] = []
        for sidecar in image_file.sidecars:
            if sidecar.error is not None:
                raise SidecarError(sidecar.error)
            if sidecar.suffix == ".json":
                values = parse_json_sidecar(self.read_sidecar(sidecar))
            else:
                lines = parse_text_sidecar(self.read_sidecar(sidecar))
        return values, lines

    @cached_property
    def _inferred(self) -> _Inferred:
        """Infer the keys and the meaning of lines from the first images.

        All caption files are read only if no earlier one has a key that an option names.

        Raises:
            InvalidInputError: if no caption file has a key, or lines have two possible meanings.
        """
        keys: dict[str, None] = {}
        missing = sidecar_keys(self.options, keys)
        multiline_texts: list[list[str]] = []
        image_files = self.iter_image_files(IgnoredFiles(), Counter())
        for index, image_file in enumerate(image_files):
            if index >= _NUM_PROBED_IMAGES and not missing:
                break
            if isinstance(image_file, SkippedSample):
                continue
            try:
                values, lines = self._read_sidecars(image_file)
            except SidecarError:
                continue
            keys.update(dict.fromkeys([*values, *([_TEXT_KEY] if lines else [])]))
            if missing:
                missing = [item for item in sidecar_keys(self.options, keys) if item[1] not in keys]
            if len(lines) > 1 and index < _NUM_PROBED_IMAGES:
                multiline_texts.append(lines)
        for field, key in missing:
            raise InvalidInputError(_missing_key_message(self.name, field, key, list(keys)), field=field)
        columns, message = self._infer_columns(list(keys))
        return _Inferred(columns=columns, separate_lines=self._infer_lines(multiline_texts), message=message)

    def _infer_columns(self, keys: list[str]) -> tuple[ColumnMapping, str]:
        columns = sidecar_columns(self.options, keys)
        inferred = (
            []
            if self.options.caption_column or set(_DEFAULT_KEYS) & set(keys)
            else match_caption_columns(keys)
        )
        if inferred:
            columns = replace(columns, captions=tuple(inferred[:1]))
        names = " or ".join(map(repr, columns.captions))
        other = f"; set `caption_column` to use {', '.join(inferred[1:])}" if inferred[1:] else ""
        return (
            columns,
            f"{self.name}: captions are {names} of the .json file of an image, or its text file{other}",
        )

    def _infer_lines(self, texts: list[list[str]]) -> bool | None:
        """Return whether the lines of a text file are separate captions; None if no text has several lines.

        Raises:
            InvalidInputError: if both readings are possible.
        """
        if self.options.caption_lines != "auto":
            return self.options.caption_lines == "separate"
        if not texts:
            return None
        separate = are_separate_captions(texts)
        if separate is None:
            raise InvalidInputError(
                f"the caption files of {self.name} have several lines, such as {texts[0][0][:60]!r} and "
                f"{texts[0][1][:60]!r}: one caption per line, or one caption in several lines? Set "
                "`caption_lines` to separate or join",
                field="caption_lines",
            )
        return separate


def _skip(image_file: ImageFile, reason: str) -> SkippedSample:
    return SkippedSample(id=image_file.id, location=image_file.location, reason=reason)


def _texts_or_none(value: Any) -> tuple[str, ...]:
    try:
        return cell_texts(value)
    except ValueError:
        return ()


def _normalized(texts: Iterable[str]) -> set[str]:
    return {" ".join(text.split()) for text in texts}


def _condition_values(columns: ColumnMapping, values: dict[str, Any]) -> list[str]:
    return [f"{name}={text}" for name, _ in columns.where for text in _texts_or_none(values.get(name))]


def sidecar_keys(options: ImportOptions, keys: Container[str]) -> list[tuple[str, str]]:
    """Return the keys that options name, with the name of the option; names in `keys` keep their commas."""
    named = [
        *(("caption_column", key) for key in split_unknown_names(options.caption_column, keys.__contains__)),
        ("label_column", options.label_column),
        ("group_column", options.group_column),
        ("id_column", options.id_column),
        *(("where", key) for key, _ in parse_where(options)),
    ]
    return [(field, key) for field, key in named if key is not None]


def _missing_key_message(name: str, field: str, key: str, keys: list[str]) -> str:
    if not keys:
        return f"`{field}`: no image of {name} has a caption file, and so none has the key {key!r}"
    return (
        f"`{field}`: no caption file of {name} has the key {key!r}; its keys are {', '.join(keys[:50])}."
        f"{did_you_mean(key, keys)}"
    )


def sidecar_columns(options: ImportOptions, keys: Container[str]) -> ColumnMapping:
    """Return the keys to read from the JSON file of an image; names in `keys` keep their commas."""
    return ColumnMapping(
        captions=split_unknown_names(options.caption_column, keys.__contains__) or _DEFAULT_KEYS,
        label=options.label_column,
        group=options.group_column,
        id=options.id_column,
        where=parse_where(options),
    )
