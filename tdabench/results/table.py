"""Results in Python: `tdabench.load_results(path)`."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.errors import DataError, MissingExtra, UsageError, clean, unknown
from tdabench.report.records import find_runs, is_run, read_run, runs_in
from tdabench.report.text import number
from tdabench.results.layout import is_repository, read_results
from tdabench.run.record import Record, finite

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "suite", "suite_version", "target", "benchmark", "method", "version", "label", "seed", "status",
    "metric", "value", "low", "high", "unit", "higher_is_better", "ceiling", "build_seconds",
    "query_ms", "bytes_per_example", "device", "cpu", "gpu", "by", "started", "source", "key",
    "reason", "marks",
)  # fmt: skip
SHOWN = ("suite", "target", "benchmark", "label", "value", "low", "high", "status", "by")


def load_results(path: str | Path = "runs") -> ResultTable:
    """Returns the results in a run folder, a folder of runs, or a results repository, as a table.

    Damaged records and refused submissions are not in it; `problems` lists them. Raises UsageError
    if there are no results at `path`.
    """
    path = Path(path)
    if is_repository(path):
        found = read_results(path)
        rows = [_row(r, s.place, s.by, s.suite) for s in found.submissions for r in s.records]
        problems = [f"{r.place}: {r.reason}" for r in found.refused]
    else:
        if not is_run(path) and not runs_in(path):
            raise UsageError(f"{path} contains no results", "Create some with: tdabench run")
        runs = [read_run(f) for f in find_runs([path])]
        rows = [_row(r, run.name, "", run.suite) for run in runs for r in run.records]
        problems = [f"{run.name}: {p}" for run in runs for p in run.problems]
    return ResultTable(
        tuple(row for row, _ in rows), tuple(problems), {id(row): r for row, r in rows}
    )


def _row(
    record: Record, source: str, by: str, suite: Mapping[str, Any]
) -> tuple[dict[str, Any], Record]:
    primary = record.primary
    metric = record.metric(primary) if record.ok else {}
    own = record.data.get("suite")
    suite = own if isinstance(own, Mapping) else suite
    build, query = record.cost.get("build"), record.cost.get("query")
    seconds = finite(query.get("seconds")) if isinstance(query, Mapping) else None
    asked = finite(query.get("queries")) if isinstance(query, Mapping) else None
    row = {
        "suite": suite.get("name"),
        "suite_version": suite.get("version"),
        "target": record.target.get("label") or record.target.get("name"),
        "benchmark": record.benchmark_name,
        "method": record.method.get("name"),
        "version": record.method.get("version"),
        "label": record.label,
        "seed": record.seed,
        "status": record.status,
        "metric": primary if record.ok else "",
        "value": finite(metric.get("value")),
        "low": finite(metric.get("low")),
        "high": finite(metric.get("high")),
        "unit": metric.get("unit") or "",
        "higher_is_better": bool(metric.get("higher_is_better", True)),
        "ceiling": finite(record.metric("ceiling").get("value")),
        "build_seconds": finite(build.get("seconds")) if isinstance(build, Mapping) else None,
        "query_ms": 1e3 * seconds / asked if seconds is not None and asked else None,
        "bytes_per_example": finite(record.cost.get("bytes_per_example")),
        "device": record.data.get("device"),
        "cpu": record.hardware.get("cpu"),
        "gpu": record.hardware.get("gpu") or "",
        "by": by,
        "started": record.data.get("started"),
        "source": source,
        "key": record.key,
        "reason": record.reason,
        "marks": "; ".join([*record.altered(), *record.odd_values()]) if record.ok else "",
    }
    return row, record


@dataclass(frozen=True, repr=False)
class ResultTable(Sequence[Mapping[str, Any]]):
    """One row per record: a dictionary with the names in `columns`.

    `rows` are the rows, `problems` what could not be read. `value`, `low` and `high` are the
    primary metric with its 95% interval; `by` and `source` say who measured it, and the run or
    submission that it is in.
    """

    rows: tuple[Mapping[str, Any], ...]
    problems: tuple[str, ...] = ()
    _records: Mapping[int, Record] = field(default_factory=dict, repr=False, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names in every row."""
        return COLUMNS

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        return self.select_rows(self.rows[i]) if isinstance(i, slice) else self.rows[i]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"ResultTable({len(self)} results, {len(self.problems)} problems)"

    def select_rows(self, rows: Sequence[Mapping[str, Any]]) -> ResultTable:
        """Returns a table of these rows of it."""
        return ResultTable(tuple(rows), self.problems, self._records)

    def select(self, **wanted: Any) -> ResultTable:
        """Returns the rows whose columns have these values: `select(benchmark="lds", seed=0)`.

        A list, tuple or set selects any of its values. Raises UsageError for an unknown column.
        """
        for name in wanted:
            if name not in COLUMNS:
                raise unknown("column", name, COLUMNS)
        several = {k: v if isinstance(v, (list, tuple, set)) else (v,) for k, v in wanted.items()}
        return self.select_rows(
            [row for row in self.rows if all(row[k] in v for k, v in several.items())]
        )

    def metrics(self, row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Returns every metric of a row's record: name -> value, low, high, unit, and so on."""
        record = self.record(row)
        return {name: dict(record.metric(name)) for name in record.metrics}

    def per_query(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Returns a row's value on each query: query id -> value.

        Raises DataError if the record has no stored values.
        """
        record = self.record(row)
        if not record.ok:
            raise DataError(f"{record.label} on {record.benchmark_name} is {record.status}")
        arrays, meta = record.arrays()
        values, ids = arrays.get("per_query"), meta.get("query_ids")
        if values is None or not isinstance(ids, list) or np.shape(values) != (len(ids),):
            raise DataError(f"{record.arrays_path} holds no value per query")
        return {str(i): float(v) for i, v in zip(ids, values)}

    def record(self, row: Mapping[str, Any]) -> Record:
        """Returns the record behind a row, with every field that docs/records.md names."""
        if id(row) not in self._records:
            raise UsageError("this row is not of this table", "Take it from the table, not a copy")
        return self._records[id(row)]

    def to_dataframe(self, per_query: bool = False) -> pd.DataFrame:
        """Returns a pandas data frame: one line per record, or with `per_query` per query.

        Per query, the columns `query` and `query_value` are added, and rows without a result are
        left out. Raises MissingExtra without pandas.
        """
        try:
            import pandas
        except ImportError as e:
            raise MissingExtra("pandas", remedy="Install it with: pip install pandas") from e
        if not per_query:
            return pandas.DataFrame([dict(row) for row in self.rows], columns=list(COLUMNS))
        lines = [
            {**row, "query": query, "query_value": value}
            for row in self.rows
            if row["status"] == "ok"
            for query, value in self.per_query(row).items()
        ]
        return pandas.DataFrame(lines, columns=[*COLUMNS, "query", "query_value"])

    def _repr_html_(self) -> str:
        """Returns the table for a notebook: the first 200 rows, every text escaped."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in SHOWN)
        body = []
        for row in self.rows[:200]:
            cells = (
                number(v, 3)
                if isinstance(v := row[name], float)
                else clean("" if v is None else v, 80)
                for name in SHOWN
            )
            body.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
        parts = [f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"]
        if len(self) > 200:
            parts.append(f"<p>… and {len(self) - 200} more rows</p>")
        if self.problems:
            parts.append(f"<p>{len(self.problems)} could not be read: see problems</p>")
        return "".join(parts)
