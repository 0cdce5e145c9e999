"""The command line: one verb a stage. Parse, call, print; everything else lies below."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter

from likewise.errors import InterruptedRunError, LikewiseError
from likewise.pretraining.settings import TrainSettings
from likewise.terminal import Common, comparison_lines, fail, import_lines, result_lines

if TYPE_CHECKING:
    from likewise.evaluation.protocols import ProtocolSettings

app = App(
    name="likewise",
    help="Learn image encoders from captioned images: pictures that are described alike, learn alike.",
    help_epilogue="Start here: `likewise demo --quick`",
    help_format="markdown",
    default_parameter=Parameter(negative=()),
)


_COMMON = Common()
_TRAIN = TrainSettings()
TrainFlags = Annotated[TrainSettings, Parameter(name="*")]


@app.command(name="import", help_epilogue="Example: `likewise import photos/ photos.likewise`")
def import_(
    source: str,
    collection: Path,
    /,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    id_column: str | None = None,
    where: list[str] | None = None,
    images: Path | None = None,
    limit: int | None = None,
    workers: int | None = None,
    common: Common = _COMMON,
) -> None:
    """Make a collection of captioned images; the images stay where they are.

    Args:
        source: A folder of images with `.json` or `.txt` beside them, a CSV, TSV, JSON Lines or Parquet
            table, WebDataset tars, COCO captions JSON, a Flickr8k/30k token file, or a Hugging Face set (a
            folder, or `hf:NAME`).
        collection: The folder to make.
        image_column: Column of image paths; guessed where its name is usual.
        caption_column: Column of captions, or several with commas between; guessed where the name is usual.
        label_column: Column of labels, for judging pairs later; never used in training.
        group_column: Column of groups (subreddit, year, product line).
        id_column: Column of identifiers; the image path by default.
        where: Keep only rows with COLUMN=VALUE; may be given several times.
        images: Folder that image paths are relative to; the source's own by default.
        limit: Take the first so many images only.
        workers: Threads that decode images.
    """
    from likewise.collection.importing import import_collection
    from likewise.collection.sources.candidates import ImportOptions

    options = ImportOptions(
        image_column=image_column,
        caption_column=_listed(caption_column),
        label_column=label_column,
        group_column=group_column,
        id_column=id_column,
        where=tuple(where or ()),
        images=images,
        limit=limit,
    )
    made = import_collection(source, collection, options, workers=workers, progress=common.progress())
    summary = made.summary()
    common.tell({"collection": str(collection), **summary}, "\n".join(import_lines(collection, summary)))


@app.command(help_epilogue="Example: `likewise embed photos.likewise --encoder all-MiniLM-L6-v2`")
def embed(
    collection: Path,
    /,
    *,
    encoder: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    common: Common = _COMMON,
) -> None:
    """Embed the captions of a collection with a pretrained language model.

    Args:
        collection: A collection.
        encoder: A sentence-transformers model by hub name or folder; by default the paper's,
            all-mpnet-base-v2.
        batch_size: Captions a forward pass.
        device: `cpu`, `cuda`, …; chosen by itself.
    """
    from likewise.embeddings.embed import embed as embed_captions
    from likewise.embeddings.encoders import PAPER_ENCODER

    made = embed_captions(
        collection, encoder or PAPER_ENCODER, batch_size=batch_size, device=device, progress=common.progress()
    )
    result = {"embeddings": str(made.path), "captions": len(made), "dimension": made.dimension}
    common.tell(result, f"{len(made):,} captions in {made.dimension} dimensions: {made.path}")


@app.command(help_epilogue="Example: `likewise neighbors photos.likewise -k 10`")
def neighbors(
    collection: Path,
    /,
    *,
    encoder: str | None = None,
    k: Annotated[int, Parameter(name=["-k", "--k"])] = 10,
    memory: int = 512,
    device: str = "cpu",
    common: Common = _COMMON,
) -> None:
    """Find for each image those described most alike.

    Args:
        collection: A collection with embeddings.
        encoder: Whose embeddings to use; may be left out where there is only one.
        k: Neighbors an image.
        memory: MiB that a block of similarities may take.
        device: Where blocks are compared.
    """
    from likewise.neighbors.neighbors import find_neighbors

    made = find_neighbors(
        collection, encoder, k=k, memory_mb=memory, device=device, progress=common.progress()
    )
    counts = made.artifact.manifest.counts
    result = {"neighbors": str(made.path), "k": made.k, **counts}
    common.tell(
        result, f"{made.k} neighbors for {counts['with_neighbors']:,} of {len(made):,} images: {made.path}"
    )


@app.command(
    help_epilogue="Example: `likewise train photos.likewise --out run --backbone resnet18 --size 64 "
    "--epochs 20 --batch-size 128`"
)
def train(
    collection: Path,
    /,
    *,
    out: Path,
    settings: TrainFlags = _TRAIN,
    workers: int | None = None,
    device: str | None = None,
    checkpoint_minutes: float = 2.0,
    common: Common = _COMMON,
) -> None:
    """Train an image encoder; run it again after an interruption, and it goes on.

    Args:
        collection: A collection; `--pairs language` needs its neighbors.
        out: The run's folder.
        workers: Threads that make batches; half the processors by default.
        device: `cpu`, `cuda`, …; chosen by itself.
        checkpoint_minutes: A kill loses at most this much work.
    """
    from likewise.pretraining.train import train as train_encoder

    run = train_encoder(
        collection,
        out,
        settings,
        workers=workers,
        device=device,
        checkpoint_minutes=checkpoint_minutes,
        progress=common.progress(),
    )
    last = (run.metrics() or [{}])[-1]
    common.tell(
        {"run": str(run.path), "encoder": str(run.encoder), "last": last},
        f"trained: {run.path} (loss {last.get('loss', float('nan')):.3f}, effective rank "
        f"{last.get('effective_rank', float('nan')):.0f})\n"
        f"  next: likewise evaluate {run.path} --on FOLDER; likewise report {run.path}",
    )


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
    common: Common = _COMMON,
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
        [Path(each) for each in _listed(on)],
        _listed(protocol),
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
    common.tell({"results": results}, "\n".join(result_lines(results, _listed(protocol))))


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
    common: Common = _COMMON,
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
    common: Common = _COMMON,
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


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with 0 (done), 1 (failed), 2 (bad usage) or 130 (interrupted)."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(tokens, debug="--debug" in tokens))


def _run(tokens: list[str], *, debug: bool) -> int:
    try:
        app(tokens, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2
    except KeyboardInterrupt:
        return fail("interrupted; what is finished is kept, run the same command again to go on", 130)
    except InterruptedRunError as fault:
        return fail(str(fault), 130)
    except LikewiseError as fault:
        if debug:
            raise
        return fail(f"error: {fault}", 1)
    except OSError as fault:
        if debug:
            raise
        return fail(f"error: {fault.strerror or fault}: {fault.filename or 'no file named'}", 1)
    return 0


if __name__ == "__main__":
    main()
