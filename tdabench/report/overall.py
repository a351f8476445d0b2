"""One rank over several benchmarks, by a stated rule that users can change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tdabench.report.board import BoardCell, Column, Table
from tdabench.report.text import clean, listing

OVERALL = "overall"
NOT_COUNTED = ("cost",)  # a price, not a quality


def counted(table: Table) -> list[str]:
    """Returns the columns that count by default: every benchmark with a value except cost."""
    filled = {name for row in table.rows for name, cell in row.cells.items() if cell.ok}
    return [c.name for c in table.columns if c.benchmark not in NOT_COUNTED and c.name in filled]


def with_overall(table: Table, names: Sequence[str] | None = None) -> Table:
    """Returns the table with the column `overall`: a method's mean rank over the columns `names`.

    Methods without a significant difference in a column share the mean of their ranks, and methods
    without a value there share the last ranks. Smaller is better. The table is unchanged if fewer
    than two columns count and no names are given. Raises UsageError for an unknown column.
    """
    chosen = [table.column(n).name for n in names] if names else counted(table)
    rows = [r for r in table.rows if any(c.ok for c in r.cells.values())]
    if not rows or (len(chosen) < 2 and not names):
        return table
    places = {row.label: 0.0 for row in rows}
    for name in chosen:
        ranks = {r.label: c.rank for r in rows if (c := r.cells.get(name)) and c.ok and c.rank}
        for row in rows:
            rank = ranks.get(row.label)
            above = len(ranks) if rank is None else sum(r < rank for r in ranks.values())
            beside = len(rows) - len(ranks) if rank is None else list(ranks.values()).count(rank)
            places[row.label] += (above + (beside + 1) / 2) / len(chosen)
    values = list(places.values())
    column = Column(OVERALL, OVERALL, "mean_rank", higher_is_better=False, params={"of": chosen})
    filled = []
    for row in table.rows:
        if row.label in places:
            value = places[row.label]
            rank = 1 + sum(v < value - 1e-9 for v in values)
            tied = sum(abs(v - value) < 1e-9 for v in values) > 1
            cell = BoardCell("ok", value=value, rank=rank, tied=tied, best=rank == 1)
        else:
            cell = BoardCell("absent", "no result on any benchmark")
        filled.append(replace(row, cells={**row.cells, OVERALL: cell}))
    return replace(table, columns=(*table.columns, column), rows=tuple(filled))


def rule(table: Table) -> str:
    """Describes the rule in words; empty if the table has no overall rank."""
    column = next((c for c in table.columns if c.name == OVERALL), None)
    if column is None:
        return ""
    names = listing(clean(n, 40) for n in column.params["of"])
    return (
        f"overall: mean rank on {names}; ties share ranks, and a missing "
        "value ranks last. Change with --overall A,B; order by it with --benchmark overall."
    )
