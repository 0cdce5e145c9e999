"""Settings on disk, as plain YAML that people can read."""

from pathlib import Path
from typing import Any

import yaml

from likewise.artifacts import write_text
from likewise.errors import InputError


def write_yaml(path: Path, settings: dict[str, Any]) -> None:
    """Write settings as YAML, in their order."""
    write_text(path, yaml.safe_dump(settings, sort_keys=False))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        InputError: where the file is missing, is no YAML, or is no mapping.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as fault:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(fault).split())}") from fault
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings: a mapping of names to values is needed")
    return values
