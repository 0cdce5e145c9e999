"""The report: one page, one file, made from what runs and evaluations left on disk."""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from likewise.artifacts import write_text
from likewise.data.dataset import Collection
from likewise.errors import ArtifactError
from likewise.neighbors.index import Neighbors
from likewise.report import format as figures
from likewise.report.format import Picture, caption_of, picture, picture_of
from likewise.report.load import FAULTS, Entry, Preview, Trained, read_entries
from likewise.report.plots import Curve, Interval, curves, dots, histogram
from likewise.report.results import Results, SetTable, caveats, sentences, tabulate

SHOWN_ANCHORS = 8
SHOWN_PARTNERS = 4
_MOST_VIEWS = 40  # keeps the page small with many runs


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An image with its captions, and how alike its captions are to the anchor's."""

    picture: Picture
    caption: str
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of a pair, two or one, as one run's network was shown them."""

    run: str
    pictures: list[Picture]


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """An image with the images described most like it, and with what became of it in training."""

    image: Shown
    partners: list[Shown]
    views: list[Views]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Neighbors by language with the collection they are about.

    Attributes:
        style: The place of the run that used them.
        collection: The images.
        neighbors: The artifact.
        positions: (n, k) int64, -1 where there is none.
        similarity: (n, k) float32.
    """

    style: int
    collection: Collection
    neighbors: Neighbors
    positions: np.ndarray
    similarity: np.ndarray

    @property
    def nearest(self) -> np.ndarray:
        """The similarity of every image to the one described most like it, where there is one: (m,)."""
        first = self.similarity[:, 0]
        return first[np.isfinite(first)]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What could be read, and sentences about what could not.

    Attributes:
        collection: The images, or None.
        lead: The place of the run whose collection that is and whose first pairs are shown.
        guidance: Neighbors by language, each once; the first are of `collection`.
        notes: What is missing.
    """

    collection: Collection | None = None
    lead: int = 0
    guidance: list[Guidance] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look_up(entries: Sequence[Entry]) -> Found:
    """Open the collection and the neighbors that runs were trained with, each once."""
    notes: list[str] = []
    opened: dict[int, Collection] = {}
    guidance: dict[str, Guidance] = {}
    for place, entry in enumerate(entries):
        if entry.trained is None:
            continue
        try:
            opened[place] = open_collection(entry.trained)
            used = entry.trained.derived.get("neighbors")
            if used and used[0]["path"] not in guidance:
                guidance[used[0]["path"]] = _open_guidance(place, opened[place], used[0])
        except FAULTS as fault:
            notes.append(f"{entry.name}: {fault}.")
    if not guidance and not notes and opened:
        notes.append("No run used pairs by language, so there are no neighbors to show.")
    lead = next((each.style for each in guidance.values()), next(iter(opened), 0))
    return Found(collection=opened.get(lead), lead=lead, guidance=list(guidance.values()), notes=notes)


def open_collection(trained: Trained) -> Collection:
    """Open the collection of a run.

    Raises:
        ArtifactError: where it is gone, or another has taken its place.
    """
    place = trained.derived.get("collection")
    if place is None:
        raise ArtifactError("the run does not say which collection it was trained on")
    found = Collection(Path(place))
    if found.key != trained.manifest.inputs.get("collection") or len(found) == 0:
        raise ArtifactError(f"the collection at {place} is no longer the one that the run was trained on")
    return found


def _open_guidance(style: int, collection: Collection, told: dict[str, str]) -> Guidance:
    neighbors = Neighbors(Path(told["path"]))
    if neighbors.artifact.manifest.key != told["key"]:
        raise ArtifactError(
            f"the neighbors at {neighbors.path} are no longer those that the run was trained on"
        )
    if len(neighbors) != len(collection):
        raise ArtifactError(f"the neighbors at {neighbors.path} are those of captions, not of images")
    positions, similarity = neighbors.table(min(SHOWN_PARTNERS, neighbors.k))
    return Guidance(
        style=style,
        collection=collection,
        neighbors=neighbors,
        positions=positions,
        similarity=similarity,
    )


def anchors(entries: Sequence[Entry], found: Found) -> list[Anchor]:
    """Show the first images of training, preferring those that the first pairs of every run hold."""
    shown = [(e.name, e.trained.preview) for e in entries if e.trained and e.trained.preview]
    leader = entries[found.lead].trained
    if found.collection is None or leader is None or leader.preview is None:
        return []
    common = [{pair["anchor"] for pair in preview.pairs} for _, preview in shown]
    order = sorted(leader.preview.pairs, key=lambda pair: -sum(pair["anchor"] in ids for ids in common))
    count = max(2, min(SHOWN_ANCHORS, _MOST_VIEWS // len(shown)))
    guidance = found.guidance[0] if found.guidance else None
    return [_anchor(found.collection, guidance, pair["position"], shown) for pair in order[:count]]


def _anchor(
    collection: Collection, guidance: Guidance | None, position: int, shown: Sequence[tuple[str, Preview]]
) -> Anchor:
    record = collection[position]
    partners = []
    if guidance is not None:
        for at, similar in zip(guidance.positions[position], guidance.similarity[position], strict=True):
            if at >= 0:
                partners.append(_shown(guidance.collection, int(at), float(similar)))
    return Anchor(
        image=_shown(collection, position),
        partners=partners,
        views=[_views(run, pair) for run, preview in shown if (pair := preview.of(record.id)) is not None],
    )


def _shown(collection: Collection, position: int, similarity: float | None = None) -> Shown:
    record = collection[position]
    return Shown(picture=picture_of(collection, record), caption=caption_of(record), similarity=similarity)


def _views(run: str, pair: np.ndarray) -> Views:
    names = ("one", "the other") if len(pair) == 2 else ("the",)
    told = [
        picture(pixels, f"{which} view shown to {run}") for which, pixels in zip(names, pair, strict=True)
    ]
    return Views(run=run, pictures=told)


def facts(entries: Sequence[Entry], found: Found) -> list[tuple[str, str]]:
    """Return what the page is about in figures; a setting that differs between runs is told of each."""
    facts = []
    if found.collection is not None:
        facts.append(("images", f"{len(found.collection):,}"))
        facts.append(("captions", f"{found.collection.artifact.manifest.counts['captions']:,}"))
    runs = [entry.trained for entry in entries if entry.trained]
    if found.collection is None and runs:
        facts.append(("images", _each(f"{run.manifest.counts.get('images', 0):,}" for run in runs)))
    if runs:
        facts += [
            ("backbone", _each(figures.plain(run.settings.get("backbone")) for run in runs)),
            ("views", _each(f"{run.settings.get('size')} px" for run in runs)),
            ("steps", _each(f"{run.manifest.counts.get('steps', 0):,}" for run in runs)),
            ("pairs a step", _each(figures.plain(run.settings.get("batch_size")) for run in runs)),
        ]
    return facts


def _each(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def pace(entry: Entry) -> dict[str, Any]:
    """Return how fast a run was, as the median of its rows, and how long it waited for data."""
    if entry.trained is None:
        return {}
    speed, wait = _middle(entry, "images_per_second"), _middle(entry, "data_wait")
    last = {name: entry.trained.column(name)[1][-1:] for name in ("loss", "effective_rank", "spread")}
    return {
        "entry": entry,
        "pace": figures.ABSENT if speed is None else f"{speed:,.0f}",
        "wait": figures.ABSENT if wait is None else f"{100 * wait:.1f} %",
        "device": figures.plain(entry.trained.derived.get("device")),
        **{name: f"{values[0]:.4g}" if len(values) else figures.ABSENT for name, values in last.items()},
    }


def _middle(entry: Entry, name: str) -> float | None:
    values = entry.trained.column(name)[1] if entry.trained else ()
    return float(np.median(values)) if len(values) else None


def settings(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the settings as given and what followed from them, a row a name, marked where runs differ."""
    runs = [entry.trained for entry in entries if entry.trained]
    rows = []
    for kind, tables in (("given", [r.settings for r in runs]), ("derived", [r.derived for r in runs])):
        for name in dict.fromkeys(name for table in tables for name in table):
            values = [figures.plain(table.get(name)) for table in tables]
            rows.append(
                {
                    "kind": kind,
                    "name": name.replace("_", " "),
                    "told": values,
                    "differs": len(set(values)) > 1,
                }
            )
    return rows


def skipped(entries: Sequence[Entry], found: Found) -> list[tuple[str, str, int]]:
    """Return what was left out: where, why, how many."""
    told = []
    if found.collection is not None:
        told += [("import", why, n) for why, n in sorted(found.collection.artifact.manifest.skipped.items())]
    for entry in entries:
        if entry.trained is not None:
            told += [(entry.name, why, n) for why, n in sorted(entry.trained.manifest.skipped.items())]
    return told


def versions(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Return the versions of libraries, several where runs differ."""
    tables = [entry.trained.manifest.versions for entry in entries if entry.trained]
    names = sorted({name for table in tables for name in table})
    return [(name, _each(table.get(name, figures.ABSENT) for table in tables)) for name in names]


_IMPORT_FLAGS = (
    "image_column",
    "caption_column",
    "label_column",
    "group_column",
    "id_column",
    "where",
    "images",
    "limit",
)


class Commands:
    """Writes commands with paths relative to a folder that holds all of them."""

    def __init__(self, entries: Sequence[Entry], found: Found) -> None:
        """Choose the folder."""
        self.entries, self.found = entries, found
        collections = [] if found.collection is None else [found.collection.path.resolve()]
        common = os.path.commonpath([e.path.parent for e in entries] + [c.parent for c in collections])
        self.base = Path(common)

    def lines(self) -> list[str]:
        """Return the chain from images to this page, one command a line."""
        told = [f"cd {shlex.quote(str(self.base))}"]
        if self.found.collection is not None:
            told.append(self._import(self.found.collection))
        told += [line for guidance in self.found.guidance for line in self._search(guidance)]
        for entry in self.entries:
            if entry.trained is not None:
                told.append(self._train(entry, entry.trained))
            told += [self._evaluate(entry, result) for result in entry.results]
        return [*told, _line("report", *(self._short(e.path) for e in self.entries), out="report.html")]

    def _short(self, path: Path) -> str:
        return str(path.relative_to(self.base)) if path.is_relative_to(self.base) else str(path)

    def _import(self, collection: Collection) -> str:
        settings = collection.artifact.manifest.settings
        given = {name: settings.get(name) for name in _IMPORT_FLAGS}
        columns = given["caption_column"]
        given["caption_column"] = ",".join(columns) if columns else None
        source = _source(str(settings.get("source")), collection.root)
        place = self._short(Path(source)) if Path(source).is_absolute() else source
        return _line("import", place, self._short(collection.path.resolve()), **given)

    def _search(self, guidance: Guidance) -> list[str]:
        collection = self._short(guidance.collection.path.resolve())
        found = guidance.neighbors
        return [
            _line("embed", collection, encoder=found.encoder),
            _line("neighbors", collection, encoder=found.encoder, k=found.k),
        ]

    def _train(self, entry: Entry, trained: Trained) -> str:
        collection = self._short(Path(str(trained.derived.get("collection"))))
        asked = trained.derived.get("asked", trained.settings)
        return _line("train", collection, out=self._short(entry.path), **asked)

    def _evaluate(self, entry: Entry, result: dict[str, Any]) -> str:
        protocols = result["protocols"]
        few = protocols.get("fewshot", {}).get("settings", {})
        given = {name: few.get(name) for name in ("ways", "shots", "episodes")}
        given["mean_per_class"] = any(p["settings"].get("mean_per_class") for p in protocols.values()) or None
        about, asked = result["set"], result["asked"]
        for name, usual in (("label_column", "label"), ("split_column", "split")):
            given[name] = None if about.get(name, usual) == usual else about[name]
        given["caption_column"] = about.get("caption_column")
        epochs = [p["settings"]["epochs"] for p in protocols.values() if "epochs" in p["settings"]]
        given["epochs"] = epochs[0] if len(set(epochs)) == 1 else None
        tuned = [p for p in protocols.values() if p["settings"].get("backbone") == "tuned"]
        given["tune"] = bool(tuned) or None
        given |= {name: asked[name] or None for name in ("backbone", "prefix", "drop", "size")}
        how = {"on": self._short(Path(about["path"])), "protocol": ",".join(protocols), **given}
        if entry.trained is not None:
            return _line("evaluate", self._short(entry.path), **how)
        target = asked["target"] if ":" in asked["target"] else self._short(Path(asked["target"]).resolve())
        return _line("evaluate", target, **how, out=self._short(entry.path))


def _source(told: str, root: Path) -> str:
    """Return the source as an absolute path where it was told as a relative one and can be found again."""
    if Path(told).is_absolute():
        return told
    for guess in (root / Path(told).name, root):
        if guess.name == Path(told).name and guess.exists():
            return str(guess)
    return told


def _line(verb: str, *places: str, **flags: Any) -> str:
    words = ["likewise", verb, *places]
    for name, value in flags.items():
        if value is None:
            continue
        flag = "-k" if verb == "neighbors" and name == "k" else f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
            continue
        for each in value if isinstance(value, list) else [value]:
            words += [flag, str(each)]
    return shlex.join(words)


_HERE = Path(__file__).parent
_CURVES = (
    ("loss", "Loss"),
    ("effective_rank", "Effective rank of the features"),
    ("spread", "Spread of the features"),
    ("rate", "Learning rate"),
)


def write_report(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    title: str | None = None,
    credits: Sequence[str] = (),  # noqa: A002  # nobody misses the interpreter's own
) -> Path:
    """Write a page on one or several runs; the same files give the same bytes.

    Args:
        runs: Finished runs, and folders of evaluations that are no runs (an untrained encoder). Runs are
            compared with the first that has `self` pairs, or else with the first.
        out: The HTML file.
        title: What stands at the top.
        credits: Whom the images are owed to, and their licences.

    Raises:
        ArtifactError: where a folder is neither a finished run nor holds results.
        InputError: where no run is given.
    """
    entries = read_entries(runs)
    page, target = _render(entries, title or _title(entries), credits), Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Names of files may hold bytes that are no text.
    write_text(target, page.encode("utf-8", "replace").decode("utf-8"))
    return target


def _title(entries: Sequence[Entry]) -> str:
    return f"likewise: {figures.listed([entry.path.name for entry in entries])}"


def _render(entries: Sequence[Entry], title: str, credits: Sequence[str]) -> str:  # noqa: A002  # as in write_report
    found, results = look_up(entries), tabulate(entries)
    # Captions are anybody's text: everything is escaped but what this package drew itself.
    pages = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"plain": figures.plain, "counted": figures.counted}
    styles = {entry.path: place for place, entry in enumerate(entries)}
    return pages.get_template("page.html").render(
        title=title,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704  # the package's own file
        entries=entries,
        runs=[entry for entry in entries if entry.trained],
        styles=styles,
        results=results,
        sentences=[] if results is None else sentences(results),
        caveats=[] if results is None else caveats(results),
        dots=[] if results is None else [_dots(table, results, styles) for table in results.tables],
        unmeasured=[e.fault or f"{e.name} has not been evaluated" for e in entries if not e.rows],
        facts=facts(entries, found),
        found=found,
        anchors=anchors(entries, found),
        alike=_alike(found),
        curves=_curves(entries),
        pace=[pace(entry) for entry in entries if entry.trained],
        settings=settings(entries),
        skipped=skipped(entries, found),
        versions=versions(entries),
        commands=Commands(entries, found).lines(),
        credits=credits,
    )


def _dots(table: SetTable, results: Results, styles: dict[Path, int]) -> Markup:
    rows = []
    for line in table.lines:
        told = [
            (c.estimate, styles[e.path])
            for c, e in zip(line.cells, results.columns, strict=True)
            if c.estimate
        ]
        marks = [
            Interval(style=style, value=100 * e.value, low=100 * e.low, high=100 * e.high)
            for e, style in told
        ]
        rows.append((line.name, marks))
    return dots(f"results {table.lines[0].row.set_key}", rows)


def _alike(found: Found) -> dict[str, Any] | None:
    """Return the histogram of similarities, with shares in words."""
    told = [(guidance, guidance.nearest) for guidance in found.guidance if len(guidance.nearest)]
    if not told:
        return None
    images = len(told[0][0].collection)
    return {
        "plot": histogram("similarity", [(guidance.style, values) for guidance, values in told]),
        "sources": [
            {
                "style": guidance.style,
                "encoder": guidance.neighbors.encoder,
                "median": f"{np.median(values):.2f}",
                "near": figures.percent(float((values >= 0.8).mean())),
                "same": figures.percent(float((values >= 0.9995).mean())),
            }
            for guidance, values in told
        ],
        "images": images,
        "without": images - len(told[0][1]),
        "share": figures.percent((images - len(told[0][1])) / images),
    }


def _curves(entries: Sequence[Entry]) -> list[Markup]:
    """Draw what was logged, one small plot a figure."""
    drawn = []
    for name, title in _CURVES:
        told = [(i, entry.trained.column(name)) for i, entry in enumerate(entries) if entry.trained]
        lines = [Curve(style=i, x=x, y=y) for i, (x, y) in told if len(x)]
        if lines:
            drawn.append(curves(f"curve {name}", title, lines))
    return drawn
