"""What a `.json` or `.txt` beside an image tells of it."""

import json
from typing import Any

MAX_SIZE = 16 * 2**20  # a longer caption file is a mistake, and would fill the memory
KINDS = frozenset({".json", ".txt"})


class SidecarError(ValueError):
    """A caption file that cannot be used; the message is a short reason to count skipped images by."""


def told_beside(mapping: bytes | None, text: bytes | None) -> dict[str, Any]:
    """Return the keys of a JSON file; a text file is the caption where those have none.

    Raises:
        SidecarError: where a file is damaged or no text.
    """
    values: Any = {}
    if mapping is not None:
        try:
            values = json.loads(mapping)
        except (ValueError, RecursionError) as fault:
            raise SidecarError("caption file is not valid JSON") from fault
        if not isinstance(values, dict):
            raise SidecarError("caption file holds no JSON object")
    if text is not None and values.get("caption") is None:
        try:
            values["caption"] = text.decode("utf-8-sig")
        except UnicodeDecodeError as fault:
            raise SidecarError("caption file is not UTF-8") from fault
    return values
