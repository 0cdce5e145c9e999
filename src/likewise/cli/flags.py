"""Command-line flags made from config dataclasses: one flag per field, with the field's docstring as help."""

import ast
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, TypeVar, get_type_hints

from cyclopts import Parameter, Token

from likewise.cli.common import HELP_GROUPS, app
from likewise.strings import split_at_commas

Config = TypeVar("Config")


def _convert_strings(_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(token.value for token in tokens)


def _convert_ints(_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    return tuple(int(part) for token in tokens for part in split_at_commas(token.value))


def _convert_floats(_: Any, tokens: Sequence[Token]) -> tuple[float, ...]:
    return tuple(float(part) for token in tokens for part in split_at_commas(token.value))


# Repeatable flags, such as `--dataset eurosat --dataset dtd`. Commands split values at commas by
# `split_unknown_names`, where it is known which names exist.
STRINGS = Parameter(converter=_convert_strings, n_tokens=1)
# Comma-separated integers.
INTS = Parameter(converter=_convert_ints, n_tokens=1)
FLOATS = Parameter(converter=_convert_floats, n_tokens=1)
# The fields of a dataclass are flags of their own.
FLATTEN = Parameter(name="*")


def field_docs(config: type) -> dict[str, str]:
    """Return the documentation of each field of a dataclass, inherited ones included."""
    docs: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        docs |= _module_docs(base.__module__).get(base.__name__, {})
    return docs


@cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings below the fields of each class of a module."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        node.name: {
            statement.target.id: " ".join(str(doc.value.value).split())
            for statement, doc in pairwise(node.body)
            if isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def make_flags(
    config: type,
    *,
    group: str,
    groups: Mapping[str, str] | None = None,
    parameters: Mapping[str, Parameter] | None = None,
    types: Mapping[str, Any] | None = None,
    extra: Sequence[tuple[str, Any, Any]] = (),
) -> Any:
    """Return a dataclass with the fields of `config` as flags, to be used as `Annotated[..., FLATTEN]`.

    The dataclass does not validate: `to_config` makes the config, whose errors then name its fields.

    Args:
        config: A dataclass whose fields all have defaults.
        group: Help group of the flags.
        groups: Other help groups, by field.
        parameters: Names or converters that differ from the default, by field.
        types: Types that differ from the annotation, by field.
        extra: Further flags, as names, annotations and fields.
    """
    hints, docs = get_type_hints(config) | dict(types or {}), field_docs(config)
    names = {item.name: f"`--{item.name.replace('_', '-')}`" for item in fields(config)}
    specs = []
    for config_field in fields(config):
        name = config_field.name
        parameter = Parameter.combine(
            Parameter(
                group=HELP_GROUPS[(groups or {}).get(name, group)],
                help=translate_fields(docs.get(name, ""), names),
            ),
            (parameters or {}).get(name),
        )
        specs.append((name, Annotated[hints[name], parameter], field(default=config_field.default)))
    return make_flag_dataclass(f"{config.__name__}Flags", [*specs, *extra])


def make_flag_dataclass(name: str, specs: Sequence[tuple[str, Any, Any]]) -> Any:
    """Return a dataclass of flags, from names, annotations and fields."""
    # cyclopts does not read the fields of classes whose module is in the standard library.
    return make_dataclass(name, specs, frozen=True, kw_only=True, namespace={"__module__": __name__})


def to_values(flags: Any) -> dict[str, Any]:
    """Return the values of flags by field; `None` means that no flag was given."""
    return {} if flags is None else {item.name: getattr(flags, item.name) for item in fields(flags)}


def to_config(config: type[Config], flags: Any) -> Config:
    """Return the config that flags describe.

    Raises:
        InvalidInputError: if a value is invalid; `field` is its name.
    """
    return config(**to_values(flags))


# Fields of protocol configs, whose names are not unique across protocols.
_PROTOCOL_FLAGS = {"lr": "--finetune-lr", "epochs": "--train-epochs", "prompts": "--prompt"}


def flag_names(command: str) -> dict[str, str]:
    """Return the flag of each config field and parameter of a command."""
    arguments = app[command].assemble_argument_collection()
    flags = {
        argument.keys[-1] if argument.keys else argument.field_info.name: argument.name
        for argument in arguments
        if argument.name.startswith("-")
    }
    return flags | (_PROTOCOL_FLAGS if command == "evaluate" else {})


def translate_fields(message: str, flag_names: Mapping[str, str]) -> str:
    """Replace fields in backticks by the flags that set them."""
    return re.sub(r"`(\w+)`", lambda match: flag_names.get(match[1], match[0]), message)
