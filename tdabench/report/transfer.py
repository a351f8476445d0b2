"""The source x target matrix of a method: scores from one model against retraining of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tdabench.errors import DataError, unknown
from tdabench.report.board import Board, BoardCell
from tdabench.report.text import clean, number
from tdabench.run.record import finite

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class TransferMatrix:
    """LDS by (source, target), including the in-model diagonal, and bounds for each target.

    `ceiling` bounds a method that knows the target, `truth` is the mean LDS of the other targets'
    truths taken as scores, and `agnostic` estimates the bound for a method that knows no model
    (docs/benchmarks/transfer.md).
    """

    method: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    lds: dict[tuple[str, str], float]
    ceiling: dict[str, float]
    truth: dict[str, float]
    agnostic: dict[str, float]


def transfer_matrix(board: Board, method: str) -> TransferMatrix:
    """Builds the matrix from records of the benchmark `transfer`, one row per source.

    Raises UsageError for an unknown method, DataError if it has no such record.
    """
    rows = {t.target: next((r for r in t.rows if r.label == method), None) for t in board.tables}
    if not any(rows.values()):
        raise unknown("method", method, {r.label for t in board.tables for r in t.rows})
    lds: dict[tuple[str, str], float] = {}
    bounds: dict[str, dict[str, float]] = {"ceiling": {}, "truth": {}, "agnostic": {}}
    for table in board.tables:
        row = rows[table.target]
        for column in table.columns:
            cell = row.cells.get(column.name) if row else None
            if column.benchmark != "transfer" or cell is None or not cell.ok:
                continue
            for name in cell.metrics:
                kind, _, rest = name.partition("[")
                label = table.target if rest == "source]" else rest[:-1]
                value = _value(cell, name)
                if not rest or value is None:
                    continue
                if kind == "lds":
                    lds[table.target, label] = value
                elif kind in bounds:
                    bounds[kind][label] = value
    if not lds:
        raise DataError(
            f"{method} has no result on transfer",
            "Create them with: tdabench run --benchmarks transfer --target all",
        )
    sources = tuple(dict.fromkeys(s for s, _ in lds))
    targets = tuple(dict.fromkeys([*sources, *(t for _, t in lds)]))
    return TransferMatrix(method, sources, targets, lds, **bounds)


def _value(cell: BoardCell, name: str) -> float | None:
    return finite((cell.metrics.get(name) or {}).get("value"))


def print_transfer(matrix: TransferMatrix, console: Console) -> None:
    """Prints one row per source and one column per target; the last rows hold the bounds."""
    from rich.text import Text

    from tdabench.report.terminal import emit

    head = ["source \\ target", *matrix.targets]
    lines = [head]
    for source in matrix.sources:
        values = [matrix.lds.get((source, t)) for t in matrix.targets]
        lines.append([source, *("–" if v is None else number(v, 3) for v in values)])
    bounds = [("noise ceiling", matrix.ceiling)]
    if matrix.truth:
        bounds = [("others' truths", matrix.truth), ("knowing no model", matrix.agnostic), *bounds]
    for name, of in bounds:
        values = [of.get(t) for t in matrix.targets]
        lines.append([name, *("–" if v is None else number(v, 3) for v in values)])
    widths = [max(len(clean(line[i], 40)) for line in lines) for i in range(len(head))]
    emit(console, Text(f"{clean(matrix.method, 60)}: LDS of the source's scores", "bold"))
    for line in lines:
        first = clean(line[0], 40).ljust(widths[0])
        rest = [clean(v, 40).rjust(w) for v, w in zip(line[1:], widths[1:])]
        emit(console, Text("  ".join([first, *rest])))
    if matrix.truth:
        said = (
            "others' truths: mean LDS of what retraining the other targets showed, taken as "
            "scores. knowing no model: about what a method that reads no model could reach."
        )
        emit(console, Text(said, "dim"))
