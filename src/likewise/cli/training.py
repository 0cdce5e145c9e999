"""From pairs to an image encoder: `train`."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import CycloptsError, Parameter

from likewise.cli.common import COMMON, Common, app
from likewise.errors import InputError, close_matches
from likewise.pairs.config import PairRule
from likewise.training.config import TrainSettings

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
    from likewise.artifacts import read_yaml

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
        from likewise.pairs.config import PairRule
        from likewise.training.config import TrainSettings, check_together

        given = bound.arguments
        check_together(given.get("settings", TrainSettings()), given.get("rule", PairRule()))


_TRAIN = TrainSettings()
_RULE = PairRule()
TrainFlags = Annotated[TrainSettings, Parameter(name="*", group="Training", consume_multiple=True)]
RuleFlags = Annotated[PairRule, Parameter(name="*", group="Who is shown with whom")]


@app.command(
    help_epilogue="Example: `likewise train photos.likewise --out run --backbone resnet18 --size 64 "
    "--epochs 20 --batch-size 128`"
)
def train(
    collection: Path,
    /,
    *,
    out: Path,
    rule: RuleFlags = _RULE,
    settings: TrainFlags = _TRAIN,
    workers: int | None = None,
    device: str | None = None,
    checkpoint_minutes: float = 2.0,
    common: Common = COMMON,
) -> None:
    """Train an image encoder; run it again after an interruption, and it goes on.

    On several GPUs or machines: `torchrun --nproc-per-node 8 -m likewise.cli train …` with the same flags;
    each process takes its part of every batch.

    Args:
        collection: A collection; `--pairs language` needs embeddings of its captions.
        out: The run's folder.
        workers: Threads that make batches; half the processors by default.
        device: `cpu`, `cuda`, …; chosen by itself.
        checkpoint_minutes: A kill loses at most this much work.
    """
    from likewise.distributed import leads
    from likewise.training.train import train as train_encoder

    run = train_encoder(
        collection,
        out,
        settings,
        rule,
        workers=workers,
        device=device,
        checkpoint_minutes=checkpoint_minutes,
        progress=common.progress(),
    )
    if not leads():
        return
    last = (run.metrics() or [{}])[-1]
    common.tell(
        {"run": str(run.path), "encoder": str(run.encoder), "last": last, "kept": run.kept_step},
        f"trained: {run.path} (loss {last.get('loss', float('nan')):.3f}, effective rank "
        f"{last.get('effective_rank', float('nan')):.0f}; encoder of step {run.kept_step:,})\n"
        f"  next: likewise evaluate {run.path} --on FOLDER; likewise report {run.path}",
    )


@app.command(help_epilogue="Example: `likewise methods`")
def methods(*, common: Common = COMMON) -> None:
    """List the methods of `train`: what each asks, what it tells an image from, and what it needs besides."""
    from likewise.training.methods.options import METHODS

    rows = {
        name: {"asks": needs.what, "negatives": needs.negatives, "needs": list(needs.besides)}
        for name, needs in METHODS.items()
    }
    lines = []
    for name, needs in METHODS.items():
        told_from = "nothing" if needs.negatives == "none" else needs.negatives
        besides = f"; needs: {', '.join(needs.besides)}" if needs.besides else ""
        lines += [f"{name:<16}{needs.what}", f"{'':<16}tells images from: {told_from}{besides}"]
    common.tell({"methods": rows}, "\n".join(lines))
