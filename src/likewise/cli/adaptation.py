"""Command of adaptation: `adapt`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from likewise.cli.common import COMMON_OPTIONS, HELP_GROUPS, CommonOptions, app, make_table
from likewise.cli.evaluation import DEFAULT_ENCODER_FLAGS, ImageEncoderFlags, Strings, split_datasets
from likewise.cli.flags import FLATTEN, make_flags, to_config
from likewise.cli.training import PairFlags
from likewise.pairs.config import PairConfig
from likewise.training.config import AdaptConfig

if TYPE_CHECKING:
    from rich.table import Table

    from likewise.evaluation.evaluate import ProtocolFailedError
    from likewise.evaluation.results import Comparison
    from likewise.models.encoders import ImageEncoder
    from likewise.training.train import Run

_AdaptFlags = make_flags(
    AdaptConfig,
    group="Optimization",
    groups=dict.fromkeys(("num_val_pairs", "max_retention_loss"), "Validation"),
    parameters={"projector_dims": Parameter(consume_multiple=True)},
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

    The features of all images are computed once. A small adapter is trained on them, which takes a minute or
    two on a CPU. How much of it is used is decided on held-out pairs.

    Args:
        dataset: A dataset with caption embeddings.
        encoder: The start: a run; `timm:NAME`, `torchvision:NAME`, `hf:NAME`, `clip:ARCH/WEIGHTS` or
            `hub:OWNER/REPO/ENTRY` (pretrained); or a weights file.
        out: Directory of the run.
    """
    from likewise.training.adaptation import adapt as adapt_encoder

    start = options.load(encoder)
    run = adapt_encoder(
        dataset,
        start,
        out,
        to_config(AdaptConfig, adapt_flags),
        to_config(PairConfig, pair_flags),
        retain=comparison.retain,
        num_workers=options.num_workers,
        progress=common.progress(),
    )
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
        f"blends of start (0) and adapted features (1), on {outcome['num_val_pairs']:,} held-out pairs, in %"
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
