"""Values of cells: which are absent, the text of the others, and JSON values that keep their written form."""

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

# Texts that other programs write for missing values. In a table they are text all the same, and are counted.
MISSING_VALUE_WORDS = frozenset({"nan", "NaN", "NAN", "null", "NULL", "None", "N/A", "n/a", "NA", "<NA>"})
# Keys of the text in a mapping, as in the sentences of Karpathy's splits.
MAX_DEPTH = 16  # of lists and mappings in a cell; deeper ones would exhaust the stack
_TEXT_KEYS = ("raw", "caption", "text")


class JsonFloat(float):
    """A number of a JSON file that keeps its written form, such as `1.10`, as its text."""

    __slots__ = ("written",)
    written: str

    def __new__(cls, written: str) -> "JsonFloat":
        """Parse a number."""
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written


class DuplicateKeyError(ValueError):
    """A JSON object with two values for one key."""


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise DuplicateKeyError("a key occurs twice")
    return values


def _parse_int(written: str) -> int | str:
    try:
        return int(written)
    except ValueError:  # more digits than Python converts
        return written


JSON_DECODER = json.JSONDecoder(object_pairs_hook=_build_object, parse_float=JsonFloat, parse_int=_parse_int)
"""Decoder of table rows; duplicate keys raise DuplicateKeyError, and huge integers are text."""


def cell_texts(value: Any, depth: int = 0) -> tuple[str, ...]:
    """Return the texts in a cell: none for an absent value, several for a list.

    Absent are None and numbers that are not finite. Booleans are `true` and `false`; other numbers keep their
    written form. A mapping stands for its value of `raw`, `caption` or `text`, and bytes for UTF-8 text.

    Args:
        value: The value.
        depth: Number of lists and mappings around it.

    Raises:
        ValueError: if a value is another mapping, bytes that are not UTF-8, or nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ValueError("not text")
    if value is None or (isinstance(value, float | Decimal) and not math.isfinite(value)):
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, bool):
        return ("true" if value else "false",)
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in cell_texts(item, depth + 1))
    if isinstance(value, Mapping):
        keys = [key for key in _TEXT_KEYS if key in value]
        if len(keys) != 1:
            raise ValueError("not text")
        return cell_texts(value[keys[0]], depth + 1)
    return (value.decode() if isinstance(value, bytes) else str(value),)


def cell_text(value: Any) -> str | None:
    """Return the text of a cell without surrounding whitespace, a list as one text, or None if it is absent.

    Raises:
        ValueError: if the value is not text (see `cell_texts`).
    """
    return ", ".join(text.strip() for text in cell_texts(value) if text.strip()) or None


def equals_text(value: Any, expected: str) -> bool:
    """Return whether a text is a way to write a cell; an absent cell is written as the empty text.

    Text is compared as written, without surrounding whitespace. `true` and `True` are the same boolean,
    `2001` and `2001.0` the same floating-point number. A list equals each of its items.

    Raises:
        ValueError: if the value is not text (see `cell_texts`).
    """
    texts = [text.strip() for text in cell_texts(value)] or [""]
    if isinstance(value, list | tuple) and value:
        return any(equals_text(item, expected) for item in value)
    if isinstance(value, bool):
        texts += [str(value)]
    elif isinstance(value, float) and value.is_integer():
        texts += [str(int(value))]
    return expected.strip() in texts
