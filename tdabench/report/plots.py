"""Plots for papers and slides: PNG, SVG or PDF, from the numbers of `figures`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.errors import DataError, MissingExtra, UsageError, unknown
from tdabench.io import write_bytes
from tdabench.report import figures
from tdabench.report.board import Board, Table
from tdabench.report.terminal import title
from tdabench.report.text import clean, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's palette, told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw(
    board: Board,
    kinds: Sequence[str],
    folder: Path,
    *,
    form: str = "png",
    benchmark: str | None = None,
    target: str | None = None,
    tasks: Mapping[str, str] | None = None,
) -> tuple[list[Path], list[str]]:
    """Draws plots of `kinds` (keys of KINDS; empty: all that the records allow) into `folder`.

    Returns the files written and, by a line each, what could not be drawn and why. Raises
    MissingExtra without matplotlib, UsageError for an unknown kind or format, DataError when
    one kind was asked for and the records do not hold it.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("plot", kind, KINDS)
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    tables = [board.table(target)] if target else list(board.tables)
    if benchmark:
        tables = [t.ranked_by(benchmark) for t in tables]
    if not tables:
        raise UsageError("these runs hold no records", "Make some with: tdabench run")
    written, missing = [], []
    for kind in kinds or KINDS:
        for table in tables:
            try:
                figure = KINDS[kind](board, table, tasks or {})
            except DataError as e:
                if len(kinds) == 1 and len(tables) == 1:
                    raise
                missing.append(f"{kind} ({clean(table.target, 60)}): {e.message}")
                continue
            name = kind if len(tables) == 1 else f"{kind}-{_file_name(table.target)}"
            path = folder / f"{name}.{form}"
            write_bytes(path, _bytes(figure, form))
            written.append(path)
    return written, missing


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in clean(text, 80)).strip(".")


def _bytes(figure: Figure, form: str) -> bytes:
    import matplotlib

    out = io.BytesIO()
    # Text stays text in SVG and PDF; no date, so that the same records give the same file.
    stamp: dict[str, Any] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "tdabench"}
    ):
        figure.savefig(out, format=form, dpi=200, metadata=stamp[form])
    return out.getvalue()


def _figure(width: float = 6.4, height: float = 4.2) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingExtra("matplotlib", "plots") from e
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _log_x(axes: Axes, values: Sequence[float], ticks: bool = False) -> None:
    """A logarithmic x axis with plain numbers; within a factor of five it stays linear.

    With `ticks`, the (few) values themselves are marked.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda v, _: f"{v:,.0f}" if abs(v) >= 100 else f"{v:g}")
    low, high = min(values), max(values)
    if low <= 0 or high < 5 * low:
        axes.xaxis.set_major_formatter(plain)
        return
    axes.set_xscale("log")
    if ticks and len(set(values)) <= 8:
        axes.set_xticks(sorted(set(values)))
    else:
        subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _text(text: str, limit: int = 40) -> str:
    """Plain text for matplotlib, which would read `$…$` as mathematics."""
    return shorten(clean(text, 200), limit).replace("$", r"\$")


def _heading(table: Table) -> str:
    regime = f" ({table.regime})" if table.regime and table.regime not in table.target else ""
    return " · ".join(_text(p) for p in (table.suite, f"{table.target}{regime}") if p)


def _families(points: Sequence[figures.Point]) -> dict[str, int]:
    return {f: i for i, f in enumerate(dict.fromkeys(p.family for p in points))}


def _pareto(cost: str) -> Callable[[Board, Table, Mapping[str, str]], Figure]:
    def draw_one(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
        if cost != "bytes" and not table.one_machine:
            raise DataError("times come from several machines and are not comparable")
        points = [p for p in figures.cost_points(table, cost) if p.x > 0]
        if not points:
            raise DataError(f"no method has both a value and its {cost} cost")
        figure, axes = _figure()
        families = _families(points)
        for family, i in families.items():
            own = [p for p in points if p.family == family]
            errors = [
                [p.y - p.low if p.low is not None else 0.0 for p in own],
                [p.high - p.y if p.high is not None else 0.0 for p in own],
            ]
            axes.errorbar(
                [p.x for p in own],
                [p.y for p in own],
                yerr=np.maximum(errors, 0.0),
                fmt=MARKERS[i % len(MARKERS)],
                color=COLOURS[i % len(COLOURS)],
                label=_text(family) or "other",
                markersize=6,
                elinewidth=1,
                capsize=2,
            )
        front = sorted((p for p in points if p.front), key=lambda p: p.x)
        axes.plot(
            [p.x for p in front],
            [p.y for p in front],
            color="#888888",
            linewidth=1,
            linestyle="--",
            zorder=1,
            label="Pareto front",
        )
        for p in points if len(points) <= 25 else front:
            axes.annotate(
                _text(p.label, 24),
                (p.x, p.y),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
                fontweight="bold" if p.front else "normal",
            )
        column = table.column(table.primary)
        if column.ceiling is not None and column.higher_is_better:
            axes.axhline(column.ceiling, color="#444444", linewidth=0.8, linestyle=":")
            axes.annotate(
                "noise ceiling",
                (1, column.ceiling),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                fontsize=7,
            )
        axes.margins(x=0.15)
        _log_x(axes, [p.x for p in points])
        axes.set_xlabel(figures.COST_LABELS[cost])
        axes.set_ylabel(_text(title(column)))
        axes.set_title(_heading(table), fontsize=9, loc="left")
        axes.legend(fontsize=7, frameon=False)
        return figure

    return draw_one


def _heat(matrix: figures.Matrix, heading: str, label: str) -> Figure:
    n_rows, n_columns = matrix.values.shape
    figure, axes = _figure(max(5.0, 2.6 + 0.5 * n_columns), max(2.4, 1.6 + 0.28 * n_rows))
    axes.grid(False)
    top = float(np.nanmax(np.abs(matrix.values))) or 1.0
    image = axes.imshow(matrix.values, cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
    names = [_text(c, 18) for c in matrix.columns]
    if matrix.counts:
        names = [f"{n} ({c})" for n, c in zip(names, matrix.counts, strict=True)]
    axes.set_xticks(range(n_columns), names, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(n_rows), [_text(r, 24) for r in matrix.rows], fontsize=7)
    if n_rows * n_columns <= 600:
        for r in range(n_rows):
            for c in range(n_columns):
                value = matrix.values[r, c]
                if np.isfinite(value):
                    dark = abs(value) > 0.6 * top
                    axes.text(
                        c,
                        r,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="white" if dark else "black",
                    )
    figure.colorbar(image, ax=axes, shrink=0.8, label=label)
    axes.set_title(heading, fontsize=9, loc="left")
    return figure


def _tasks(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
    if not tasks:
        raise DataError("the queries have no task labels at hand")
    matrix = figures.by_task(board, table, tasks)
    if matrix.empty:
        raise DataError("no method has per-query values of labelled queries")
    name = title(table.column(table.primary))
    return _heat(matrix, f"{_heading(table)} · {_text(name)} by task (queries)", _text(name))


def _transfer(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
    names = [c.name for c in table.columns if c.benchmark == "transfer"]
    matrix = figures.transfer_matrix(table, names[0]) if names else None
    if matrix is None or matrix.empty:
        raise DataError("the records hold no transfer benchmark")
    return _heat(matrix, f"{_heading(table)} · LDS by truth of", "LDS")


def _curves(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
    found = [
        (column.name, measure, lines)
        for column in table.columns
        for measure, lines in figures.curves(table, column.name).items()
    ]
    if not found:
        raise DataError("the records hold no curves (selection or removal at two k or more)")
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingExtra("matplotlib", "plots") from e
    across = min(3, len(found))
    down = -(-len(found) // across)
    figure = Figure(figsize=(4.2 * across, 3.2 * down), layout="constrained")
    for i, (column, measure, lines) in enumerate(found):
        axes = figure.add_subplot(down, across, i + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        for j, line in enumerate(lines):
            style = "--" if line.reference else "-"
            colour = "#888888" if line.reference else COLOURS[j % len(COLOURS)]
            if len(line.k) == 1:
                axes.axhline(
                    line.value[0], linestyle=":", color=colour, label=f"{_text(line.label)}"
                )
                continue
            axes.plot(
                line.k,
                line.value,
                style,
                marker=MARKERS[j % len(MARKERS)],
                markersize=4,
                color=colour,
                label=_text(line.label, 24),
            )
            low = [v if b is None else b for v, b in zip(line.value, line.low)]
            high = [v if b is None else b for v, b in zip(line.value, line.high)]
            axes.fill_between(line.k, low, high, color=colour, alpha=0.12, linewidth=0)
        _log_x(axes, [k for line in lines if len(line.k) > 1 for k in line.k], ticks=True)
        axes.set_xlabel("k (training examples)")
        axes.set_ylabel(_text(measure))
        axes.set_title(f"{_text(column)}: {_text(measure)}", fontsize=9, loc="left")
        if i == 0:
            axes.legend(fontsize=7, frameon=False)
    return figure


def _lines(
    series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, heading: str
) -> Figure:
    figure, axes = _figure()
    for i, (label, points) in enumerate(series.items()):
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            label=_text(label, 24),
        )
    _log_x(axes, [p[0] for points in series.values() for p in points], ticks=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(heading, fontsize=9, loc="left")
    axes.legend(fontsize=7, frameon=False)
    return figure


def _scaling(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
    if len({m for t in board.tables for m in t.machines}) > 1:
        raise DataError("times come from several machines and are not comparable")
    series = figures.scaling(board.tables, "build")
    if not series:
        raise DataError("no method was run on two corpora of different size")
    figure = _lines(series, "training examples", "build (s)", "scaling of the build phase")
    figure.axes[0].set_yscale("log")
    return figure


def _budget(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
    series = figures.budget(table)
    if not series:
        raise DataError("no method was run with two budgets of retrainings")
    pairs = {name: [(x, y) for x, y, _ in points] for name, points in series.items()}
    y = _text(title(table.column(table.primary)))
    return _lines(pairs, "retrainings spent on labels", y, _heading(table))


KINDS: dict[str, Callable[[Board, Table, Mapping[str, str]], Any]] = {
    "fidelity-build": _pareto("build"),
    "fidelity-query": _pareto("query"),
    "fidelity-storage": _pareto("bytes"),
    "tasks": _tasks,
    "transfer": _transfer,
    "curves": _curves,
    "scaling": _scaling,
    "budget": _budget,
}
