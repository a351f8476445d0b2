"""Plots for papers and slides: PNG, SVG or PDF, from the numbers of `figures`."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.errors import DataError, MissingExtra, UsageError, unknown
from tdabench.io import open_own, write_bytes
from tdabench.report import figures
from tdabench.report.board import Board, Table
from tdabench.report.terminal import title
from tdabench.report.text import clean, number, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's palette, safe for colour-blind readers; grey is for references.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#000000")
MOST_LINES = 10  # more are hard to distinguish
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

    Returns the written files, and one line per plot that could not be drawn, with the reason.
    Raises MissingExtra without matplotlib, UsageError for an unknown kind or format, DataError if
    a single kind was requested and the records do not allow it.
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
        raise UsageError("these runs contain no records", "Create some with: tdabench run")
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
            if os.path.lexists(path) and not _is_ours(path):
                raise UsageError(
                    f"{path} exists and is not a plot of tdabench",
                    "Remove it, or choose another folder with --out",
                )
            write_bytes(path, figure_bytes(figure, form))
            written.append(path)
    return written, missing


STAMP = "tdabench plot"


def _is_ours(path: Path) -> bool:
    try:
        with open_own(path, "rb") as f:
            return STAMP.encode() in f.read()
    except (OSError, DataError):
        return False


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in clean(text, 80)).strip(".")


def figure_bytes(figure: Figure, form: str) -> bytes:
    """Returns a figure as a file of the format `form`; equal figures give equal bytes."""
    import matplotlib

    out = io.BytesIO()
    # Text remains text in SVG and PDF; no date, so that the same records give the same file.
    stamp: dict[str, Any] = {
        "png": {"Software": STAMP},
        "svg": {"Date": None, "Creator": STAMP},
        "pdf": {"CreationDate": None, "Creator": STAMP},
    }
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "tdabench"}
    ):
        figure.savefig(out, format=form, dpi=200, metadata=stamp[form])
    return out.getvalue()


def _blank(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingExtra("matplotlib", "plots") from e
    return Figure(figsize=(width, height), layout="constrained")


def _axes(figure: Figure, down: int = 1, across: int = 1, place: int = 1) -> Axes:
    axes = figure.add_subplot(down, across, place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Places the legend beside the axes, where it hides nothing."""
    figure.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)


def _log_x(axes: Axes, values: Sequence[float], ticks: bool = False, always: bool = False) -> None:
    """Makes the x axis logarithmic with plain numbers.

    Within a factor of five it stays linear, unless `always` is set.

    With `ticks`, these few values are marked.
    """
    low, high = min(values), max(values)
    if low <= 0 or (high < 5 * low and not always):
        axes.xaxis.set_major_formatter(_plain)
        return
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, low, high)
    if ticks and len(set(values)) <= 8:
        axes.set_xticks(sorted(set(values)))


def _plain(value: float, _: Any = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Sets plain numbers on a logarithmic axis, at 1, 2 and 5 if it spans few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter

    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(NullFormatter())


def _text(text: str, limit: int = 40) -> str:
    """Escapes text for matplotlib, which reads `$…$` as mathematics."""
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
            raise DataError(f"no method has both a value and a {cost} cost")
        column = table.column(table.primary)
        lines = {}
        if column.ceiling is not None and column.higher_is_better:
            lines["noise ceiling"] = column.ceiling
        return scatter(
            points, figures.COST_LABELS[cost], _text(title(column)), _heading(table), lines
        )

    return draw_one


def scatter(
    points: Sequence[figures.Point], across: str, up: str, heading: str, lines: Mapping[str, float]
) -> Figure:
    """Draws values against costs above 0, with intervals, the Pareto front and every label.

    `lines` are horizontal references by name, such as ceilings. With more than 20 points the figure
    is larger.
    """
    # Small: letters stay readable at 400 pixels. Many labels need more room.
    figure = _blank(4.8, 4.6) if len(points) <= 20 else _blank(8.4, 6.4)
    axes = _axes(figure)
    axes.tick_params(labelsize=8)
    families = _families(points)
    handles: list[Any] = []
    for family, i in families.items():
        own = [p for p in points if p.family == family]
        errors = [
            [p.y - p.low if p.low is not None else 0.0 for p in own],
            [p.high - p.y if p.high is not None else 0.0 for p in own],
        ]
        bars = axes.errorbar(
            [p.x for p in own],
            [p.y for p in own],
            yerr=np.maximum(errors, 0.0),
            fmt=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            label=_text(family) or "other",
            markersize=5,
            elinewidth=0.8,
            alpha=0.9,
        )
        handles.append(bars)
    for name, path in figures.frontiers(points).items():
        handles += axes.plot(
            [p.x for p in path],
            [p.y for p in path],
            color=COLOURS[families[figures.PIPELINE] % len(COLOURS)],
            linewidth=1.2,
            zorder=1,
            label=_text(f"{name} over k", 30),
        )
    front = sorted((p for p in points if p.front), key=lambda p: p.x)
    if front:
        handles += axes.plot(
            [p.x for p in front],
            [p.y for p in front],
            color="#888888",
            linewidth=1,
            linestyle="--",
            zorder=1,
            label="Pareto front",
        )
    for name, value in lines.items():
        axes.axhline(value, color="#444444", linewidth=0.8, linestyle=":")
        axes.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
    axes.margins(x=0.15)
    _log_x(axes, [p.x for p in points])
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.set_title(heading, fontsize=9, loc="left")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8,
                  frameon=False, columnspacing=1.2, handletextpad=0.4)  # fmt: skip
    _name_points(figure, axes, points)
    return figure


def _name_points(figure: Figure, axes: Axes, points: Sequence[figures.Point]) -> None:
    """Labels every point where no other label is, those on the Pareto front first.

    A label that has to stand apart from its point is joined to it by a line.
    """
    figure.draw_without_rendering()  # runs the layout: only now are positions known
    unit = figure.dpi / 72
    frame = axes.get_window_extent()
    x0, y0, x1, y1 = (v / unit for v in (frame.x0, frame.y0, frame.x1, frame.y1))
    at = {p.label: axes.transData.transform((p.x, p.y)) / unit for p in points}
    size = 3.5
    taken = [(x - size, y - size, x + size, y + size) for x, y in at.values()]
    for p in sorted(points, key=lambda p: (not p.front, -p.y)):
        text = shorten(clean(p.label, 200), 24)
        x, y = at[p.label]
        width, height = 4.7 * len(text) + 2, 9.0
        for ring, (right, up) in ((r, d) for r in range(14) for d in _DIRECTIONS):
            away = 5.0 + 9.0 * ring
            left = x + right * away - (width if right < 0 else width / 2 if right == 0 else 0)
            below = y + up * away - height / 2
            box = (left, below, left + width, below + height)
            inside = x0 <= box[0] and box[2] <= x1 + 8 and y0 <= box[1] and box[3] <= y1 + 6
            if inside and all(
                box[2] <= o[0] or box[0] >= o[2] or box[3] <= o[1] or box[1] >= o[3] for o in taken
            ):
                break
        else:
            continue
        taken.append(box)
        axes.annotate(
            _text(p.label, 24),
            (p.x, p.y),
            xytext=(left + width / 2 - x, below + height / 2 - y),
            textcoords="offset points",
            fontsize=8,
            fontweight="bold" if p.front else "normal",
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0,
                        "shrinkB": 2} if ring else None,
        )  # fmt: skip


# Where a label may stand, seen from its point: the nearest free place of the first direction.
_DIRECTIONS = ((1, 0.4), (1, -0.4), (-1, 0.4), (-1, -0.4), (0, 1), (0, -1), (0.6, 1), (0.6, -1),
               (-0.6, 1), (-0.6, -1))  # fmt: skip


def _heat(matrix: figures.Matrix, heading: str, label: str) -> Figure:
    n_rows, n_columns = matrix.values.shape
    figure = _blank(max(5.0, 2.6 + 0.5 * n_columns), max(2.4, 1.6 + 0.28 * n_rows))
    axes = _axes(figure)
    axes.grid(False)
    top = max(0.1, float(np.nanmax(np.abs(matrix.values))))  # missing values have no colour
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
                        number(value),
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
        raise DataError("no task labels are available for the queries")
    matrix = figures.by_task(board, table, tasks)
    if matrix.empty:
        raise DataError("no method has per-query values for labelled queries")
    name = title(table.column(table.primary))
    return _heat(matrix, f"{_heading(table)} · {_text(name)} by task (queries)", _text(name))


def _transfer(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
    names = [c.name for c in table.columns if c.benchmark == "transfer"]
    matrix = figures.transfer_heatmap(table, names[0]) if names else None
    if matrix is None or matrix.empty:
        raise DataError("the records contain no transfer benchmark")
    return _heat(matrix, f"{_heading(table)} · LDS on the truth of each target", "LDS")


def _lines(plots: Sequence[figures.Lines], heading: str) -> Figure:
    """Draws panels side by side with one legend, with the same colour per line in all panels."""
    labels = list(dict.fromkeys(c.label for p in plots for c in p.lines if not c.reference))
    shown = labels[:MOST_LINES]
    left_out = f" ({len(shown)} of {len(labels)} methods)" if len(shown) < len(labels) else ""
    across = min(3, len(plots))
    down = -(-len(plots) // across)
    figure = _blank(4.0 * across + 1.4, 3.2 * down)
    dashes = dict(zip(figures.REFERENCES.values(), ("-.", "--", ":")))
    handles: dict[str, Any] = {}
    for i, plot in enumerate(plots):
        axes = _axes(figure, down, across, i + 1)
        if plot.log:
            ys = [y for line in plot.lines for y in line.y]
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis, min(ys), max(ys))
        for line in plot.lines:
            if line.reference:
                dash = dashes.get(line.label, ":")
                style: dict[str, Any] = {"color": "#888888", "linestyle": dash}
            elif line.label in shown:
                j = shown.index(line.label)
                marker = MARKERS[(j + j // len(COLOURS)) % len(MARKERS)]
                style = {"color": COLOURS[j % len(COLOURS)], "marker": marker}
            else:
                continue
            style |= {"label": _text(line.label, 28), "markersize": 4, "linewidth": 1.4}
            if len(line.x) == 1:
                handle = axes.axhline(line.y[0], **style)
            else:
                (handle,) = axes.plot(line.x, line.y, **style)
                low = [v if b is None else b for v, b in zip(line.y, line.low)]
                high = [v if b is None else b for v, b in zip(line.y, line.high)]
                if len(plot.lines) <= 4:
                    colour = style["color"]
                    axes.fill_between(line.x, low, high, color=colour, alpha=0.12, linewidth=0)
                elif low != high:  # bands would hide each other
                    axes.vlines(line.x, low, high, color=style["color"], alpha=0.4, linewidth=0.8)
            handles.setdefault(style["label"], handle)
        xs = [x for line in plot.lines if len(line.x) > 1 for x in line.x]
        _log_x(axes, xs, ticks=True, always=plot.log)
        axes.set_xlabel(plot.x, fontsize=8)
        axes.set_ylabel(_text(plot.y), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_title(_text(plot.title), fontsize=9, loc="left")
    figure.suptitle(heading + left_out, fontsize=9, x=0.01, ha="left")
    _legend(figure, list(handles.values()))
    return figure


def _curves(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
    found = [p for column in table.columns for p in figures.curves(table, column.name)]
    if not found:
        raise DataError("the records contain no curves (selection or removal with at least two k)")
    return _lines(found, _heading(table))


def _scaling(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
    found = figures.scaling(board, table)
    if not found:
        raise DataError("the records contain no cost benchmark and no corpora of different sizes")
    return _lines(found, _heading(table))


def _budget(board: Board, table: Table, tasks: Mapping[str, str]) -> Figure:
    found = figures.budget(table)
    if not found:
        raise DataError("no method was run with two label budgets")
    return _lines(found, _heading(table))


KINDS: dict[str, Callable[[Board, Table, Mapping[str, str]], Any]] = {
    "fidelity-build": _pareto("build"),
    "fidelity-query": _pareto("query"),
    "fidelity-total": _pareto("total"),
    "fidelity-storage": _pareto("bytes"),
    "tasks": _tasks,
    "transfer": _transfer,
    "curves": _curves,
    "scaling": _scaling,
    "budget": _budget,
}
