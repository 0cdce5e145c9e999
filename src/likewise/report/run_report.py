"""HTML report of runs and evaluations, from their result files."""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from likewise.data.dataset import CaptionDataset
from likewise.report.load import (
    NeighborSource,
    PairInputs,
    PairPreview,
    ReportEntry,
    RunInfo,
    load_pair_inputs,
    read_report_entries,
)
from likewise.report.page import (
    ABSENT,
    Thumbnail,
    format_captions,
    format_percent,
    format_value,
    join_words,
    make_thumbnail,
    render,
    sample_thumbnail,
    write_page,
)
from likewise.report.plots import Curve, IntervalMark, histogram, interval_plot, line_plot
from likewise.report.results import (
    DatasetTable,
    ResultTables,
    build_result_tables,
    caveats,
    summary_sentences,
)
from likewise.strings import count_noun

MAX_ANCHORS = 8
_MAX_VIEWS = 40  # limits the size of a page with many runs
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
    image_credits: Sequence[str] = (),
) -> Path:
    """Write a self-contained HTML report on one or several runs; equal files give equal bytes.

    Args:
        runs: Finished runs, and folders of evaluations without a run (of an untrained encoder, for example).
            The baseline is the first run with `self` pairs, else the first run.
        out: The HTML file.
        title: Title of the report; defaults to the names of the runs.
        image_credits: Authors and licenses of the images.

    Raises:
        ArtifactError: if a folder is neither a finished run nor has results.
        InvalidInputError: if there is no run.
    """
    entries = read_report_entries(runs)
    page = render("run.html", **_template_context(entries, title or _default_title(entries), image_credits))
    path = Path(out)
    write_page(path, page)
    return path


def _default_title(entries: Sequence[ReportEntry]) -> str:
    return f"likewise: {join_words([entry.path.name for entry in entries])}"


def _template_context(
    entries: Sequence[ReportEntry], title: str, image_credits: Sequence[str]
) -> dict[str, Any]:
    inputs, results = load_pair_inputs(entries), build_result_tables(entries)
    styles = {entry.path: i for i, entry in enumerate(entries)}
    runs = [entry for entry in entries if entry.run]
    return {
        "title": title,
        "runs": runs,
        "styles": styles,
        "legends": {
            "runs": [(styles[entry.path], entry.name) for entry in runs],
            "results": [(styles[entry.path], entry.name) for entry in (results.columns if results else [])],
        },
        "results": results,
        "sentences": _lead_sentences(results),
        "caveats": [] if results is None else caveats(results),
        "interval_plots": _interval_plots(results, styles),
        "unmeasured": [
            entry.error or f"{entry.name} has not been evaluated" for entry in entries if not entry.rows
        ],
        "facts": key_facts(entries, inputs),
        "inputs": inputs,
        "anchors": build_anchor_examples(entries, inputs),
        "similarity": _similarity_summary(inputs),
        "curves": _training_curves(entries),
        "throughput": [row for entry in entries if (row := throughput(entry)) is not None],
        "settings": config_rows(entries),
        "skipped": skipped_counts(entries, inputs),
        "versions": library_versions(entries),
        "commands": ReproductionCommands(entries, inputs).command_lines(),
        "credits": image_credits,
    }


def _lead_sentences(results: ResultTables | None) -> list[str]:
    if results is None:
        return ["Nothing has been evaluated yet: this page has the data and the training, but no results."]
    return summary_sentences(results) or ["The table below has the results."]


@dataclass(frozen=True, kw_only=True)
class CaptionedThumbnail:
    """An image with its captions and, for a neighbor, its caption similarity to the anchor."""

    thumbnail: Thumbnail
    caption: str
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class ViewPair:
    """The views of one pair in one run: two, or one for methods that pair an image with a caption."""

    run_name: str
    thumbnails: list[Thumbnail]


@dataclass(frozen=True, kw_only=True)
class AnchorExample:
    """An anchor with its neighbors by caption, and with its views in each run."""

    image: CaptionedThumbnail
    neighbors: list[CaptionedThumbnail]
    view_pairs: list[ViewPair]


def build_anchor_examples(entries: Sequence[ReportEntry], inputs: PairInputs) -> list[AnchorExample]:
    """Return the first anchors of the reference run; those that most runs have in their preview are first."""
    previews = [(entry.name, entry.run.preview) for entry in entries if entry.run and entry.run.preview]
    reference_run = entries[inputs.reference_index].run
    if inputs.dataset is None or reference_run is None or reference_run.preview is None:
        return []
    anchor_ids = [{pair["anchor"] for pair in preview.pairs} for _, preview in previews]
    pairs = sorted(
        reference_run.preview.pairs, key=lambda pair: -sum(pair["anchor"] in ids for ids in anchor_ids)
    )
    num_anchors = max(2, min(MAX_ANCHORS, _MAX_VIEWS // len(previews)))
    source = inputs.neighbor_sources[0] if inputs.neighbor_sources else None
    return [
        _build_anchor_example(inputs.dataset, source, pair["position"], previews)
        for pair in pairs[:num_anchors]
    ]


def _build_anchor_example(
    dataset: CaptionDataset,
    source: NeighborSource | None,
    position: int,
    previews: Sequence[tuple[str, PairPreview]],
) -> AnchorExample:
    sample = dataset[position]
    neighbors = []
    if source is not None:
        for index, similarity in zip(source.positions[position], source.similarity[position], strict=True):
            if index >= 0:
                neighbors.append(_captioned_thumbnail(source.dataset, int(index), float(similarity)))
    return AnchorExample(
        image=_captioned_thumbnail(dataset, position),
        neighbors=neighbors,
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
    thumbnails = [
        make_thumbnail(pixels, f"view {i} of {len(views)}, {run_name}") for i, pixels in enumerate(views, 1)
    ]
    return ViewPair(run_name=run_name, thumbnails=thumbnails)


def key_facts(entries: Sequence[ReportEntry], inputs: PairInputs) -> list[tuple[str, str]]:
    """Return the key facts of the report; a setting that differs between runs has one value per run."""
    facts = []
    if inputs.dataset is not None:
        facts.append(("images", f"{len(inputs.dataset):,}"))
        facts.append(("captions", f"{inputs.dataset.artifact.manifest.counts['captions']:,}"))
    runs = [entry.run for entry in entries if entry.run]
    if inputs.dataset is None and runs:
        facts.append(("images", _join_distinct(f"{run.manifest.counts.get('images', 0):,}" for run in runs)))
    if runs:
        facts += [
            ("backbone", _join_distinct(format_value(run.config.get("backbone")) for run in runs)),
            ("image size", _join_distinct(f"{run.config.get('image_size')} px" for run in runs)),
            ("steps", _join_distinct(f"{run.manifest.counts.get('steps', 0):,}" for run in runs)),
            ("batch size", _join_distinct(format_value(run.config.get("batch_size")) for run in runs)),
        ]
    return facts


def _join_distinct(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))


def throughput(entry: ReportEntry) -> dict[str, Any] | None:
    """Return final metrics, throughput and data time (medians over the log) of a run; None without a run."""
    if entry.run is None:
        return None
    images_per_second = _median_metric(entry.run, "images_per_second")
    data_time = _median_metric(entry.run, "data_time_fraction")
    last_values = {
        name: entry.run.metric_series(name)[1][-1:] for name in ("loss", "effective_rank", "feature_std")
    }
    return {
        "entry": entry,
        "images_per_second": ABSENT if images_per_second is None else f"{images_per_second:,.0f}",
        "data_time": ABSENT if data_time is None else f"{100 * data_time:.1f} %",
        "device": format_value(entry.run.derived.get("device")),
        **{name: f"{values[0]:.4g}" if len(values) else ABSENT for name, values in last_values.items()},
    }


def _median_metric(run: RunInfo, name: str) -> float | None:
    values = run.metric_series(name)[1]
    return float(np.median(values)) if len(values) else None


def config_rows(entries: Sequence[ReportEntry]) -> list[dict[str, Any]]:
    """Return the given and the derived settings, one row per name, with a mark if the runs differ."""
    runs = [entry.run for entry in entries if entry.run]
    rows = []
    for kind, tables in (("given", [run.config for run in runs]), ("derived", [run.derived for run in runs])):
        for name in dict.fromkeys(name for table in tables for name in table):
            values = [format_value(table.get(name)) for table in tables]
            rows.append(
                {
                    "kind": kind,
                    "name": name.replace("_", " "),
                    "cells": values,
                    "differs": len(set(values)) > 1,
                }
            )
    return rows


def skipped_counts(entries: Sequence[ReportEntry], inputs: PairInputs) -> list[tuple[str, str, str]]:
    """Return the skipped images and ignored files: step, reason and count."""
    rows = []
    if inputs.dataset is not None:
        rows += [
            ("import", reason, count_noun(n, "image"))
            for reason, n in sorted(inputs.dataset.artifact.manifest.skipped.items())
        ]
        rows += [
            ("import, ignored", reason, count_noun(n, "file"))
            for reason, n in sorted(inputs.dataset.artifact.manifest.ignored.items())
        ]
    for entry in entries:
        if entry.run is not None:
            rows += [
                (entry.name, reason, count_noun(n, "image"))
                for reason, n in sorted(entry.run.manifest.skipped.items())
            ]
    return rows


def library_versions(entries: Sequence[ReportEntry]) -> list[tuple[str, str]]:
    """Return the versions of the libraries; several if the runs differ."""
    tables = [entry.run.manifest.versions for entry in entries if entry.run]
    names = sorted({name for table in tables for name in table})
    return [(name, _join_distinct(table.get(name, ABSENT) for table in tables)) for name in names]


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
# Settings of an adaptation that describe its start; the flags that load it are in the derived settings.
_START_SETTINGS = ("method", "backbone", "image_size")


class ReproductionCommands:
    """Commands that reproduce the report, with paths relative to the common parent folder."""

    def __init__(self, entries: Sequence[ReportEntry], inputs: PairInputs) -> None:
        """Find the common parent folder of the entries and the dataset."""
        self.entries, self.inputs = entries, inputs
        dataset_paths = [] if inputs.dataset is None else [inputs.dataset.path.resolve()]
        common_path = os.path.commonpath(
            [entry.path.parent for entry in entries] + [path.parent for path in dataset_paths]
        )
        self.base_dir = Path(common_path)

    def command_lines(self) -> list[str]:
        """Return the commands from the import to the report, one per line."""
        commands = [f"cd {shlex.quote(str(self.base_dir))}"]
        if self.inputs.dataset is not None:
            commands.append(self._import_command(self.inputs.dataset))
        commands += [
            command for source in self.inputs.neighbor_sources for command in self._neighbor_commands(source)
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
        if run.is_adapted:
            start = str(run.derived["start"]["encoder"])
            encoder = start if ":" in start else self._relative(Path(start).resolve())
            config = {name: value for name, value in config.items() if name not in _START_SETTINGS}
            config |= run.derived["start"]
            # A flag that is absent means false or the default of the start.
            config = {name: None if value in (False, "") else value for name, value in config.items()}
            config["encoder"] = encoder
        flags = {"pairs" if name == "source" else name: value for name, value in config.items()}
        command = "adapt" if run.is_adapted else "train"
        return _command_line(command, dataset, out=self._relative(entry.path), **flags)

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
    """Return a relative source as an absolute path if it exists."""
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


def _similarity_summary(inputs: PairInputs) -> dict[str, Any] | None:
    """Return the histogram of caption similarities and its statistics; None without neighbors."""
    nearest = [
        (source, source.nearest_similarity)
        for source in inputs.neighbor_sources
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
                "percent_similar": format_percent(float((similarities >= 0.8).mean())),
                "percent_identical": format_percent(float((similarities >= 0.9995).mean())),
            }
            for source, similarities in nearest
        ],
        "num_images": num_images,
        "num_without_caption": num_images - len(nearest[0][1]),
        "percent_without_caption": format_percent((num_images - len(nearest[0][1])) / num_images),
    }


def _training_curves(entries: Sequence[ReportEntry]) -> list[Markup]:
    """Draw one plot per logged metric."""
    plots = []
    for name, title in _CURVES:
        series = [(i, entry.run.metric_series(name)) for i, entry in enumerate(entries) if entry.run]
        lines = [Curve(style=i, x=x, y=y) for i, (x, y) in series if len(x)]
        if lines:
            plots.append(line_plot(f"curve {name}", title, lines))
    return plots
