"""Identifiers use the vocabulary of the field: a denylist of words in names and string keys."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import likewise

ROOT = Path(__file__).parents[1]
FOLDERS = (Path(likewise.__file__).parent, ROOT / "tests", ROOT / "benchmarks")
DENYLIST = {"told", "shown", "among", "aloud", "alike", "unlike", "looks", "fault", "faults", "chosen"}
DENYLIST |= {"kept", "held", "place", "besides", "usual", "chance"}
ALLOWED_PHRASES = re.compile(r"(?<![a-z0-9])(held_out|in_place)(?![a-z0-9])")
FILES = {
    path.relative_to(folder.parent).as_posix(): path
    for folder in FOLDERS
    for path in sorted(folder.rglob("*.py"))
}


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
    """Return the lowercase words of a name in snake case, camel case or with dashes.

    Phrases of the field that contain a denied word, such as `held_out`, are omitted.
    """
    snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", identifier).lower()
    return set(ALLOWED_PHRASES.sub("_", snake_case).split("_"))


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        ("_left_out", {"", "left", "out"}),
        ("ViewSpec", {"view", "spec"}),
        ("batch-size", {"batch", "size"}),
        ("k", {"k"}),
        ("rows_held_out_of_train", {"", "rows", "of", "train"}),
        ("HeldOut", {""}),
        ("withheld_out", {"withheld", "out"}),
        ("held", {"held"}),
    ],
)
def test_words_of_an_identifier(identifier: str, expected: set[str]) -> None:
    assert words(identifier) == expected


@pytest.mark.parametrize("name", FILES)
def test_identifiers_avoid_the_denylist(name: str) -> None:
    denied = [
        f"{name}:{line}: {identifier}"
        for line, identifier in identifiers(ast.parse(FILES[name].read_text()))
        if words(identifier) & DENYLIST
    ]
    assert not denied, "\n".join(denied)
