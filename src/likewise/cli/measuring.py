"""What an encoder is worth: `evaluate`, `report` and `demo`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from likewise.cli.app import COMMON, app, listed
from likewise.terminal import Common, comparison_lines, result_lines

if TYPE_CHECKING:
    from likewise.evaluation.protocols import ProtocolSettings


@app.command(help_epilogue="Example: `likewise evaluate run --on labelled/ --protocol linear,fewshot`")
def evaluate(
    target: str,
    /,
    *,
    on: str,
    protocol: str = "linear,fewshot,knn",
    label_column: str = "label",
    split_column: str = "split",
    ways: int | None = None,
    shots: int | None = None,
    episodes: int | None = None,
    mean_per_class: bool = False,
    backbone: str | None = None,
    size: int | None = None,
    out: Path | None = None,
    workers: int | None = None,
    device: str | None = None,
    common: Common = COMMON,
) -> None:
    """Measure a frozen encoder on labelled images.

    Args:
        target: A run, `timm:NAME` (pretrained), `random:NAME` (untrained), or a file of weights.
        on: Labelled sets, with commas between: folders laid out as split/class/image or with a labels.csv,
            or CSV files.
        protocol: Of linear, fewshot, knn and retrieval, with commas between.
        label_column: Column of labels in CSV files.
        split_column: Column of splits (train, val, test) in CSV files.
        ways: Classes a few-shot episode; 5 by default.
        shots: Labelled images a class; 5 by default.
        episodes: Few-shot episodes; 5,000 by default.
        mean_per_class: Score linear and knn by the mean of the classes' accuracies.
        backbone: The timm model that a plain file of weights is for.
        size: Side of the input in pixels; by default what the model was trained with.
        out: Where results go; by default `evaluation` in the run.
        workers: Threads that read images.
        device: Where features are computed.
    """
    from likewise.evaluation.evaluate import evaluate as evaluate_encoder

    results = evaluate_encoder(
        target,
        [Path(each) for each in listed(on)],
        listed(protocol),
        settings=_protocol_settings(ways, shots, episodes, mean_per_class),
        label_column=label_column,
        split_column=split_column,
        backbone=backbone,
        size=size,
        out=out,
        workers=workers,
        device=device,
        progress=common.progress(),
    )
    common.tell({"results": results}, "\n".join(result_lines(results, listed(protocol))))


def _protocol_settings(
    ways: int | None, shots: int | None, episodes: int | None, mean_per_class: bool
) -> "ProtocolSettings":
    from likewise.evaluation.protocols import ProtocolSettings

    usual = ProtocolSettings()
    given = {"ways": ways, "shots": shots, "episodes": episodes}
    return replace(
        usual,
        linear=replace(usual.linear, mean_per_class=mean_per_class),
        fewshot=replace(usual.fewshot, **{name: value for name, value in given.items() if value is not None}),
    )


@app.command(help_epilogue="Example: `likewise report run-language run-self --out report.html`")
def report(
    runs: Annotated[list[Path], Parameter(name="RUNS")],
    /,
    *,
    out: Path | None = None,
    title: str | None = None,
    common: Common = COMMON,
) -> None:
    """Write a page that shows pairs, curves and results of one or several runs.

    Args:
        runs: Finished runs; they are compared with the first that has `self` pairs, else with the first.
        out: The HTML file; by default `report.html` in the first run.
        title: What stands at the top.
    """
    from likewise.report.html import write_report

    page = write_report(runs, out or runs[0] / "report.html", title=title)
    common.tell({"report": str(page)}, f"report: {page}")


@app.command(help_epilogue="Example: `likewise demo --quick`")
def demo(
    *,
    out: Path | None = None,
    quick: bool = False,
    device: str | None = None,
    common: Common = COMMON,
) -> None:
    """Run the whole pipeline on real captioned images and write a report.

    Emoji as drawn by two houses, captioned by their Unicode names: an encoder is trained twice from the same
    start, once on pairs of views of one image and once on pairs of images that are described alike.

    Args:
        out: The folder of everything the demo makes; `likewise-demo` or `likewise-demo-quick` by default.
        quick: A smaller run, under 90 seconds on 2 processors.
        device: Where to train.
    """
    from likewise.demo import run_demo

    folder = out or Path("likewise-demo-quick" if quick else "likewise-demo")
    page, rows = run_demo(folder, quick=quick, device=device, progress=common.progress())
    common.tell(
        {"report": str(page), "results": [row.told() for row in rows]},
        "\n".join(
            [
                "on held-out concepts, in %, with 95 % intervals:",
                *comparison_lines(rows, ("self", "language", "untrained")),
                f"report: {page.resolve()}",
            ]
        ),
    )
