"""Comparison of encoders as CSV, Markdown, LaTeX and plots."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from likewise.artifacts import atomic_write
from likewise.evaluation.results import Comparison, ComparisonCell
from likewise.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTION_MARKS = {"higher": "▲", "lower": "▼"}
LEGEND = (
    "in %, with 95 % confidence intervals; ▲ ▼: significantly higher or lower than the first encoder (5 %, "
    "Holm correction over all tests of this table)"
)


def significance_mark(cell: ComparisonCell) -> str:
    """Return a triangle for a significant difference from the first encoder, else an empty text."""
    if not cell.significant or cell.difference is None:
        return ""
    return DIRECTION_MARKS["higher" if cell.difference.value > 0 else "lower"]


def to_rows(comparison: Comparison) -> list[list[str]]:
    """Return the table as rows of text: the header, the metrics, and means and ranks over datasets."""
    rows = [["dataset", "protocol", "metric", "n", *comparison.encoder_names]]
    for row in comparison.rows:
        cells = [
            "" if cell is None else f"{_format_interval(cell.estimate)} {significance_mark(cell)}".rstrip()
            for cell in row.cells
        ]
        rows.append([row.dataset, row.protocol, row.metric, f"{row.n:,}", *cells])
    for mean_row in comparison.mean_rows:
        label = f"mean of {mean_row.num_datasets} datasets"
        rows.append(
            [
                label,
                mean_row.protocol,
                mean_row.metric,
                "",
                *(f"{100 * value:.1f}" for value in mean_row.values),
            ]
        )
        friedman_note = "" if mean_row.p_value is None else f"; Friedman p = {mean_row.p_value:.3g}"
        rows.append(
            [
                f"mean rank{friedman_note}",
                mean_row.protocol,
                mean_row.metric,
                "",
                *(f"{rank:.2f}" for rank in mean_row.ranks),
            ]
        )
    return rows


def _format_interval(estimate: Estimate) -> str:
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as a Markdown table."""
    header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in to_rows(comparison))
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{LEGEND[0].upper()}{LEGEND[1:]}.\n"


def to_latex(comparison: Comparison) -> str:
    """Return the comparison as a booktabs table in LaTeX: best bold, arrows for significant differences."""
    column_spec = "lllr" + "r" * len(comparison.encoder_names)
    rows = [
        " & ".join(map(_escape_latex, ["dataset", "protocol", "metric", "n", *comparison.encoder_names]))
        + r" \\ \midrule"
    ]
    for row in comparison.rows:
        cells = ["" if cell is None else _latex_cell(cell) for cell in row.cells]
        labels = [_escape_latex(label) for label in (row.dataset, row.protocol, row.metric)]
        rows.append(" & ".join([*labels, f"{row.n}", *cells]) + r" \\")
    for mean_row in comparison.mean_rows:
        labels = [_escape_latex(label) for label in ("mean rank", mean_row.protocol, mean_row.metric)]
        rows.append(" & ".join([*labels, "", *(f"{rank:.2f}" for rank in mean_row.ranks)]) + r" \\")
    body = "\n".join(rows)
    return f"\\begin{{tabular}}{{{column_spec}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def _latex_cell(cell: ComparisonCell) -> str:
    value = f"{100 * cell.estimate.value:.1f}"
    half_width = f"{100 * (cell.estimate.high - cell.estimate.low) / 2:.1f}"
    arrow = {"▲": r"$^\uparrow$", "▼": r"$^\downarrow$", "": ""}[significance_mark(cell)]
    return (rf"\textbf{{{value}}}" if cell.rank == 1 else value) + rf" $\pm$ {half_width}{arrow}"


def _escape_latex(text: str) -> str:
    for char in "&%_#":
        text = text.replace(char, f"\\{char}")
    return text


def to_csv(comparison: Comparison) -> str:
    """Return the comparison as CSV, one row per metric and encoder, as fractions in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([
        "dataset", "protocol", "metric", "n", "encoder", "value", "low", "high", "rank",
        "difference", "difference_low", "difference_high", "p_value", "significant",
    ])  # fmt: skip
    for row in comparison.rows:
        for name, cell in zip(comparison.encoder_names, row.cells, strict=True):
            if cell is None:
                continue
            e, d = cell.estimate, cell.difference
            difference_values = ["", "", "", ""] if d is None else [d.value, d.low, d.high, d.p_value]
            rank = "" if cell.rank is None else cell.rank
            row_values = [row.dataset, row.protocol, row.metric, row.n, name, e.value, e.low, e.high, rank]
            writer.writerow([*row_values, *difference_values, int(cell.significant)])
    return buffer.getvalue()


def write_comparison(comparison: Comparison, out: Path, gflops: Sequence[float | None]) -> list[Path]:
    """Write a comparison as CSV, Markdown, LaTeX and plots, and return the paths.

    Args:
        comparison: The comparison.
        out: Output folder.
        gflops: 10^9 floating-point operations per image of each encoder. If all are known and they differ,
            the metrics are plotted against them.
    """
    out.mkdir(parents=True, exist_ok=True)
    formatters = {"comparison.csv": to_csv, "comparison.md": to_markdown, "comparison.tex": to_latex}
    paths = []
    for name, formatter in formatters.items():
        with atomic_write(out / name) as tmp_path:
            tmp_path.write_text(formatter(comparison), encoding="utf-8")
        paths.append(out / name)
    paths.append(_plot_intervals(comparison, out / "comparison.svg"))
    known_gflops = [x for x in gflops if x is not None]
    if len(known_gflops) == len(gflops) and len(set(known_gflops)) > 1:
        paths.append(_plot_flops(comparison, known_gflops, out / "cost.svg"))
    return paths


def _plot_intervals(comparison: Comparison, path: Path) -> Path:
    """Draw the value and the interval of each metric and encoder."""
    from matplotlib.figure import Figure

    rows = comparison.rows
    figure = Figure(
        figsize=(8, 1.2 + 0.18 * len(rows) * (len(comparison.encoder_names) + 1)), layout="constrained"
    )
    axes = figure.add_subplot()
    for i, name in enumerate(comparison.encoder_names):
        cells = [(j, row.cells[i]) for j, row in enumerate(rows)]
        estimates = [(j, cell.estimate) for j, cell in cells if cell is not None]
        y = [j + (i + 1) / (len(comparison.encoder_names) + 1) - 0.5 for j, _ in estimates]
        x = [100 * e.value for _, e in estimates]
        xerr = [
            [100 * (e.value - e.low) for _, e in estimates],
            [100 * (e.high - e.value) for _, e in estimates],
        ]
        axes.errorbar(x, y, xerr=xerr, fmt="osD^vP"[i % 6], label=name, markersize=4, capsize=2)
    axes.set_yticks(range(len(rows)), [f"{row.dataset}: {row.protocol} {row.metric}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("%, with 95 % confidence intervals")
    axes.grid(visible=True, axis="x", alpha=0.4)
    figure.legend(loc="outside lower center", ncols=min(4, len(comparison.encoder_names)), frameon=False)
    return _save_svg(figure, path)


def _plot_flops(comparison: Comparison, gflops: Sequence[float], path: Path) -> Path:
    """Draw each metric of each encoder over its floating-point operations per image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for i, row in enumerate(comparison.rows):
        points = sorted(
            (x, 100 * cell.estimate.value)
            for x, cell in zip(gflops, row.cells, strict=True)
            if cell is not None
        )
        label = f"{row.dataset}: {row.protocol} {row.metric}"
        axes.plot(*zip(*points, strict=True), marker="osD^vP"[i % 6], label=label)
    axes.set_xscale("log")
    axes.set_xlabel("GFLOPs per image")
    axes.set_ylabel("%")
    axes.grid(visible=True, alpha=0.4)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    for name, x in zip(comparison.encoder_names, gflops, strict=True):
        axes.annotate(name, (x, 1), xycoords=("data", "axes fraction"), rotation=30, fontsize=8)
    return _save_svg(figure, path)


def _save_svg(figure: "Figure", path: Path) -> Path:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": path.name}), atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, format="svg", metadata={"Date": None})
    return path
