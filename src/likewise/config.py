"""Settings as frozen dataclasses: told as plain values, read back strictly, unknown names refused."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from likewise.artifacts import write_text
from likewise.errors import InputError, close_matches

Settings = TypeVar("Settings")


def from_mapping(kind: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Build a settings dataclass from plain values.

    Raises:
        InputError: for a name that the dataclass does not have, with close matches, or a missing one.
    """
    known = [field.name for field in fields(kind)]  # pyrefly: ignore[bad-argument-type]
    for name in values:
        if name not in known:
            raise InputError(f"{where}: unknown setting `{name}`.{close_matches(name, known)}")
    try:
        return kind(**values)
    except TypeError as fault:
        raise InputError(f"{where}: {fault}") from fault


def write_yaml(path: Path, settings: Any, extra: dict[str, Any] | None = None) -> None:
    """Write settings, and values derived from them under their own names, as YAML."""
    write_text(path, yaml.safe_dump(asdict(settings) | (extra or {}), sort_keys=False))


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
