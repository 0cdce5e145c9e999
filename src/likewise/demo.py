"""The whole pipeline on real data: `likewise demo`."""

from dataclasses import dataclass
from pathlib import Path

from likewise.collection.emoji import CREDITS, make_emoji
from likewise.collection.importing import import_collection
from likewise.collection.sources.candidates import ImportOptions
from likewise.embeddings.embed import embed
from likewise.evaluation.compare import Comparison, compare, read_results
from likewise.evaluation.evaluate import evaluate
from likewise.evaluation.fewshot import FewShot
from likewise.evaluation.protocols import ProtocolSettings
from likewise.neighbors.neighbors import find_neighbors
from likewise.neighbors.rules import PairRule, PairSource
from likewise.pretraining.settings import TrainSettings
from likewise.pretraining.train import initial_encoder, train
from likewise.progress import SILENT, Progress
from likewise.report.html import write_report

ENCODER = "all-MiniLM-L6-v2"
PROTOCOLS = ("retrieval", "linear", "fewshot")
ARMS: tuple[PairSource, ...] = ("self", "language")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the demo is: one in `every` families of emoji, `epochs` of training, few-shot `episodes`."""

    every: int
    epochs: int
    episodes: int


FULL = Size(every=1, epochs=9, episodes=5000)
QUICK = Size(every=3, epochs=4, episodes=1000)
PIXELS = 40


def _settings(size: Size) -> TrainSettings:
    return TrainSettings(
        backbone="resnet10t",
        size=PIXELS,
        stem="standard",
        batch_size=64,
        epochs=size.epochs,
        # A peak of 0.001: a run of minutes cannot wait for the paper's slow one at this batch.
        rate=8e-3,
    )


def run_demo(
    out: Path, *, quick: bool = False, device: str | None = None, progress: Progress = SILENT
) -> tuple[Path, list[Comparison]]:
    """Train on emoji with `self` and with `language` pairs from the same start, and compare.

    Args:
        out: The folder of everything; a demo that was interrupted goes on there.
        quick: A third of the data and fewer epochs.
        device: Where to train.
        progress: Where to report.

    Returns:
        The report page, and the comparison on held-out concepts.

    Raises:
        DependencyError: where the demo's packages are missing.
    """
    size = QUICK if quick else FULL
    table = make_emoji(out / "emoji", every=size.every, progress=progress)
    collection = import_collection(
        table,
        out / "collection",
        ImportOptions(
            caption_column=("caption", "alias"),
            label_column="label",
            group_column="house",
            where=("split=train",),
        ),
        progress=progress,
    )
    embed(collection, ENCODER, progress=progress)
    find_neighbors(collection, progress=progress)
    probes = ProtocolSettings(fewshot=FewShot(episodes=size.episodes))
    runs = []
    for arm in ARMS:
        run = train(
            collection,
            out / f"run-{arm}",
            _settings(size),
            PairRule(pairs=arm),
            device=device,
            progress=progress,
        )
        evaluate(run.path, table.parent, PROTOCOLS, settings=probes, device=device, progress=progress)
        runs.append(run.path)
    floor = out / "untrained"
    evaluate(
        initial_encoder(_settings(size), out / "untrained.safetensors"),
        table.parent,
        PROTOCOLS,
        settings=probes,
        out=floor,
        device=device,
        progress=progress,
    )
    page = write_report(
        [*runs, floor], out / "report.html", title="Emoji, drawn by two houses", credits=CREDITS
    )
    return page, compare([read_results(path) for path in (*runs, floor)])
