"""Commands of training: `train`, `adapt`, `methods`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from cyclopts import Parameter

from likewise.cli.common import COMMON_OPTIONS, HELP_GROUPS, CommonOptions, app, make_table
from likewise.cli.evaluation import DEFAULT_ENCODER_FLAGS, ImageEncoderFlags, Strings, split_datasets
from likewise.cli.flags import (
    FLATTEN,
    field_docs,
    make_flag_dataclass,
    make_flags,
    to_config,
    to_values,
    translate_fields,
)
from likewise.neighbors.config import SearchConfig
from likewise.pairs.config import PairConfig
from likewise.training.adapt_config import LEVELS, AdaptConfig, parse_adapt_config
from likewise.training.config import TrainConfig, parse_train_config
from likewise.training.methods.options import METHODS

if TYPE_CHECKING:
    from rich.table import Table

    from likewise.evaluation.evaluate import ProtocolFailedError
    from likewise.evaluation.results import Comparison
    from likewise.models.encoders import ImageEncoder
    from likewise.training.train import Run


_METHOD_GROUP, _LEVEL_GROUP = "Method options", "Level options"

_PairFlags = make_flags(
    PairConfig,
    group="Pair sampling",
    groups={item.name: "Neighbor search" for item in fields(SearchConfig)},
    parameters={"source": Parameter(name="--pairs"), "k": Parameter(name=["-k", "--k"])},
)
PairFlags = Annotated[_PairFlags, FLATTEN]
_TrainFlags = make_flags(
    TrainConfig,
    group="Optimization",
    groups={
        "method": _METHOD_GROUP,
        **dict.fromkeys(("backbone", "stem", "init", "image_size", "augmentation"), "Model and augmentation"),
        **dict.fromkeys(("num_val_pairs", "val_every", "early_stopping_patience"), "Validation"),
    },
    parameters={"method": Parameter(help="Pre-training method; `likewise methods` describes them.")},
    types={"method": Literal[*METHODS]},  # pyrefly: ignore[invalid-literal]
)
TrainFlags = Annotated[_TrainFlags, FLATTEN]


def _option_flags(options_by_name: Mapping[str, type], group: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the options of all methods, or of all levels, as flags; None means not given."""
    hints: dict[str, Any] = {}
    docs: dict[str, str] = {}
    for options in options_by_name.values():
        hints = get_type_hints(options) | hints
        docs = field_docs(options) | docs
    names = {name: f"`--{name.replace('_', '-')}`" for name in docs}
    for name, defaults in _option_defaults(options_by_name).items():
        users = [f"{', '.join(users)}{default and ': '}{default}" for default, users in defaults.items()]
        parameter = Parameter(
            group=HELP_GROUPS[group],
            help=f"{translate_fields(docs[name], names)} ({'; '.join(users)})",
            consume_multiple=True,
        )
        yield name, Annotated[hints[name] | None, parameter], field(default=None)


def _option_defaults(options_by_name: Mapping[str, type]) -> dict[str, dict[str, list[str]]]:
    """Return the methods or levels of each default of each option; no text for None and False."""
    defaults: dict[str, dict[str, list[str]]] = {}
    for user, options in options_by_name.items():
        for option in fields(options):
            value = option.default
            if option.name == "memory_bank_size":
                value = getattr(options, "default_memory_bank_size", None)
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            text = "" if value is None or value is False else text
            defaults.setdefault(option.name, {}).setdefault(text, []).append(user)
    return defaults


_MethodFlags = make_flag_dataclass("MethodFlags", [*_option_flags(METHODS, _METHOD_GROUP)])
MethodFlags = Annotated[_MethodFlags, FLATTEN]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RuntimeFlags:
    """Options that do not change the result of training."""

    num_workers: int | None = None
    """Threads that load batches; defaults to half the CPU cores."""
    device: str | None = None
    """`cpu`, `cuda`, ...; defaults to a GPU if there is one."""
    checkpoint_minutes: float = 2.0
    """Minutes between checkpoints."""


_DEFAULT_RUNTIME = RuntimeFlags()


@app.command(
    help_epilogue="Example: `likewise train photos.likewise --out run --backbone resnet18 --image-size 64 "
    "--epochs 20 --batch-size 128`"
)
def train(
    dataset: Path,
    /,
    *,
    out: Path,
    runtime: RuntimeFlags = _DEFAULT_RUNTIME,
    pair_flags: PairFlags | None = None,
    train_flags: TrainFlags | None = None,
    method_flags: MethodFlags | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Train an image encoder; an interrupted run resumes with the same command.

    With several GPUs or machines: `torchrun --nproc-per-node 8 -m likewise.cli train ...` with the same
    flags; each process trains on its share of every batch.

    Args:
        dataset: A dataset; `--pairs language` needs caption embeddings.
        out: Directory of the run.
    """
    from likewise.distributed import is_main_process
    from likewise.training.train import train as train_encoder

    options = {name: value for name, value in to_values(method_flags).items() if value is not None}
    run = train_encoder(
        dataset,
        out,
        parse_train_config(to_values(train_flags) | options),
        to_config(PairConfig, pair_flags),
        num_workers=runtime.num_workers,
        device=runtime.device,
        checkpoint_minutes=runtime.checkpoint_minutes,
        progress=common.progress(),
    )
    if is_main_process():
        common.print_result(*run_summary(run))


def run_summary(run: Any) -> tuple[Mapping[str, Any], str]:
    """Return the result of a run for `print_result`: as a dict and as text."""
    last_metrics = (run.metrics() or [{}])[-1]
    result = {
        "run": str(run.path),
        "encoder": str(run.encoder_path),
        "metrics": last_metrics,
        "best_step": run.best_step,
    }
    return result, (
        f"trained: {run.path} (loss {last_metrics.get('loss', float('nan')):.3f}, effective rank "
        f"{last_metrics.get('effective_rank', float('nan')):.0f}; encoder of step {run.best_step:,})\n"
        f"  next: likewise evaluate {run.path} --dataset FOLDER; likewise report {run.path}"
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
    table = make_table(
        ("method", "objective", "negatives", "requirements"),
        [
            (name, options.summary, options.negatives, ", ".join(options.requirements))
            for name, options in METHODS.items()
        ],
        num_labels=4,
    )
    common.print_result({"methods": rows}, table)


_AdaptFlags = make_flags(
    AdaptConfig,
    group="Optimization",
    groups={
        "level": _LEVEL_GROUP,
        **dict.fromkeys(("num_val_pairs", "max_retention_loss"), "Validation"),
    },
    parameters={
        "level": Parameter(
            help=f"What is trained: {'; '.join(f'`{name}`: {o.summary}' for name, o in LEVELS.items())}."
        ),
        "projector_dims": Parameter(consume_multiple=True),
    },
    types={"level": Literal[*LEVELS]},  # pyrefly: ignore[invalid-literal]
    extra=[*_option_flags(LEVELS, _LEVEL_GROUP)],
)
AdaptFlags = Annotated[_AdaptFlags, FLATTEN]


@Parameter(name="*", group=HELP_GROUPS["Validation"])
@dataclass(frozen=True, kw_only=True)
class ComparisonFlags:
    """Labeled images on which start and adapted encoder are compared."""

    retain: Path | None = None
    """A dataset with labels of other images, on which a nearest-neighbor classifier may lose at most
    `max_retention_loss`."""
    eval_dataset: Strings = ()
    """Labeled datasets on which start and adapted encoder are compared by a linear probe, few-shot episodes
    and k-NN, as in `evaluate`."""


_DEFAULT_COMPARISON = ComparisonFlags()


@app.command(
    help_epilogue="Example: `likewise adapt photos.likewise --encoder timm:resnet50 --out adapted "
    "--eval-dataset labeled/`"
)
def adapt(
    dataset: Path,
    /,
    *,
    encoder: str,
    out: Path,
    comparison: ComparisonFlags = _DEFAULT_COMPARISON,
    options: ImageEncoderFlags = DEFAULT_ENCODER_FLAGS,
    adapt_flags: AdaptFlags | None = None,
    pair_flags: PairFlags | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Adapt a pretrained encoder to a dataset by its captions; keep the start if that does not help.

    At level `adapter` the features of all images are computed once, and a small adapter is trained on them,
    which takes a minute or two on a CPU. At `lora` and `full` the weights are trained on pairs of images, and
    the same command resumes an interrupted run. How much of the change is used is decided on held-out pairs.

    Args:
        dataset: A dataset with caption embeddings.
        encoder: The start: a run; `timm:NAME`, `torchvision:NAME`, `hf:NAME`, `clip:ARCH/WEIGHTS` or
            `hub:OWNER/REPO/ENTRY` (pretrained); or a weights file.
        out: Directory of the run.
    """
    from likewise.distributed import is_main_process
    from likewise.training.adaptation import adapt as adapt_encoder

    start = options.load(encoder)
    settings = {name: value for name, value in to_values(adapt_flags).items() if value is not None}
    run = adapt_encoder(
        dataset,
        start,
        out,
        parse_adapt_config(settings),
        to_config(PairConfig, pair_flags),
        retain=comparison.retain,
        num_workers=options.num_workers,
        progress=common.progress(),
    )
    if not is_main_process():
        return
    result, *output = _outcome(run)
    if not comparison.eval_dataset:
        next_steps = f"  next: likewise evaluate {run.path} --dataset FOLDER; likewise report {run.path}"
        common.print_result(result, *output, next_steps)
        return
    table, failure = _compare(start, run, comparison.eval_dataset, options.num_workers, common)
    common.print_result({**result, "comparison": asdict(table)}, *output, *_comparison_lines(table))
    if failure is not None:
        raise failure


def _outcome(run: "Run") -> "tuple[dict[str, Any], str, Table]":
    """Return the result of a run for `print_result`, and its validation as text and table."""
    from likewise.artifacts import read_json

    outcome = read_json(run.path / "adaptation.json")
    result = {"run": str(run.path), "encoder": str(run.encoder_path), "adaptation": outcome}
    optional = [name for name in ("knn", "retention") if outcome["scores"][0][name] is not None]
    rows = [
        (
            f"{score['blend']:g}{' (chosen)' * (score['blend'] == outcome['blend'])}",
            *(f"{100 * score[name]:.1f}" for name in ("mrr", *optional)),
        )
        for score in outcome["scores"]
    ]
    text = (
        f"blends of start (0) and adapted encoder (1), on {outcome['num_val_pairs']:,} held-out pairs, in %"
    )
    return result, text, make_table(("blend", "mrr", *optional), rows)


def _compare(
    start: "ImageEncoder", run: "Run", datasets: Sequence[str], num_workers: int | None, common: CommonOptions
) -> "tuple[Comparison, ProtocolFailedError | None]":
    """Evaluate start and adapted encoder; a protocol that fails is returned with the others' results."""
    from likewise.evaluation.evaluate import ProtocolFailedError, evaluate
    from likewise.evaluation.results import compare

    results, failure = [], None
    for encoder, out in ((start, run.path / "start"), (run, None)):
        try:
            evaluated = evaluate(
                encoder,
                split_datasets(datasets),
                out=out,
                num_workers=num_workers,
                progress=common.progress(),
            )
        except ProtocolFailedError as error:
            evaluated, failure = error.results, error
        results.append(evaluated)
    return compare(results, ["start", "adapted"]), failure


def _comparison_lines(comparison: "Comparison") -> "tuple[Table, str]":
    from likewise.report.comparison import LEGEND, to_rows

    header, *rows = to_rows(comparison)
    return make_table(header, rows, num_labels=3), LEGEND
