"""What an encoder is worth: `evaluate`, `sets`, `compare`, `report` and `demo`."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from likewise.cli.common import COMMON, Common, app, comparison_lines, listed, result_lines, table_lines
from likewise.errors import InputError


@app.command(
    help_epilogue="Example: `likewise diagnose photos.likewise --encoder all-MiniLM-L6-v2,tfidf --rule paper "
    "--rule k=3 --rule mutual=10,hubs=csls`"
)
def diagnose(
    collection: Path,
    /,
    *,
    encoder: str | None = None,
    rule: list[str] | None = None,
    out: Path | None = None,
    common: Common = COMMON,
) -> None:
    """Judge pairs without training: encoders and rules side by side, as a table and as a page with pictures.

    Args:
        collection: A collection with embeddings.
        encoder: Whose embeddings to compare, with commas between; `image:…` for those of images. All that
            the collection has by default.
        rule: Settings of a rule with commas between, such as `k=3,mutual=10`, or `paper` for the nearest
            caption; may be given several times. The usual ones by default.
        out: The HTML file, its data beside it; by default `diagnosis.html` in the collection.
    """
    from likewise.data.dataset import Collection
    from likewise.pairs.analyze import diagnose as diagnose_pairs
    from likewise.report.pairs_report import text_lines, write_pairs_page

    source = Collection.open(collection)
    encoders = None if encoder is None else listed(encoder)
    found = diagnose_pairs(source, encoders, rule, progress=common.progress())
    page = write_pairs_page(found, source, out or source.path / "diagnosis.html")
    common.tell({"page": str(page), **found.told()}, "\n".join([*text_lines(found), f"page: {page}"]))


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
    caption_column: str | None = None,
    ways: int | None = None,
    shots: int | None = None,
    episodes: int | None = None,
    mean_per_class: bool = False,
    tune: Annotated[bool, Parameter(negative="")] = False,
    ignore: str = "255",
    epochs: int | None = None,
    rate: float | None = None,
    template: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    backbone: str | None = None,
    prefix: str = "",
    drop: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    size: int | None = None,
    out: Path | None = None,
    workers: int | None = None,
    device: str | None = None,
    common: Common = COMMON,
) -> None:
    """Measure an image encoder on labelled or captioned images.

    Args:
        target: A run; `timm:NAME`, `torchvision:NAME`, `hf:NAME`, `clip:ARCH/WEIGHTS` or
            `hub:OWNER/REPO/ENTRY` (pretrained); `random:NAME` (untrained); or a file of weights.
        on: Sets, with commas between: folders laid out as split/class/image or with a labels.csv, CSV files,
            or names that `likewise sets` lists; for image-text a CSV file or a folder with a captions.csv;
            for detection a boxes.csv, COCO, Pascal VOC or YOLO; for segmentation an index.csv or folders.
        protocol: With commas between: linear, fewshot, knn, knn-grid, retrieval, clustering, finetune,
            localisation; with a text tower zeroshot and image-text; detection and segmentation.
        label_column: Column of labels in CSV files.
        split_column: Column of splits (train, val, test) in CSV files.
        caption_column: Column of captions in CSV files.
        ways: Classes a few-shot episode; 5 by default.
        shots: Labelled images a class; 5 by default.
        episodes: Few-shot episodes; 5,000 by default.
        mean_per_class: Score classifiers by the mean of the classes' accuracies.
        tune: Let detection and segmentation train the encoder, too; by default it stays as it is.
        ignore: Numbers in masks that count neither way, with commas between.
        epochs: Epochs of finetune (10 by default), detection (12) and segmentation (20).
        rate: Peak learning rate of the encoder in finetune; 0.0001 by default.
        template: Sentences for zeroshot with {} for the class; "a photo of a {}." by default.
        backbone: The timm model, or `torchvision:NAME`, that a plain file of weights is for.
        prefix: What stands before the names of its weights, as in `module.encoder_q.`; others are left out.
        drop: Beginnings of names of weights that are left out; everything else must fit.
        size: Side of the input in pixels; by default what the model was trained with.
        out: Where results go; by default `evaluation` in the run.
        workers: Threads that read images.
        device: Where features are computed.
    """
    from likewise.evaluation.evaluate import evaluate as evaluate_encoder

    results = evaluate_encoder(
        target,
        listed(on),
        listed(protocol),
        settings=_protocol_settings(
            mean_per_class,
            fewshot={"ways": ways, "shots": shots, "episodes": episodes},
            finetune={"epochs": epochs, "rate": rate},
            zeroshot={"templates": tuple(template) if template else None},
            detection={"backbone": "tuned" if tune else None, "epochs": epochs, "size": size},
            segmentation={"backbone": "tuned" if tune else None, "epochs": epochs, "size": size},
        ),
        label_column=label_column,
        split_column=split_column,
        caption_column=caption_column,
        ignored=_numbers(ignore),
        backbone=backbone,
        prefix=prefix,
        drop=drop or (),
        size=size,
        out=out,
        workers=workers,
        device=device,
        progress=common.progress(),
    )
    common.tell({"results": results}, "\n".join(result_lines(results)))


def _numbers(told: str) -> tuple[int, ...]:
    if not all(each.isdecimal() for each in listed(told)):
        raise InputError(f"--ignore {told}: give numbers with commas between, such as 11,255")
    return tuple(map(int, listed(told)))


def _protocol_settings(mean_per_class: bool, **given: dict[str, Any]) -> "ProtocolSettings":
    """Return the usual settings but for those that are given, by the protocol they belong to."""
    from likewise.evaluation.protocols import ProtocolSettings

    usual = ProtocolSettings()
    told = {
        name: replace(getattr(usual, name), **{k: v for k, v in values.items() if v is not None})
        for name, values in given.items()
    }
    return replace(usual, linear=replace(usual.linear, mean_per_class=mean_per_class), **told)


@app.command(help_epilogue="Example: `likewise sets`, then `likewise evaluate run --on eurosat,dtd`")
def sets(*, common: Common = COMMON) -> None:
    """List the well-known sets that `evaluate --on NAME` fetches, and which of them are here."""
    from likewise.evaluation.datasets.download import is_here, place
    from likewise.evaluation.datasets.registry import CATALOG

    rows = {name: asdict(told) | {"here": is_here(name)} for name, told in CATALOG.items()}
    lines = []
    for name, told in CATALOG.items():
        images = ", ".join(f"{count:,} {split}" for split, count in told.images.items())
        where = f"in {place(name)}" if is_here(name) else f"about {told.megabytes:,} MB to fetch"
        lines += [
            f"{name:<16}{told.title}: {told.classes} classes, {images}",
            f"{'':<16}{told.metric}; {where}; licence: {told.licence}",
            f"{'':<16}{told.homepage}",
        ]
    common.tell({"sets": rows}, "\n".join(lines))


@app.command(
    help_epilogue="Example: `likewise compare self=self-0,self-1 language=language-0,language-1 --out cmp`"
)
def compare(
    encoders: Annotated[list[str], Parameter(name="ENCODERS")],
    /,
    *,
    out: Path | None = None,
    common: Common = COMMON,
) -> None:
    """Lay encoders side by side: intervals, paired tests against the first, ranks over sets.

    Args:
        encoders: Runs or evaluation folders that were measured on the same sets; commas between those that
            differ only in their seed, `NAME=` before them to call them so. All are compared with the first.
        out: A folder to write the table to as CSV, Markdown and LaTeX, with plots.
    """
    from likewise.evaluation.results import read_entries, tabulate
    from likewise.report.comparison import LEGEND, grid, write_comparison

    entries = read_entries(encoders)
    table = tabulate(entries)
    costs = [next(iter(entry.seeds[0].values())).operations for entry in entries]
    files = [] if out is None else write_comparison(table, out, [c and c / 1e9 for c in costs])
    text = [*table_lines(grid(table)), LEGEND, *(f"written: {file}" for file in files)]
    common.tell({"table": asdict(table), "files": [str(file) for file in files]}, "\n".join(text))


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
    from likewise.report.run_report import write_report

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
