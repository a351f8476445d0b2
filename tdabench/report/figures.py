"""The numbers behind the plots, shared by matplotlib and the browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tdabench.errors import TdabenchError
from tdabench.report.board import Board, BoardCell, Cost, Table
from tdabench.report.terminal import title
from tdabench.run.record import Record, machine_of

COST_LABELS = {
    "build": "prepare + build (s)",  # all that a method needs before its first score
    "query": "query (ms per query)",
    "total": "prepare + build + all queries (s)",
    "bytes": "storage (bytes per example)",
    "prepare": "prepare (s)",
}
PIPELINE = "pipeline"  # the family of two-stage methods
CONTROL = "control"  # the family of references, which do not compete
# Suffixes of metrics of baselines, and the names of their lines.
REFERENCES = {"random": "random examples", "oracle": "the task's own", "full": "whole pool",
              "zeroshot": "no training"}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A method at (cost, value); `front` if no other method is cheaper and at least as good.

    A control (an oracle, random scores) is a reference and neither on the front nor a rival to it.
    """

    label: str
    family: str
    x: float
    y: float
    low: float | None
    high: float | None
    front: bool
    pipeline: str = ""  # the stages of a pipeline, whose points differ in how many it keeps


def pareto(costs: Sequence[float], values: Sequence[float], higher: bool = True) -> list[bool]:
    """Marks (cost, value) pairs that no other beats: lower cost, better value, one strictly."""
    sign = 1.0 if higher else -1.0
    points = [(c, sign * v) for c, v in zip(costs, values, strict=True)]
    return [not any(c <= a and v >= b and (c < a or v > b) for c, v in points) for a, b in points]


def cost_points(table: Table, cost: str, column: str | None = None) -> list[Point]:
    """Returns value against `cost` (build, query, total, bytes, prepare) of methods with both.

    The costs `build` and `total` include a preparation that is done once, such as AirRep's
    retrainings.
    """
    of = {"build": before_scores, "total": whole}
    name = column or table.primary
    found = [
        Point(
            row.label, row.family, x, c.value or 0.0, c.low, c.high, False,
            row.name if row.family == PIPELINE else "",
        )
        for row in table.rows
        if (c := row.cells.get(name)) is not None
        and c.ok
        and (x := of[cost](row.cost) if cost in of else row.cost.of(cost)) is not None
    ]  # fmt: skip
    return with_front(found, table.column(name).higher_is_better)


def with_front(points: Sequence[Point], higher: bool = True) -> list[Point]:
    """Returns the points with `front` set on the Pareto front, which no control is part of."""
    rivals = [p for p in points if p.family != CONTROL]
    marks = pareto([p.x for p in rivals], [p.y for p in rivals], higher)
    front = {p.label for p, on in zip(rivals, marks, strict=True) if on}
    return [replace(p, front=p.label in front) for p in points]


def frontiers(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Returns the points of every pipeline that was measured with several numbers of candidates, by
    cost: what each further candidate buys."""
    found: dict[str, list[Point]] = {}
    for p in sorted(points, key=lambda p: (p.x, p.y)):
        if p.pipeline:
            found.setdefault(p.pipeline, []).append(p)
    return {name: of for name, of in found.items() if len(of) > 1}


def before_scores(cost: Cost) -> float | None:
    """Returns the seconds that a method needs before its first score: preparation and build."""
    return None if cost.build_seconds is None else cost.build_seconds + (cost.prepare_seconds or 0)


def whole(cost: Cost) -> float | None:
    """Returns the seconds of everything that a run measured: preparation, build and all queries."""
    before = before_scores(cost)
    return None if before is None or cost.query_seconds is None else before + cost.query_seconds


@dataclass(frozen=True)
class Curve:
    """One line: `x`, the value there, and its interval if it was recorded.

    A `reference` is a baseline, such as random examples. With one point it is a level.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    reference: bool = False


@dataclass(frozen=True)
class Lines:
    """A plot of lines: methods in the board's order, then references."""

    title: str
    x: str
    y: str
    lines: tuple[Curve, ...]
    log: bool = False  # whether y is best shown as ratios, as for a cost


_AT = re.compile(r"(?P<name>.+)@(?P<k>\d+(?:\.\d+)?)")
_OF = re.compile(r"(?P<name>[^\[\]]+)\[(?P<of>.+)\]")


def curves(table: Table, column: str) -> list[Lines]:
    """Makes one plot per measure of `column`: a line per method from its metrics `measure@k`.

    Metrics `measure_random@k` (also oracle, full) are the same for every method and drawn once, as
    references. Only measures with at least two k, and different values, make a curve.
    """
    out: dict[str, dict[tuple[bool, str], Curve]] = {}
    for row in table.rows:
        cell = row.cells.get(column)
        if cell is None or not cell.ok:
            continue
        series: dict[str, list[tuple[float, Mapping]]] = {}
        for name, m in cell.metrics.items():
            if match := _AT.fullmatch(name):
                series.setdefault(match["name"], []).append((float(match["k"]), m))
        for name, points in series.items():
            measure, _, tail = name.rpartition("_")
            is_reference = tail in REFERENCES and bool(measure)
            points.sort(key=lambda p: p[0])
            curve = Curve(
                REFERENCES[tail] if is_reference else row.label,
                tuple(k for k, _ in points),
                tuple(m["value"] for _, m in points),
                tuple(m.get("low") for _, m in points),
                tuple(m.get("high") for _, m in points),
                is_reference,
            )
            found = out.setdefault(measure if is_reference else name, {})
            found.setdefault((is_reference, curve.label), curve)
    return [
        Lines(
            f"{column}: {measure}",
            "k (training examples)",
            measure,
            tuple(sorted(found.values(), key=lambda c: c.reference)),
        )
        for measure, found in out.items()
        if any(len(c.x) > 1 for c in found.values() if not c.reference)
        and len({y for c in found.values() for y in c.y}) > 1
    ]


@dataclass(frozen=True)
class Matrix:
    """values [row, column], NaN where missing."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray
    counts: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        return self.values.size == 0 or not np.isfinite(self.values).any()


def transfer_heatmap(table: Table, column: str = "transfer", metric: str = "lds") -> Matrix:
    """Returns the LDS of each method [row] on each target's truth [column], from `lds[target]`."""
    found: dict[str, dict[str, float]] = {}
    for row in table.rows:
        cell = row.cells.get(column)
        for name, m in (cell.metrics if cell is not None and cell.ok else {}).items():
            match = _OF.fullmatch(name)
            if match and match["name"] == metric:
                of = table.target if match["of"] == "source" else match["of"]
                found.setdefault(row.label, {})[of] = m["value"]
    targets = sorted({t for values in found.values() for t in values})
    targets.sort(key=lambda t: t != table.target)
    values = [[of.get(t, np.nan) for t in targets] for of in found.values()]
    return Matrix(
        tuple(found),
        tuple(targets),
        np.array(values, dtype=float).reshape(len(found), len(targets)),
    )


Values = tuple[list[str], np.ndarray]  # query ids, and a method's values on them [query]


def by_task(
    board: Board,
    table: Table,
    tasks: Mapping[str, str],
    column: str | None = None,
    read: Callable[[str, str], Values | None] | None = None,
) -> Matrix:
    """Averages each method's [row] per-query values over the queries of each task [column].

    `tasks` maps query ids to tasks. Methods whose arrays cannot be read are left out. `read(column,
    label)` returns values that the caller has already read.
    """
    name = column or table.primary
    rows, sums, counts = [], [], []
    names = sorted({t for t in tasks.values() if t})
    place = {t: i for i, t in enumerate(names)}
    for row in table.rows:
        found = read(name, row.label) if read else per_query(board, row.cells.get(name))
        if found is None:
            continue
        ids, value = found
        of = np.array([place.get(tasks.get(i, ""), len(names)) for i in ids], dtype=int)
        rows.append(row.label)
        sums.append(np.bincount(of, value, len(names) + 1)[: len(names)])
        counts.append(np.bincount(of, minlength=len(names) + 1)[: len(names)])
    shape = (len(rows), len(names))
    total, n = np.array(sums).reshape(shape), np.array(counts).reshape(shape)
    keep = n.sum(axis=0) > 0
    mean = np.divide(total, n, out=np.full(shape, np.nan), where=n > 0)[:, keep]
    most = n.max(axis=0, initial=0)[keep]
    kept = tuple(t for t, k in zip(names, keep) if k)
    return Matrix(tuple(rows), kept, mean, tuple(int(c) for c in most))


def records_of(board: Board, cell: BoardCell | None) -> list[Record]:
    """Returns the records behind a cell, one per seed."""
    if cell is None:
        return []
    found = (board.records.get((run, key)) for run in cell.runs for key in cell.keys)
    return [r for r in found if r is not None]


def per_query(board: Board, cell: BoardCell | None) -> Values | None:
    """Returns query ids and a method's values [query], averaged over seeds; None if not stored."""
    if cell is None or not cell.ok:
        return None
    stacked, ids = [], None
    for record in records_of(board, cell):
        try:
            arrays, meta = record.arrays()
        except TdabenchError:
            return None
        value = np.asarray(arrays.get("per_query", ()), dtype=np.float64)
        these = meta.get("query_ids")
        if not isinstance(these, list) or value.shape != (len(these),):
            return None
        if ids is not None and these != ids:
            return None
        ids = these
        stacked.append(value)
    return ([str(i) for i in ids], np.mean(stacked, axis=0)) if ids and stacked else None


# By plot name: the array of a cost record, its factor, and the board's own figure.
_GROWTH: dict[str, tuple[str, float, Callable[[Cost], float | None]]] = {
    "build (s)": ("build_seconds", 1.0, lambda c: c.build_seconds),
    "query (ms per query)": ("query_seconds", 1e3, lambda c: c.query_ms),
    "index (bytes)": ("index_bytes", 1.0, lambda c: c.index_bytes),
}


def scaling(board: Board, table: Table) -> list[Lines]:
    """Plots cost against the number of training examples.

    The costs come from the benchmark `cost`, which builds on parts of a corpus, or else from runs
    on corpora of different sizes. Times are left out if they come from several machines.
    """
    others = [t for t in board.tables if (t.suite, t.target) == (table.suite, table.target)]
    column = next((c.name for c in table.columns if c.benchmark == "cost"), "")
    measured = [r for row in table.rows for r in records_of(board, row.cells.get(column))]
    machines = {m for t in others for m in t.machines} | {machine_of(r.machine) for r in measured}
    one_machine = len(machines) <= 1
    out = []
    for y, (array, factor, of) in _GROWTH.items():
        if "bytes" not in y and not one_machine:
            continue
        lines = []
        for row in table.rows:
            points = _grown(board, row.cells.get(column), array, factor)
            if not points:
                rows = ((t.n_train, r.cost) for t in others for r in t.rows if r.label == row.label)
                points = {n: v for n, cost in rows if n and (v := of(cost)) is not None}
            points = {n: v for n, v in sorted(points.items()) if v > 0}
            if len(points) > 1:
                none = (None,) * len(points)
                lines.append(Curve(row.label, tuple(points), tuple(points.values()), none, none))
        if lines:
            heading = f"{y.partition(' ')[0]} against corpus size"
            out.append(Lines(heading, "training examples", y, tuple(lines), log=True))
    return out


def _grown(board: Board, cell: BoardCell | None, array: str, factor: float) -> dict[float, float]:
    """Returns an array of the benchmark `cost` by corpus size, averaged over seeds."""
    found: dict[float, list[float]] = {}
    for record in records_of(board, cell) if cell is not None and cell.ok else ():
        try:
            arrays, _ = record.arrays()
        except TdabenchError:
            continue
        sizes, values = (np.asarray(arrays.get(name, ())) for name in ("sizes", array))
        if sizes.ndim == 1 and sizes.shape == values.shape:
            for n, value in zip(sizes.tolist(), values.tolist()):
                found.setdefault(n, []).append(factor * value)
    return {n: float(np.mean(values)) for n, values in found.items()}


def budget(table: Table) -> list[Lines]:
    """Plots value against the number of retrainings for labels, for methods with several budgets.

    The reference level is the best method without labels.
    """
    series: dict[str, list[tuple[float, BoardCell]]] = {}
    level: Curve | None = None
    for row in table.rows:
        cell, spent = row.cells.get(table.primary), row.cost.retrainings
        if cell is None or not cell.ok or cell.value is None:
            continue
        if spent:
            series.setdefault(row.name, []).append((spent, cell))
        elif level is None:  # rows are in order of rank
            y = (cell.value,)
            level = Curve(f"no retraining: {row.label}", (0.0,), y, (cell.low,), (cell.high,), True)
    lines = []
    for name, points in series.items():
        points.sort(key=lambda p: p[0])
        if len({x for x, _ in points}) > 1:
            cells = [c for _, c in points]
            lines.append(
                Curve(
                    name,
                    tuple(x for x, _ in points),
                    tuple(float(c.value or 0.0) for c in cells),
                    tuple(c.low for c in cells),
                    tuple(c.high for c in cells),
                )
            )
    if not lines:
        return []
    value = title(table.column(table.primary))
    return [
        Lines(
            f"{value} against label budget",
            "retrainings for labels",
            value,
            (*lines, *([level] if level else [])),
        )
    ]
