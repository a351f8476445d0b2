"""The board in a terminal: one line of context, one row per method, failures, the next command.

Columns that do not fit are dropped in a fixed order and named below the table. In a pipe the
whole table is printed, without colour and independent of any width, so that scripts always see
the same text.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from tdabench.errors import unknown
from tdabench.registry import registry
from tdabench.report.board import COSTS, Board, BoardCell, Column, Row, Table
from tdabench.report.overall import OVERALL, rule, with_overall
from tdabench.report.text import (
    clean,
    count,
    listing,
    milliseconds,
    number,
    seconds,
)

BAR = 10
GAP = 2
MANY = 3  # with more benchmarks beside the ranking one, a narrow terminal drops costs first
_NAMES = {"bytes": "bytes/ex", "share": "of ceiling"}
_ASCII = str.maketrans("█░·–…−×→↓", "#.--~-x>v")


@dataclass(frozen=True)
class _Shown:
    """One column in the layout: its header, alignment and the text of each row."""

    key: str
    header: str
    cells: list[Text]
    right: bool = True

    @property
    def width(self) -> int:
        return max([cell_len(self.header), *(c.cell_len for c in self.cells)])


def print_board(
    board: Board,
    console: Console,
    *,
    sort: str = "rank",
    columns: Sequence[str] | None = None,
    benchmark: str | None = None,
    target: str | None = None,
    wide: bool = False,
    intervals: bool = False,
    overall: Sequence[str] | None = None,
) -> None:
    """Prints every table of `board`, or only the table of `target`.

    `columns` names the columns to show (rank, method, share, build, query, bytes, prepare, family
    and benchmarks), at any width; `wide` shows all; `intervals` shows the interval of every
    benchmark and not only of the ranking one; `overall` names the benchmarks that the overall rank
    averages (see `tdabench.report.overall`). Raises UsageError for an unknown name.
    """
    tables = [board.table(target)] if target else list(board.tables)
    if not tables:
        console.print("These runs contain no records yet. Next: tdabench run", highlight=False)
    with console.capture() as whole:  # an unknown name leaves stdout empty
        for i, table in enumerate(tables):
            if i:
                emit(console, Text())
            table = with_overall(table, overall)
            table = table.ranked_by(benchmark) if benchmark else table
            _print_table(table.sorted_by(sort), console, columns, wide, intervals)
    console.file.write(whole.get())
    for warning in board.warnings:
        hang(console, Text("! ", "yellow"), Text(clean(warning), "yellow"))
    if tables:
        hang(console, Text(), Text(_next_command(board, tables[0]), "dim"))


def _typed(label: str) -> str:
    """Returns a row's label as a word of a command line: records may come from anyone."""
    return shlex.quote(clean(label.removesuffix(" [altered]"), 60))


def _next_command(board: Board, table: Table) -> str:
    failed = next((r.label for r in table.rows if not any(c.ok for c in r.cells.values())), None)
    label = failed or (table.rows[0].label if table.rows else "METHOD")
    return f"Details: tdabench show {_typed(label)}, tdabench report"


def _print_table(
    table: Table,
    console: Console,
    columns: Sequence[str] | None,
    wide: bool,
    intervals: bool = False,
) -> None:
    plain = not console.is_terminal
    width = console.width
    digits = 3 if plain or wide or width >= 100 else 2
    hang(console, Text(), context_line(table))
    ranked = [r for r in table.rows if _primary(table, r).ok]
    failed = [r for r in table.rows if not _primary(table, r).ok]
    hidden: list[str] = []
    if columns is not None:
        shown = [_column(table, ranked, key, digits, intervals) for key in columns]
    else:
        keys = default_columns(table)
        shown = [_column(table, ranked, key, digits, intervals) for key in keys]
        shown = [c for c in shown if c.key not in COSTS or any(str(t) != "–" for t in c.cells)]
        if not (plain or wide):
            shown, hidden = _fit(shown, table, width)
    if ranked:
        header = [Text(c.header, "bold") for c in shown]
        widths = [max(t.cell_len for t in [Text(c.header), *c.cells]) for c in shown]
        for line in [header, *([c.cells[i] for c in shown] for i in range(len(ranked)))]:
            emit(console, _line(line, shown, widths))
    for row in failed:
        cell = _primary(table, row)
        prefix = Text(" -    ")
        label = Text(clean(row.label, 60), "bold")
        if not plain:
            label.truncate(max(8, width - 30), overflow="ellipsis")
        prefix.append_text(label)
        prefix.append("  ")
        body = Text(f"{cell.status}: ", "red")
        body.append(clean(cell.reason or "no reason was recorded", 300))
        if cell.status not in ("absent", "skipped"):
            body.append(f" (tdabench show {_typed(row.label)})", "dim")
        hang(console, prefix, body, indent=6)
    for note in footnotes(table, wide or plain, {c.key for c in shown}):
        hang(console, Text(), Text(clean(note), "dim"))
    if hidden:
        names = listing(clean(h) for h in hidden)
        hang(console, Text(), Text(f"Not shown at this width: {names} (--wide).", "dim"))


def context_line(table: Table) -> Text:
    """Returns `pocket · target qwen2-1m · 2,000 train · 400 queries · … · noise ceiling 0.87`."""
    column = table.column(table.primary)
    regime = f" ({table.regime})" if table.regime and table.regime not in table.target else ""
    parts = [table.suite, f"target {table.target}{regime}"]
    if table.n_train is not None:
        parts.append(f"{count(table.n_train)} train")
    if column.queries is not None:
        tasks = f" of {count(column.tasks)} tasks" if column.tasks else ""
        parts.append(f"{count(column.queries)} queries{tasks}")
    if column.groups is not None:
        seeds = f" x {column.truth_seeds} seeds" if column.truth_seeds else ""
        parts.append(f"{count(column.groups)} groups{seeds}")
    if column.ceiling is not None:
        parts.append(f"noise ceiling {number(column.ceiling)}")
    if column.additive is not None:
        parts.append(f"additive ceiling {number(column.additive)}")
    if column.agreement is not None:
        parts.append(f"two seeds agree {number(column.agreement)}")
    if column.smoothness is not None:
        parts.append(f"metasmoothness {number(column.smoothness)}")
    if table.primary != table.columns[0].name:
        parts.append(f"ranked by {table.primary}")
    return Text(" · ".join(clean(p, 80) for p in parts if p), "bold")


def footnotes(
    table: Table, everything: bool = True, shown: Collection[str] | None = None
) -> list[str]:
    """Lists prepare phases, the meaning of ties, failures in other columns, and notes of rows.

    `shown` names the columns to explain, None all.
    """
    out = []
    for row in table.rows:
        cost = row.cost
        parts = [
            f"{count(cost.retrainings)} retrainings" if cost.retrainings else "",
            seconds(cost.prepare_seconds) if cost.prepare_seconds else "",
        ]
        if any(parts):
            spent = ", ".join(p for p in parts if p)
            out.append(f"{clean(row.label, 60)}'s prepare phase: {spent} (once).")
    if not table.one_machine:
        places = (f"#{i} {clean(m, 200)}" for i, m in enumerate(table.machines.values(), 1))
        out.append(f"times were measured on: {'; '.join(places)}.")
    out += how_ranked(table)
    for row in table.rows:
        cell = _primary(table, row)
        if cell.ok and cell.spread is not None:
            name = clean(title(table.column(table.primary)), 40)
            out.append(
                f"{clean(row.label, 60)}: over {cell.seeds} seeds of the method, {name} varies by "
                f"{number(cell.spread, 3)} (standard deviation)."
            )
    seen = [c for c in table.columns if shown is None or c.name in shown]
    if any(not c.higher_is_better for c in seen):
        out.append("↓: lower is better.")
    if OVERALL in (c.name for c in seen) and (rule_of_overall := rule(table)):
        out.append(rule_of_overall)
    if free := [row.label for row in table.rows if row.unconfined]:
        out.append(
            f"isolation: none for {_some(free)}: nothing kept the method from reading the answers."
        )
    lost: dict[tuple[str, str, str], list[str]] = {}
    for row in table.rows:
        main = _primary(table, row)
        for name, cell in row.cells.items():
            if name != table.primary and not cell.ok and cell.reason != main.reason:
                reason = clean(cell.reason or "no reason was recorded", 200).rstrip(".")
                lost.setdefault((clean(name, 60), cell.status, reason), []).append(row.label)
    for (name, status, reason), labels in lost.items():
        out.append(f"{_some(labels)} on {name}: {status}: {reason}.")
    notes: dict[str, list[str]] = {}
    for row in table.rows:
        for note in row.notes:
            notes.setdefault(clean(note, 300), []).append(row.label)
    said_notes = [f"{_some(labels)}: {note}" for note, labels in notes.items()]
    limit = len(said_notes) if everything else 4
    out += said_notes[:limit]
    if len(said_notes) > limit:
        out.append(f"… and {len(said_notes) - limit} more notes (--wide).")
    return out


def how_ranked(table: Table) -> list[str]:
    """Returns what ranks, letters and intervals of the ranking column mean, if it has any."""
    column = table.column(table.primary)
    cells = [c for r in table.rows if (c := _primary(table, r)).ok]
    out = []
    if any(c.letters for c in cells) and len(cells) > 1:
        out.append(
            "rank: the places not ruled out. Methods that share a letter do not differ "
            "significantly (5%, paired test, Holm over all pairs)."
        )
    if column.tasks:
        out.append(
            f"Intervals and ranks hold for new tasks ({count(column.tasks)} tasks, resampled "
            "whole); intervals for other queries of the same tasks: tdabench show."
        )
    return out


def _some(labels: Sequence[str]) -> str:
    """Returns up to three labels by name, or else their number."""
    return listing(clean(x, 60) for x in labels) if len(labels) < 4 else f"{len(labels)} methods"


def _primary(table: Table, row: Row) -> BoardCell:
    return row.cells.get(table.primary) or BoardCell("absent", f"not run on {table.primary}")


def default_columns(table: Table) -> list[str]:
    """Returns the default columns of a table, without benchmarks that have no values."""
    filled = {name for row in table.rows for name, cell in row.cells.items() if cell.ok}
    others = [c.name for c in table.columns if c.name != table.primary and c.name in filled]
    others.sort(key=lambda name: name != OVERALL)  # a terminal drops columns from the right
    share = ["share"] if table.column(table.primary).ceiling else []
    return ["rank", "method", table.primary, *share, *others, "build", "query", "bytes"]


def _fit(shown: list[_Shown], table: Table, width: int) -> tuple[list[_Shown], list[str]]:
    """Drops columns, the least important first, until the table fits; then cuts long labels.

    The bar of the share is dropped before any column. Costs are dropped before benchmarks if there
    are many of these (`MANY`), and otherwise after them.
    """

    def needed(columns: list[_Shown]) -> int:
        return sum(min(c.width, 24) if c.key == "method" else c.width for c in columns) + GAP * (
            len(columns) - 1
        )

    others = [c.key for c in shown if c.key in {x.name for x in table.columns} - {table.primary}]
    hidden: list[str] = []
    if needed(shown) > width and len(others) > MANY:
        shown = [_without_bar(c) if c.key == "share" else c for c in shown]
        order = ["bytes", "build", "query", *reversed(others), "share"]
    else:
        order = [*reversed(others), "bytes", "build", "query", "share"]
    for key in order:
        if needed(shown) <= width:
            break
        if any(c.key == key for c in shown):
            shown = [c for c in shown if c.key != key]
            hidden.append(key)
    everything = [*others, "build", "query", "bytes", "share"]
    hidden = [_NAMES.get(key, key) for key in sorted(hidden, key=everything.index)]
    spare = width - sum(c.width for c in shown if c.key != "method") - GAP * (len(shown) - 1)
    for c in shown:
        if c.key == "method" and c.width > spare:
            for cell in c.cells:
                cell.truncate(max(8, spare), overflow="ellipsis")
    return shown, hidden


def _column(
    table: Table, rows: Sequence[Row], key: str, digits: int, intervals: bool = False
) -> _Shown:
    names = {c.name for c in table.columns}
    if key == "rank":
        return _Shown("rank", "rank", [_rank(_primary(table, r)) for r in rows], right=False)
    if key == "method":
        return _Shown("method", "method", [Text(clean(r.label, 60)) for r in rows], right=False)
    if key == "family":
        return _Shown(key, key, [Text(clean(r.family, 30) or "–") for r in rows], right=False)
    if key == "share":
        return _Shown(
            key, "of ceiling", [_bar(_primary(table, r).share) for r in rows], right=False
        )
    if key in COSTS:
        return _Shown(key, _NAMES.get(key, key), [Text(_cost(r, key, table)) for r in rows])
    if key in names:
        column = table.column(key)
        primary = key == table.primary
        spans = primary or intervals
        known = spans and any((c := r.cells.get(key)) and c.low is not None for r in rows)
        header = clean(title(column), 40) + ("" if column.higher_is_better else "↓")
        header += " [95%]" if known else ""
        digits = 1 if key == OVERALL else digits
        cells = [_value(r.cells.get(key), column, digits, interval=spans) for r in rows]
        return _Shown(key, header, cells, right=False)
    raise unknown("column", key, ["rank", "method", "family", "share", *COSTS, *sorted(names)])


def title(column: Column) -> str:
    """Returns the title that an installed benchmark gives itself, or the column's name and unit."""
    entry = registry().benchmarks.get(column.name)
    unit = f" ({column.unit})" if column.unit else ""
    return (entry.cls.title if entry else "") or column.name + unit


def _rank(cell: BoardCell) -> Text:
    return Text(f" {cell.rank_text or '-'}", "bold green" if cell.best else "")


def _value(cell: BoardCell | None, column: Column, digits: int, interval: bool) -> Text:
    if cell is None:
        return Text("–")
    if not cell.ok or cell.value is None:
        return Text(cell.status, "red")
    text = Text(metric(cell.value, digits), "bold" if cell.best else "")
    if interval and cell.low is not None and cell.high is not None:
        text.append(f" [{metric(cell.low, digits)}, {metric(cell.high, digits)}]", "not bold dim")
    return text


def metric(value: float | None, digits: int = 2) -> str:
    """Formats a metric's value; large ones without decimals."""
    return count(value) if value is not None and abs(value) >= 1000 else number(value, digits)


def _bar(share: float | None) -> Text:
    if share is None:
        return Text("–")
    full = round(max(0.0, min(1.0, share)) * BAR)
    text = Text("█" * full, "cyan")
    text.append("░" * (BAR - full), "dim")
    text.append(f" {round(share * 100):3d}%", "")
    return text


def _without_bar(share: _Shown) -> _Shown:
    return _Shown(share.key, "share", [Text(c.plain.lstrip("█░ ")) for c in share.cells])


def _cost(row: Row, key: str, table: Table) -> str:
    value = row.cost.of(key)
    if key == "bytes":
        return count(value)
    said = milliseconds(value) if key == "query" else seconds(value)
    if value is not None and not table.one_machine:
        said += f" {machine_mark(table, row.cost.machine)}"
    return said


def machine_mark(table: Table, machine: str) -> str:
    """Returns `#1`, `#2`, … in the order of `table.machines`, to mark times as not comparable.

    Letters would be read as those of significance.
    """
    places = list(table.machines)
    return f"#{places.index(machine) + 1}" if machine in places else "?"


def _line(cells: Sequence[Text], columns: Sequence[_Shown], widths: Sequence[int]) -> Text:
    line = Text()
    for i, (cell, column) in enumerate(zip(cells, columns)):
        pad = " " * max(0, widths[i] - cell.cell_len)
        last = i == len(columns) - 1
        line.append_text(Text(pad) + cell if column.right else cell + Text("" if last else pad))
        line.append("" if last else " " * GAP)
    return line


def hang(console: Console, prefix: Text, body: Text, indent: int = 2) -> None:
    """Prints `prefix` and a paragraph; in a terminal, its continuation lines are indented."""
    if not console.is_terminal:
        emit(console, prefix + body)
        return
    room = console.width
    first = room - prefix.cell_len
    if first < 20:  # a long label: the paragraph starts on its own line
        emit(console, prefix)
        prefix, first = Text(" " * indent), room - indent
    lines = body.wrap(console, max(10, first))
    head = lines[0] if lines else Text()
    emit(console, prefix + head)
    for line in lines:
        line.rstrip()  # the space at which it was broken
    rest = Text(" ").join(lines[1:]) if len(lines) > 1 else Text()
    if rest:
        for line in rest.wrap(console, max(10, room - indent)):
            emit(console, Text(" " * indent) + line)


def emit(console: Console, text: Text) -> None:
    """Prints one line unchanged, or in ASCII if the encoding has no box characters."""
    text = text.copy()
    text.rstrip()
    if console.options.ascii_only:
        plain = text.plain.translate(_ASCII)
        text = Text(plain.encode("ascii", "backslashreplace").decode())
    console.print(text, soft_wrap=True, highlight=False, markup=False, emoji=False)
