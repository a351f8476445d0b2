"""`tdabench report`: one self-contained HTML file that makes no network requests.

The page is a template with a style, a script and the data as JSON. Data reaches the page as
text only: strings are cleaned here, `<` is escaped in the JSON, and the script writes only text
nodes. A content security policy forbids every request and every other script.

Per-query values and top examples are 16-bit numbers in base64, decoded when shown, which keeps a
large report small and quick to open. If it is still too large, it contains fewer examples per
query, shorter texts and then fewer queries, and the page says so.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.examples import Example
from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.io import open_own, write_text
from tdabench.report import figures
from tdabench.report.board import Board, BoardCell, Table
from tdabench.report.examples import Texts, load_texts
from tdabench.report.export import plain_cells
from tdabench.report.terminal import context_line, default_columns, footnotes, title
from tdabench.report.text import clean
from tdabench.report.words import Key, WordScores

MAX_BYTES = 18 << 20
MARK = '<meta name="generator" content="tdabench {}">'  # in a page's template: report, trace
TOP = ("top_index", "top_score", "bottom_index", "bottom_score")
# Reductions of a report that would be too large, in order: (examples per side, characters per
# text, queries in the explorer).
LEVELS = (
    (10, 1200, 2000),
    (10, 400, 2000),
    (5, 400, 2000),
    (3, 300, 2000),
    (3, 200, 500),
    (3, 200, 100),
)


@dataclass(frozen=True)
class Level:
    """The amount of data in the explorer."""

    k: int
    characters: int
    queries: int


def write_report(
    board: Board,
    path: Path,
    *,
    suite: str | None = None,
    max_bytes: int = MAX_BYTES,
    words: Mapping[Key, Mapping[str, WordScores]] | None = None,
) -> list[str]:
    """Writes the report and returns what was left out to stay within `max_bytes`.

    `words` are word scores by (target, method) and query (`tdabench.report.words`).
    """
    check_place(path)
    source = Source(board, [load_texts(run, suite) for run in board.runs], words)
    page = ""
    notes: list[str] = []
    for numbers in LEVELS:
        page, notes = render(source, Level(*numbers))
        if len(page.encode()) <= max_bytes:
            break
    else:
        notes.append(f"the report is {len(page.encode()) / 2**20:.0f} MB; it cannot be reduced")
    write_text(path, page)
    return notes


def check_place(path: Path, kind: str = "report") -> None:
    """Raises UsageError if `path` exists and is not a page of this `kind`: report or trace."""
    if not os.path.lexists(path):
        return
    try:
        with open_own(path, "rb") as f:
            if MARK.format(kind).encode() in f.read(4096):
                return
    except (OSError, DataError):
        pass
    raise UsageError(
        f"{path} exists and is not a {kind} of tdabench",
        f"Remove it, or write elsewhere with {'--out' if kind == 'report' else '--html'}",
    )


class Source:
    """The contents of the page, read from the records once."""

    def __init__(
        self,
        board: Board,
        texts: Sequence[Texts],
        words: Mapping[Key, Mapping[str, WordScores]] | None = None,
    ) -> None:
        self.board, self.texts, self.words = board, texts, words or {}
        self.tasks = {i: task for t in texts for i, task in t.tasks.items()}
        self._values: dict[tuple[int, str, str], figures.Values | None] = {}
        self._tables = [self._table(i) for i in range(len(board.tables))]
        self._tops = [list(_stored_tops(board, table)) for table in board.tables]

    def values(self, place: int, column: str, label: str) -> figures.Values | None:
        """Returns a method's per-query values in a column of the table at `place`."""
        key = (place, column, label)
        if key not in self._values:
            row = next(r for r in self.board.tables[place].rows if r.label == label)
            self._values[key] = figures.per_query(self.board, row.cells.get(column))
        return self._values[key]

    def table(self, place: int) -> dict[str, Any]:
        """Returns the page's contents for a table, except the explorer, ready for JSON."""
        return self._tables[place]

    def tops(self, place: int) -> list[Top]:
        return self._tops[place]

    def _table(self, place: int) -> dict[str, Any]:
        table = self.board.tables[place]

        def read(column: str, label: str) -> figures.Values | None:
            return self.values(place, column, label)

        out: dict[str, Any] = {
            "target": table.target,
            "regime": table.regime,
            "context": context_line(table).plain,
            "primary": table.primary,
            "machines": list(table.machines.values()),
            "columns": [{**asdict(c), "title": title(c)} for c in table.columns],
            "rows": [_row(table, row) for row in table.rows],
            "footnotes": footnotes(table),
            "lines": [
                asdict(plot)
                for plot in [
                    *(p for c in table.columns for p in figures.curves(table, c.name)),
                    *figures.budget(table),
                    *figures.scaling(self.board, table),
                ]
            ],
            "tasks": {},
        }
        for c in table.columns if self.tasks else ():
            m = figures.by_task(self.board, table, self.tasks, c.name, read)
            if not m.empty:
                out["tasks"][c.name] = _matrix(m)
        transfer = [c.name for c in table.columns if c.benchmark == "transfer"]
        if transfer and not (m := figures.transfer_heatmap(table, transfer[0])).empty:
            out["transfer"] = _matrix(m)
        return dict(plain(out))


def render(source: Source, level: Level | None = None) -> tuple[str, list[str]]:
    """Renders the page; also returns what was left out of it."""
    level = level or Level(*LEVELS[0])
    board = source.board
    pool = CarriedTexts(source.texts, level.characters)
    blobs: dict[str, str] = {}
    notes: list[str] = []
    tables = [
        {**source.table(i), "explorer": _explorer(source, i, pool, blobs, level, notes)}
        for i in range(len(board.tables))
    ]
    if pool.cut:
        notes.append(f"{pool.cut} texts are cut at {level.characters:,} characters")
    data = {
        "warnings": plain(board.warnings),
        "notes": plain(notes),
        "runs": [plain(_manifest(r.manifest)) for r in board.runs],
        "tables": tables,
        "queries": pool.queries,
        "train": pool.train,
        "reason": plain("; ".join(dict.fromkeys(t.reason for t in source.texts if t.reason))),
    }
    name = clean(board.tables[0].suite if board.tables else "", 60) or "tdabench"
    return _page(f"{name} · tdabench report", data, blobs, _fallback(board)), notes


# --------------------------------------------------------------------------- the page


def _asset(name: str) -> str:
    return (resources.files("tdabench.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _page(heading: str, data: Any, blobs: Mapping[str, str], fallback: str) -> str:
    parts = {
        "TITLE": html.escape(heading),
        "DATA": json_text(data),
        "BLOBS": "\n".join(
            f'<script type="text/plain" id="{key}">{value}</script>' for key, value in blobs.items()
        ),
        "FALLBACK": fallback,
    }
    return filled("report", "tdabench report", parts)


def filled(name: str, generator: str, parts: Mapping[str, str]) -> str:
    """Returns a page: `name`.html in the frame page.html, with `parts`, style and `name`.js.

    `generator` names the program in the page's head. A content security policy admits this style
    and this script alone, and no request.
    """
    style, script = _asset("report.css"), _asset(f"{name}.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        **parts,
        "GENERATOR": generator,
        "POLICY": html.escape(policy),
        "STYLE": style,
        "SCRIPT": script,
    }
    # One pass over the template, so that inserted text is not searched for placeholders.
    out, rest = [], _asset("page.html").replace("{{BODY}}", _asset(f"{name}.html"))
    while "{{" in rest:
        before, _, rest = rest.partition("{{")
        key, _, rest = rest.partition("}}")
        out += [before, parts[key]]
    return "".join([*out, rest])


def json_text(value: Any) -> str:
    """Returns JSON that is safe inside <script>: nothing in it can end the element.

    `value` has been through `_plain` or `clean`.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plain(value: Any, limit: int = 4000) -> Any:
    """Returns `value` for JSON: strings cleaned, numbers finite and of sensible length."""
    if isinstance(value, str):
        return clean(value, limit, keep_newlines=True)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, (int, np.integer)):
        return int(value) if abs(int(value)) < 2**53 else str(value)[:40]
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean(k, 200): plain(v, limit) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, limit) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), limit)
    return clean(value, limit)


def _fallback(board: Board) -> str:
    """Renders the boards as static tables, for a browser without scripts."""
    out = []
    for table in board.tables:
        header, rows = plain_cells(table, default_columns(table))
        out.append(f"<table><caption>{html.escape(context_line(table).plain)}</caption><thead><tr>")
        out += [f'<th scope="col">{html.escape(h)}</th>' for h in header]
        out.append("</tr></thead><tbody>")
        for row in rows:
            out.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>")
        out.append("</tbody></table>")
        out += [f"<p>{html.escape(clean(n, 600))}</p>" for n in footnotes(table)]
    return "".join(out)


_SHOWN = (
    *("run", "suite", "command", "created", "tdabench", "git", "python", "packages", "hardware"),
    *("targets", "methods", "benchmarks", "seeds", "request"),
)


def _manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {k: manifest[k] for k in _SHOWN if k in manifest}


# --------------------------------------------------------------------------- a table


class CarriedTexts:
    """Texts that the page carries, each once, shortened to `limit` characters."""

    def __init__(self, texts: Sequence[Texts], limit: int) -> None:
        self.texts, self.limit = texts, limit
        self.queries: list[dict[str, str]] = []
        self.train: list[dict[str, str]] = []
        self.cut = 0  # texts longer than the limit
        self._query_place: dict[str, int] = {}
        self._train_places: dict[str, np.ndarray] = {}  # by corpus: [index], -1 if not here

    def query(self, id: str) -> int:
        if id not in self._query_place:
            found = next((t.queries[id] for t in self.texts if id in t.queries), None)
            self._query_place[id] = len(self.queries)
            self.queries.append(self._entry(id, found))
        return self._query_place[id]

    def examples(self, corpus: str, index: np.ndarray) -> np.ndarray:
        """Returns positions in `train` of the training examples `index` of the named corpus."""
        known = self._train_places.setdefault(corpus, np.empty(0, dtype=np.int64))
        if index.size and index.max() >= len(known):
            more = np.full(int(index.max()) + 1 - len(known), -1, dtype=np.int64)
            known = self._train_places[corpus] = np.concatenate([known, more])
        for i in np.unique(index[known[index] < 0]):
            source = next((t.train for t in self.texts if _holds(t, corpus, int(i))), None)
            example = source[int(i)] if source is not None else None
            known[i] = len(self.train)
            self.train.append(self._entry(example.id if example else f"#{i}", example))
        return known[index]

    def _entry(self, id: str, example: Example | None) -> dict[str, str]:
        entry = {"id": clean(id, 100)}
        if example is not None:
            entry["prompt"] = clean(example.prompt, self.limit, keep_newlines=True)
            entry["response"] = clean(example.response, self.limit, keep_newlines=True)
            self.cut += max(len(example.prompt), len(example.response)) > self.limit
            if example.task:
                entry["task"] = clean(example.task, 100)
        return entry


def _holds(texts: Texts, corpus: str, index: int) -> bool:
    train = texts.train
    return train is not None and train.fingerprint == corpus and index < len(train)


def _matrix(m: figures.Matrix) -> dict[str, Any]:
    return {"rows": m.rows, "columns": m.columns, "counts": m.counts, "values": m.values}


def _row(table: Table, row: Any) -> dict[str, Any]:
    machines = list(table.machines)
    data = asdict(row)
    data["machine"] = machines.index(row.cost.machine) if row.cost.machine in machines else None
    data["cost"].pop("machine")
    return data


# --------------------------------------------------------------------------- the explorer


@dataclass(frozen=True)
class Top:
    """A method's stored examples: arrays of TOP, of which corpus, for which queries."""

    label: str
    arrays: Mapping[str, np.ndarray]
    corpus: str
    query_ids: list[str]


def _explorer(
    source: Source,
    place: int,
    pool: CarriedTexts,
    blobs: dict[str, str],
    level: Level,
    notes: list[str],
) -> dict[str, Any]:
    """Queries with every method's value on them and, where stored, its top examples."""
    table = source.board.tables[place]
    ids: dict[str, None] = {}
    found = []
    for column in table.columns:
        for row in table.rows:
            read = source.values(place, column.name, row.label)
            if read is not None:
                ids.update(dict.fromkeys(read[0]))
                found.append((column.name, row.label, read))
    for top in source.tops(place):  # own data may have no benchmark with a value per query
        ids.update(dict.fromkeys(top.query_ids))
    chosen = _thin(list(ids), level.queries)
    if len(chosen) < len(ids):
        notes.append(f"{table.target}: {len(chosen)} of {len(ids)} queries can be explored")
    numbers = []
    known: dict[tuple[str, ...], np.ndarray] = {}

    def places_of(query_ids: Sequence[str]) -> np.ndarray:
        """Where each chosen query stands in `query_ids`; -1 where it does not."""
        key = tuple(query_ids)
        if key not in known:
            place_of = {q: n for n, q in enumerate(key)}
            known[key] = np.array([place_of.get(q, -1) for q in chosen], dtype=np.int64)
        return known[key]

    for i, (name, label, (query_ids, values)) in enumerate(found):
        at = places_of(query_ids)
        picked = np.where(at >= 0, values[at], np.nan)
        key = f"v{place}-{i}"
        scale = _pack(blobs, key, picked[None])
        numbers.append({"column": name, "method": label, "blob": key, "scale": scale[0]})
    tops: list[dict[str, Any]] = []
    for i, top in enumerate(source.tops(place)):
        at = places_of(top.query_ids)
        entry: dict[str, Any] = {"method": top.label}
        for side in ("top", "bottom"):
            index = top.arrays[f"{side}_index"][at, : level.k]
            score = top.arrays[f"{side}_score"][at, : level.k]
            score = np.where(at[:, None] >= 0, score, np.nan)
            key = f"{side[0]}{place}-{i}"
            scales = _pack(blobs, f"{key}s", score)
            places = pool.examples(top.corpus, index)
            entry[side] = {"blob": key, "k": index.shape[1], "scale": scales, "places": places}
        entry["words"] = _words(source.words.get((table.target, top.label), {}), top, pool, chosen)
        if (stored := top.arrays["top_index"].shape[1]) > level.k:
            note = f"{table.target}: {level.k} of {stored} examples a side"
            notes += [note] if note not in notes else []
        tops.append(entry)
    for entry in tops:  # only now is it known how wide a place has to be
        for side in ("top", "bottom"):
            places = entry[side].pop("places")
            wide = len(pool.train) > 1 << 16
            blobs[f"{entry[side]['blob']}i"] = _base64(places.astype("<u4" if wide else "<u2"))
            entry[side]["bytes"] = 4 if wide else 2
    out = {"queries": [pool.query(q) for q in chosen], "values": numbers, "tops": tops}
    return dict(plain(out))


def _words(
    found: Mapping[str, WordScores], top: Top, pool: CarriedTexts, chosen: Sequence[str]
) -> dict[str, Any]:
    """Returns word scores by place of the query in the explorer; examples by place in `train`."""
    return {
        str(n): {
            "query": found[q].query,
            "examples": {
                str(int(pool.examples(top.corpus, np.array([i]))[0])): shares
                for i, shares in found[q].examples.items()
            },
        }
        for n, q in enumerate(chosen)
        if q in found
    }


def _thin(ids: Sequence[str], limit: int) -> list[str]:
    """At most `limit` of `ids`, evenly spaced."""
    if len(ids) <= limit:
        return list(ids)
    return [ids[int(i)] for i in np.linspace(0, len(ids) - 1, limit)]


def _stored_tops(board: Board, table: Table) -> Iterator[Top]:
    """Of the methods whose records keep examples."""
    for row in table.rows:
        found = (_top_of(board, row.label, cell) for cell in row.cells.values())
        if (top := next((t for t in found if t is not None), None)) is not None:
            yield top


def _top_of(board: Board, label: str, cell: BoardCell) -> Top | None:
    records = figures.records_of(board, cell) if cell.ok else []
    if not records or not {"top_index", "top_score"} <= set(records[0].shapes()):
        return None
    try:
        arrays, meta = records[0].arrays()
    except TdabenchError:
        return None
    ids = meta.get("top_query_ids", meta.get("query_ids"))
    if not isinstance(ids, list) or any(name not in arrays for name in TOP):
        return None
    stored = {name: arrays[name] for name in TOP}
    for side in ("top", "bottom"):
        index, score = stored[f"{side}_index"], stored[f"{side}_score"]
        good = index.ndim == 2 and index.shape == score.shape and len(index) == len(ids)
        if not good or index.dtype.kind not in "iu" or score.dtype.kind != "f":
            return None
        if index.size and (index.min() < 0 or not np.isfinite(score).all()):
            return None
    return Top(label, stored, str(records[0].corpus.get("train")), [str(i) for i in ids])


def _pack(blobs: dict[str, str], key: str, values: np.ndarray) -> list[float | None]:
    """Stores values [row, column] as 16-bit shares of each row's largest; returns the scales.

    -32768 stands for a missing value.
    """
    top = np.nanmax(np.abs(np.where(np.isfinite(values), values, 0.0)), axis=1, initial=0.0)
    scale = np.where(top > 0, top, 1.0)
    share = np.round(np.nan_to_num(values / scale[:, None], nan=0.0) * 32767)
    packed = np.where(np.isfinite(values), share, -32768).astype("<i2")
    blobs[key] = _base64(packed)
    return [float(s) for s in scale]


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
