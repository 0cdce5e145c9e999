"""A comparison as files: CSV for machines, Markdown and LaTeX for papers, and two plots."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from likewise.artifacts import atomic
from likewise.evaluation.results import Cell, Table
from likewise.evaluation.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"higher": "▲", "lower": "▼"}
LEGEND = (
    "in %, with 95 % intervals; ▲ ▼: higher or lower than the first, surely among all tests of this table "
    "(Holm, 5 %)"
)


def mark(cell: Cell) -> str:
    """Return a triangle where a cell differs from the first for sure, else nothing."""
    if not cell.significant or cell.difference is None:
        return ""
    return MARKS["higher" if cell.difference.value > 0 else "lower"]


def grid(table: Table) -> list[list[str]]:
    """Lay a table out as cells of text, the head first, and means and ranks over sets last."""
    rows = [["set", "protocol", "metric", "n", *table.names]]
    for line in table.lines:
        cells = [
            "" if cell is None else f"{_percent(cell.estimate)} {mark(cell)}".rstrip() for cell in line.cells
        ]
        rows.append([line.set, line.protocol, line.metric, f"{line.n:,}", *cells])
    for each in table.averages:
        told = f"mean of {each.sets} sets"
        rows.append([told, each.protocol, each.metric, "", *(f"{100 * value:.1f}" for value in each.values)])
        known = "" if each.p_value is None else f"; Friedman p = {each.p_value:.3g}"
        rows.append([f"mean rank{known}", each.protocol, each.metric, "", *(f"{r:.2f}" for r in each.ranks)])
    return rows


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * part for part in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def markdown(table: Table) -> str:
    """Return a table as Markdown."""
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in grid(table))
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{LEGEND[0].upper()}{LEGEND[1:]}.\n"


def latex(table: Table) -> str:
    """Return a table as LaTeX for booktabs; the best of a row is bold, an arrow marks sure differences."""
    columns = "lllr" + "r" * len(table.names)
    rows = [" & ".join(map(_tex, ["set", "protocol", "metric", "n", *table.names])) + r" \\ \midrule"]
    for line in table.lines:
        cells = ["" if cell is None else _tex_cell(cell) for cell in line.cells]
        told = [_tex(part) for part in (line.set, line.protocol, line.metric)]
        rows.append(" & ".join([*told, f"{line.n}", *cells]) + r" \\")
    for each in table.averages:
        told = [_tex(part) for part in ("mean rank", each.protocol, each.metric)]
        rows.append(" & ".join([*told, "", *(f"{rank:.2f}" for rank in each.ranks)]) + r" \\")
    body = "\n".join(rows)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}\n"


def _tex_cell(cell: Cell) -> str:
    value = f"{100 * cell.estimate.value:.1f}"
    margin = f"{100 * (cell.estimate.high - cell.estimate.low) / 2:.1f}"
    arrow = {"▲": r"$^\uparrow$", "▼": r"$^\downarrow$", "": ""}[mark(cell)]
    return (rf"\textbf{{{value}}}" if cell.rank == 1 else value) + rf" $\pm$ {margin}{arrow}"


def _tex(text: str) -> str:
    for sign in "&%_#":
        text = text.replace(sign, f"\\{sign}")
    return text


def comma_separated(table: Table) -> str:
    """Return a table as CSV, a row a figure and encoder, as fractions with all their digits."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([
        "set", "protocol", "metric", "n", "encoder", "value", "low", "high", "rank",
        "difference", "difference_low", "difference_high", "p_value", "significant",
    ])  # fmt: skip
    for line in table.lines:
        for name, cell in zip(table.names, line.cells, strict=True):
            if cell is None:
                continue
            e, d = cell.estimate, cell.difference
            tested = ["", "", "", ""] if d is None else [d.value, d.low, d.high, d.p_value]
            rank = "" if cell.rank is None else cell.rank
            start = [line.set, line.protocol, line.metric, line.n, name, e.value, e.low, e.high, rank]
            writer.writerow([*start, *tested, int(cell.significant)])
    return stream.getvalue()


def write_comparison(table: Table, folder: Path, costs: Sequence[float | None]) -> list[Path]:
    """Write a comparison as CSV, Markdown, LaTeX and plots, and return the files.

    `costs` are the encoders' operations an image, in units of 10^9; where all are known, a plot sets accuracy
    against them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"comparison.csv": comma_separated, "comparison.md": markdown, "comparison.tex": latex}
    written = []
    for name, make in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(make(table), encoding="utf-8")
        written.append(folder / name)
    written.append(_plot_intervals(table, folder / "comparison.svg"))
    known = [cost for cost in costs if cost is not None]
    if len(known) == len(costs) and len(set(known)) > 1:
        written.append(_plot_costs(table, known, folder / "cost.svg"))
    return written


def _plot_intervals(table: Table, path: Path) -> Path:
    """Draw a dot with its interval for each figure and encoder."""
    from matplotlib.figure import Figure

    lines = table.lines
    figure = Figure(figsize=(8, 1.2 + 0.18 * len(lines) * (len(table.names) + 1)), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(table.names):
        shown = [(row, line.cells[place]) for row, line in enumerate(lines)]
        kept = [(row, cell.estimate) for row, cell in shown if cell is not None]
        y = [row + (place + 1) / (len(table.names) + 1) - 0.5 for row, _ in kept]
        x = [100 * e.value for _, e in kept]
        wide = [[100 * (e.value - e.low) for _, e in kept], [100 * (e.high - e.value) for _, e in kept]]
        axes.errorbar(x, y, xerr=wide, fmt="osD^vP"[place % 6], label=name, markersize=4, capsize=2)
    axes.set_yticks(range(len(lines)), [f"{line.set}: {line.protocol} {line.metric}" for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("% with 95 % interval")
    axes.grid(visible=True, axis="x", alpha=0.4)
    figure.legend(loc="outside lower center", ncols=min(4, len(table.names)), frameon=False)
    return _save(figure, path)


def _plot_costs(table: Table, costs: Sequence[float], path: Path) -> Path:
    """Draw each figure of each encoder over its operations an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, line in enumerate(table.lines):
        kept = sorted(
            (cost, 100 * cell.estimate.value)
            for cost, cell in zip(costs, line.cells, strict=True)
            if cell is not None
        )
        label = f"{line.set}: {line.protocol} {line.metric}"
        axes.plot(*zip(*kept, strict=True), marker="osD^vP"[number % 6], label=label)
    axes.set_xscale("log")
    axes.set_xlabel("operations an image, 10⁹")
    axes.set_ylabel("%")
    axes.grid(visible=True, alpha=0.4)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    for name, cost in zip(table.names, costs, strict=True):
        axes.annotate(name, (cost, 1), xycoords=("data", "axes fraction"), rotation=30, fontsize=8)
    return _save(figure, path)


def _save(figure: "Figure", path: Path) -> Path:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": path.name}), atomic(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return path
