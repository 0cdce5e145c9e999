"""A whole chain from one file: `run`."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclopts import CycloptsError

from likewise.cli.app import COMMON, app
from likewise.errors import InputError, close_matches
from likewise.terminal import Common

# The stages of a chain, in order, and what each works on beside its flags.
_STAGES = ("import", "embed", "train", "evaluate")
_SECTIONS = ("about", *_STAGES)


@app.command(
    help_epilogue="Example: `likewise run recipes/small/lgsimclr.yaml --source photos/ --out photos-run`"
)
def run(
    recipe: Path,
    /,
    *,
    source: str,
    out: Path,
    on: str | None = None,
    override: list[str] | None = None,
    dry_run: bool = False,
    common: Common = COMMON,
) -> None:
    """Run a recipe: import, embed, train, evaluate and report, as one command.

    A recipe is a YAML file with a section a stage, whose keys are the flags of that verb. What is finished is
    taken as it is: run the same command again after an interruption, and it goes on.

    Args:
        recipe: A recipe, such as those under `recipes/`.
        source: Captioned images in any form that `import` reads, or a collection.
        out: The folder for everything: `collection`, `run` and, in it, the evaluation and the report.
        on: Labelled sets to evaluate on, with commas between; without any the encoder is only trained.
        override: SECTION.FLAG=VALUE, such as train.seed=1, instead of what the recipe has; may be given
            several times.
        dry_run: Show the commands that the recipe stands for, and do nothing.
    """
    chain = list(_commands(_sections(recipe, override or []), source, out, on))
    for command in chain:
        _check(command, recipe)
    if dry_run:
        lines = [shlex.join(["likewise", *command]) for command in chain]
        common.tell({"commands": lines}, "\n".join(lines))
        return
    shared = [f"--{name}" for name in ("json", "quiet", "debug") if getattr(common, name)]
    for command in chain:
        app([*command, *shared], exit_on_error=False, result_action="return_value")


def _sections(recipe: Path, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """Read a recipe and put the overrides in."""
    from likewise.config import read_yaml

    told = read_yaml(recipe)
    for name, section in told.items():
        if name not in _SECTIONS:
            near = close_matches(str(name), list(_SECTIONS))
            raise InputError(f"{recipe}: unknown section {name!r}; known: {', '.join(_SECTIONS)}.{near}")
        if not isinstance(section or {}, dict):
            raise InputError(f"{recipe}: section {name} holds {section!r}; flags and their values are needed")
    if "train" not in told:
        raise InputError(f"{recipe}: there is no section train, so there is nothing to run")
    sections = {name: dict(section or {}) for name, section in told.items() if name != "about"}
    for text in overrides:
        place, equals, value = text.partition("=")
        stage, dot, flag = place.partition(".")
        if not (equals and dot and stage in _STAGES):
            raise InputError(f"--override {text}: give SECTION.FLAG=VALUE, such as train.seed=1")
        sections.setdefault(stage, {})[flag.replace("-", "_")] = value
    return sections


def _commands(
    sections: dict[str, dict[str, Any]], source: str, out: Path, on: str | None
) -> Iterator[list[str]]:
    """Yield the command of each stage, as one would type it."""
    collection, trained = out / "collection", out / "run"
    if _is_collection(Path(source)):
        collection = Path(source)
    else:
        yield ["import", source, str(collection), *_flags(sections.get("import", {}))]
    if "embed" in sections:
        yield ["embed", str(collection), *_flags(sections["embed"])]
    yield ["train", str(collection), "--out", str(trained), *_flags(sections["train"])]
    if on is not None:
        yield ["evaluate", str(trained), "--on", on, *_flags(sections.get("evaluate", {}))]
    yield ["report", str(trained)]


def _is_collection(source: Path) -> bool:
    manifest = source / "artifact.json"
    return manifest.is_file() and json.loads(manifest.read_text()).get("kind") == "collection"


def _flags(section: dict[str, Any]) -> list[str]:
    """Turn a section into flags: lists of numbers as several values, `where` repeated, other lists joined."""
    tokens: list[str] = []
    for name, value in section.items():
        flag = f"--{str(name).replace('_', '-')}"
        if value is True:
            tokens.append(flag)
        elif isinstance(value, list) and name == "where":
            tokens += [part for each in value for part in (flag, str(each))]
        elif isinstance(value, list) and all(isinstance(each, int) for each in value):
            tokens += [flag, *map(str, value)]
        elif isinstance(value, list):
            tokens += [flag, ",".join(map(str, value))]
        elif value is not None and value is not False:
            tokens += [flag, str(value)]
    return tokens


def _check(command: list[str], recipe: Path) -> None:
    """Parse a command without running it, so that a slip in the last stage shows before the first one runs.

    Raises:
        InputError: naming the stage and what is wrong.
    """
    try:
        _, bound, _ = app.parse_args(command, exit_on_error=False, print_error=False)
    except (CycloptsError, InputError) as fault:
        told = " ".join(str(fault).split())
        raise InputError(f"{recipe}, section {command[0]}: {told}") from fault
    if command[0] == "train":
        from likewise.neighbors.rules import PairRule
        from likewise.pretraining.settings import TrainSettings, check_together

        given = bound.arguments
        check_together(given.get("settings", TrainSettings()), given.get("rule", PairRule()))
