"""Package structure: subpackages import only lower layers; modules and functions are short."""

import ast
import inspect
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import likewise

SOURCE = Path(likewise.__file__).parent

# Each subpackage may import the subpackages in its set; all may import the base modules.
BASE_MODULES = {
    "errors",
    "artifacts",
    "hashing",
    "locks",
    "rng",
    "parallel",
    "distributed",
    "progress",
    "run_directory",
    "strings",
}
ALLOWED_IMPORTS = {
    "data": set(),
    "models": {"data"},
    "embeddings": {"data", "models"},
    "neighbors": {"embeddings", "data"},
    "pairs": {"neighbors", "embeddings", "data"},
    "training": {"pairs", "neighbors", "embeddings", "data", "models"},
    "evaluation": {"models", "data"},
    "report": {"data", "neighbors", "pairs", "evaluation"},
    "demo": {"data", "models", "embeddings", "neighbors", "pairs", "training", "evaluation", "report"},
    "cli": {"data", "embeddings", "neighbors", "pairs", "training", "evaluation", "report", "demo", "models"},
}
ALLOWED_BASE_IMPORTS = {
    "errors": set(),
    "rng": set(),
    "parallel": {"errors"},
    "progress": set(),
    "hashing": {"parallel"},
    "locks": {"errors"},
    "artifacts": {"errors", "hashing", "locks"},
    "run_directory": set(),
    "strings": set(),
    "distributed": {"errors"},
}
MODULES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Return the likewise modules that a file imports, at the top or inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("likewise."):
            modules.add(node.module.removeprefix("likewise."))
        if isinstance(node, ast.Import):
            modules |= {
                a.name.removeprefix("likewise.") for a in node.names if a.name.startswith("likewise.")
            }
    return modules


def test_packages_import_only_lower_layers() -> None:
    for path in MODULES:
        package = name_of(path).split(".")[0]
        if path == SOURCE / "__init__.py":
            continue
        if package in BASE_MODULES:
            allowed = ALLOWED_BASE_IMPORTS[package]
        else:
            allowed = ALLOWED_IMPORTS[package] | BASE_MODULES
        for imported in imports_of(path):
            target = imported.split(".")[0]
            assert target == package or target in allowed, f"{name_of(path)} must not import {imported}"


def test_modules_have_no_import_cycles() -> None:
    graph = {name_of(p): imports_of(p) for p in MODULES if p != SOURCE / "__init__.py"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for imported in graph.get(module, set()):
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_modules_and_functions_are_short() -> None:
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 600, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert length <= 60, f"{name_of(path)}.{node.name} has {length} lines"


def test_heavy_modules_are_not_imported_before_arguments_are_parsed() -> None:
    code = "import sys, likewise, likewise.cli.__main__; print([m for m in sys.modules if m in sys.argv[1:]])"
    heavy = ["torch", "timm", "pyarrow", "matplotlib", "transformers", "numpy", "sentence_transformers"]
    result = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_equal_at_runtime_and_for_type_checkers() -> None:
    imported = {
        alias.asname or alias.name: node.module
        for block in ast.parse((SOURCE / "__init__.py").read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == likewise._MODULES
    assert sorted(likewise.__all__) == sorted(imported)
    for name in likewise.__all__:
        assert getattr(likewise, name) is not None
    assert set(likewise.__all__) <= set(dir(likewise))
    assert (SOURCE / "py.typed").is_file()


def test_types_of_public_signatures_are_public() -> None:
    def classes_of(annotation: Any) -> Iterator[type]:
        for argument in typing.get_args(annotation):
            yield from classes_of(argument)
        if inspect.isclass(annotation) and annotation.__module__.startswith("likewise."):
            yield annotation

    public = {name: getattr(likewise, name) for name in likewise.__all__}
    for name, function in public.items():
        if inspect.isfunction(function):
            for annotation in typing.get_type_hints(function).values():
                for cls in classes_of(annotation):
                    assert cls in public.values(), f"{name} uses {cls.__name__}, which is not public"
