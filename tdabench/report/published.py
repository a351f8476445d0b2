"""Rows that others published on a suite's truth, shown beside ours; never ranked or recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from tdabench.report.board import Board
from tdabench.report.terminal import emit, hang
from tdabench.report.text import clean, number


def published_rows(board: Board) -> list[dict[str, Any]]:
    """Returns the published rows in the runs' manifests, which are untrusted files."""
    out: dict[str, dict[str, Any]] = {}
    for run in board.runs:
        listed = run.manifest.get("published")
        for row in listed if isinstance(listed, list) else ():
            if not isinstance(row, Mapping):
                continue
            value = row.get("value")
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                continue
            fields = ("method", "benchmark", "ours", "target", "source")
            text = {k: str(row.get(k) or "") for k in fields}
            out.setdefault(f"{text['method']}\0{text['benchmark']}", {**text, "value": value})
    return list(out.values())


def print_published(board: Board, console: Console) -> None:
    """Prints one line per published row: its value, and the value measured here for that method."""
    rows = published_rows(board)
    if not rows or not board.tables:
        return
    table = board.tables[0]
    rows = [r for r in rows if r["target"] in ("", *_labels(board, table.target_fingerprint))]
    if not rows:
        return
    ours = {row.label: row for row in table.rows}
    lines = [("published", "value", "here", "by")]
    for r in rows:
        cell = ours[r["ours"]].cells.get(r["benchmark"]) if r["ours"] in ours else None
        if cell is not None and cell.ok:
            span = (
                f" [{number(cell.low, 3)}, {number(cell.high, 3)}]" if cell.low is not None else ""
            )
            here = number(cell.value, 3) + span
        else:
            here = cell.status if cell is not None else "not run"
        name = clean(r["ours"], 40) or "–"
        lines.append((clean(r["method"], 40), number(float(r["value"]), 3), here, name))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    emit(console, Text())
    for n, line in enumerate(lines):
        text = "  ".join(cell.ljust(w) for cell, w in zip(line, widths))
        emit(console, Text(text, "bold" if n == 0 else ""))
    sources = sorted({clean(r["source"], 80) for r in rows if r["source"]})
    named = sorted({clean(r["benchmark"], 40).upper() for r in rows})
    hang(
        console,
        Text(),
        Text(
            f"Published {', '.join(named)}: {', '.join(sources)}. Not measured here, without "
            "intervals, and not ranked.",
            "dim",
        ),
    )


def _labels(board: Board, fingerprint: str) -> set[str]:
    """Returns the labels that runs give the target with this fingerprint."""
    found = set()
    for run in board.runs:
        targets = run.manifest.get("targets")
        for label, about in (targets if isinstance(targets, Mapping) else {}).items():
            if isinstance(about, Mapping) and about.get("fingerprint") == fingerprint:
                found.add(str(label))
    return found
