"""Commands of evaluation: `analyze-pairs`, `evaluate`, `datasets`, `compare`, `report`, `demo`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from likewise.cli.common import (
    COMMON_OPTIONS,
    HELP_GROUPS,
    CommonOptions,
    app,
    check_skipped,
    comparison_table,
    make_table,
)
from likewise.cli.flags import INTS, STRINGS
from likewise.strings import path_exists, split_unknown_names

if TYPE_CHECKING:
    from likewise.evaluation.evaluate import ColumnOptions
    from likewise.evaluation.protocols import ProtocolConfig
    from likewise.evaluation.results import EvalResults
    from likewise.models.encoders import ImageEncoder

Strings = Annotated[tuple[str, ...], STRINGS]


@app.command(
    help_epilogue="Example: `likewise analyze-pairs photos.likewise --encoder all-MiniLM-L6-v2,tfidf "
    "--pair-config default --pair-config k=3 --pair-config mutual_k=10,hubness_correction=csls`"
)
def analyze_pairs(
    dataset: Path,
    /,
    *,
    encoder: Strings = (),
    pair_config: list[str] | None = None,
    out: Path | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Compare encoders and pair configurations without training, as a table and an HTML report.

    Args:
        dataset: A dataset with embeddings.
        encoder: Encoders to compare, repeatable or comma-separated; `image:...` for image encoders. Defaults
            to all whose embeddings the dataset has.
        pair_config: Comma-separated options of `train`'s pair sampling, such as `k=3,mutual_k=10`, or
            `default` for the nearest caption; repeatable. Defaults to a selection.
        out: The HTML file; defaults to `pairs.html` in the dataset.
    """
    from likewise.data.dataset import CaptionDataset
    from likewise.embeddings.store import embedding_names
    from likewise.pairs.analyze import analyze_pairs as analyze
    from likewise.report.pairs_report import format_analysis, write_pairs_report

    caption_dataset = CaptionDataset.open(dataset)
    known = embedding_names(caption_dataset)
    encoders = split_unknown_names(encoder, lambda name: name in known or path_exists(name))
    analysis = analyze(caption_dataset, encoders or None, pair_config, progress=common.progress())
    page = write_pairs_report(analysis, caption_dataset, out or caption_dataset.path / "pairs.html")
    common.print_result(
        {"page": str(page), **analysis.to_dict()}, *format_analysis(analysis), f"page: {page}"
    )


@Parameter(name="*", group=HELP_GROUPS["Columns"])
@dataclass(frozen=True, kw_only=True)
class ColumnFlags:
    """Columns of tables, and ignored values of masks."""

    label_column: str = "label"
    """Column of labels in tables."""
    split_column: str = "split"
    """Column of splits (train, val, test) in tables."""
    caption_column: str | None = None
    """Column of captions in tables; inferred from its name by default."""
    ignore_index: Annotated[tuple[int, ...], INTS] = (255,)
    """Mask values to ignore (comma-separated), e.g. 255."""

    def to_columns(self) -> "ColumnOptions":
        """Return the options of `evaluate`."""
        from likewise.evaluation.evaluate import ColumnOptions

        return ColumnOptions(
            label=self.label_column,
            split=self.split_column,
            caption=self.caption_column,
            ignore_index=self.ignore_index,
        )


@Parameter(name="*", group=HELP_GROUPS["Protocol options"])
@dataclass(frozen=True, kw_only=True)
class ProtocolFlags:
    """Options of protocols; None is the default of the protocol."""

    ways: int | None = None
    """Classes per few-shot episode; defaults to 5."""
    shots: int | None = None
    """Labeled images per class of a few-shot episode; defaults to 5."""
    episodes: int | None = None
    """Few-shot episodes; defaults to 5,000."""
    mean_class_accuracy: bool = False
    """Score the linear probe by the mean of the per-class accuracies."""
    prompt: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None
    """Prompt templates of zeroshot with {} for the class; defaults to "a photo of a {}."."""
    finetune_backbone: bool = False
    """Train the encoder too in detection and segmentation; by default it is frozen."""
    train_epochs: int | None = None
    """Epochs of finetune (defaults to 10), detection (12) and segmentation (20)."""
    finetune_lr: float | None = None
    """Peak learning rate of the encoder in finetune; defaults to 0.0001."""

    def to_config(self, image_size: int | None) -> "ProtocolConfig":
        """Return the config of the protocols; detection and segmentation read images at `image_size`."""
        from likewise.evaluation.protocols import ProtocolConfig

        dense = {
            "finetune_backbone": self.finetune_backbone or None,
            "epochs": self.train_epochs,
            "image_size": image_size,
        }
        overrides: dict[str, dict[str, Any]] = {
            "fewshot": {"ways": self.ways, "shots": self.shots, "episodes": self.episodes},
            "zeroshot": {"prompts": tuple(self.prompt) if self.prompt else None},
            "finetune": {"epochs": self.train_epochs, "lr": self.finetune_lr},
            "detection": dense,
            "segmentation": dense,
        }
        config = ProtocolConfig()
        for name, values in overrides.items():
            given = {key: value for key, value in values.items() if value is not None}
            config = replace(config, **{name: replace(getattr(config, name), **given)})
        return config.with_mean_class_accuracy() if self.mean_class_accuracy else config


@Parameter(name="*", group=HELP_GROUPS["Encoder options"])
@dataclass(frozen=True, kw_only=True)
class ImageEncoderFlags:
    """How an image encoder is loaded and run."""

    image_size: int | None = None
    """Height and width of the input in pixels; defaults to that of the model's training."""
    backbone: str | None = None
    """Architecture of a weights file: a timm name, or `torchvision:NAME`."""
    weights_prefix: str = ""
    """Prefix of the backbone's weights in the file, such as `module.encoder_q.`; others are ignored. Found if
    only one fits all weights."""
    weights_exclude: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None
    """Prefixes of weights to ignore; all others must match."""
    device: str | None = None
    """`cpu`, `cuda`, ...; defaults to a GPU if there is one."""
    num_workers: int | None = None
    """Threads that read images; defaults to the number of CPU cores."""

    def load(self, encoder: str) -> "ImageEncoder":
        """Load an encoder."""
        from likewise.models.encoders import load_encoder

        return load_encoder(
            encoder,
            backbone=self.backbone,
            weights_prefix=self.weights_prefix,
            weights_exclude=self.weights_exclude or (),
            image_size=self.image_size,
            device=self.device,
        )


@Parameter(name="*", group=HELP_GROUPS["Output"])
@dataclass(frozen=True, kw_only=True)
class ResultFlags:
    """Where results are written, and what counts as a failure."""

    out: Path | None = None
    """Directory of the results; defaults to `evaluation` in the run."""
    strict: bool = False
    """Exit with code 1 if an image or an annotation was skipped; the results are complete nevertheless."""


_DEFAULT_COLUMNS, _DEFAULT_PROTOCOLS, _DEFAULT_RESULTS = ColumnFlags(), ProtocolFlags(), ResultFlags()
DEFAULT_ENCODER_FLAGS = ImageEncoderFlags()


@app.command(
    help_epilogue="Example: `likewise evaluate run --dataset eurosat,labeled/ --protocol linear,fewshot`"
)
def evaluate(
    encoder: str,
    /,
    *,
    dataset: Strings,
    protocol: Strings = ("linear", "fewshot", "knn"),
    columns: ColumnFlags = _DEFAULT_COLUMNS,
    protocols: ProtocolFlags = _DEFAULT_PROTOCOLS,
    options: ImageEncoderFlags = DEFAULT_ENCODER_FLAGS,
    result_flags: ResultFlags = _DEFAULT_RESULTS,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Evaluate an image encoder on labeled or captioned images.

    Args:
        encoder: A run; `timm:NAME`, `torchvision:NAME`, `hf:NAME`, `clip:ARCH/WEIGHTS` or
            `hub:OWNER/REPO/ENTRY` (pretrained); `random:NAME` (untrained); or a weights file.
        dataset: Datasets, repeatable or comma-separated (a path that exists is not split): folders
            split/class/image, folders with a labels.csv, CSV files, or names (see `likewise datasets`); for
            image-text a CSV file or a folder with a captions.csv; for detection a boxes.csv, COCO, Pascal VOC
            or YOLO; for segmentation an index.csv or folders.
        protocol: Protocols, repeatable or comma-separated: linear, fewshot, knn, knn-grid, retrieval,
            clustering, finetune, localization; with a text tower zeroshot and image-text; detection and
            segmentation.
    """
    from likewise.evaluation.evaluate import ProtocolFailedError
    from likewise.evaluation.evaluate import evaluate as evaluate_encoder

    loaded_encoder = options.load(encoder)
    try:
        results = evaluate_encoder(
            loaded_encoder,
            split_datasets(dataset),
            split_unknown_names(protocol, lambda _: False),
            config=protocols.to_config(options.image_size),
            columns=columns.to_columns(),
            out=result_flags.out,
            num_workers=options.num_workers,
            progress=common.progress(),
        )
    except ProtocolFailedError as error:
        print_evaluation(error.results, common)
        raise
    print_evaluation(results, common)
    for result in results.raw:
        info = result["dataset"]
        check_skipped(info["skipped"], f"the evaluation on {info['name']}", strict=result_flags.strict)


def print_evaluation(results: "EvalResults", common: CommonOptions) -> None:
    """Print what is known of each dataset and the table of results."""
    table = (results.table(),) if len(results) else ()
    common.print_result({"results": results.raw}, *dataset_lines(results), *table)


def split_datasets(datasets: Sequence[str]) -> tuple[str, ...]:
    """Split datasets at commas, except paths that exist."""
    return split_unknown_names(datasets, path_exists)


def dataset_lines(results: "EvalResults") -> Iterator[str]:
    """Yield what is known of each dataset: counts, skipped images, classes without training images."""
    for result in results.raw:
        info = result["dataset"]
        annotations = (
            f"{info['num_classes']} classes"
            if "num_classes" in info
            else f"{info['num_captions']:,} captions"
        )
        yield f"{info['name']}: {annotations}, images {info['num_images']}"
        for reason, count in info["skipped"].items():
            yield f"  skipped {count:,}: {reason}"
        for reason, count in info.get("ignored", {}).items():
            yield f"  ignored {count:,}: {reason}"
        if info.get("test_only_classes"):
            yield f"  classes without training images: {', '.join(info['test_only_classes'])}"


@app.command(help_epilogue="Example: `likewise datasets`, then `likewise evaluate run --dataset eurosat,dtd`")
def datasets(*, common: CommonOptions = COMMON_OPTIONS) -> None:
    """List the datasets that `evaluate --dataset NAME` downloads, and which of them are on disk."""
    from likewise.evaluation.datasets.download import dataset_dir, is_downloaded
    from likewise.evaluation.datasets.registry import DATASETS

    rows = {name: asdict(info) | {"is_downloaded": is_downloaded(name)} for name, info in DATASETS.items()}
    lines = []
    for name, info in DATASETS.items():
        images = ", ".join(f"{count:,} {split}" for split, count in info.split_sizes.items())
        location = f"in {dataset_dir(name)}" if is_downloaded(name) else f"download {info.download_mb:,} MB"
        lines += [
            f"{name:<16}{info.title}: {info.num_classes} classes, {images}",
            f"{'':<16}{info.metric}; {location}; license: {info.license}",
            f"{'':<16}{info.homepage}",
        ]
    common.print_result({"datasets": rows}, *lines)


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
    """Compare encoders: confidence intervals, paired tests against the first, and mean ranks.

    Args:
        encoders: Runs or evaluation directories with results on the same datasets, the first of which is the
            baseline. Seeds of one encoder are comma-separated; `NAME=` before them sets its name. A path that
            exists is neither split at commas nor at `=`.
        out: Directory for the table as CSV, Markdown and LaTeX, and for plots.
    """
    from likewise.evaluation.results import compare as compare_encoders
    from likewise.report.comparison import LEGEND, to_rows, write_comparison

    names, paths = zip(*map(parse_encoder, encoders), strict=True)
    comparison = compare_encoders(paths, names)
    gflops = [None if flops is None else flops / 1e9 for flops in comparison.encoder_flops]
    files = [] if out is None else write_comparison(comparison, out, gflops)
    header, *rows = to_rows(comparison)
    common.print_result(
        {"table": asdict(comparison), "files": [str(path) for path in files]},
        make_table(header, rows, num_labels=3),
        LEGEND,
        *(f"written: {path}" for path in files),
    )


def parse_encoder(text: str) -> tuple[str | None, tuple[str, ...]]:
    """Parse `NAME=PATH,PATH`, with or without the name, into the name and the paths."""
    paths = split_datasets([text])
    name, equals, after_name = text.partition("=")
    if not equals or all(map(path_exists, paths)):
        return None, paths
    return name or None, split_datasets([after_name])


@app.command(help_epilogue="Example: `likewise report run-language run-self --out report.html`")
def report(
    runs: Annotated[list[Path], Parameter(name="RUNS")],
    /,
    *,
    out: Path | None = None,
    title: str | None = None,
    common: CommonOptions = COMMON_OPTIONS,
) -> None:
    """Write an HTML report with pairs, training curves and results of one or several runs.

    Args:
        runs: Finished runs; the baseline is the first with `self` pairs, else the first.
        out: The HTML file; defaults to `report.html` in the first run.
        title: Title of the report.
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
    """Train and adapt encoders on emoji from two vendors, compare them, and write an HTML report.

    Captions are Unicode names. One encoder is trained from scratch with self pairs, one with language pairs.
    A pretrained encoder is adapted by the captions, and compared with itself before. All are evaluated on
    held-out concepts.

    Args:
        out: Directory of all results; defaults to `likewise-demo`, or `likewise-demo-quick`.
        quick: Run a smaller demo: a third of the data, fewer steps, smaller images.
        device: `cpu`, `cuda`, ...; defaults to a GPU if there is one.
    """
    from likewise.demo import START, run_demo

    out_dir = out or Path("likewise-demo-quick" if quick else "likewise-demo")
    demo_result = run_demo(out_dir, quick=quick, device=device, progress=common.progress())
    common.print_result(
        {
            "report": str(demo_result.report_path),
            "results": [row.to_dict() for row in demo_result.scratch],
            "adaptation": [row.to_dict() for row in demo_result.adaptation],
            "blend": demo_result.outcome.blend,
        },
        "trained from scratch; on held-out concepts, in %, with 95 % intervals:",
        comparison_table(demo_result.scratch, ("self", "language", "untrained")),
        f"{START}, pretrained on photos: frozen, and adapted by the captions; on the same concepts:",
        comparison_table(demo_result.adaptation, ("start", "adapted")),
        demo_result.outcome.summary(),
        f"report: {demo_result.report_path.resolve()}",
    )
