"""Identifiers use the field's vocabulary: a denylist of words for names and for keys of files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import likewise

SOURCE = Path(likewise.__file__).parent
DENYLIST = {"told", "shown", "among", "aloud", "alike", "unlike", "looks", "fault", "faults", "chosen"}
DENYLIST |= {"kept", "held", "place", "besides", "usual", "chance"}
FILES = sorted(SOURCE.rglob("*.py"))


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each name that a file defines, and of each string key."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.keyword(arg=str(name)):
                yield node.value.lineno, name
            case ast.Dict(keys=keys):
                for key in keys:
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        yield key.lineno, key.value
            case ast.Subscript(slice=ast.Constant(value=str(key))):
                yield node.lineno, key


def words(identifier: str) -> set[str]:
    """Return the lowercase words of a name in snake case, camel case or with dashes."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", identifier)
    return set(re.split(r"[^a-z0-9]+", spaced.lower()))


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [("_left_out", {"", "left", "out"}), ("ViewSpec", {"view", "spec"}), ("k", {"k"})],
)
def test_words_of_an_identifier(identifier: str, expected: set[str]) -> None:
    assert words(identifier) == expected


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_identifiers_avoid_the_denylist(path: Path) -> None:
    found = [
        f"{path.name}:{line}: {name}"
        for line, name in identifiers(ast.parse(path.read_text()))
        if words(name) & DENYLIST
    ]
    assert not found, "\n".join(found)
