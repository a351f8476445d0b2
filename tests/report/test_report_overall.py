"""The overall rank by hand, its rule in words, and intervals on request."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from tdabench.cli.leaderboard import command
from tdabench.errors import UsageError
from tdabench.report.board import Board, BoardCell, Column, Cost, Row, Table
from tdabench.report.overall import OVERALL, blocks, place, rule, with_overall
from tdabench.report.terminal import print_board

RANKS = {  # places by hand: a benchmark's ties share the mean of their places
    "a": {"lds": 1, "tracing": 2, "cost": 3},
    "b": {"lds": 2, "tracing": 2, "cost": 2},
    "c": {"lds": 2, "tracing": 1, "cost": 1},
    "d": {"lds": 4},
    "e": {},
}


def table() -> Table:
    columns = tuple(Column(n, n, n) for n in ("lds", "tracing", "cost", "empty"))
    rows = tuple(
        Row(label, cells={n: BoardCell("ok", value=1.0, rank=r) for n, r in ranks.items()})
        for label, ranks in RANKS.items()
    )
    return Table("t", "", "", 1, columns, rows, "lds")


def overall(t: Table) -> dict[str, tuple[float | None, int | None]]:
    return {r.label: (r.cells[OVERALL].value, r.cells[OVERALL].rank) for r in t.rows}


def test_the_overall_rank_is_the_mean_place() -> None:
    t = with_overall(table())
    assert overall(t) == {
        "a": ((1 + 2.5) / 2, 1),
        "b": ((2.5 + 2.5) / 2, 3),
        "c": ((2.5 + 1) / 2, 1),
        "d": ((4 + 4) / 2, 4),  # no value on tracing: last
        "e": (None, None),  # no value at all
    }
    assert t.columns[-1].params["of"] == ["lds", "tracing"]  # a cost is no quality
    assert "mean rank on lds and tracing" in rule(t)
    assert [r.label for r in t.ranked_by(OVERALL).rows] == ["a", "c", "b", "d", "e"]


def test_the_benchmarks_that_count_can_be_chosen() -> None:
    t = with_overall(table(), ["tracing", "cost"])
    assert overall(t)["c"] == (1.0, 1)
    assert overall(t)["d"] == (4.0, 4)
    only = with_overall(table(), ["cost"])
    assert [r.label for r in only.ranked_by(OVERALL).rows][:3] == ["c", "b", "a"]
    with pytest.raises(UsageError, match="Did you mean 'tracing'"):
        with_overall(table(), ["traceing"])


def test_one_benchmark_or_no_result_has_no_overall_rank() -> None:
    t = table()
    one = replace(t, columns=t.columns[:1], rows=tuple(
        replace(r, cells={k: c for k, c in r.cells.items() if k == "lds"}) for r in t.rows
    ))  # fmt: skip
    assert with_overall(one) is one
    assert rule(one) == ""
    empty = replace(t, rows=tuple(replace(r, cells={}) for r in t.rows))
    assert with_overall(empty) is empty


def test_a_place_counts_half_of_what_is_not_told_apart() -> None:
    """By hand: a beats c only; b is like both; nobody is like d."""
    cells = {
        "a": BoardCell("ok", value=4.0, rank=1, letters="a"),
        "b": BoardCell("ok", value=3.0, rank=2, letters="ab"),
        "c": BoardCell("ok", value=2.0, rank=3, letters="b"),
        "d": BoardCell("ok", value=1.0, rank=4, letters="c"),
    }
    assert [place(k, cells) for k in "abcd"] == [1.5, 2.0, 2.5, 4.0]


def test_benchmarks_that_order_methods_alike_count_once() -> None:
    """`x` and `y` agree over nine methods, `z` does not: they weigh a half, a half and one."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=9)
    z = rng.permutation(9).astype(float)
    z[np.argmax(values)] = -1.0
    found = {"x": values, "y": 2 * values, "z": z}
    columns = tuple(Column(n, n, n, higher_is_better=n != "y") for n in found)
    rows = tuple(
        Row(
            f"m{i}",
            cells={
                n: BoardCell(
                    "ok",
                    value=float(-v[i] if n == "y" else v[i]),
                    rank=1 + int((v > v[i]).sum()),
                )
                for n, v in found.items()
            },
        )
        for i in range(9)
    )
    t = Table("t", "", "", 1, columns, rows, "x")
    assert blocks(t, ["x", "y", "z"]) == [["x", "y"], ["z"]]
    best = with_overall(t).rows[int(np.argmax(values))].cells[OVERALL].value
    assert best == (1 + 9) / 2
    assert "x and y order methods alike and count as one" in rule(with_overall(t))
    named = with_overall(t, ["x", "y", "z"])  # asked for by name: each counts
    assert named.rows[int(np.argmax(values))].cells[OVERALL].value == pytest.approx(11 / 3)
    few = replace(t, rows=rows[:5])
    assert blocks(few, ["x", "y", "z"]) == [["x"], ["y"], ["z"]]
    kin = replace(few, columns=(*columns, Column("lds", "lds", "lds"),
                                Column("transfer", "transfer", "transfer")))  # fmt: skip
    assert blocks(kin, ["lds", "x", "transfer"]) == [["lds", "transfer"], ["x"]]


def test_methods_without_a_value_share_the_last_places() -> None:
    cells = {"x": {"lds": 1, "tracing": 1}, "y": {"lds": 2}, "z": {"lds": 3}}
    rows = tuple(
        Row(k, cells={n: BoardCell("ok", value=0.0, rank=r) for n, r in v.items()})
        for k, v in cells.items()
    )
    t = with_overall(replace(table(), rows=rows))
    assert [overall(t)[k][0] for k in "xyz"] == [1.0, (2 + 2.5) / 2, (3 + 2.5) / 2]


def printed(folder, **more) -> str:
    out = io.StringIO()
    print_board(Board.from_runs([folder]), Console(file=out, width=200), **more)
    return out.getvalue()


def test_the_board_states_the_rule_and_shows_intervals_on_request(plain_run) -> None:
    text = printed(plain_run)
    head = next(line for line in text.splitlines() if line.startswith("rank"))
    assert head.split()[:3] == ["rank", "method", "LDS"]
    assert "overall" in head
    assert head.count("[95%]") == 1
    assert "overall: mean rank on lds, transfer and selection" in text
    wide = printed(plain_run, intervals=True)
    head = next(line for line in wide.splitlines() if line.startswith("rank"))
    assert head.count("[95%]") == 3  # the overall rank has none
    best = printed(plain_run, benchmark=OVERALL, overall=["selection"])
    assert "ranked by overall" in best
    assert "overall: mean rank on selection;" in best


def test_the_command_takes_the_rule(plain_run) -> None:
    run = CliRunner().invoke
    args = [str(plain_run), "--overall", "lds,selection", "--benchmark", OVERALL, "--intervals"]
    done = run(command, args)
    assert done.exit_code == 0, done.output
    assert "overall: mean rank on lds and selection" in done.output
    data = json.loads(run(command, [*args, "--json"]).output)
    (found,) = data["tables"]
    assert found["primary"] == OVERALL
    assert found["columns"][-1]["params"] == {"of": ["lds", "selection"], "as_one": []}
    values = [r["cells"][OVERALL]["value"] for r in found["rows"] if r["label"] != "demo"]
    assert values == sorted(values)


def test_many_benchmarks_are_shown_before_costs_where_room_is_short() -> None:
    names = ("lds", "classification", "loo", "noise", "removal", "selection", "tracing", "transfer")
    columns = tuple(
        Column(n, n, n, higher_is_better=n != "selection", ceiling=0.9 if n == "lds" else None)
        for n in names
    )
    cells = {n: BoardCell("ok", value=0.5, low=0.4, high=0.6, rank=1, share=0.55) for n in names}
    row = Row(
        "method", cells=cells, cost=Cost(build_seconds=1.0, query_ms=2.0, bytes_per_example=3.0)
    )
    board = Board((Table("t", "", "", 1, columns, (row, replace(row, label="other")), "lds"),), ())

    def lines(width: int) -> list[str]:
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=True, color_system=None)
        print_board(board, console)
        return [line.rstrip() for line in out.getvalue().splitlines()]

    wide, narrow = lines(124), lines(80)
    head = next(line for line in wide if line.startswith("rank"))
    assert all(n in head for n in names[1:])
    assert "share" in head
    assert "selection↓" in head
    assert "build" not in head
    assert "Not shown at this width: build, query and bytes/ex (--wide)." in wide
    assert "↓: lower is better." in wide
    head = next(line for line in narrow if line.startswith("rank"))
    assert head.split() == ["rank", "method", "LDS", "[95%]", "share", "overall↓",
                            "classification", "loo", "noise"]  # fmt: skip
    assert max(map(len, narrow)) <= 80
