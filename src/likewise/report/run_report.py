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
from likewise.data.dataset import CaptionDataset
from likewise.errors import ArtifactError
from likewise.neighbors.index import Neighbors
from likewise.report import format as figures
from likewise.report.format import Thumbnail, format_captions, make_thumbnail, sample_thumbnail
from likewise.report.load import READ_ERRORS, PairPreview, ReportEntry, RunInfo, read_report_entries
from likewise.report.plots import Curve, IntervalMark, histogram, interval_plot, line_plot
from likewise.report.results import (
    DatasetTable,
    ResultTables,
    build_result_tables,
    caveats,
    summary_sentences,
)

MAX_ANCHORS = 8
MAX_PARTNERS = 4
_MAX_VIEWS = 40  # keeps the page small with many runs


@dataclass(frozen=True, kw_only=True)
class CaptionedThumbnail:
    """An image with its captions, and how alike its captions are to the anchor's."""

    thumbnail: Thumbnail
    caption: str
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class ViewPair:
    """The views of a pair, two or one, as one run's network was shown them."""

    run_name: str
    thumbnails: list[Thumbnail]


@dataclass(frozen=True, kw_only=True)
class AnchorExample:
    """An image with the images described most like it, and with what became of it in training."""

    image: CaptionedThumbnail
    partners: list[CaptionedThumbnail]
    view_pairs: list[ViewPair]


@dataclass(frozen=True, kw_only=True)
class NeighborSource:
    """Neighbors by language with the collection they are about.

    Attributes:
        style: The place of the run that used them.
        dataset: The images.
        neighbors: The artifact.
        positions: (n, k) int64, -1 where there is none.
        similarity: (n, k) float32.
    """

    style: int
    dataset: CaptionDataset
    neighbors: Neighbors
    positions: np.ndarray
    similarity: np.ndarray

    @property
    def nearest_similarity(self) -> np.ndarray:
        """The similarity of every image to the one described most like it, where there is one: (m,)."""
        top1 = self.similarity[:, 0]
        return top1[np.isfinite(top1)]


@dataclass(frozen=True, kw_only=True)
class PairExamples:
    """What could be read, and sentences about what could not.

    Attributes:
        dataset: The images, or None.
        lead_index: The place of the run whose collection that is and whose first pairs are shown.
        neighbor_sources: Neighbors by language, each once; the first are of `dataset`.
        notes: What is missing.
    """

    dataset: CaptionDataset | None = None
    lead_index: int = 0
    neighbor_sources: list[NeighborSource] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_pair_examples(entries: Sequence[ReportEntry]) -> PairExamples:
    """Open the collection and the neighbors that runs were trained with, each once."""
    notes: list[str] = []
    datasets: dict[int, CaptionDataset] = {}
    neighbor_sources: dict[str, NeighborSource] = {}
    for i, entry in enumerate(entries):
        if entry.run is None:
            continue
        try:
            datasets[i] = open_run_dataset(entry.run)
            neighbor_refs = entry.run.derived.get("neighbors")
            if neighbor_refs and neighbor_refs[0]["path"] not in neighbor_sources:
                neighbor_sources[neighbor_refs[0]["path"]] = _open_neighbor_source(
                    i, datasets[i], neighbor_refs[0]
                )
        except READ_ERRORS as error:
            notes.append(f"{entry.name}: {error}.")
    if not neighbor_sources and not notes and datasets:
        notes.append("No run used pairs by language, so there are no neighbors to show.")
    lead_index = next((source.style for source in neighbor_sources.values()), next(iter(datasets), 0))
    return PairExamples(
        dataset=datasets.get(lead_index),
        lead_index=lead_index,
        neighbor_sources=list(neighbor_sources.values()),
        notes=notes,
    )


def open_run_dataset(run: RunInfo) -> CaptionDataset:
    """Open the collection of a run.

    Raises:
        ArtifactError: where it is gone, or another has taken its place.
    """
    path = run.derived.get("dataset")
    if path is None:
        raise ArtifactError("the run does not say which collection it was trained on")
    dataset = CaptionDataset(Path(path))
    if dataset.key != run.manifest.inputs.get("dataset") or len(dataset) == 0:
        raise ArtifactError(f"the collection at {path} is no longer the one that the run was trained on")
    return dataset


def _open_neighbor_source(style: int, dataset: CaptionDataset, ref: dict[str, str]) -> NeighborSource:
    neighbors = Neighbors(Path(ref["path"]))
    if neighbors.artifact.manifest.key != ref["key"]:
        raise ArtifactError(
            f"the neighbors at {neighbors.path} are no longer those that the run was trained on"
        )
    if len(neighbors) != len(dataset):
        raise ArtifactError(f"the neighbors at {neighbors.path} are those of captions, not of images")
    positions, similarity = neighbors.topk(min(MAX_PARTNERS, neighbors.k))
    return NeighborSource(
        style=style,
        dataset=dataset,
        neighbors=neighbors,
        positions=positions,
        similarity=similarity,
    )


def build_anchor_examples(entries: Sequence[ReportEntry], examples: PairExamples) -> list[AnchorExample]:
    """Show the first images of training, preferring those that the first pairs of every run hold."""
    previews = [(entry.name, entry.run.preview) for entry in entries if entry.run and entry.run.preview]
    lead_run = entries[examples.lead_index].run
    if examples.dataset is None or lead_run is None or lead_run.preview is None:
        return []
    anchor_ids = [{pair["anchor"] for pair in preview.pairs} for _, preview in previews]
    pairs = sorted(lead_run.preview.pairs, key=lambda pair: -sum(pair["anchor"] in ids for ids in anchor_ids))
    num_anchors = max(2, min(MAX_ANCHORS, _MAX_VIEWS // len(previews)))
    source = examples.neighbor_sources[0] if examples.neighbor_sources else None
    return [
        _build_anchor_example(examples.dataset, source, pair["position"], previews)
        for pair in pairs[:num_anchors]
    ]


def _build_anchor_example(
    dataset: CaptionDataset,
    source: NeighborSource | None,
    position: int,
    previews: Sequence[tuple[str, PairPreview]],
) -> AnchorExample:
    sample = dataset[position]
    partners = []
    if source is not None:
        for index, similarity in zip(source.positions[position], source.similarity[position], strict=True):
            if index >= 0:
                partners.append(_captioned_thumbnail(source.dataset, int(index), float(similarity)))
    return AnchorExample(
        image=_captioned_thumbnail(dataset, position),
        partners=partners,
        view_pairs=[
            _view_pair(run_name, views)
            for run_name, preview in previews
            if (views := preview.views_of(sample.id)) is not None
        ],
    )


def _captioned_thumbnail(
    dataset: CaptionDataset, position: int, similarity: float | None = None
) -> CaptionedThumbnail:
    sample = dataset[position]
    return CaptionedThumbnail(
        thumbnail=sample_thumbnail(dataset, sample), caption=format_captions(sample), similarity=similarity
    )


def _view_pair(run_name: str, views: np.ndarray) -> ViewPair:
    view_names = ("one", "the other") if len(views) == 2 else ("the",)
    thumbnails = [
        make_thumbnail(pixels, f"{view_name} view shown to {run_name}")
        for view_name, pixels in zip(view_names, views, strict=True)
    ]
    return ViewPair(run_name=run_name, thumbnails=thumbnails)


def key_facts(entries: Sequence[ReportEntry], examples: PairExamples) -> list[tuple[str, str]]:
    """Return the key facts of the page; a setting that differs between runs is listed per run."""
    facts = []
    if examples.dataset is not None:
        facts.append(("images", f"{len(examples.dataset):,}"))
        facts.append(("captions", f"{examples.dataset.artifact.manifest.counts['captions']:,}"))
    runs = [entry.run for entry in entries if entry.run]
    if examples.dataset is None and runs:
        facts.append(("images", _join_distinct(f"{run.manifest.counts.get('images', 0):,}" for run in runs)))
    if runs:
        facts += [
            ("backbone", _join_distinct(figures.format_value(run.config.get("backbone")) for run in runs)),
            ("views", _join_distinct(f"{run.config.get('image_size')} px" for run in runs)),
            ("steps", _join_distinct(f"{run.manifest.counts.get('steps', 0):,}" for run in runs)),
            (
                "pairs a step",
                _join_distinct(figures.format_value(run.config.get("batch_size")) for run in runs),
            ),
        ]
    return facts


def _join_distinct(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def throughput(entry: ReportEntry) -> dict[str, Any]:
    """Return how fast a run was, as the median of its rows, and how long it waited for data."""
    if entry.run is None:
        return {}
    images_per_second, data_wait = _median(entry, "images_per_second"), _median(entry, "data_time_fraction")
    last_values = {
        name: entry.run.metric_series(name)[1][-1:] for name in ("loss", "effective_rank", "feature_std")
    }
    return {
        "entry": entry,
        "images_per_second": figures.ABSENT if images_per_second is None else f"{images_per_second:,.0f}",
        "wait": figures.ABSENT if data_wait is None else f"{100 * data_wait:.1f} %",
        "device": figures.format_value(entry.run.derived.get("device")),
        **{
            name: f"{values[0]:.4g}" if len(values) else figures.ABSENT
            for name, values in last_values.items()
        },
    }


def _median(entry: ReportEntry, name: str) -> float | None:
    values = entry.run.metric_series(name)[1] if entry.run else ()
    return float(np.median(values)) if len(values) else None


def config_rows(entries: Sequence[ReportEntry]) -> list[dict[str, Any]]:
    """Return the settings as given and what followed from them, a row a name, marked where runs differ."""
    runs = [entry.run for entry in entries if entry.run]
    rows = []
    for kind, tables in (("given", [run.config for run in runs]), ("derived", [run.derived for run in runs])):
        for name in dict.fromkeys(name for table in tables for name in table):
            values = [figures.format_value(table.get(name)) for table in tables]
            rows.append(
                {
                    "kind": kind,
                    "name": name.replace("_", " "),
                    "cells": values,
                    "differs": len(set(values)) > 1,
                }
            )
    return rows


def skipped_counts(entries: Sequence[ReportEntry], examples: PairExamples) -> list[tuple[str, str, int]]:
    """Return what was left out: where, why, how many."""
    rows = []
    if examples.dataset is not None:
        rows += [
            ("import", reason, n) for reason, n in sorted(examples.dataset.artifact.manifest.skipped.items())
        ]
    for entry in entries:
        if entry.run is not None:
            rows += [(entry.name, reason, n) for reason, n in sorted(entry.run.manifest.skipped.items())]
    return rows


def library_versions(entries: Sequence[ReportEntry]) -> list[tuple[str, str]]:
    """Return the versions of libraries, several where runs differ."""
    tables = [entry.run.manifest.versions for entry in entries if entry.run]
    names = sorted({name for table in tables for name in table})
    return [(name, _join_distinct(table.get(name, figures.ABSENT) for table in tables)) for name in names]


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


class ReproductionCommands:
    """Writes commands with paths relative to a folder that holds all of them."""

    def __init__(self, entries: Sequence[ReportEntry], examples: PairExamples) -> None:
        """Choose the folder."""
        self.entries, self.examples = entries, examples
        dataset_paths = [] if examples.dataset is None else [examples.dataset.path.resolve()]
        common_path = os.path.commonpath(
            [entry.path.parent for entry in entries] + [path.parent for path in dataset_paths]
        )
        self.base_dir = Path(common_path)

    def command_lines(self) -> list[str]:
        """Return the chain from images to this page, one command a line."""
        commands = [f"cd {shlex.quote(str(self.base_dir))}"]
        if self.examples.dataset is not None:
            commands.append(self._import_command(self.examples.dataset))
        commands += [
            command
            for source in self.examples.neighbor_sources
            for command in self._neighbor_commands(source)
        ]
        for entry in self.entries:
            if entry.run is not None:
                commands.append(self._train_command(entry, entry.run))
            commands += [self._evaluate_command(entry, result) for result in entry.results]
        return [
            *commands,
            _command_line(
                "report", *(self._relative(entry.path) for entry in self.entries), out="report.html"
            ),
        ]

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.base_dir)) if path.is_relative_to(self.base_dir) else str(path)

    def _import_command(self, dataset: CaptionDataset) -> str:
        config = dataset.artifact.manifest.settings
        flags = {name: config.get(name) for name in _IMPORT_FLAGS}
        columns = flags["caption_column"]
        flags["caption_column"] = ",".join(columns) if columns else None
        source = _resolve_source(str(config.get("source")), dataset.root)
        source_path = self._relative(Path(source)) if Path(source).is_absolute() else source
        return _command_line("import", source_path, self._relative(dataset.path.resolve()), **flags)

    def _neighbor_commands(self, source: NeighborSource) -> list[str]:
        dataset = self._relative(source.dataset.path.resolve())
        neighbors = source.neighbors
        return [
            _command_line("embed", dataset, encoder=neighbors.encoder),
            _command_line("neighbors", dataset, encoder=neighbors.encoder, k=neighbors.k),
        ]

    def _train_command(self, entry: ReportEntry, run: RunInfo) -> str:
        dataset = self._relative(Path(str(run.derived.get("dataset"))))
        config = run.derived.get("non_default", run.config)
        flags = {"pairs" if name == "source" else name: value for name, value in config.items()}
        return _command_line("train", dataset, out=self._relative(entry.path), **flags)

    def _evaluate_command(self, entry: ReportEntry, result: dict[str, Any]) -> str:
        protocols = result["protocols"]
        fewshot = protocols.get("fewshot", {}).get("config", {})
        overrides = {name: fewshot.get(name) for name in ("ways", "shots", "episodes")}
        overrides["mean_class_accuracy"] = (
            any(p["config"].get("mean_class_accuracy") for p in protocols.values()) or None
        )
        dataset_info, requested = result["dataset"], result["requested"]
        for name, default in (("label_column", "label"), ("split_column", "split")):
            overrides[name] = None if dataset_info.get(name, default) == default else dataset_info[name]
        overrides["caption_column"] = dataset_info.get("caption_column")
        epochs = [p["config"]["epochs"] for p in protocols.values() if "epochs" in p["config"]]
        overrides["train_epochs"] = epochs[0] if len(set(epochs)) == 1 else None
        finetuned = [p for p in protocols.values() if p["config"].get("finetune_backbone")]
        overrides["finetune_backbone"] = bool(finetuned) or None
        overrides |= {
            name: requested[name] or None
            for name in ("backbone", "weights_prefix", "weights_exclude", "image_size")
        }
        flags = {
            "dataset": self._relative(Path(dataset_info["path"])),
            "protocol": ",".join(protocols),
            **overrides,
        }
        if entry.run is not None:
            return _command_line("evaluate", self._relative(entry.path), **flags)
        encoder = (
            requested["encoder"]
            if ":" in requested["encoder"]
            else self._relative(Path(requested["encoder"]).resolve())
        )
        return _command_line("evaluate", encoder, **flags, out=self._relative(entry.path))


def _resolve_source(source: str, root: Path) -> str:
    """Return the source as an absolute path if it was given as a relative one and exists."""
    if Path(source).is_absolute():
        return source
    for candidate in (root / Path(source).name, root):
        if candidate.name == Path(source).name and candidate.exists():
            return str(candidate)
    return source


def _command_line(command: str, *positionals: str, **flags: Any) -> str:
    tokens = ["likewise", command, *positionals]
    for name, value in flags.items():
        if value is None:
            continue
        flag = "-k" if command == "neighbors" and name == "k" else f"--{name.replace('_', '-')}"
        if value is True:
            tokens.append(flag)
            continue
        for item in value if isinstance(value, list) else [value]:
            tokens += [flag, str(item)]
    return shlex.join(tokens)


_TEMPLATE_DIR = Path(__file__).parent
_CURVES = (
    ("loss", "Loss"),
    ("effective_rank", "Effective rank of the features"),
    ("feature_std", "Standard deviation of the features"),
    ("lr", "Learning rate"),
)


def write_report(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    title: str | None = None,
    image_credits: Sequence[str] = (),  # nobody misses the interpreter's own
) -> Path:
    """Write a page on one or several runs; the same files give the same bytes.

    Args:
        runs: Finished runs, and folders of evaluations that are no runs (an untrained encoder). Runs are
            compared with the first that has `self` pairs, or else with the first.
        out: The HTML file.
        title: What stands at the top.
        image_credits: Whom the images are owed to, and their licences.

    Raises:
        ArtifactError: where a folder is neither a finished run nor holds results.
        InputError: where no run is given.
    """
    entries = read_report_entries(runs)
    page, path = _render(entries, title or _default_title(entries), image_credits), Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of files may hold bytes that are no text.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
    return path


def _default_title(entries: Sequence[ReportEntry]) -> str:
    return f"likewise: {figures.join_words([entry.path.name for entry in entries])}"


def _render(
    entries: Sequence[ReportEntry], title: str, image_credits: Sequence[str]
) -> str:  # as in write_report
    examples, results = load_pair_examples(entries), build_result_tables(entries)
    # Captions are anybody's text: everything is escaped but what this package drew itself.
    env = Environment(
        loader=FileSystemLoader(_TEMPLATE_DIR),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"plain": figures.format_value, "counted": figures.count_noun}
    styles = {entry.path: i for i, entry in enumerate(entries)}
    return env.get_template("page.html").render(
        title=title,
        style=Markup((_TEMPLATE_DIR / "page.css").read_text(encoding="utf-8")),  # noqa: S704  # the package's own file
        entries=entries,
        runs=[entry for entry in entries if entry.run],
        styles=styles,
        results=results,
        sentences=[] if results is None else summary_sentences(results),
        caveats=[] if results is None else caveats(results),
        interval_plots=_interval_plots(results, styles),
        unmeasured=[
            entry.error or f"{entry.name} has not been evaluated" for entry in entries if not entry.rows
        ],
        facts=key_facts(entries, examples),
        examples=examples,
        anchors=build_anchor_examples(entries, examples),
        similarity=_similarity_summary(examples),
        curves=_training_curves(entries),
        throughput=[throughput(entry) for entry in entries if entry.run],
        settings=config_rows(entries),
        skipped=skipped_counts(entries, examples),
        versions=library_versions(entries),
        commands=ReproductionCommands(entries, examples).command_lines(),
        credits=image_credits,
    )


def _interval_plots(results: ResultTables | None, styles: dict[Path, int]) -> list[Markup]:
    return [] if results is None else [_interval_plot(table, results, styles) for table in results.tables]


def _interval_plot(table: DatasetTable, results: ResultTables, styles: dict[Path, int]) -> Markup:
    rows = []
    for row in table.rows:
        estimates = [
            (cell.estimate, styles[estimate.path])
            for cell, estimate in zip(row.cells, results.columns, strict=True)
            if cell.estimate
        ]
        intervals = [
            IntervalMark(
                style=style, value=100 * estimate.value, low=100 * estimate.low, high=100 * estimate.high
            )
            for estimate, style in estimates
        ]
        rows.append((row.name, intervals))
    return interval_plot(f"results {table.rows[0].result.dataset_key}", rows)


def _similarity_summary(examples: PairExamples) -> dict[str, Any] | None:
    """Return the histogram of similarities, with shares in words."""
    nearest = [
        (source, source.nearest_similarity)
        for source in examples.neighbor_sources
        if len(source.nearest_similarity)
    ]
    if not nearest:
        return None
    num_images = len(nearest[0][0].dataset)
    return {
        "plot": histogram("similarity", [(source.style, similarities) for source, similarities in nearest]),
        "sources": [
            {
                "style": source.style,
                "encoder": source.neighbors.encoder,
                "median": f"{np.median(similarities):.2f}",
                "percent_similar": figures.format_percent(float((similarities >= 0.8).mean())),
                "percent_identical": figures.format_percent(float((similarities >= 0.9995).mean())),
            }
            for source, similarities in nearest
        ],
        "num_images": num_images,
        "num_without_caption": num_images - len(nearest[0][1]),
        "share": figures.format_percent((num_images - len(nearest[0][1])) / num_images),
    }


def _training_curves(entries: Sequence[ReportEntry]) -> list[Markup]:
    """Draw what was logged, one small plot a figure."""
    plots = []
    for name, title in _CURVES:
        series = [(i, entry.run.metric_series(name)) for i, entry in enumerate(entries) if entry.run]
        lines = [Curve(style=i, x=x, y=y) for i, (x, y) in series if len(x)]
        if lines:
            plots.append(line_plot(f"curve {name}", title, lines))
    return plots
