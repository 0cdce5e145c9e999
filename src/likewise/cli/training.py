"""From pairs to an image encoder: `train`."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import docstring_parser
from cyclopts import CycloptsError, Parameter

from likewise.cli.common import COMMON_OPTIONS, CommonOptions, app
from likewise.errors import InvalidInputError, did_you_mean
from likewise.pairs.config import PairConfig
from likewise.training.config import TrainConfig, parse_train_config, validate_combination
from likewise.training.methods.options import METHODS

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
    dataset: str | None = None,
    set_: list[str] | None = None,
    dry_run: bool = False,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Run a recipe: import, embed, train, evaluate and report, as one command.

    A recipe is a YAML file with a section a stage, whose keys are the flags of that verb. What is finished is
    taken as it is: run the same command again after an interruption, and it goes on.

    Args:
        recipe: A recipe, such as those under `recipes/`.
        source: Captioned images in any form that `import` reads, or a collection.
        out: The folder for everything: `collection`, `run` and, in it, the evaluation and the report.
        dataset: Labelled sets to evaluate on, with commas between; without any the encoder is only trained.
        set_: SECTION.FLAG=VALUE, such as train.seed=1, instead of what the recipe has; may be given
            several times.
        dry_run: Show the commands that the recipe stands for, and do nothing.
    """
    commands = list(_stage_commands(_read_recipe(recipe, set_ or []), source, out, dataset))
    for command in commands:
        _validate_command(command, recipe)
    if dry_run:
        lines = [shlex.join(["likewise", *command]) for command in commands]
        common.print_result({"commands": lines}, "\n".join(lines))
        return
    common_flags = [f"--{name}" for name in ("json", "quiet", "debug") if getattr(common, name)]
    for command in commands:
        app([*command, *common_flags], exit_on_error=False, result_action="return_value")


def _read_recipe(recipe: Path, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """Read a recipe and put the overrides in."""
    from likewise.artifacts import read_yaml

    content = read_yaml(recipe)
    for name, section in content.items():
        if name not in _SECTIONS:
            suggestion = did_you_mean(str(name), list(_SECTIONS))
            raise InvalidInputError(
                f"{recipe}: unknown section {name!r}; known: {', '.join(_SECTIONS)}.{suggestion}"
            )
        if not isinstance(section or {}, dict):
            raise InvalidInputError(
                f"{recipe}: section {name} holds {section!r}; flags and their values are needed"
            )
    if "train" not in content:
        raise InvalidInputError(f"{recipe}: there is no section train, so there is nothing to run")
    sections = {name: dict(section or {}) for name, section in content.items() if name != "about"}
    for override in overrides:
        key, equals, value = override.partition("=")
        stage, dot, flag = key.partition(".")
        if not (equals and dot and stage in _STAGES):
            raise InvalidInputError(f"--override {override}: give SECTION.FLAG=VALUE, such as train.seed=1")
        sections.setdefault(stage, {})[flag.replace("-", "_")] = value
    return sections


def _stage_commands(
    sections: dict[str, dict[str, Any]], source: str, out: Path, eval_dataset: str | None
) -> Iterator[list[str]]:
    """Yield the command of each stage, as one would type it."""
    dataset, run_dir = out / "collection", out / "run"
    if _is_dataset(Path(source)):
        dataset = Path(source)
    else:
        yield ["import", source, str(dataset), *_to_flags(sections.get("import", {}))]
    if "embed" in sections:
        yield ["embed", str(dataset), *_to_flags(sections["embed"])]
    yield ["train", str(dataset), "--out", str(run_dir), *_to_flags(sections["train"])]
    if eval_dataset is not None:
        yield ["evaluate", str(run_dir), "--on", eval_dataset, *_to_flags(sections.get("evaluate", {}))]
    yield ["report", str(run_dir)]


def _is_dataset(source: Path) -> bool:
    manifest_path = source / "artifact.json"
    return manifest_path.is_file() and json.loads(manifest_path.read_text()).get("kind") == "dataset"


def _to_flags(section: dict[str, Any]) -> list[str]:
    """Turn a section into flags: lists of numbers as several values, `where` repeated, other lists joined."""
    tokens: list[str] = []
    for name, value in section.items():
        flag = f"--{str(name).replace('_', '-')}"
        if value is True:
            tokens.append(flag)
        elif isinstance(value, list) and name == "where":
            tokens += [token for item in value for token in (flag, str(item))]
        elif isinstance(value, list) and all(isinstance(item, int) for item in value):
            tokens += [flag, *map(str, value)]
        elif isinstance(value, list):
            tokens += [flag, ",".join(map(str, value))]
        elif value is not None and value is not False:
            tokens += [flag, str(value)]
    return tokens


def _validate_command(command: list[str], recipe: Path) -> None:
    """Parse a command without running it, so that a slip in the last stage shows before the first one runs.

    Raises:
        InputError: naming the stage and what is wrong.
    """
    try:
        _, bound, _ = app.parse_args(command, exit_on_error=False, print_error=False)
    except (CycloptsError, InvalidInputError) as error:
        message = " ".join(str(error).split())
        raise InvalidInputError(f"{recipe}, section {command[0]}: {message}") from error
    if command[0] == "train":
        arguments = bound.arguments
        config = _train_config(
            arguments.get("config", _DEFAULT_TRAIN_CONFIG), arguments.get("method_options")
        )
        validate_combination(config, arguments.get("pair_config", _DEFAULT_PAIR_CONFIG))


_DEFAULT_TRAIN_CONFIG = TrainConfig()
_DEFAULT_PAIR_CONFIG = PairConfig()


def _method_flags() -> Any:
    """Return a dataclass with the options of all methods as flags; None means not given."""
    hints: dict[str, Any] = {}
    docs: dict[str, str] = {}
    defaults: dict[str, dict[str, list[str]]] = {}
    for method, options in METHODS.items():
        for base in reversed(options.__mro__[:-1]):
            for param in docstring_parser.parse_from_object(base).params:
                docs.setdefault(param.arg_name, " ".join((param.description or "").split()))
        for option in fields(options):
            hints.setdefault(option.name, get_type_hints(options)[option.name])
            value = option.default
            if option.name == "memory_bank_size":
                value = getattr(options, "default_memory_bank_size", None)
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            defaults.setdefault(option.name, {}).setdefault(text, []).append(method)
    flags = []
    for name, hint in hints.items():
        parts = "; ".join(f"{', '.join(methods)}: {text}" for text, methods in defaults[name].items())
        parameter = Parameter(help=f"{docs[name]} ({parts})")
        flags.append((name, Annotated[hint | None, parameter], field(default=None)))
    return make_dataclass("MethodFlags", flags, frozen=True, kw_only=True, namespace={"__module__": __name__})


_MethodFlags = _method_flags()
MethodFlags = Annotated[
    _MethodFlags, Parameter(name="*", group="Options of the method", consume_multiple=True)
]


def _train_config(config: TrainConfig, method_flags: Any) -> TrainConfig:
    """Return the config with the options of the method that were given as flags."""
    settings = {item.name: getattr(config, item.name) for item in fields(config)}
    if method_flags is not None:
        settings |= {name: value for name, value in vars(method_flags).items() if value is not None}
    return parse_train_config(settings)


TrainFlags = Annotated[TrainConfig, Parameter(name="*", group="Training", consume_multiple=True)]
PairFlags = Annotated[PairConfig, Parameter(name="*", group="Who is shown with whom")]


@app.command(
    help_epilogue="Example: `likewise train photos.likewise --out run --backbone resnet18 --size 64 "
    "--epochs 20 --batch-size 128`"
)
def train(
    dataset: Path,
    /,
    *,
    out: Path,
    pair_config: PairFlags = _DEFAULT_PAIR_CONFIG,
    config: TrainFlags = _DEFAULT_TRAIN_CONFIG,
    method_options: MethodFlags | None = None,
    num_workers: int | None = None,
    device: str | None = None,
    checkpoint_minutes: float = 2.0,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Train an image encoder; run it again after an interruption, and it goes on.

    On several GPUs or machines: `torchrun --nproc-per-node 8 -m likewise.cli train …` with the same flags;
    each process takes its part of every batch.

    Args:
        dataset: A collection; `--pairs language` needs embeddings of its captions.
        out: The run's folder.
        num_workers: Threads that make batches; half the processors by default.
        device: `cpu`, `cuda`, …; chosen by itself.
        checkpoint_minutes: A kill loses at most this much work.
    """
    from likewise.distributed import is_main_process
    from likewise.training.train import train as train_encoder

    run = train_encoder(
        dataset,
        out,
        _train_config(config, method_options),
        pair_config,
        num_workers=num_workers,
        device=device,
        checkpoint_minutes=checkpoint_minutes,
        progress=common.progress(),
    )
    if not is_main_process():
        return
    last_metrics = (run.metrics() or [{}])[-1]
    common.print_result(
        {"run": str(run.path), "encoder": str(run.encoder_path), "last": last_metrics, "kept": run.best_step},
        f"trained: {run.path} (loss {last_metrics.get('loss', float('nan')):.3f}, effective rank "
        f"{last_metrics.get('effective_rank', float('nan')):.0f}; encoder of step {run.best_step:,})\n"
        f"  next: likewise evaluate {run.path} --on FOLDER; likewise report {run.path}",
    )


@app.command(help_epilogue="Example: `likewise methods`")
def methods(*, common: CommonOptions = COMMON_OPTIONS) -> None:
    """List the methods of `train`: objective, source of negatives, and requirements."""
    rows = {
        name: {
            "summary": options.summary,
            "negatives": options.negatives,
            "requirements": list(options.requirements),
        }
        for name, options in METHODS.items()
    }
    lines = []
    for name, options in METHODS.items():
        requirements = f"; requires: {', '.join(options.requirements)}" if options.requirements else ""
        lines += [f"{name:<16}{options.summary}", f"{'':<16}negatives: {options.negatives}{requirements}"]
    common.print_result({"methods": rows}, "\n".join(lines))
