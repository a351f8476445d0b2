"""The table behind every output, computed from records.

`Board.from_runs` returns one `Table` per target and training corpus. A table has one column per
benchmark and one row per method label; failed rows stay, with their reasons.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tdabench.errors import UsageError, unknown
from tdabench.io import cache_folder, fingerprint
from tdabench.registry import registry
from tdabench.report.checked import Checked
from tdabench.report.ranks import Entry, Ranks, pooled, rank_column
from tdabench.report.records import Run, find_runs, no_collection, read_run
from tdabench.run.record import Record, describe_machine, finite, machine_of

CEILING, SHARE, TRUTH_SEEDS = "ceiling", "share_of_ceiling", "truth_seeds"
ADDITIVE = "additive_ceiling"
AGREEMENT, SMOOTHNESS = "seed_agreement", "metasmoothness"
TIMES = ("prepare", "build", "query")
COSTS = (*TIMES, "bytes")


@dataclass(frozen=True)
class Column:
    """A benchmark with its version, parameters and truth: values are comparable if all agree."""

    name: str
    benchmark: str
    metric: str
    higher_is_better: bool = True
    unit: str = ""
    version: Any = None
    params: Mapping[str, Any] = field(default_factory=dict)
    truth: Any = None
    ceiling: float | None = None
    additive: float | None = None  # the ceiling of predictors that add up their members' scores
    queries: int | None = None
    groups: int | None = None
    truth_seeds: int | None = None
    agreement: float | None = None
    smoothness: float | None = None
    tasks: int | None = None  # drawn whole by its intervals and tests; None: queries are


@dataclass(frozen=True)
class BoardCell:
    """One method on one benchmark: a value with its 95% interval, or the reason for its absence.

    `rank` is its place by value, `rank_low` to `rank_high` its rank as an interval: the places of
    the methods from which it does not differ significantly. Two methods of a column share one of
    `letters` if and only if they do not differ significantly. `best`: it shares one with the first.
    """

    status: str
    reason: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    share: float | None = None
    low_these_tasks: float | None = None
    high_these_tasks: float | None = None
    rank: int | None = None
    rank_low: int | None = None
    rank_high: int | None = None
    letters: str = ""
    best: bool = False
    seeds: int = 1
    spread: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "ok" and self.value is not None

    @property
    def rank_text(self) -> str:
        """`1`, or `1–4 ab`: the rank as an interval and the letters; "" without a rank."""
        if self.rank is None:
            return ""
        low, high = self.rank_low or self.rank, self.rank_high or self.rank
        places = str(low) if low == high else f"{low}–{high}"
        return f"{places} {self.letters}".rstrip()


@dataclass(frozen=True)
class Cost:
    """Cost of a method in seconds, milliseconds per query and bytes; None if not measured."""

    prepare_seconds: float | None = None
    retrainings: float | None = None
    build_seconds: float | None = None
    query_ms: float | None = None
    query_seconds: float | None = None  # of all queries together
    bytes_per_example: float | None = None
    index_bytes: float | None = None
    build_peak_bytes: float | None = None
    query_peak_bytes: float | None = None
    machine: str = ""

    def of(self, what: str) -> float | None:
        """Returns a cost by its name in `--sort` and `--columns`: prepare, build, query, bytes."""
        return {
            "prepare": self.prepare_seconds,
            "build": self.build_seconds,
            "query": self.query_ms,
            "bytes": self.bytes_per_example,
        }[what]


@dataclass(frozen=True)
class Row:
    """One method label: one cell per column, and its cost."""

    label: str
    name: str = ""
    version: Any = None
    family: str = ""
    plugin: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    passed: Mapping[str, Any] = field(default_factory=dict)
    cells: Mapping[str, BoardCell] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    notes: tuple[str, ...] = ()
    log_tail: tuple[str, ...] = ()
    unconfined: bool = False  # whether a value comes from a method that could reach the answers


@dataclass(frozen=True)
class Table:
    """All methods on one target and training corpus. `primary` is the ranking column."""

    target: str
    regime: str
    target_fingerprint: str
    n_train: int | None
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    primary: str
    suite: str = ""
    suites: tuple[str, ...] = ()
    machines: Mapping[str, str] = field(default_factory=dict)

    def column(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise unknown("benchmark", name, [c.name for c in self.columns], "in these runs")

    @property
    def one_machine(self) -> bool:
        return len(self.machines) <= 1

    def ranked_by(self, name: str) -> Table:
        """Returns the same table with another primary column and its order of rows."""
        return replace(self, primary=name, rows=tuple(_by_rank(self.rows, self.column(name))))

    def sorted_by(self, key: str) -> Table:
        """Sorts rows by `rank`, `method`, `family`, `share`, a cost or a benchmark; `-` reverses.

        Fidelity sorts best first and costs smallest first; rows without the value are last.
        Raises UsageError for an unknown key, and for times measured on several machines.
        """
        name = key.removeprefix("-")
        known = ["rank", "method", "family", "share", *COSTS, *(c.name for c in self.columns)]
        if name not in known:
            raise unknown("sort key", name, known)
        if name in TIMES and not self.one_machine:
            raise UsageError(
                f"times from {several(self.machines.values())} cannot be ranked: "
                + "; ".join(f"{k} is {v}" for k, v in self.machines.items()),
                "Show runs of one machine and setting at a time, or sort by rank",
            )
        rows = _by_rank(self.rows, self.column(self.primary))

        def value(row: Row) -> Any:
            if name == "rank":
                return row.cells[self.primary].rank if self.primary in row.cells else None
            if name == "method":
                return row.label.casefold()
            if name == "family":
                return row.family.casefold()
            if name in COSTS:
                return row.cost.of(name)
            cell = row.cells.get(self.primary if name == "share" else name)
            if cell is None:
                return None
            if name == "share":
                return None if cell.share is None else -cell.share
            sign = -1.0 if self.column(name).higher_is_better else 1.0
            return None if cell.value is None else sign * cell.value

        have = [r for r in rows if value(r) is not None]
        have.sort(key=value, reverse=key.startswith("-"))
        return replace(self, rows=tuple(have + [r for r in rows if value(r) is None]))


@dataclass(frozen=True)
class Board:
    """Tables over one or several runs, and warnings about mixing them."""

    tables: tuple[Table, ...]
    runs: tuple[Run, ...]
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_runs(
        cls,
        folders: Iterable[Path] = (),
        *,
        methods: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        cache: bool = True,
    ) -> Board:
        """Reads run folders, or folders of runs; without any, the newest run under `runs/`.

        `methods` and `targets` select labels. With `cache`, the result of comparing methods is
        kept in the user's cache, as is which records of a large folder were found unaltered.
        Raises UsageError or DataError.
        """
        with no_collection():
            runs = tuple(read_run(f) for f in find_runs(folders))
            return cls.of_runs(runs, methods=methods, targets=targets, cache=cache)

    @classmethod
    def of_runs(
        cls,
        runs: Sequence[Run],
        *,
        methods: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        cache: bool = True,
    ) -> Board:
        """Makes the board of runs that have been read. Arguments as in `from_runs`."""
        runs = tuple(runs)
        records, warnings = _merge(runs)
        records, marks = _marked(records, cache)
        warnings += marks
        if targets is not None:
            known = {_target_name(r) for r, _ in records}
            for t in targets:
                if t not in known:
                    raise unknown("target", t, known)
            records = [(r, label) for r, label in records if _target_name(r) in targets]
        if methods is not None:
            for m in methods:
                if m not in (known := {r.label for r, _ in records}):
                    raise unknown("method", m, known, "in these runs")
            records = [(r, label) for r, label in records if r.label in methods]
        by_table: dict[tuple[str, ...], list[tuple[Record, str]]] = {}
        for record, label in records:
            by_table.setdefault(_table_key(record), []).append((record, label))
        where = {run.name: run for run in runs}
        tables = tuple(
            _table(members, where, cache_folder() / "ranks" if cache else None)
            for members in by_table.values()
        )
        for run in runs:
            warnings += [f"{run.name}: {p}" for p in run.problems]
        return cls(tables, runs, tuple(warnings + _differences(runs, tables)))

    @cached_property
    def records(self) -> Mapping[tuple[str, str], Record]:
        """Every record, by run name and cell key."""
        return {(r.run, r.key): r for run in self.runs for r in run.records}

    def table(self, target: str | None = None) -> Table:
        """Returns the table of `target`, or the only table. Raises UsageError if not unique."""
        found = [t for t in self.tables if target in (None, t.target)]
        if len(found) == 1:
            return found[0]
        names = [t.target for t in self.tables]
        if not names:
            raise UsageError("these runs contain no records", "Create some with: tdabench run")
        if not found:
            raise unknown("target", str(target), names)
        raise UsageError(f"these runs contain {len(found)} tables", "Choose with --target NAME")


def _target_name(record: Record) -> str:
    return str(record.target.get("label") or record.target.get("name") or "?")


def _table_key(record: Record) -> tuple[str, ...]:
    """Returns the key of a table: one target (weights included) and one training corpus."""
    return (_target_name(record), str(record.target.get("fingerprint")), record.data_hash)


def _merge(runs: Sequence[Run]) -> tuple[list[tuple[Record, str]], list[str]]:
    """Returns records with their displayed labels, one per (table, label, benchmark, seed)."""
    warnings: list[str] = []
    kept: dict[tuple[Any, ...], Record] = {}
    for run in runs:
        for record in run.records:
            place = (record.run, *_place(record))
            old = kept.get(place)
            if old is not None:
                record = max(old, record, key=lambda r: (str(r.data.get("started") or ""), r.key))
                warnings.append(
                    f"{record.run}: {record.label} on {record.benchmark_name} has several "
                    "records; the latest is shown"
                )
            kept[place] = record
    if len(runs) == 1:
        return [(r, r.label) for r in kept.values()], sorted(set(warnings))
    keys: dict[tuple[Any, ...], set[str]] = {}
    identity: dict[str, set[str]] = {}
    worked: dict[tuple[Any, ...], Record] = {}
    for (_, *at), record in kept.items():
        place = tuple(at)
        keys.setdefault(place, set()).add(record.key)
        identity.setdefault(record.label, set()).add(_identity(record))
        if record.ok:
            worked.setdefault(place, record)
    clashing = {place[3] for place, found in keys.items() if len(found) > 1}
    clashing |= {label for label, found in identity.items() if len(found) > 1}
    seen: set[tuple[Any, ...]] = set()
    out = []
    for (_, *at), record in kept.items():
        place = tuple(at)
        label = f"{record.label} ({record.run})" if record.label in clashing else record.label
        if (label, place) in seen:  # the same cell, computed or copied twice
            continue
        if record.label not in clashing and not record.ok:
            record = worked.get(place, record)
        seen.add((label, place))
        out.append((record, label))
    return out, sorted(set(warnings))


def _marked(
    records: Sequence[tuple[Record, str]], cache: bool
) -> tuple[list[tuple[Record, str]], list[str]]:
    """Marks the rows whose records show that they were edited; says which and what is odd.

    One altered record marks its row in every table, since a reader looks at the row.
    """
    edited: dict[str, str] = {}
    warnings = []
    carrying = {r.run for r, _ in records if "digest" in r.data}
    checked = Checked(r for r, _ in records if cache)
    for record, label in records:
        where = f"{label} on {record.benchmark_name}"
        reasons = checked.altered(record) if record.ok else []
        if record.ok and record.run in carrying and "digest" not in record.data:
            reasons.append("it carries no digest, unlike the others of its run")
        for reason in reasons:
            edited[label] = f"{label} [altered]"
            warnings.append(f"{where} was altered after it was written: {reason}")
        if record.ok:
            warnings += [f"{where}: {odd}" for odd in record.odd_values()]
    checked.keep()
    return [(r, edited.get(label, label)) for r, label in records], warnings


def _place(record: Record) -> tuple[Any, ...]:
    return (
        *_table_key(record),
        record.label,
        record.benchmark_name,
        record.what_hash,
        record.seed,
    )


def _identity(record: Record) -> str:
    m = record.method
    return fingerprint([m.get("name"), m.get("version"), m.get("params") or m.get("passed")])


def _table(
    members: Sequence[tuple[Record, str]], where: Mapping[str, Run], cache: Path | None
) -> Table:
    order = {name: i for i, name in enumerate(_benchmark_order(members, where))}
    columns: dict[str, Column] = {}
    cells: dict[str, dict[str, list[Record]]] = {}
    names: dict[tuple[str, str], str] = {}
    for record, label in sorted(members, key=lambda m: order[m[0].benchmark_name]):
        what = record.what_hash
        name = names.get((record.benchmark_name, what))
        if name is None:
            split = str(record.data.get("split") or "test")
            name = record.benchmark_name if split == "test" else f"{record.benchmark_name}@{split}"
            if name in names.values():
                name = f"{name}@{what[:4]}"
            names[record.benchmark_name, what] = name
        cells.setdefault(label, {}).setdefault(name, []).append(record)
        columns[name] = _column(name, record, columns.get(name))
    first = members[0][0]
    # The headline benchmark may have no result at all, such as LDS without a truth.
    good = {n for of in cells.values() for n, found in of.items() if any(r.ok for r in found)}
    primary = next((n for n in columns if n in good), next(iter(columns)))
    ranks = {name: _ranks(name, column, cells, cache) for name, column in columns.items()}
    machines: dict[str, str] = {}
    rows = []
    for label, of_label in cells.items():
        filled = {
            name: _cell(label, columns[name], of_label[name], ranks[name])
            for name in columns
            if name in of_label
        }
        rows.append(_row(label, of_label, filled, primary, where, machines))
    n_train = [n for r, _ in members if (n := finite(r.cost.get("n_train"))) is not None]
    return Table(
        target=_target_name(first),
        regime=str(first.target.get("regime") or ""),
        target_fingerprint=str(first.target.get("fingerprint") or ""),
        n_train=int(n_train[0]) if n_train else None,
        columns=tuple(columns.values()),
        rows=tuple(_by_rank(rows, columns[primary])),
        primary=primary,
        suite=str(where[first.run].suite.get("name") or "") if first.run in where else "",
        suites=tuple(sorted({_suite_name(where.get(r.run)) for r, _ in members} - {""})),
        machines=machines,
    )


def _suite_name(run: Run | None) -> str:
    return str(run.suite.get("name") or "") if run is not None else ""


def _benchmark_order(members: Sequence[tuple[Record, str]], where: Mapping[str, Run]) -> list[str]:
    """Orders benchmarks: the headline one first, then as the manifests list them, then as found."""
    found = {r.benchmark_name for r, _ in members}
    named = [run.manifest.get("benchmarks") for run in where.values()]
    listed = [str(b) for names in named if isinstance(names, list) for b in names]
    first = [name for name, entry in registry().benchmarks.items() if entry.cls.headline]
    return list(dict.fromkeys(b for b in [*first, *listed, *sorted(found)] if b in found))


def _column(name: str, record: Record, old: Column | None) -> Column:
    """Describes a column by its first successful record."""
    if old is not None and (old.metric or not record.ok):
        return old
    metric = record.metric(record.primary)
    shapes = record.shapes() if record.ok else {}
    ceiling = finite(record.metric(CEILING).get("value"))
    queries = (shapes.get("per_query") or (None,))[0]
    groups = (shapes.get("group_scores") or (None,))[-1]
    seeds = finite(record.metric(TRUTH_SEEDS).get("value"))
    params = record.benchmark.get("params")
    return Column(
        name=name,
        benchmark=record.benchmark_name,
        metric=record.primary if record.ok else "",
        higher_is_better=bool(metric.get("higher_is_better", True)),
        unit=str(metric.get("unit") or ""),
        version=record.benchmark.get("version"),
        params=params if isinstance(params, Mapping) else {},
        truth=record.data.get("truth"),
        ceiling=ceiling,
        additive=finite(record.metric(ADDITIVE).get("value")),
        queries=queries,
        groups=groups,
        truth_seeds=int(seeds) if seeds else None,
        agreement=finite(record.metric(AGREEMENT).get("value")),
        smoothness=finite(record.metric(SMOOTHNESS).get("value")),
        tasks=int(tasks) if (tasks := finite(metric.get("tasks"))) else None,
    )


class _Metrics(Mapping[str, Any]):
    """Every metric of a cell, averaged over seeds; computed when the first one is asked for."""

    def __init__(self, records: tuple[Record, ...]) -> None:
        self._records = records

    @cached_property
    def _values(self) -> dict[str, Any]:
        first = self._records[0].metrics
        return {k: v for k in first if (v := pooled(self._records, k))}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _ranks(
    name: str,
    column: Column,
    cells: Mapping[str, Mapping[str, Sequence[Record]]],
    cache: Path | None,
) -> Ranks:
    entries = []
    for label, of_label in cells.items():
        records = of_label.get(name, ())
        if records and all(r.ok for r in records):
            value = pooled(records, column.metric).get("value")
            if value is not None:
                entries.append(Entry(label, value, tuple(records)))
    return rank_column(entries, column.higher_is_better, cache)


def _cell(label: str, column: Column, records: Sequence[Record], ranks: Ranks) -> BoardCell:
    bad = [r for r in records if not r.ok]
    notes = tuple(dict.fromkeys(n for r in records for n in r.notes))
    base = BoardCell(
        status="ok",
        seeds=len(records),
        notes=notes,
        keys=tuple(r.key for r in records),
        runs=tuple(dict.fromkeys(r.run for r in records)),
        metrics=_Metrics(tuple(records)),
    )
    if bad:
        some = f"{len(bad)} of {len(records)} seeds: " if len(records) > 1 else ""
        return replace(
            base, status=bad[0].status, reason=some + (bad[0].reason or "no reason was recorded")
        )
    metric = pooled(records, column.metric)
    if not metric:
        return replace(base, status="failed", reason=f"its record has no {column.metric}")
    value, low, high = metric["value"], metric["low"], metric["high"]
    if (low is None or high is None) and label in ranks.interval:
        low, high = ranks.interval[label]
    span = ranks.span.get(label, (None, None))
    return replace(
        base,
        value=value,
        low=low,
        high=high,
        spread=metric["spread"],
        share=_share(records, value, column.ceiling),
        low_these_tasks=metric["low_these_tasks"],
        high_these_tasks=metric["high_these_tasks"],
        rank=ranks.place.get(label),
        rank_low=span[0],
        rank_high=span[1],
        letters=ranks.letters.get(label, ""),
        best=span[0] == 1,
    )


def _share(records: Sequence[Record], value: float, ceiling: float | None) -> float | None:
    """Returns the recorded share of the ceiling; else the value over the column's ceiling."""
    recorded = pooled(records, SHARE).get("value")
    if recorded is not None:
        return float(recorded)
    return value / ceiling if ceiling and ceiling > 0 else None


def _row(
    label: str,
    records: Mapping[str, Sequence[Record]],
    cells: Mapping[str, BoardCell],
    primary: str,
    where: Mapping[str, Run],
    machines: dict[str, str],
) -> Row:
    everything = [r for name in cells for r in records[name]]
    first = (records.get(primary) or everything)[0]
    measured = next((records[n] for n in cells if cells[n].ok and records[n][0].cost), ())
    method = first.method
    tail = next((r.data.get("log_tail") for r in everything if not r.ok), None)
    return Row(
        label=label,
        name=str(method.get("name") or ""),
        version=method.get("version"),
        family=str(method.get("family") or ""),
        plugin=str(method.get("plugin") or ""),
        params=_mapping(method.get("params")),
        passed=_mapping(method.get("passed")),
        cells=cells,
        cost=_cost(measured, where, machines),
        notes=tuple(dict.fromkeys(n for c in cells.values() for n in c.notes)),
        log_tail=tuple(str(line) for line in tail) if isinstance(tail, list) else (),
        unconfined=any(r.ok and r.data.get("isolation") == "none" for r in everything),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _cost(records: Sequence[Record], where: Mapping[str, Run], machines: dict[str, str]) -> Cost:
    """Averages costs over seeds. `machines` collects the machines behind the times."""
    if not records:
        return Cost()

    def mean(*path: str) -> float | None:
        values = []
        for record in records:
            part: Any = record.cost
            for name in path:
                part = part.get(name) if isinstance(part, Mapping) else None
            if (value := finite(part)) is not None:
                values.append(value)
        return sum(values) / len(values) if values else None

    first = records[0]
    machine = first.machine or (where[first.run].hardware if first.run in where else {})
    per_query = [
        1e3 * s / n
        for r in records
        if (s := finite(_mapping(r.cost.get("query")).get("seconds"))) is not None
        and (n := finite(_mapping(r.cost.get("query")).get("queries")))
    ]
    machines.setdefault(machine_of(machine), describe_machine(machine))
    return Cost(
        prepare_seconds=mean("prepare", "seconds"),
        retrainings=mean("prepare", "retrainings"),
        build_seconds=mean("build", "seconds"),
        query_ms=sum(per_query) / len(per_query) if per_query else None,
        query_seconds=mean("query", "seconds"),
        bytes_per_example=mean("bytes_per_example"),
        index_bytes=mean("index_bytes"),
        build_peak_bytes=mean("build", "peak_bytes"),
        query_peak_bytes=mean("query", "peak_bytes"),
        machine=machine_of(machine),
    )


def _by_rank(rows: Iterable[Row], column: Column) -> list[Row]:
    """Returns ranked rows, best first, then rows without a value, by label."""
    sign = -1.0 if column.higher_is_better else 1.0

    def place(row: Row) -> tuple[Any, ...]:
        cell = row.cells.get(column.name)
        if cell is None or not cell.ok:
            return (1, cell is None, 0.0, row.label)
        return (0, cell.rank or 0, sign * (cell.value or 0.0), row.label)

    return sorted(rows, key=place)


# How a machine was used, as `describe_machine` ends.
def several(machines: Collection[str]) -> str:
    """Returns `2 machines`, or `2 settings of one machine` where only threads or jobs differ."""
    one = len({_USE.sub("", m) for m in machines}) == 1
    return f"{len(machines)} {'settings of one machine' if one else 'machines'}"


_USE = re.compile(r"(, \d+ threads? per method)?(, \d+ methods at once)?$")


def _differences(runs: Sequence[Run], tables: Sequence[Table]) -> list[str]:
    """Lists relevant differences between the shown records."""
    out = []
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        stamps = [(r.versions, r.data.get("git")) for r in run.records] or [({}, None)]
        for versions, git in stamps:
            packages = versions or _mapping(run.manifest.get("packages"))
            for package, version in packages.items():
                found.setdefault(str(package), {})[str(version)] = None
            commit = git or run.manifest.get("git")
            if commit:
                found.setdefault("the commit of tdabench", {})[str(commit)[:12]] = None
    for what, values in sorted(found.items()):
        if len(values) > 1:
            out.append(f"records differ in {what}: {', '.join(values)}")
    suites = {str(r.suite.get("fingerprint")) for r in runs}
    if len(suites) > 1:
        out.append(f"the runs use {len(suites)} versions of the suite")
    names = [t.target for t in tables]
    for name in sorted({n for n in names if names.count(n) > 1}):
        out.append(
            f"the {names.count(name)} tables of {name} are of other weights, another training "
            "corpus or another regime: not comparable with each other"
        )
    for table in tables:
        if len(table.suites) > 1:
            out.append(f"rows of {table.target} come from the suites {', '.join(table.suites)}")
    machines = {k: v for t in tables for k, v in t.machines.items()}
    if len(machines) > 1:
        out.append(
            f"times come from {several(machines.values())} and are not ranked: "
            + "; ".join(dict.fromkeys(machines.values()))
        )
    for table in tables:
        for column in table.columns:
            if "@" in column.name:
                out.append(
                    f"{column.name}: {column.benchmark} with other queries, parameters, truth or "
                    f"version; not comparable with another column {column.benchmark}"
                )
    return list(dict.fromkeys(out))
