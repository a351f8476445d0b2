"""The static site of a results repository: one page that needs no server, and its data.

    index.html     the board of every suite and target, cards of methods, history, machines, and
                   what was refused
    results.csv    one line per record
    results.json   the same

A table shows for every label the newest submission of its newest version; `history` has them all.
Data reaches the page as text only (see `tdabench.report.html`).
"""

from __future__ import annotations

import csv
import html
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdabench.errors import DataError, UsageError, clean
from tdabench.io import open_own, write_text
from tdabench.report.board import Board, Table
from tdabench.report.export import formula_safe, plain_cells
from tdabench.report.html import filled, json_text, plain
from tdabench.report.records import Run
from tdabench.report.terminal import context_line, default_columns, footnotes, title
from tdabench.results.layout import Results, Submission
from tdabench.results.table import COLUMNS, load_results
from tdabench.run.record import Record, describe_machine, finite

MARK = '<meta name="generator" content="tdabench board">'
MAX_BYTES = 50 << 20  # of the page
FILES = ("index.html", "results.csv", "results.json")


def build_site(
    results: Results, out: Path, name: str = "Results", cache: bool = True
) -> list[Path]:
    """Writes the site into the folder `out` and returns its files.

    Raises UsageError if `out` contains a file under one of their names that is not of a site, and
    DataError if the page would be larger than 50 MiB.
    """
    check_place(out)
    page = render(results, name, cache)
    if len(page.encode()) > MAX_BYTES:
        raise DataError(
            f"the page would have {len(page.encode()) >> 20} MiB, more than {MAX_BYTES >> 20}",
            "Move old submissions to another repository",
        )
    table = load_results(results.folder)
    rows = [{k: _cell(v) for k, v in row.items()} for row in table]
    write_text(out / FILES[0], page)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([[formula_safe(row[c]) for c in COLUMNS] for row in rows])
    write_text(out / FILES[1], text.getvalue())
    write_text(out / FILES[2], json.dumps(rows, indent=1) + "\n")
    return [out / f for f in FILES]


def check_place(out: Path) -> None:
    """Raises UsageError if files would be overwritten that no site consists of."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "Choose another folder with --out")
    there = [f for f in FILES if os.path.lexists(out / f)]
    if not there:
        return
    try:
        with open_own(out / FILES[0], "rb") as f:
            if MARK.encode() in f.read(4096):
                return
    except (OSError, DataError):
        pass
    raise UsageError(
        f"{out} holds {there[0]}, which is not of a site", "Choose another folder with --out"
    )


def _cell(value: Any) -> Any:
    return clean(value, 500) if isinstance(value, str) else value


def render(results: Results, name: str = "Results", cache: bool = True) -> str:
    """Returns the page."""
    machines: dict[str, int] = {}

    def machine(record: Record) -> int:
        text = clean(describe_machine(record.machine), 200)
        return machines.setdefault(text, len(machines))

    boards = [
        (members, Board.of_runs([_run(s, records) for s, records in members], cache=cache))
        for members in _newest(results.submissions)
    ]
    tables, fallback = [], []
    for members, board in boards:
        for table in board.tables:
            tables.append(_table(table, members, machine))
            fallback.append(_fallback(table))
    who: Counter[tuple[int, str]] = Counter()
    for s in results.submissions:
        who[machine(s.records[0]), s.by] += 1
    data = {
        "tables": tables,
        "methods": _methods(results.submissions),
        "history": _history(results.submissions, machine),
        "who": [[m, clean(by, 100), n] for (m, by), n in who.most_common()],
        "refused": [[clean(r.place, 300), clean(r.reason, 400)] for r in results.refused[:1000]],
        "machines": list(machines),
    }
    parts = {
        "TITLE": html.escape(clean(name, 100)),
        "DATA": json_text(plain(data)),
        "FALLBACK": "".join(fallback),
    }
    return filled("site", "tdabench board", parts)


def _newest(
    submissions: Sequence[Submission],
) -> list[list[tuple[Submission, list[Record]]]]:
    """Returns for each suite, version and target the records of each label that a table shows.

    For a label they are of the newest version of its method, and of its newest submission.
    """
    best: dict[tuple[Any, ...], dict[str, tuple[tuple[Any, ...], Submission]]] = {}
    for s in submissions:
        place = (s.suite["name"], -int(s.suite["version"]), s.target)
        for label in {r.label for r in s.records}:
            rank = (int(s.method["version"]), s.created, s.id)
            kept = best.setdefault(place, {})
            if label not in kept or rank > kept[label][0]:
                kept[label] = (rank, s)
    out = []
    for _, kept in sorted(best.items(), key=lambda item: item[0]):
        chosen: dict[str, tuple[Submission, list[Record]]] = {}
        for label, (_, s) in kept.items():
            entry = chosen.setdefault(s.id, (s, []))
            entry[1].extend(r for r in s.records if r.label == label)
        out.append(list(chosen.values()))
    return out


def _run(s: Submission, records: list[Record]) -> Run:
    manifest = {
        "run": s.id, "suite": dict(s.suite), "hardware": dict(s.hardware),
        "packages": dict(s.head["packages"]), "created": s.created,
    }  # fmt: skip
    return Run(s.folder, manifest, tuple(records))


def _table(
    table: Table, members: Sequence[tuple[Submission, list[Record]]], machine: Any
) -> dict[str, Any]:
    by_label: dict[str, tuple[Submission, Record]] = {}
    for s, records in members:
        for r in records:
            by_label.setdefault(r.label, (s, r))
    rows = []
    for row in table.rows:
        s, record = by_label.get(row.label) or next(iter(by_label.values()))
        rows.append(
            {
                "label": row.label, "name": row.name, "version": row.version,
                "family": row.family, "by": s.by, "machine": machine(record),
                "build": row.cost.build_seconds, "query": row.cost.query_ms,
                "bytes": row.cost.bytes_per_example,
                "cells": {
                    c: {
                        "value": cell.value if cell.ok else None, "low": cell.low,
                        "high": cell.high, "rank": cell.rank_text, "best": cell.best,
                        "status": cell.status, "reason": cell.reason,
                    }
                    for c, cell in row.cells.items()
                },
            }
        )  # fmt: skip
    suite = members[0][0].suite
    return {
        "suite": f"{suite['name']} {suite['version']}",
        "target": table.target,
        "context": context_line(table).plain,
        "primary": table.primary,
        "columns": [
            {"name": c.name, "title": title(c), "higher": c.higher_is_better} for c in table.columns
        ],
        "rows": rows,
        "notes": footnotes(table),
    }


def _methods(submissions: Sequence[Submission]) -> dict[str, Any]:
    """Returns a card per method: what it is, source, parameters by label, and cost."""
    out: dict[str, Any] = {}
    for s in sorted(submissions, key=lambda s: (int(s.method["version"]), s.created)):
        name = str(s.method["name"])
        text = {k: str(s.method.get(k) or "") for k in ("summary", "source", "family", "plugin")}
        old = out.get(name, {"versions": [], "params": {}, "costs": {}})
        versions = [*dict.fromkeys([*old["versions"], int(s.method["version"])])]
        params, costs = dict(old["params"]), dict(old["costs"])
        for r in s.records:
            found = r.method.get("params")
            if isinstance(found, Mapping) and (r.label in params or len(params) < 20):
                params[r.label] = dict(found)
            cost = _cost(r)
            if r.ok and cost:
                where = f"{s.suite['name']}, {s.target}"
                costs[where] = {**cost, "where": where}
        out[name] = {**text, "versions": versions, "params": params, "costs": costs}
    return {k: {**v, "costs": list(v["costs"].values())[:20]} for k, v in sorted(out.items())}


def _cost(record: Record) -> dict[str, Any]:
    def part(name: str, key: str) -> float | None:
        found = record.cost.get(name)
        return finite(found.get(key)) if isinstance(found, Mapping) else None

    seconds, queries = part("query", "seconds"), part("query", "queries")
    out = {
        "build": part("build", "seconds"),
        "query": 1e3 * seconds / queries if seconds is not None and queries else None,
        "bytes": finite(record.cost.get("bytes_per_example")),
        "retrainings": part("prepare", "retrainings"),
    }
    return out if any(v is not None for v in out.values()) else {}


def _history(submissions: Sequence[Submission], machine: Any) -> list[list[Any]]:
    rows = []
    for s in sorted(submissions, key=lambda s: (s.created, s.id), reverse=True):
        for r in s.records:
            m = r.metric(r.primary) if r.ok else {}
            rows.append(
                [
                    s.method["name"], s.method["version"], r.label,
                    f"{s.suite['name']} {s.suite['version']}", s.target, r.benchmark_name,
                    finite(m.get("value")), finite(m.get("low")), finite(m.get("high")), r.status,
                    s.created[:10], s.by, machine(r), s.id,
                ]
            )  # fmt: skip
    return rows


def _fallback(table: Table) -> str:
    header, rows = plain_cells(table, default_columns(table))
    cells = "".join(f'<th scope="col">{html.escape(h)}</th>' for h in header)
    out = [f"<table><caption>{html.escape(context_line(table).plain)}</caption>"]
    out.append(f"<thead><tr>{cells}</tr></thead><tbody>")
    for row in rows:
        out.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>")
    return "".join([*out, "</tbody></table>"])
