"""What an encoder is worth: `evaluate`, `sets`, `compare`, `report` and `demo`."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from likewise.cli.common import (
    COMMON_OPTIONS,
    CommonOptions,
    app,
    comparison_table,
    format_table,
    parse_list,
    results_table,
)
from likewise.errors import InvalidInputError


@app.command(
    help_epilogue="Example: `likewise diagnose photos.likewise --encoder all-MiniLM-L6-v2,tfidf --rule paper "
    "--rule k=3 --rule mutual=10,hubs=csls`"
)
def analyze_pairs(
    dataset: Path,
    /,
    *,
    encoder: str | None = None,
    pair_config: list[str] | None = None,
    out: Path | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Judge pairs without training: encoders and rules side by side, as a table and as a page with pictures.

    Args:
        dataset: A collection with embeddings.
        encoder: Whose embeddings to compare, with commas between; `image:…` for those of images. All that
            the collection has by default.
        pair_config: Settings of a rule with commas between, such as `k=3,mutual=10`, or `paper` for the
            nearest
            caption; may be given several times. The usual ones by default.
        out: The HTML file, its data beside it; by default `diagnosis.html` in the collection.
    """
    from likewise.data.dataset import CaptionDataset
    from likewise.pairs.analyze import analyze_pairs as diagnose_pairs
    from likewise.report.pairs_report import format_analysis, write_pairs_report

    caption_dataset = CaptionDataset.open(dataset)
    encoders = None if encoder is None else parse_list(encoder)
    analysis = diagnose_pairs(caption_dataset, encoders, pair_config, progress=common.progress())
    page = write_pairs_report(analysis, caption_dataset, out or caption_dataset.path / "diagnosis.html")
    common.print_result(
        {"page": str(page), **analysis.to_dict()}, "\n".join([*format_analysis(analysis), f"page: {page}"])
    )


if TYPE_CHECKING:
    from likewise.evaluation.protocols import ProtocolConfig


@app.command(help_epilogue="Example: `likewise evaluate run --on labelled/ --protocol linear,fewshot`")
def evaluate(
    encoder: str,
    /,
    *,
    dataset: str,
    protocol: str = "linear,fewshot,knn",
    label_column: str = "label",
    split_column: str = "split",
    caption_column: str | None = None,
    ways: int | None = None,
    shots: int | None = None,
    episodes: int | None = None,
    mean_class_accuracy: bool = False,
    finetune_backbone: Annotated[bool, Parameter(negative="")] = False,
    ignore_index: str = "255",
    train_epochs: int | None = None,
    finetune_lr: float | None = None,
    prompt: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    backbone: str | None = None,
    weights_prefix: str = "",
    weights_exclude: Annotated[list[str] | None, Parameter(consume_multiple=True, negative="")] = None,
    image_size: int | None = None,
    out: Path | None = None,
    num_workers: int | None = None,
    device: str | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Measure an image encoder on labelled or captioned images.

    Args:
        encoder: A run; `timm:NAME`, `torchvision:NAME`, `hf:NAME`, `clip:ARCH/WEIGHTS` or
            `hub:OWNER/REPO/ENTRY` (pretrained); `random:NAME` (untrained); or a file of weights.
        dataset: Sets, with commas between: folders laid out as split/class/image or with a labels.csv, CSV
            files,
            or names that `likewise sets` lists; for image-text a CSV file or a folder with a captions.csv;
            for detection a boxes.csv, COCO, Pascal VOC or YOLO; for segmentation an index.csv or folders.
        protocol: With commas between: linear, fewshot, knn, knn-grid, retrieval, clustering, finetune,
            localization; with a text tower zeroshot and image-text; detection and segmentation.
        label_column: Column of labels in CSV files.
        split_column: Column of splits (train, val, test) in CSV files.
        caption_column: Column of captions in CSV files.
        ways: Classes a few-shot episode; 5 by default.
        shots: Labelled images a class; 5 by default.
        episodes: Few-shot episodes; 5,000 by default.
        mean_class_accuracy: Score classifiers by the mean of the classes' accuracies.
        finetune_backbone: Let detection and segmentation train the encoder, too; by default it stays as it
            is.
        ignore_index: Numbers in masks that count neither way, with commas between.
        train_epochs: Epochs of finetune (10 by default), detection (12) and segmentation (20).
        finetune_lr: Peak learning rate of the encoder in finetune; 0.0001 by default.
        prompt: Sentences for zeroshot with {} for the class; "a photo of a {}." by default.
        backbone: The timm model, or `torchvision:NAME`, that a plain file of weights is for.
        weights_prefix: What stands before the names of its weights, as in `module.encoder_q.`; others are
            left out.
        weights_exclude: Beginnings of names of weights that are left out; everything else must fit.
        image_size: Side of the input in pixels; by default what the model was trained with.
        out: Where results go; by default `evaluation` in the run.
        num_workers: Threads that read images.
        device: Where features are computed.
    """
    from likewise.evaluation.evaluate import ColumnOptions
    from likewise.evaluation.evaluate import evaluate as evaluate_encoder
    from likewise.models.encoders import load_encoder

    results = evaluate_encoder(
        load_encoder(
            encoder,
            backbone=backbone,
            weights_prefix=weights_prefix,
            weights_exclude=weights_exclude or (),
            image_size=image_size,
            device=device,
        ),
        parse_list(dataset),
        parse_list(protocol),
        config=_protocol_config(
            mean_class_accuracy,
            fewshot={"ways": ways, "shots": shots, "episodes": episodes},
            finetune={"epochs": train_epochs, "lr": finetune_lr},
            zeroshot={"prompts": tuple(prompt) if prompt else None},
            detection={
                "finetune_backbone": finetune_backbone or None,
                "epochs": train_epochs,
                "image_size": image_size,
            },
            segmentation={
                "finetune_backbone": finetune_backbone or None,
                "epochs": train_epochs,
                "image_size": image_size,
            },
        ),
        columns=ColumnOptions(
            label=label_column,
            split=split_column,
            caption=caption_column,
            ignore_index=_parse_ints(ignore_index),
        ),
        out=out,
        num_workers=num_workers,
        progress=common.progress(),
    )
    common.print_result({"results": results.raw}, "\n".join(results_table(results.raw)))


def _parse_ints(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() for part in parse_list(text)):
        raise InvalidInputError(f"--ignore {text}: give numbers with commas between, such as 11,255")
    return tuple(map(int, parse_list(text)))


def _protocol_config(mean_class_accuracy: bool, **overrides: dict[str, Any]) -> "ProtocolConfig":
    """Return the usual settings but for those that are given, by the protocol they belong to."""
    from likewise.evaluation.protocols import ProtocolConfig

    defaults = ProtocolConfig()
    configs = {
        name: replace(getattr(defaults, name), **{k: v for k, v in values.items() if v is not None})
        for name, values in overrides.items()
    }
    config = replace(defaults, **configs)
    return config.with_mean_class_accuracy() if mean_class_accuracy else config


@app.command(help_epilogue="Example: `likewise sets`, then `likewise evaluate run --on eurosat,dtd`")
def datasets(*, common: CommonOptions = COMMON_OPTIONS) -> None:
    """List the well-known sets that `evaluate --on NAME` fetches, and which of them are here."""
    from likewise.evaluation.datasets.download import dataset_dir, is_downloaded
    from likewise.evaluation.datasets.registry import DATASETS

    rows = {name: asdict(info) | {"here": is_downloaded(name)} for name, info in DATASETS.items()}
    lines = []
    for name, info in DATASETS.items():
        images = ", ".join(f"{count:,} {split}" for split, count in info.split_sizes.items())
        location = (
            f"in {dataset_dir(name)}" if is_downloaded(name) else f"about {info.download_mb:,} MB to fetch"
        )
        lines += [
            f"{name:<16}{info.title}: {info.num_classes} classes, {images}",
            f"{'':<16}{info.metric}; {location}; licence: {info.license}",
            f"{'':<16}{info.homepage}",
        ]
    common.print_result({"sets": rows}, "\n".join(lines))


@app.command(
    help_epilogue="Example: `likewise compare self=self-0,self-1 language=language-0,language-1 --out cmp`"
)
def compare(
    encoders: Annotated[list[str], Parameter(name="ENCODERS")],
    /,
    *,
    out: Path | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Lay encoders side by side: intervals, paired tests against the first, ranks over sets.

    Args:
        encoders: Runs or evaluation folders that were measured on the same sets; commas between those that
            differ only in their seed, `NAME=` before them to call them so. All are compared with the first.
        out: A folder to write the table to as CSV, Markdown and LaTeX, with plots.
    """
    from likewise.evaluation.results import compare as compare_encoders
    from likewise.report.comparison import LEGEND, to_rows, write_comparison

    names, _, paths = zip(*(encoder.rpartition("=") for encoder in encoders), strict=True)
    comparison = compare_encoders([parse_list(seeds) for seeds in paths], [name or None for name in names])
    gflops = [None if flops is None else flops / 1e9 for flops in comparison.encoder_flops]
    files = [] if out is None else write_comparison(comparison, out, gflops)
    lines = [*format_table(to_rows(comparison)), LEGEND, *(f"written: {path}" for path in files)]
    common.print_result(
        {"table": asdict(comparison), "files": [str(path) for path in files]}, "\n".join(lines)
    )


@app.command(help_epilogue="Example: `likewise report run-language run-self --out report.html`")
def report(
    runs: Annotated[list[Path], Parameter(name="RUNS")],
    /,
    *,
    out: Path | None = None,
    title: str | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Write a page that shows pairs, curves and results of one or several runs.

    Args:
        runs: Finished runs; they are compared with the first that has `self` pairs, else with the first.
        out: The HTML file; by default `report.html` in the first run.
        title: What stands at the top.
    """
    from likewise.report.run_report import write_report

    page = write_report(runs, out or runs[0] / "report.html", title=title)
    common.print_result({"report": str(page)}, f"report: {page}")


@app.command(help_epilogue="Example: `likewise demo --quick`")
def demo(
    *,
    out: Path | None = None,
    quick: bool = False,
    device: str | None = None,
    common: CommonOptions = COMMON_OPTIONS,
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

    out_dir = out or Path("likewise-demo-quick" if quick else "likewise-demo")
    page, rows = run_demo(out_dir, quick=quick, device=device, progress=common.progress())
    common.print_result(
        {"report": str(page), "results": [row.to_dict() for row in rows]},
        "\n".join(
            [
                "on held-out concepts, in %, with 95 % intervals:",
                *comparison_table(rows, ("self", "language", "untrained")),
                f"report: {page.resolve()}",
            ]
        ),
    )
