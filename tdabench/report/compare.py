"""Compares two methods, or two runs: the difference, its interval and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tdabench.errors import DataError, UsageError, unknown
from tdabench.report.board import Board, BoardCell, Cost, Row, Table
from tdabench.report.figures import records_of
from tdabench.report.ranks import ALPHA, bootstrap_of
from tdabench.report.records import find_runs, is_run
from tdabench.report.terminal import metric, title
from tdabench.report.text import clean, count, milliseconds, p_value, seconds
from tdabench.run.record import Record, finite

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Difference:
    """B compared with A on one benchmark. `effect` is B - A, `verdict` is about B.

    `verdict`: better, worse, tied (no significant difference at 5%), untested (no paired
    replicates) or lost (A has a value and B failed). `p` is adjusted by Holm's procedure over all
    differences of one comparison; the interval is not adjusted.
    """

    target: str
    benchmark: str
    a: str
    b: str
    value_a: float
    value_b: float | None
    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    verdict: str
    higher_is_better: bool
    cost_a: Cost
    cost_b: Cost
    reason: str = ""
    tasks: int | None = None  # resampled whole by the test; None: queries are resampled
    crossover: str = ""  # for the benchmark cost: the corpus size from which one is cheaper

    @property
    def regressed(self) -> bool:
        return self.verdict in ("worse", "lost")

    def words(self) -> str:
        """Returns one sentence with the verdict, the effect, its interval and p."""
        a, b, where = clean(self.a, 60), clean(self.b, 60), clean(self.benchmark, 60)
        if self.verdict == "lost" or self.effect is None:
            return f"{b} has no result on {where}, {a} has: {clean(self.reason, 200)}."
        size = metric(abs(self.effect), 3)
        if self.verdict == "untested":
            return f"{b} and {a} differ by {size} on {where}, not tested: {clean(self.reason)}."
        sure = p_value(self.p) if self.p is not None else ""
        known = self.low is not None and self.high is not None
        span = f"95% interval {_signed(self.low)} to {_signed(self.high)}" if known else ""
        facts = ", ".join(s for s in (span, sure) if s)
        if self.verdict == "tied":
            return f"{b} and {a} do not differ significantly on {where} ({facts})."
        return f"{b} is {self.verdict} than {a} on {where} by {size} ({facts})."


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{'+' if value >= 0 else '−'}{metric(abs(value), 3)}"


@dataclass(frozen=True)
class _Side:
    name: str
    table: Table
    row: Row
    cell: BoardCell
    records: tuple[Record, ...]


def compare(
    a: str,
    b: str,
    folders: Sequence[Path] = (),
    benchmark: str | None = None,
    target: str | None = None,
) -> list[Difference]:
    """Computes the differences of B from A: two method labels of a run, or two run folders.

    Two folders are compared on every method and benchmark in A. Raises UsageError for an unknown
    name, and DataError if the two were measured differently or have nothing in common.
    """
    if two_folders(a, b, folders):
        pairs = _pairs_of_runs(Path(a), Path(b), benchmark, target)
    else:
        pairs = _pairs_of_labels(a, b, Board.from_runs(folders), benchmark, target)
    if not pairs:
        raise DataError(f"{a} and {b} have no benchmark in common", "See: tdabench leaderboard")
    return _adjusted([_difference(*pair) for pair in pairs])


def two_folders(a: str, b: str, folders: Sequence[Path] = ()) -> bool:
    """Tells whether A and B are run folders rather than methods."""
    return not folders and _is_folder(a) and _is_folder(b)


def _is_folder(name: str) -> bool:
    return is_run(Path(name)) or is_run(Path("runs") / name)


def _pairs_of_labels(
    a: str, b: str, board: Board, benchmark: str | None, target: str | None
) -> list[tuple[_Side, _Side]]:
    tables = [board.table(target)] if target else board.tables
    labels = {r.label for t in tables for r in t.rows}
    for label in (a, b):
        if label not in labels:
            raise unknown("method", label, labels, "Or give two run folders.")
    pairs = []
    for table in tables:
        rows = {r.label: r for r in table.rows}
        if a not in rows or b not in rows:
            continue
        for name in (
            [table.column(benchmark).name] if benchmark else [c.name for c in table.columns]
        ):
            before = _side(a, table, rows[a], name, board)
            after = _side(b, table, rows[b], name, board)
            if before and after and (before.cell.ok or benchmark):
                pairs.append((before, after))
    return pairs


def _pairs_of_runs(
    a: Path, b: Path, benchmark: str | None, target: str | None
) -> list[tuple[_Side, _Side]]:
    boards = [Board.from_runs([f]) for f in (find_runs([a])[0], find_runs([b])[0])]
    names = [board.runs[0].name for board in boards]
    if names[0] == names[1]:
        names = [a.as_posix(), b.as_posix()]
    pairs = []
    for table_a in boards[0].tables:
        for table_b in boards[1].tables:
            same = table_a.target == table_b.target
            if not same or target not in (None, table_a.target):
                continue
            if table_a.target_fingerprint != table_b.target_fingerprint:
                raise DataError(
                    f"the two runs use different targets named {clean(table_a.target, 60)}",
                    "Rerun both with: tdabench run",
                )
            rows = {r.label: r for r in table_b.rows}
            columns = [table_a.column(benchmark)] if benchmark else table_a.columns
            for row in table_a.rows:
                for column in columns:
                    if row.label not in rows:
                        continue
                    left, right = (f"{row.label} ({name})" for name in names)
                    before = _side(left, table_a, row, column.name, boards[0])
                    after = _side(right, table_b, rows[row.label], column.name, boards[1])
                    if before and after and before.cell.ok:
                        pairs.append((before, after))
    return pairs


def _side(name: str, table: Table, row: Row, column: str, board: Board) -> _Side | None:
    cell = row.cells.get(column)
    if cell is None:
        return None
    return _Side(name, table, row, cell, tuple(records_of(board, cell)))


def _difference(a: _Side, b: _Side) -> Difference:
    from tdabench import stats

    column = next(c for c in a.table.columns if a.row.cells.get(c.name) is a.cell)
    if a.cell.value is None or not a.cell.ok:
        raise DataError(
            f"{clean(a.name, 60)} has no result on {clean(column.name, 60)} "
            f"({a.cell.status}: {clean(a.cell.reason, 200)})"
        )
    if a.records and b.records and a.records[0].what != b.records[0].what:
        raise DataError(
            f"{clean(a.name, 60)} and {clean(b.name, 60)} were measured differently on "
            f"{clean(column.name, 60)}: version, parameters or truth differ",
            "Rerun both with: tdabench run",
        )
    empty = Difference(
        target=a.table.target,
        benchmark=title(column),
        a=a.name,
        b=b.name,
        value_a=a.cell.value,
        value_b=b.cell.value,
        effect=None if b.cell.value is None else b.cell.value - a.cell.value,
        low=None,
        high=None,
        p=None,
        verdict="untested",
        higher_is_better=column.higher_is_better,
        cost_a=a.row.cost,
        cost_b=b.row.cost,
        tasks=column.tasks,
        reason="a record has no bootstrap replicates",
        crossover=_crossover(a, b) if column.benchmark == "cost" else "",
    )
    if b.cell.value is None or not b.cell.ok:
        return replace(empty, verdict="lost", reason=f"{b.cell.status}: {b.cell.reason}")
    boot_a = bootstrap_of(a.records, a.cell.value)
    boot_b = bootstrap_of(b.records, b.cell.value)
    if boot_a is None or boot_b is None:
        return empty
    try:
        found = stats.compare(boot_b, boot_a)
    except UsageError as e:
        return replace(empty, reason=e.message)
    return replace(
        empty,
        low=found.low,
        high=found.high,
        p=found.p,
        reason="",
        verdict=found.verdict(ALPHA, column.higher_is_better),
    )


def _crossover(a: _Side, b: _Side) -> str:
    """Finds the corpus size from which one method costs less in total, with preparation.

    With at least two records of each, one per seed, the size has a 95% interval over them.
    """
    import numpy as np

    from tdabench.benchmarks.cost import crossover, crossover_interval

    sides = [(clean(side.name, 60), np.array(_cost_lines(side))) for side in (a, b)]
    if not all(len(lines) for _, lines in sides):
        return ""
    for (first, cheap), (second, costly) in (sides, sides[::-1]):  # lines [record, 2]
        size = crossover(*cheap.mean(0), *costly.mean(0))
        if size is None:
            continue
        said = f"{first} costs less than {second}"
        if size == 0:
            return f"For preparation and build together, {said} at any size (extrapolated)."
        span = crossover_interval(cheap, costly)
        if span is None:
            known = "extrapolated; for an interval, measure with --seed 0 --seed 1 --seed 2"
        else:
            low, high = span
            to = "without an upper bound" if high is None else f"to {count(high)}"
            runs = f"{len(cheap)} and {len(costly)} measurements"
            known = f"95% interval {count(low)} {to}, over {runs}; extrapolated"
        return f"For preparation and build together, {said} from {count(size)} examples ({known})."
    return ""


def _cost_lines(side: _Side) -> list[tuple[float, float]]:
    """Returns (fixed seconds, seconds per example) of each record of the benchmark cost."""
    from tdabench.benchmarks.cost import EXTRAPOLATED

    lines = []
    for record in side.records:
        at = [finite(record.metric(f"build_at_{n}").get("value")) for n in ("1e6", "1e9")]
        if at[0] is None or at[1] is None:
            continue
        per_example = (at[1] - at[0]) / (EXTRAPOLATED[1] - EXTRAPOLATED[0])
        fixed = max(0.0, at[0] - per_example * EXTRAPOLATED[0])
        lines.append(((side.row.cost.prepare_seconds or 0.0) + fixed, per_example))
    return lines


def _adjusted(found: list[Difference]) -> list[Difference]:
    """Applies Holm's correction over all differences, so that many benchmarks are safe to test."""
    from tdabench.stats import holm

    tested = [d.p for d in found if d.p is not None]
    adjusted = iter(float(p) for p in holm(tested))
    out = []
    for d in found:
        if d.p is not None:
            p = next(adjusted)
            d = replace(d, p=p, verdict=d.verdict if p < ALPHA else "tied")
        out.append(d)
    return out


def print_comparison(found: Sequence[Difference], console: Console) -> None:
    """Prints both values, the difference with its interval, both costs, and the verdicts."""
    from rich.text import Text

    from tdabench.report.terminal import emit, hang

    where = ""
    for d in found:
        if (here := f"target {clean(d.target, 60)}") != where:
            where = here
            emit(console, Text(where, "bold"))
        style = {"better": "green", "worse": "red", "lost": "red"}.get(d.verdict, "")
        values = f"{metric(d.value_a, 3)} → {metric(d.value_b, 3)}"
        line = Text(f"{clean(d.benchmark, 40)}  {values}  ", "")
        line.append(f"{_signed(d.effect)}", style)
        if d.low is not None:
            line.append(f" [{_signed(d.low)}, {_signed(d.high)}]", "dim")
        hang(console, Text(), line)
        hang(console, Text("  "), Text(d.words(), style))
        if d.crossover:
            hang(console, Text("  "), Text(d.crossover, "dim"))
    for cost in _costs(found):
        hang(console, Text(), Text(cost, "dim"))
    if tasks := {d.tasks for d in found if d.p is not None and d.tasks}:
        said = ", ".join(map(count, sorted(tasks)))
        scope = f"Intervals and p-values hold for new tasks ({said} tasks, resampled whole)."
        hang(console, Text(), Text(scope, "dim"))
    if len([d for d in found if d.p is not None]) > 1:
        hang(console, Text(), Text("p-values are Holm-adjusted over all lines.", "dim"))


def times(ratio: float) -> str:
    """Formats a ratio: `0.35x`, `2.1x`, `168x`."""
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def _costs(found: Sequence[Difference]) -> list[str]:
    out = {}
    for d in found:
        if (d.a, d.b) in out:
            continue
        a, b = d.cost_a, d.cost_b
        if a.machine and b.machine and a.machine != b.machine:
            out[d.a, d.b] = (
                f"{clean(d.a, 60)}, {clean(d.b, 60)}: times come from two machines, or two "
                "settings of --jobs and --threads."
            )
            continue
        parts = []
        for what, said in (("build", seconds), ("query", milliseconds)):
            if (x := a.of(what)) is not None and (y := b.of(what)) is not None:
                ratio = f" ({times(y / x)})" if x > 0 else ""
                parts.append(f"{what} {said(x)} → {said(y)}{ratio}")
        if parts:
            out[d.a, d.b] = f"{clean(d.a, 60)} → {clean(d.b, 60)}: {', '.join(parts)}"
    return list(out.values())
