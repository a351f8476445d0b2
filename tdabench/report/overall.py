"""One rank over several benchmarks, by a stated rule that users can change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tdabench.report.board import BoardCell, Column, Table
from tdabench.report.text import clean, listing

OVERALL = "overall"
NOT_COUNTED = ("cost",)  # a price, not a quality


def counted(table: Table) -> list[str]:
    """Returns the columns that count by default: every benchmark with a value except cost."""
    filled = {name for row in table.rows for name, cell in row.cells.items() if cell.ok}
    return [c.name for c in table.columns if c.benchmark not in NOT_COUNTED and c.name in filled]


ALIKE = 0.9  # Spearman's correlation over methods from which two benchmarks count as one
ENOUGH = 8  # methods without which that correlation says nothing
KIN = (("lds", "transfer"),)  # measured on the same groups and queries: always one


def blocks(table: Table, names: Sequence[str]) -> list[list[str]]:
    """Returns the columns `names` in sets that order methods alike; each set counts once.

    A column joins a set when it agrees with each of its columns: Spearman's correlation of their
    values over at least `ENOUGH` methods is `ALIKE` or more, or the two are `KIN`.
    """
    out: list[list[str]] = []
    for name in names:
        home = next((b for b in out if all(_alike(table, name, other) for other in b)), None)
        if home is None:
            out.append([name])
        else:
            home.append(name)
    return out


def _alike(table: Table, a: str, b: str) -> bool:
    from tdabench.stats import spearman_rows

    columns = table.column(a), table.column(b)
    kinds = tuple(c.benchmark for c in columns)
    if kinds in KIN or kinds[::-1] in KIN:
        return True
    signs = [1.0 if c.higher_is_better else -1.0 for c in columns]
    pairs = [
        [s * (row.cells[n].value or 0.0) for s, n in zip(signs, (a, b))]
        for row in table.rows
        if all((c := row.cells.get(n)) is not None and c.ok for n in (a, b))
    ]
    if len(pairs) < ENOUGH:
        return False
    x, y = np.array(pairs).T
    return float(spearman_rows(x[None], y[None])[0]) >= ALIKE


def place(label: str, cells: Mapping[str, BoardCell]) -> float:
    """Computes the mean place of a method in a column: 1, plus 1 for each significantly better
    method and 1/2 for each method without a significant difference.

    Without letters (no test) ranks decide: a better one counts as better, an equal one as tied.
    """
    mine = cells[label]
    at = 1.0
    for other, cell in cells.items():
        if other == label or cell.rank is None or mine.rank is None:
            continue
        tested = cell.letters and mine.letters
        same = set(cell.letters) & set(mine.letters) if tested else cell.rank == mine.rank
        at += 0.5 if same else float(cell.rank < mine.rank)
    return at


def with_overall(table: Table, names: Sequence[str] | None = None) -> Table:
    """Returns the table with the column `overall`: a method's mean rank over the columns `names`.

    Methods without a significant difference share places, and methods without a value share the
    last ones. Columns that order methods alike count as one (`blocks`), unless `names` sets what
    counts. Smaller is better. The table is unchanged if fewer than two columns count and no names
    are given. Raises UsageError for an unknown column.
    """
    chosen = [table.column(n).name for n in names] if names else counted(table)
    rows = [r for r in table.rows if any(c.ok for c in r.cells.values())]
    if not rows or (len(chosen) < 2 and not names):
        return table
    sets = [[n] for n in chosen] if names else blocks(table, chosen)
    weight = {n: 1 / len(of) / len(sets) for of in sets for n in of}
    places = {row.label: 0.0 for row in rows}
    for name in chosen:
        cells = {r.label: c for r in rows if (c := r.cells.get(name)) and c.ok and c.rank}
        last = len(cells) + (len(rows) - len(cells) + 1) / 2  # shared by those without a value
        for row in rows:
            at = place(row.label, cells) if row.label in cells else last
            places[row.label] += weight[name] * at
    values = list(places.values())
    column = Column(
        OVERALL,
        OVERALL,
        "mean_rank",
        higher_is_better=False,
        params={"of": chosen, "as_one": [b for b in sets if len(b) > 1]},
    )
    filled = []
    for row in table.rows:
        if row.label in places:
            value = places[row.label]
            rank = 1 + sum(v < value - 1e-9 for v in values)
            cell = BoardCell("ok", value=value, rank=rank, best=rank == 1)
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
    alike = "".join(
        f"{listing(clean(n, 40) for n in of)} order methods alike and count as one; "
        for of in column.params["as_one"]
    )
    return (
        f"overall: mean rank on {names}; {alike}ties share ranks, and a missing value ranks last. "
        "Change with --overall A,B; order by it with --benchmark overall."
    )
