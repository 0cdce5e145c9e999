"""Which column of a table, or key of a JSON file, plays which part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from likewise.collection.records import ImageRef
from likewise.collection.sources.candidates import Candidate, Entry, Fault, ImportOptions
from likewise.errors import InputError, close_matches

# Usual names, likeliest first, in lower case.
_IMAGE = (
    *("file", "image", "path", "filename", "file_name", "image_path", "filepath", "img"),
    *("image_name", "image_file", "file_path", "img_path"),
)
_CAPTION = ("caption", "captions", "title", "text", "description", "comment", "name")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The parts that columns play; `image` is None where images are found without a table."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    id: str | None = None
    where: tuple[tuple[str, str], ...] = ()

    def used(self) -> list[str]:
        """Return every column that is read, once, in a fixed order."""
        names = [
            self.image,
            *self.captions,
            self.label,
            self.group,
            self.id,
            *(name for name, _ in self.where),
        ]
        return list(dict.fromkeys(name for name in names if name is not None))

    def keep(self, values: Mapping[str, Any]) -> bool:
        """Whether all conditions hold; an absent value equals the empty one."""
        return all(wanted in (texts(values.get(name)) or ("",)) for name, wanted in self.where)

    def candidate(
        self, values: Mapping[str, Any], image: ImageRef, name: str, where: str, group: str | None = None
    ) -> Entry:
        """Return the candidate that a row describes; `name` and `group` stand in for absent columns."""
        told = {}
        for part in ("label", "group", "id"):
            column = getattr(self, part)
            try:
                told[part] = (
                    None if column is None else (", ".join(texts(values.get(column))).strip() or None)
                )
            except ValueError:
                return Fault(id=name, where=where, reason=f"column {column} holds no text")
        try:
            captions = tuple(text for column in self.captions for text in texts(values.get(column)))
        except ValueError:
            return Fault(id=name, where=where, reason="caption is no text")
        return Candidate(
            id=told["id"] if told["id"] is not None else name,
            image=image,
            captions=captions,
            group=told["group"] if self.group is not None else group,
            label=told["label"],
            where=where,
        )


def texts(value: Any) -> tuple[str, ...]:
    """Return the texts in a cell: none for an absent value, several for a list.

    Raises:
        ValueError: for what cannot be told as text, such as a mapping.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in texts(item))
    if isinstance(value, dict | bytes):
        raise ValueError("no text")
    return (str(value),)


def conditions(options: ImportOptions) -> tuple[tuple[str, str], ...]:
    """Return the conditions COLUMN=VALUE as pairs.

    Raises:
        InputError: for a condition without a column or an equals sign.
    """
    pairs = []
    for told in options.where:
        name, sign, value = told.partition("=")
        if not (name and sign):
            raise InputError(f"a condition has the form COLUMN=VALUE, such as split=train; got {told}")
        pairs.append((name, value))
    return tuple(pairs)


def sidecar_columns(options: ImportOptions) -> Columns:
    """Return the keys to read from a JSON file beside each image."""
    return Columns(
        captions=options.caption_column or ("caption", "captions"),
        label=options.label_column,
        group=options.group_column,
        id=options.id_column,
        where=conditions(options),
    )


def fitness(columns: Sequence[str], embedded: frozenset[str], options: ImportOptions) -> int:
    """Return 0 for a table without an image column, 1 with one, 2 with images and captions."""
    asked = options.image_column
    if asked not in columns if asked is not None else not _image_columns(columns, embedded):
        return 0
    captioned = (
        set(options.caption_column) <= set(columns) if options.caption_column else _usual(columns, _CAPTION)
    )
    return 2 if captioned else 1


def resolve(
    columns: Sequence[str], embedded: frozenset[str], options: ImportOptions, name: str
) -> tuple[Columns, list[str]]:
    """Return the parts that a table's columns play, and sentences on those that were guessed.

    `embedded` names the columns that hold images themselves rather than paths.

    Raises:
        InputError: for a column that is asked for and not there, or no image column at all.
    """
    where = conditions(options)
    single = [options.image_column, options.label_column, options.group_column, options.id_column]
    for column in [*single, *options.caption_column, *(column for column, _ in where)]:
        if column is not None and column not in columns:
            near = close_matches(column, list(columns))
            raise InputError(f"{name} has no column `{column}`; its columns are {', '.join(columns)}.{near}")
    told = []
    image, captions = options.image_column, options.caption_column
    if image is None:
        image, *_ = _image_columns(columns, embedded) or [None]
        if image is None:
            raise InputError(
                f"{name} has no column that looks like images; its columns are {', '.join(columns)}. "
                "Name the one that holds image paths with --image-column"
            )
        told.append(f"{name}: images are taken from column `{image}`.")
    if not captions:
        usual = [column for column in _usual(columns, _CAPTION) if column != image]
        captions = tuple(usual[:1])
        told.append(_say_captions(name, usual, columns))
    parts = Columns(
        image=image,
        captions=captions,
        label=options.label_column,
        group=options.group_column,
        id=options.id_column,
        where=where,
    )
    return parts, told


def _say_captions(name: str, usual: list[str], columns: Sequence[str]) -> str:
    if not usual:
        return (
            f"{name}: no column looks like captions ({', '.join(columns)}); "
            "name one with --caption-column if there is one."
        )
    others = f" (or is it {', '.join(usual[1:])}? then say --caption-column)" if usual[1:] else ""
    return f"{name}: captions are taken from column `{usual[0]}`{others}."


def _image_columns(columns: Sequence[str], embedded: frozenset[str]) -> list[str]:
    """Return likely image columns; those that hold images themselves come before those that name files."""
    holding = [column for column in columns if column in embedded]
    return _usual(holding, _IMAGE) or holding or _usual(columns, _IMAGE)


def _usual(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    folded = {column.strip().casefold(): column for column in reversed(columns)}
    return [folded[name] for name in names if name in folded]
