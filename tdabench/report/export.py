"""Exports a table as JSON, CSV, Markdown or LaTeX.

JSON and CSV contain everything at full precision; Markdown and LaTeX have the terminal's columns.
Strings are quoted for each syntax: CSV cells that a spreadsheet would evaluate as a formula are
prefixed, and Markdown and LaTeX specials are escaped.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tdabench.errors import unknown
from tdabench.report.board import COSTS, Board, BoardCell, Row, Table
from tdabench.report.overall import with_overall
from tdabench.report.terminal import (
    context_line,
    default_columns,
    footnotes,
    machine_mark,
    metric,
    title,
)
from tdabench.report.text import clean, count, milliseconds, seconds

FORMATS = ("json", "csv", "md", "latex")
SCHEMA = 1


def export(
    board: Board,
    form: str,
    *,
    sort: str = "rank",
    columns: Sequence[str] | None = None,
    benchmark: str | None = None,
    target: str | None = None,
    overall: Sequence[str] | None = None,
) -> str:
    """Returns `board` as text in a format of FORMATS, with a final newline. Raises UsageError."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    tables = [board.table(target)] if target else list(board.tables)
    tables = [with_overall(t, overall) for t in tables]
    tables = [(t.ranked_by(benchmark) if benchmark else t).sorted_by(sort) for t in tables]
    if form == "json":
        # ASCII, so that direction marks and control characters in labels never reach a terminal.
        return json.dumps(as_json(board, tables), indent=2) + "\n"
    if form == "csv":
        return _csv(tables)
    write = _markdown if form == "md" else _latex
    return "\n".join(write(t, columns or default_columns(t)) for t in tables)


# --------------------------------------------------------------------------- data


def as_json(board: Board, tables: Sequence[Table]) -> dict[str, Any]:
    """Returns the contents of a table as plain values; non-finite numbers become null."""
    value = {
        "schema": SCHEMA,
        "runs": [{"run": r.name, **{k: r.manifest.get(k) for k in _MANIFEST}} for r in board.runs],
        "warnings": list(board.warnings),
        "tables": [asdict(t) for t in tables],
    }
    return dict(_storable(value))


def _storable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _storable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, bool, int, float)) or value is None else str(value)


_MANIFEST = ("suite", "command", "created", "tdabench", "git", "python", "packages", "hardware")


FIELDS = (
    "value", "low", "high", "low_these_tasks", "high_these_tasks", "share", "rank", "rank_low",
    "rank_high", "letters", "status", "reason",
)  # fmt: skip


def _csv(tables: Sequence[Table]) -> str:
    """Writes one line per (target, method); columns of benchmarks missing in a table stay empty."""
    names = list(dict.fromkeys(c.name for t in tables for c in t.columns))
    parts = ("", *(f"_{f}" for f in FIELDS[1:]))
    costs = list(asdict(Row("").cost))
    head = ["suite", "target", "regime", "n_train", "ranked_by"]
    head += ["rank", "rank_low", "rank_high", "letters"]
    head += ["method", "name", "version", "family", "params"]
    head += [f"{name}{part}" for name in names for part in parts]
    head += costs + ["notes"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([formula_safe(h) for h in head])
    for t in tables:
        for row in t.rows:
            main = row.cells.get(t.primary) or BoardCell("absent")
            line: list[Any] = [t.suite, t.target, t.regime, t.n_train, t.primary]
            line += [main.rank, main.rank_low, main.rank_high, main.letters]
            line += [row.label, row.name, row.version, row.family]
            line.append(json.dumps(row.params, sort_keys=True, ensure_ascii=False, default=str))
            for name in names:
                c = row.cells.get(name) or BoardCell("absent")
                line += [getattr(c, f) for f in FIELDS]
            line += [getattr(row.cost, k) for k in costs]
            line.append("; ".join(row.notes))
            writer.writerow([formula_safe(v) for v in line])
    return out.getvalue()


def formula_safe(value: Any) -> Any:
    """Marks text that a spreadsheet would evaluate with an apostrophe."""
    if not isinstance(value, str):
        return value
    text = clean(value, 10_000)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


# --------------------------------------------------------------------------- for reading


def _headers(table: Table, columns: Sequence[str]) -> list[str]:
    names = {c.name for c in table.columns}
    known = ["rank", "method", "family", "share", *COSTS, *names]
    out = []
    for key in columns:
        if key not in known:
            raise unknown("column", key, known)
        if key in names:
            column = table.column(key)
            out.append(clean(title(column), 40) + (" [95%]" if key == table.primary else ""))
        else:
            out.append({"share": "of ceiling", "bytes": "bytes/ex"}.get(key, key))
    return out


def _plain(table: Table, row: Row, key: str) -> str:
    main = row.cells.get(table.primary) or BoardCell("absent")
    if key == "rank":
        return main.rank_text or "–"
    if key == "method":
        return clean(row.label, 60)
    if key == "family":
        return clean(row.family, 30) or "–"
    if key == "share":
        return "–" if main.share is None else f"{round(main.share * 100)}%"
    value = row.cost.of(key)
    if key == "bytes":
        return count(value)
    said = milliseconds(value) if key == "query" else seconds(value)
    if value is not None and not table.one_machine:
        said += f" {machine_mark(table, row.cost.machine)}"
    return said


def _figure(cell: BoardCell) -> str:
    return metric(cell.value, 3)


def _interval(cell: BoardCell) -> str:
    if cell.low is None or cell.high is None:
        return ""
    return f"[{metric(cell.low, 3)}, {metric(cell.high, 3)}]"


def plain_cells(table: Table, columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of the table as cleaned text, failures with their reasons."""
    names = {c.name for c in table.columns}
    rows = []
    for row in table.rows:
        cells = []
        for key in columns:
            cell = row.cells.get(key)
            if key not in names:
                cells.append(_plain(table, row, key))
            elif cell is None:
                cells.append("–")
            elif not cell.ok:
                cells.append(clean(f"{cell.status}: {cell.reason}", 200))
            else:
                cells.append(f"{_figure(cell)} {_interval(cell)}".strip())
        rows.append(cells)
    return _headers(table, columns), rows


def _markdown(table: Table, columns: Sequence[str]) -> str:
    names = {c.name for c in table.columns}
    right = {"share", *COSTS}
    lines = [f"**{_md(context_line(table).plain)}**", ""]
    lines.append("| " + " | ".join(_md(h) for h in _headers(table, columns)) + " |")
    lines.append("|" + "|".join("--:" if c in right else ":--" for c in columns) + "|")
    for row in table.rows:
        main = row.cells.get(table.primary) or BoardCell("absent", f"not run on {table.primary}")
        cells = []
        for key in columns:
            if key not in names:
                cells.append(_md(_plain(table, row, key)))
                continue
            cell = row.cells.get(key)
            if cell is None:
                cells.append("–")
            elif not cell.ok:
                said = f"{cell.status}: {cell.reason}" if key == table.primary else cell.status
                cells.append(f"*{_md(clean(said, 200))}*")
            else:
                figure = f"**{_figure(cell)}**" if cell.best else _figure(cell)
                shown = f"{figure} {_md(_interval(cell))}" if key == table.primary else figure
                cells.append(shown.strip())
        if not main.ok and table.primary not in columns:
            cells[-1] += f" *{_md(clean(f'{main.status}: {main.reason}', 200))}*"
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"- {_md(clean(n, 600))}" for n in footnotes(table)]
    bold = "- Bold: the best, and methods that do not differ significantly from it."
    return "\n".join([*lines, "", bold, *notes, ""])


_MD = re.compile(r"([\\`*_{}\[\]<>|#~!&])")


def _md(text: str) -> str:
    return _MD.sub(r"\\\1", text)


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "·": r"$\cdot$",
    "−": "$-$",
    "…": r"\dots{}",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)


def _latex(table: Table, columns: Sequence[str]) -> str:
    """Writes a booktabs table: the best of a column and its ties are bold, letters mark ties."""
    names = {c.name for c in table.columns}
    spec = "".join("r" if c in ("share", *COSTS) else "l" for c in columns)
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{{spec}}}",
        r"\toprule",
        " & ".join(_tex(h) for h in _headers(table, columns)) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        cells = []
        for key in columns:
            if key not in names:
                cells.append(_tex_figure(_plain(table, row, key), key))
                continue
            cell = row.cells.get(key)
            if cell is None or not cell.ok:
                cells.append(rf"\emph{{{_tex(cell.status)}}}" if cell else "--")
                continue
            figure = _figure(cell).replace("-", "$-$")
            if cell.best:
                figure = rf"\textbf{{{figure}}}"
            if cell.letters:
                figure += rf"\textsuperscript{{{_tex(cell.letters)}}}"
            if key == table.primary and (span := _interval(cell)):
                figure += rf" {{\scriptsize {span.replace('-', '$-$')}}}"
            cells.append(figure)
        lines.append(" & ".join(cells) + r" \\")
    # One paragraph: every note is a sentence.
    notes = [f"{n.rstrip('.')}." for n in (clean(n, 600) for n in footnotes(table))]
    failed = [
        f"{clean(r.label, 60)}: {c.status}, {clean(c.reason, 200)}."
        for r in table.rows
        if (c := r.cells.get(table.primary)) is not None and not c.ok
    ]
    caption = (
        f"{context_line(table).plain}. Bold: the best, and methods that do not differ "
        "significantly from it. Methods that share a letter do not "
        "differ significantly (5%, paired test, Holm)."
    )
    said = [*failed, *notes]
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{_tex(caption)}}}",
        rf"\label{{tab:{_slug(table)}}}",
        *([r"\par\smallskip\footnotesize", " ".join(map(_tex, said))] if said else []),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _tex_figure(text: str, key: str) -> str:
    """Escapes a cell; figures have the minus sign of mathematics, like all others."""
    minus = key in ("share", *COSTS) and text.startswith("-")
    return f"$-${_tex(text[1:])}" if minus else _tex(text)


def _slug(table: Table) -> str:
    """Returns `pocket-instruct`, for a label: letters, digits and hyphens only."""
    return re.sub("[^A-Za-z0-9]+", "-", f"{table.suite}-{table.target}")[:60].strip("-") or "board"
