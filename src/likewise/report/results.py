"""What was measured, as tables and in words: every figure with its interval, every run against a baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from likewise.evaluation.results import Row, compare
from likewise.evaluation.statistics import Difference, Estimate
from likewise.pairs.config import PairRule
from likewise.report.format import chance, counted, listed, percent, plain, points
from likewise.report.load import Entry


@dataclass(frozen=True, kw_only=True)
class Words:
    """How to speak of a protocol.

    Attributes:
        title: What it is called.
        explain: One line on what is done, with its settings.
        items: What one item of its test is called, once and several times.
        doing: What an encoder does when it is right, as after `can`.
    """

    title: str
    explain: Callable[[Row], str]
    items: tuple[str, str]
    doing: Callable[[Row], str] = lambda _: "name the right class"

    def metric(self, row: Row) -> str:
        """Return what a figure is called in a table."""
        return f"{self.title} {row.metric}"


def _linear(_: Row) -> str:
    return (
        "A linear classifier is fitted to the frozen features of the training images and names the class of "
        "every test image. How strongly it is regularised is chosen on images held out of training."
    )


def _fewshot(row: Row) -> str:
    told = row.settings
    return (
        f"{row.n:,} small exams: {told['ways']} classes are drawn, {told['shots']} labelled training images "
        "of each are given, and test images go to the class whose mean is nearest. Guessing is right "
        f"{100 / told['ways']:.0f} % of the time. The interval covers which exams are drawn from these "
        "images, not how another test set would come out, so it is narrower than the others."
    )


def _knn(row: Row) -> str:
    return (
        f"The {row.settings['k']} most similar training images vote on the class of a test image; nothing is "
        "fitted."
    )


def _retrieval(_: Row) -> str:
    return (
        "Every test image is a query: which other test images (of other sources, where the set names "
        "sources) look most like it to the encoder? Recall@k is the share of queries with the same concept "
        "among the first k answers; mean average precision also asks how far ahead of the rest all of them "
        "come."
    )


def _finding(row: Row) -> str:
    depth = row.metric.removeprefix("recall@")
    place = {"1": " at the first try"}.get(depth, f" among the first {depth}" if depth.isdigit() else "")
    return f"find another picture of the same concept{place}"


def _knn_grid(row: Row) -> str:
    told = row.details
    return (
        "The most similar training images vote on the class of a test image. How many, and how fast a vote "
        f"fades with distance, was chosen on held-out images: {told['k']} and {told['temperature']:g}."
    )


def _clustering(row: Row) -> str:
    return (
        "The test images are sorted into as many groups as there are classes without a look at labels, "
        f"{row.n} times from other starts. 100 % is full agreement with the classes; for ARI, 0 % is chance. "
        "The interval covers the starts, not how another test set would come out."
    )


def _finetune(row: Row) -> str:
    return (
        f"Encoder and classifier are trained together on the labelled images for {row.settings['epochs']} "
        "epochs; the classifier then names the class of every test image."
    )


def _localisation(_: Row) -> str:
    return (
        "A linear map from the frozen features predicts the box around the subject. Overlap is the shared "
        "area over the area of both boxes together."
    )


def _zeroshot(row: Row) -> str:
    sentences = ", ".join(f"“{each}”" for each in row.settings["templates"])
    return f"No image is learned from: one gets the class whose name, put into {sentences}, is nearest."


def _image_text(_: Row) -> str:
    return (
        "Each test image looks for its caption among all, and each caption for its image. Recall@k is the "
        "share that finds it among the first k answers."
    )


def _detection(row: Row) -> str:
    how = "as it is" if row.settings["backbone"] == "frozen" else "trained with it"
    return (
        f"A Faster R-CNN on the encoder, which is {how}, learns to box objects for {row.settings['epochs']} "
        "epochs. AP is COCO's average precision over overlaps of 50 to 95 %, AP50 and AP75 those at one."
    )


def _segmentation(row: Row) -> str:
    head = (
        "one linear layer on its maps"
        if row.settings["backbone"] == "frozen"
        else "a network trained with it"
    )
    return (
        f"Every pixel gets a class, from the encoder and {head}. IoU is the overlap of given and true areas."
    )


PROTOCOLS = {
    "linear": Words(title="Linear probe", explain=_linear, items=("test image", "test images")),
    "fewshot": Words(title="Few-shot", explain=_fewshot, items=("episode", "episodes")),
    "knn": Words(title="kNN", explain=_knn, items=("test image", "test images")),
    "retrieval": Words(
        title="Retrieval",
        explain=_retrieval,
        items=("query", "queries"),
        doing=_finding,
    ),
    "knn-grid": Words(title="kNN, tuned", explain=_knn_grid, items=("test image", "test images")),
    "clustering": Words(
        title="Clustering", explain=_clustering, items=("start", "starts"), doing=lambda _: "be sorted"
    ),
    "finetune": Words(title="Fine-tuned", explain=_finetune, items=("test image", "test images")),
    "localisation": Words(
        title="Localisation",
        explain=_localisation,
        items=("test image", "test images"),
        doing=lambda _: "box the subject",
    ),
    "zeroshot": Words(title="Zero-shot", explain=_zeroshot, items=("test image", "test images")),
    "image-text": Words(
        title="Image and text",
        explain=_image_text,
        items=("query", "queries"),
        doing=lambda _: "find the other half",
    ),
    "detection": Words(
        title="Detection",
        explain=_detection,
        items=("test image", "test images"),
        doing=lambda _: "box the objects",
    ),
    "segmentation": Words(
        title="Segmentation",
        explain=_segmentation,
        items=("test image", "test images"),
        doing=lambda _: "name the pixels",
    ),
}


def protocol(row: Row) -> Words:
    """Return the words for a row's protocol; an unknown one is called by its own name."""
    known = PROTOCOLS.get(row.protocol)
    if known is not None:
        return known
    return Words(title=row.protocol, explain=lambda _: "", items=("item", "items"))


LEVEL = 0.05
_ORDER = ("retrieval", "linear", "fewshot", "knn")


@dataclass(frozen=True, kw_only=True)
class Change:
    """A paired difference from the baseline, in words and whether its interval excludes zero."""

    told: Difference

    @property
    def text(self) -> str:
        """The difference with its interval and p-value."""
        told = self.told
        return f"{points(told.value)} [{points(told.low)}, {points(told.high)}]"

    @property
    def p_text(self) -> str:
        """The p-value."""
        return chance(self.told.p_value)

    @property
    def direction(self) -> str:
        """`higher` or `lower` where the interval excludes zero, else nothing."""
        if self.told.low > 0:
            return "higher"
        return "lower" if self.told.high < 0 else ""

    @property
    def doubtful(self) -> bool:
        """Whether the interval excludes zero but the test of no difference does not agree."""
        return bool(self.direction) and self.told.p_value >= LEVEL

    @property
    def mark(self) -> str:
        """A triangle up or down, hollow where doubtful."""
        marks = {"higher": "△▲", "lower": "▽▼"}.get(self.direction)
        return marks[not self.doubtful] if marks else ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One encoder's figure; `note` says why it has no difference although it is not the baseline."""

    estimate: Estimate | None
    change: Change | None = None
    note: str = ""

    @property
    def value(self) -> str:
        """The value in percent."""
        return percent(self.estimate.value) if self.estimate else ""

    @property
    def interval(self) -> str:
        """The interval in percent."""
        return f"[{percent(self.estimate.low)}, {percent(self.estimate.high)}]" if self.estimate else ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of all encoders."""

    row: Row
    name: str
    items: str
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class SetTable:
    """Everything measured on one labelled set."""

    name: str
    about: list[str]
    lines: list[Line]
    explained: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Results:
    """The tables of all sets and what they come to."""

    columns: list[Entry]
    baseline: int
    tables: list[SetTable]


def tabulate(entries: Sequence[Entry]) -> Results | None:
    """Line up what was measured; None where nothing was."""
    columns = [entry for entry in entries if entry.rows]
    if not columns:
        return None
    baseline = _baseline(columns)
    first = columns[baseline]
    changes = [
        {} if entry is first else {c.row.name: c.differences[0] for c in compare([first.rows, entry.rows])}
        for entry in columns
    ]
    tables = [_table(key, columns, baseline, changes) for key in dict.fromkeys(_keys(columns))]
    return Results(columns=columns, baseline=baseline, tables=tables)


def _baseline(columns: Sequence[Entry]) -> int:
    """Return the place of the first run with `self` pairs, or 0."""
    own = (i for i, entry in enumerate(columns) if entry.trained and entry.trained.pairs == "self")
    return next(own, 0)


def _keys(columns: Sequence[Entry]) -> list[str]:
    return [row.set_key for entry in columns for row in entry.rows]


def _table(
    key: str,
    columns: Sequence[Entry],
    baseline: int,
    changes: Sequence[dict[Any, Difference | None]],
) -> SetTable:
    found = {row.name: row for entry in reversed(columns) for row in entry.rows if row.set_key == key}
    rows = sorted(found.values(), key=_order)
    lines = []
    for row in rows:
        how = protocol(row)
        cells = [_cell(row, entry, i == baseline, changes[i]) for i, entry in enumerate(columns)]
        items = counted(row.n, *how.items)
        lines.append(Line(row=row, name=how.metric(row), items=items, cells=cells))
    explained = {protocol(row).title: protocol(row).explain(row) for row in rows}
    return SetTable(
        name=rows[0].set, about=_about(key, columns), lines=lines, explained=list(explained.items())
    )


def _order(row: Row) -> tuple[int, str]:
    return (_ORDER.index(row.protocol) if row.protocol in _ORDER else len(_ORDER), row.protocol)


def _cell(row: Row, entry: Entry, is_baseline: bool, changes: dict[Any, Difference | None]) -> Cell:
    own = next((other for other in reversed(entry.rows) if other.name == row.name), None)
    if own is None:
        return Cell(estimate=None, note="not measured")
    if is_baseline:
        return Cell(estimate=own.estimate, note="baseline")
    change = changes.get(row.name)
    if change is None:
        why = "no difference given: other items or settings" if row.name in changes else ""
        return Cell(estimate=own.estimate, note=why)
    return Cell(estimate=own.estimate, change=Change(told=change))


def _about(key: str, columns: Sequence[Entry]) -> list[str]:
    """Say how large a set is, what was skipped, and which classes nobody can name."""
    results = [(entry, r) for entry in columns for r in entry.results if r["set"]["key"] == key]
    told = results[0][1]["set"]
    images = [f"{counted(count, 'image')} to {split}" for split, count in told["images"].items()]
    kind = (
        counted(told["classes"], "class", "classes")
        if "classes" in told
        else counted(told["captions"], "caption", "captions")
    )
    lines = [f"{kind}; {listed(images)}."]
    unseen = told.get("classes_only_in_test") or []
    if unseen:
        named = ", ".join(unseen[:8]) + (", …" if unseen[8:] else "")
        lines.append(
            f"In test only: {counted(len(unseen), 'class', 'classes')} ({named}), which linear and kNN can "
            "never name."
        )
    for entry, result in results:
        skipped = [f"{count:,} {reason}" for reason, count in sorted(result["set"]["skipped"].items())]
        if skipped:
            lines.append(f"Skipped with {entry.name}: {', '.join(skipped)}.")
    return lines


# The figure that the first sentence is about is chosen by this order alone, never by how it came out.
_FIRST = (
    ("retrieval", "recall@1"),
    ("linear", "accuracy"),
    ("linear", "mean per-class accuracy"),
    ("fewshot", "accuracy"),
    ("knn", "accuracy"),
    ("knn", "mean per-class accuracy"),
)
_NAMES = {"views": "the recipe of views", "precision": "precision"}
_UNCOMPARED = {"seed"} | {field.name for field in fields(PairRule)}


def sentences(results: Results) -> list[str]:
    """Return the result in words: of each run against the baseline, or of the only run."""
    columns, baseline = results.columns, results.baseline
    lines = [line for table in results.tables for line in table.lines]
    challengers = [i for i, entry in enumerate(columns) if i != baseline and entry.trained]
    if not challengers:
        line = _first_line([line for line in lines if line.cells[baseline].estimate])
        return [] if line is None else [_alone(columns, baseline, line)]
    told = []
    for i in challengers:
        compared = [line for line in lines if line.cells[i].change]
        line = _first_line(compared)
        if line is not None:
            told.append(_versus(columns[i], columns[baseline], line, line.cells[i].change))
            told.append(_tally(columns[i], compared, i))
    return [sentence for sentence in told if sentence]


def _first_line(lines: Sequence[Line]) -> Line | None:
    by_name = {(line.row.protocol, line.row.metric): line for line in reversed(lines)}
    return next((by_name[name] for name in _FIRST if name in by_name), lines[0] if lines else None)


def _alone(columns: Sequence[Entry], baseline: int, line: Line) -> str:
    """Tell of the only run, and beside it of encoders that were only evaluated."""
    entry, cell = columns[baseline], line.cells[baseline]
    whom = f"an encoder trained on {entry.phrase}" if entry.trained else entry.phrase
    others = [
        f"; {other.phrase} {there.value} % {there.interval}"
        for i, (other, there) in enumerate(zip(columns, line.cells, strict=True))
        if i != baseline and there.estimate
    ]
    doing = protocol(line.row).doing(line.row)
    return (
        f"On held-out images, {whom} can {doing} {cell.value} % of the time {cell.interval}{''.join(others)}."
    )


def _versus(entry: Entry, baseline: Entry, line: Line, change: Change | None) -> str:
    if change is None:
        return ""
    doing, told = protocol(line.row).doing(line.row), change.told
    if not change.direction:
        return (
            f"On held-out images, {entry.phrase} and {baseline.phrase} {doing} about equally often: "
            f"{points(told.value)} percentage points [{points(told.low)}, {points(told.high)}] "
            "is no difference that this test set can show."
        )
    sizes = [abs(100 * size) for size in (told.value, told.low, told.high)]
    more = "more" if change.direction == "higher" else "less"
    doubt = (
        f"; the paired test is less sure ({change.p_text}), so take it as a hint" if change.doubtful else ""
    )
    return (
        f"On held-out images, {entry.phrase} {doing} {sizes[0]:.1f} percentage points "
        f"[{min(sizes[1:]):.1f}, {max(sizes[1:]):.1f}] {more} often than {baseline.phrase}{doubt}."
    )


def _tally(entry: Entry, lines: Sequence[Line], column: int) -> str:
    """Say how all figures came out, so that the first one is not taken for the whole."""
    if len(lines) < 2:
        return ""
    found = [change for line in lines if (change := line.cells[column].change)]
    sure = [change.direction for change in found if not change.doubtful]
    up, down, none, hints = sure.count("higher"), sure.count("lower"), sure.count(""), len(found) - len(sure)
    parts = [f"{up} higher", f"{down} lower", f"{none} not to be told from the baseline"]
    if hints:
        parts.append(f"{hints} in doubt (interval without 0, but p above {LEVEL})")
    return f"All {len(found)} figures for {entry.phrase}: {listed(parts)}."


def caveats(results: Results) -> list[str]:
    """Name what else differs between a run and the baseline: it may explain a difference too."""
    columns, first = results.columns, results.columns[results.baseline].trained
    if first is None:
        return []
    told = []
    for entry in columns:
        if entry.trained is None or entry.trained is first:
            continue
        ours, theirs = ({**t.settings, **_telling(t.derived)} for t in (entry.trained, first))
        other = [
            f"{_called(name)} ({plain(ours.get(name))}, not {plain(theirs.get(name))})"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name) and name not in _UNCOMPARED
        ]
        if other:
            told.append(f"Besides the pairs, {entry.name} differs from the baseline in {listed(other)}.")
    return told


def _telling(derived: dict[str, Any]) -> dict[str, Any]:
    return {name: derived[name] for name in ("views", "steps", "precision") if name in derived}


def _called(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))
