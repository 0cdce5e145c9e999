"""The command `run`: a recipe, parsed into the configs of all stages, then import, embed, train, evaluate."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from likewise.cli.common import COMMON_OPTIONS, CommonOptions, app, import_summary
from likewise.cli.evaluation import ColumnFlags, ProtocolFlags, Strings, dataset_lines, split_datasets
from likewise.cli.flags import translate_fields
from likewise.cli.training import run_summary
from likewise.data.config import ImportOptions
from likewise.embeddings.config import EncoderOptions
from likewise.errors import InvalidInputError, LikewiseError, did_you_mean
from likewise.pairs.config import PairConfig
from likewise.training.config import (
    TrainConfig,
    parse_train_config,
    train_config_to_dict,
    validate_combination,
)
from likewise.training.methods.options import METHODS

DEFAULT_RECIPE = "small/lgsimclr"
_STAGES = ("import", "embed", "train", "evaluate")
_SECTIONS = ("about", *_STAGES)
# Flags whose values are repeated, or follow each other; other lists are comma-separated.
_REPEATED, _CONSECUTIVE = ("where", "caption_column"), ("projector_dims", "prompt")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """The section `embed` of a recipe, apart from the options of the encoder."""

    encoder: str = "all-mpnet-base-v2"
    """The encoder."""
    batch_size: int = 64
    """Captions or images per forward pass."""


@dataclass(frozen=True, kw_only=True)
class ProtocolNames:
    """The section `evaluate` of a recipe, apart from columns and options of protocols."""

    protocol: tuple[str, ...] = ("linear", "fewshot", "knn")
    """Names of protocols."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A parsed recipe: the configs of all stages."""

    import_options: ImportOptions
    embed: EmbedConfig | None
    """None if nothing is embedded."""
    encoder_options: EncoderOptions
    train: TrainConfig
    pairs: PairConfig
    protocols: ProtocolNames
    columns: ColumnFlags
    protocol_flags: ProtocolFlags


@app.command(help_epilogue="Example: `likewise run photos/ --out photos-run --recipe small/simclr`")
def run(
    source: str,
    /,
    *,
    out: Path,
    recipe: str = DEFAULT_RECIPE,
    dataset: Strings = (),
    set_: list[str] | None = None,
    dry_run: bool = False,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Run a recipe as one command: import, embed, train, evaluate and report.

    A recipe is a YAML file with one section per stage, whose keys are the flags of that command. An
    interrupted run resumes with the same command.

    Args:
        source: Captioned images in any format that `import` reads, or a dataset.
        out: Directory of all results: `dataset`, and `run` with the evaluation and the report.
        recipe: Name of a recipe of the package, such as small/simclr or lgssl/lgsimclr, or a YAML file.
        dataset: Datasets to evaluate on, as in `evaluate`; without any, the encoder is only trained.
        set_: SECTION.KEY=VALUE, such as train.seed=1, in place of the recipe's value; repeatable.
        dry_run: Print the equivalent commands instead of running them.
    """
    config, datasets = read_recipe(recipe, set_ or []), split_datasets(dataset)
    if dry_run:
        commands = [
            shlex.join(["likewise", *command]) for command in to_commands(config, source, out, datasets)
        ]
        common.print_result({"commands": commands}, *commands)
    else:
        _run_stages(config, source, out, datasets, common)


def _run_stages(
    config: PipelineConfig, source: str, out: Path, datasets: Sequence[str], common: CommonOptions
) -> None:
    """Run all stages; each reuses the finished results of an earlier run."""
    from likewise.data.dataset import CaptionDataset
    from likewise.data.importing import import_dataset
    from likewise.embeddings.embed import embed
    from likewise.evaluation.evaluate import ProtocolFailedError, evaluate
    from likewise.report.run_report import write_report
    from likewise.training.train import train

    progress = common.progress()
    if _is_dataset(source):
        dataset = CaptionDataset.open(source)
    else:
        dataset = import_dataset(source, out / "dataset", config.import_options, progress=progress)
        common.print_text(import_summary(dataset.path, dataset.summary()))
    if config.embed is not None:
        embed(
            dataset,
            config.embed.encoder,
            options=config.encoder_options,
            batch_size=config.embed.batch_size,
            progress=progress,
        )
    trained = train(dataset, out / "run", config.train, config.pairs, progress=progress)
    (result, text), failure = run_summary(trained), None
    common.print_text(text)
    if datasets:
        try:
            results = evaluate(
                trained.path,
                datasets,
                config.protocols.protocol,
                config=config.protocol_flags.to_config(None),
                columns=config.columns.to_columns(),
                progress=progress,
            )
        except ProtocolFailedError as error:  # raised when the report is written
            failure, results = error, error.results
        result = {**result, "results": results.raw}
        common.print_text(*dataset_lines(results), *([results.table()] if len(results) else []))
    page = write_report([trained.path], trained.path / "report.html")
    common.print_result({"dataset": str(dataset.path), **result, "report": str(page)}, f"report: {page}")
    if failure is not None:
        raise failure


def read_recipe(recipe: str, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a recipe, apply the overrides and parse its sections.

    Args:
        recipe: Name of a recipe of the package, or a YAML file.
        overrides: SECTION.KEY=VALUE, with values in YAML.

    Raises:
        InvalidInputError: if the recipe does not exist, or has unknown sections or keys, or invalid values.
    """
    from likewise.artifacts import read_yaml

    content = read_yaml(_find_recipe(recipe))
    for name, section in content.items():
        if name not in _SECTIONS:
            suggestion = did_you_mean(str(name), list(_SECTIONS))
            raise InvalidInputError(
                f"recipe {recipe}: unknown section {name!r}; known: {', '.join(_SECTIONS)}.{suggestion}",
                field="recipe",
            )
        if not isinstance(section or {}, dict):
            raise InvalidInputError(
                f"recipe {recipe}, section {name}: expected keys and values, got {section!r}", field="recipe"
            )
    if "train" not in content:
        raise InvalidInputError(f"recipe {recipe} has no section train", field="recipe")
    sections = {name: _normalize_keys(section or {}) for name, section in content.items() if name != "about"}
    for override in overrides:
        stage, key, value = _parse_override(override)
        sections.setdefault(stage, {})[key] = value
    return _parse_sections(recipe, sections)


def _find_recipe(recipe: str) -> Path:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    folder = Path(str(files("likewise") / "recipes"))
    known = {item.relative_to(folder).with_suffix("").as_posix(): item for item in folder.rglob("*.yaml")}
    if recipe not in known:
        suggestion = did_you_mean(recipe, list(known))
        raise InvalidInputError(
            f"unknown recipe {recipe!r}; known: {', '.join(sorted(known))}, or a YAML file.{suggestion}",
            field="recipe",
        )
    return known[recipe]


def _parse_override(override: str) -> tuple[str, str, Any]:
    import yaml

    name, equals, value = override.partition("=")
    stage, dot, key = name.partition(".")
    if not (equals and dot and stage in _STAGES):
        raise InvalidInputError(
            f"`set_` must be SECTION.KEY=VALUE, such as train.seed=1, got {override!r}", field="set_"
        )
    try:
        return stage, key.replace("-", "_"), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2025-99-99
        raise InvalidInputError(f"the value of {override!r} is not valid YAML", field="set_") from error


def _normalize_keys(section: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key).replace("-", "_"): value for key, value in section.items()}


def _parse_sections(recipe: str, sections: Mapping[str, Mapping[str, Any]]) -> PipelineConfig:
    """Parse all sections, so that an error in the last stage is reported before the first one runs."""
    parsed: dict[str, Any] = {}
    for stage, parse in (
        ("import", _parse_import),
        ("embed", _parse_embed),
        ("train", _parse_train),
        ("evaluate", _parse_evaluate),
    ):
        try:
            parsed |= parse(sections.get(stage, {}))
        except LikewiseError as error:
            message = translate_fields(str(error), {"source": "`pairs`"})
            raise InvalidInputError(f"recipe {recipe}, section {stage}: {message}", field="recipe") from error
    if "embed" not in sections:
        parsed["embed"] = None
    return PipelineConfig(**parsed)


def _parse_import(section: Mapping[str, Any]) -> dict[str, Any]:
    return {"import_options": ImportOptions(**_split(section, ImportOptions)[0])}


def _parse_embed(section: Mapping[str, Any]) -> dict[str, Any]:
    values, options = _split(section, EmbedConfig, EncoderOptions)
    return {"embed": EmbedConfig(**values), "encoder_options": EncoderOptions(**options)}


def _parse_train(section: Mapping[str, Any]) -> dict[str, Any]:
    if "source" in section:
        raise InvalidInputError("unknown key 'source'. Did you mean pairs?", field="recipe")
    section = {"source" if key == "pairs" else key: value for key, value in section.items()}
    settings, pairs, *options = _split(section, TrainConfig, PairConfig, *METHODS.values())
    for values in options:
        settings |= values
    config, pair_config = parse_train_config(settings), PairConfig(**pairs)
    validate_combination(config, pair_config)
    return {"train": config, "pairs": pair_config}


def _parse_evaluate(section: Mapping[str, Any]) -> dict[str, Any]:
    names, columns, flags = _split(section, ProtocolNames, ColumnFlags, ProtocolFlags)
    return {
        "protocols": ProtocolNames(**names),
        "columns": ColumnFlags(**columns),
        "protocol_flags": ProtocolFlags(**flags),
    }


def _split(section: Mapping[str, Any], *configs: type) -> list[dict[str, Any]]:
    """Return the values of a section by the config that they belong to, converted to the field's type."""
    hints = [get_type_hints(config) for config in configs]
    hints = [
        {item.name: types[item.name] for item in fields(config)}
        for config, types in zip(configs, hints, strict=True)
    ]
    known = dict.fromkeys(name for names in hints for name in names)
    for key in section:
        if key not in known:
            names = ["pairs" if name == "source" else name for name in known]
            raise InvalidInputError(f"unknown key {key!r}.{did_you_mean(key, names)}", field="recipe")
    return [
        {key: _convert(key, names[key], value) for key, value in section.items() if key in names}
        for names in hints
    ]


def _convert(key: str, hint: Any, value: Any) -> Any:
    """Convert a YAML value to the type of a field; configs validate ranges.

    Raises:
        InvalidInputError: if the value has another type or is not a choice; `field` is the key.
    """
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in types:
        return None
    target = types[0]
    if get_origin(target) in (tuple, list):
        items = value if isinstance(value, list) else [value]
        return get_origin(target)(_convert(key, get_args(target)[0], item) for item in items)
    if get_origin(target) is Literal:
        if value not in get_args(target):
            known = [str(choice) for choice in get_args(target)]
            raise InvalidInputError(
                f"`{key}` must be one of {', '.join(known)}, got {value!r}.{did_you_mean(str(value), known)}",
                field=key,
            )
        return value
    try:
        if target is float and not isinstance(value, bool):
            return float(value)  # YAML reads 1e-3 as a string
        if target in (str, Path) and isinstance(value, str | int | float):
            return target(str(value))
    except ValueError:
        pass
    else:
        is_number = target is int and isinstance(value, bool)
        if target not in (int, float, bool, str, Path) or (isinstance(value, target) and not is_number):
            return value
    raise InvalidInputError(f"`{key}` must be {target.__name__}, got {value!r}", field=key)


def to_commands(
    config: PipelineConfig, source: str, out: Path, datasets: Sequence[str]
) -> Iterator[list[str]]:
    """Yield the arguments of the commands that a recipe stands for."""
    dataset, run_dir = str(out / "dataset"), str(out / "run")
    if _is_dataset(source):
        dataset = source
    else:
        yield ["import", source, dataset, *_to_flags(vars(config.import_options), vars(ImportOptions()))]
    if config.embed is not None:
        options = _to_flags(vars(config.encoder_options), vars(EncoderOptions()))
        yield ["embed", dataset, *_to_flags(vars(config.embed), vars(EmbedConfig())), *options]
    train, pairs = train_config_to_dict(config.train), vars(config.pairs)
    default = train_config_to_dict(TrainConfig(method=config.train.method_options.name)) | {"method": None}
    flags = [*_to_flags(pairs, vars(PairConfig()) | {"source": None}), *_to_flags(train, default)]
    yield ["train", dataset, "--out", run_dir, *flags]
    if datasets:
        flags = [
            *_to_flags(vars(config.protocols), {}),
            *_to_flags(vars(config.columns), vars(ColumnFlags())),
            *_to_flags(vars(config.protocol_flags), vars(ProtocolFlags())),
        ]
        repeated = [token for dataset_name in datasets for token in ("--dataset", dataset_name)]
        yield ["evaluate", run_dir, *repeated, *flags]
    yield ["report", run_dir]


def _to_flags(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return values that differ from their defaults as flags."""
    tokens: list[str] = []
    for name, value in values.items():
        if name in defaults and defaults[name] == value:
            continue
        flag = "--pairs" if name == "source" else f"--{name.replace('_', '-')}"
        items = [str(item) for item in (value if isinstance(value, list | tuple) else [value])]
        if value is True:
            tokens.append(flag)
        elif name in _REPEATED:
            tokens += [token for item in items for token in (flag, item)]
        elif name in _CONSECUTIVE:
            tokens += [flag, *items]
        else:
            tokens += [flag, ",".join(items)]
    return tokens


def _is_dataset(source: str) -> bool:
    from likewise.artifacts import MANIFEST, read_json
    from likewise.data.dataset import ARTIFACT_KIND

    manifest_path = Path(source) / MANIFEST
    manifest = read_json(manifest_path) if manifest_path.is_file() else None
    return isinstance(manifest, dict) and manifest.get("kind") == ARTIFACT_KIND
