"""The table model: values, ranks with ties, failures, merging, damage, the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tdabench import stats
from tdabench.cli.show import command as show
from tdabench.errors import DataError, UsageError
from tdabench.io import read_json, write_json
from tdabench.report.board import Board
from tdabench.report.records import find_runs, read_run
from tdabench.report.terminal import footnotes, machine_mark


def table(*folders: Path, **more):
    return Board.from_runs(folders, **more).table()


def rows(t):
    return {r.label: r for r in t.rows}


def test_values_and_intervals_are_those_of_the_records(plain_run):
    t = table(plain_run)
    records = {(r.label, r.benchmark_name): r for r in read_run(plain_run).records if r.seed == 0}
    for label in ("airrep", "logra", "ekfac", "bm25"):
        for column in t.columns:
            cell = rows(t)[label].cells[column.name]
            stored = records[label, column.name].metrics[column.name]
            assert (cell.value, cell.low, cell.high) == (
                stored["value"],
                stored["low"],
                stored["high"],
            )


def test_context_comes_from_the_records(plain_run):
    t = table(plain_run)
    lds = t.column("lds")
    assert (t.n_train, lds.queries, lds.groups) == (200, 40, 60)
    assert (t.suite, t.target, t.regime) == ("pocket", "qwen2-1m", "instruct")
    assert t.column("transfer").ceiling is None
    stored = next(r for r in read_run(plain_run).records if r.benchmark_name == "lds" and r.ok)
    assert lds.ceiling == stored.metrics["ceiling"]["value"]


def test_share_is_what_the_benchmark_recorded(plain_run):
    row = rows(table(plain_run))["logra"]
    assert row.cells["lds"].share == row.cells["lds"].metrics["share_of_ceiling"]["value"]
    assert row.cells["transfer"].share is None


def test_methods_of_equal_quality_share_a_rank_and_others_do_not(plain_run):
    cells = {r.label: r.cells["lds"] for r in table(plain_run).rows}
    found = {k: (c.rank_low, c.rank_high, c.letters) for k, c in cells.items()}
    assert found["airrep"] == (1, 1, "a")
    assert found["logra"] == found["ekfac"] == (2, 3, "b")
    assert found["bm25"] == (4, 4, "c")
    assert found["random"] == (5, 5, "d")
    assert [cells[k].rank for k in ("airrep", "bm25", "random")] == [1, 4, 5]
    assert {cells["logra"].rank, cells["ekfac"].rank} == {2, 3}
    assert cells["airrep"].rank_text == "1 a"
    assert cells["logra"].rank_text == "2–3 b"
    assert cells["airrep"].best
    assert not cells["logra"].best


def test_ranks_are_those_of_the_statistics_module(plain_run):
    boots = {}
    for r in read_run(plain_run).records:
        if r.ok and r.benchmark_name == "lds" and r.label != "random":
            arrays, _ = r.arrays()
            boots[r.label] = stats.Bootstrap.of_record(
                r.metrics["lds"]["value"], arrays["per_query"], arrays
            )
    expected = stats.rank_methods(boots)
    t = table(plain_run, methods=list(boots))
    cells = {r.label: r.cells["lds"] for r in t.rows}
    assert {k: c.rank for k, c in cells.items()} == dict(zip(expected.labels, expected.places))
    assert {k: c.letters for k, c in cells.items()} == dict(zip(expected.labels, expected.letters))
    spans = {k: (c.rank_low, c.rank_high) for k, c in cells.items()}
    assert spans == dict(zip(expected.labels, expected.spans))


def test_several_seeds_are_averaged_and_keep_an_interval(plain_run):
    values = [
        r.metrics["lds"]["value"]
        for r in read_run(plain_run).records
        if r.label == "random" and r.benchmark_name == "lds"
    ]
    cell = rows(table(plain_run))["random"].cells["lds"]
    assert len(values) == cell.seeds == 3
    assert cell.value == pytest.approx(np.mean(values))
    assert cell.spread == pytest.approx(np.std(values, ddof=1))
    assert cell.low < cell.value < cell.high


def test_failures_keep_a_row_with_their_reason(plain_run):
    t = table(plain_run)
    row = t.rows[-1]
    assert row.label == "demo"
    assert row.cells["lds"].status == "failed"
    assert row.cells["lds"].reason == "returned NaN for 3 queries"
    assert row.cells["lds"].rank is None
    assert row.log_tail[0] == "Traceback"


def test_one_failed_seed_fails_the_method(make_run):
    folder = make_run("r", {"a": 1.0, "b": 0.5}, benchmarks=("lds",), seeds={"a": 3})
    path = next(r.path for r in read_run(folder).records if r.label == "a" and r.seed == 1)
    write_json(path, read_json(path) | {"status": "oom", "reason": "needed 9 GiB"})
    cell = rows(table(folder))["a"].cells["lds"]
    assert (cell.status, cell.value, cell.rank) == ("oom", None, None)
    assert cell.reason == "1 of 3 seeds: needed 9 GiB"


def test_without_any_result_of_the_headline_benchmark_another_one_ranks(make_run):
    """A target whose truth is not built has other benchmarks to show."""

    def without_truth(record):
        if record["benchmark"]["name"] == "lds":
            record |= {"status": "skipped", "reason": "the truth is not built", "metrics": {}}

    both = ("lds", "selection")
    folder = make_run("r", {"a": 0.2, "b": 1.0}, benchmarks=both, change=without_truth)
    t = table(folder)
    assert t.primary == "selection"
    assert [r.label for r in t.rows] == ["b", "a"]
    assert rows(t)["a"].cells["lds"].reason == "the truth is not built"
    everything = make_run("none", {"a": 1.0}, benchmarks=("lds",), change=without_truth)
    assert table(everything).primary == "lds"


def test_a_benchmark_where_less_is_better_ranks_the_smallest_first(make_run):
    def lower(record):
        for m in record["metrics"].values():
            m["higher_is_better"] = False

    t = table(make_run("r", benchmarks=("transfer",), change=lower))
    values = [r.cells["transfer"].value for r in t.rows]
    assert t.rows[0].cells["transfer"].rank == 1
    ranks = [r.cells["transfer"].rank for r in t.rows]
    assert ranks == sorted(ranks)
    assert values[0] == min(values)
    ordered = t.sorted_by("transfer")
    assert [r.cells["transfer"].value for r in ordered.rows] == sorted(values)


def test_methods_without_replicates_are_ranked_by_value_and_named(make_run):
    folder = make_run("r", benchmarks=("lds",))
    for r in read_run(folder).records:
        if r.label == "logra":
            r.arrays_path.unlink()
    t = table(folder)
    cells = {r.label: r.cells["lds"] for r in t.rows}
    assert (cells["airrep"].rank, cells["bm25"].rank) == (1, 4)
    assert {cells["logra"].rank, cells["ekfac"].rank} == {2, 3}
    assert cells["logra"].letters == ""
    assert cells["logra"].rank_low == cells["logra"].rank_high == cells["logra"].rank
    assert cells["ekfac"].letters


def test_replicates_that_hold_nan_are_not_compared(make_run, put_cell):
    folder = make_run("r", {"a": 1.0, "b": 0.9}, benchmarks=("lds",))
    record = next(r for r in read_run(folder).records if r.label == "a")
    arrays, meta = record.arrays()
    arrays["replicates"] = np.full_like(arrays["replicates"], np.nan)
    put_cell(folder, record.data, arrays, meta)
    t = table(folder)
    assert {r.label: r.cells["lds"].rank for r in t.rows} == {"a": 1, "b": 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", None, 10**400, True, [1]])
def test_a_value_that_is_no_finite_number_is_a_failure(make_run, value):
    folder = make_run("r", {"a": 1.0, "b": 0.9}, benchmarks=("lds",))
    path = next(r.path for r in read_run(folder).records if r.label == "a")
    data = read_json(path)
    data["metrics"]["lds"]["value"] = value
    path.write_text(json.dumps(data))
    cell = rows(table(folder))["a"].cells["lds"]
    assert (cell.status, cell.value) == ("failed", None)
    assert "lds" in cell.reason


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": 1}', '{"metrics": 3, "method": []}', "\x00\xff"]
)
def test_a_damaged_record_never_hides_the_others(make_run, text):
    folder = make_run("r", {"a": 1.0, "b": 0.2}, benchmarks=("lds",))
    (folder / "cells" / "zz.json").write_bytes(text.encode("latin-1"))
    board = Board.from_runs([folder])
    t = board.tables[0]
    assert {"a", "b"} <= set(rows(t))
    damaged = [w for w in board.warnings if "zz.json" in w]
    stranger = [r for other in board.tables for r in other.rows if r.label == "?"]
    assert damaged or stranger


def test_damaged_arrays_do_not_stop_the_board(make_run):
    folder = make_run("r", {"a": 1.0, "b": 0.2}, benchmarks=("lds",))
    path = next(r.arrays_path for r in read_run(folder).records if r.label == "a")
    path.write_bytes(path.read_bytes()[:50])
    assert rows(table(folder))["a"].cells["lds"].rank == 1


def test_sorting(plain_run):
    t = table(plain_run)
    builds = [r.cost.build_seconds for r in t.sorted_by("build").rows[:-1]]
    assert builds == sorted(builds)
    reverse = [r.cost.build_seconds for r in t.sorted_by("-build").rows[:-1]]
    assert reverse == sorted(builds, reverse=True)
    names = [r.label for r in t.sorted_by("method").rows]
    assert names == sorted(names)
    values = [r.cells["selection"].value for r in t.sorted_by("selection").rows[:-1]]
    assert values == sorted(values, reverse=True)
    assert t.sorted_by("share").rows[-1].label == "demo"
    with pytest.raises(UsageError, match="unknown sort key 'speed'"):
        t.sorted_by("speed")


def test_ranking_by_another_benchmark(plain_run):
    t = table(plain_run).ranked_by("selection")
    ranks = [r.cells["selection"].rank for r in t.rows[:-1]]
    assert ranks == sorted(ranks)
    with pytest.raises(UsageError, match="Did you mean 'selection'"):
        t.ranked_by("selektion")


@pytest.fixture
def kept_ranks(tmp_path, monkeypatch):
    """Where comparisons are kept: a cache of the test's own."""
    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ranks"


def test_cached_ranks_are_used_and_follow_the_content(plain_run, put_cell, kept_ranks):
    first = table(plain_run)
    kept = sorted(kept_ranks.glob("ranks-*.json"))
    assert len(kept) == 3
    assert not (plain_run / ".cache").exists()
    for path in kept:  # a marked cache shows whether it is read
        data = read_json(path)
        data["place"] = {k: v + 100 for k, v in data["place"].items()}
        write_json(path, data)
    assert table(plain_run).rows[0].cells["lds"].rank == first.rows[0].cells["lds"].rank + 100
    assert table(plain_run, cache=False).rows[0].cells["lds"].rank == 1
    record = next(r for r in read_run(plain_run).records if r.label == "bm25" and r.ok)
    arrays, meta = record.arrays()
    put_cell(plain_run, record.data, arrays | {"replicates": arrays["replicates"] + 1e-9}, meta)
    name = record.benchmark_name
    assert table(plain_run).rows[0].cells[name].rank < 100


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"place": {"a": 1}}'])
def test_a_damaged_cache_is_computed_again(plain_run, text, kept_ranks):
    expected = [r.cells["lds"].rank for r in table(plain_run).rows[:-1]]
    for path in kept_ranks.glob("ranks-*.json"):
        path.write_text(text)
    assert [r.cells["lds"].rank for r in table(plain_run).rows[:-1]] == expected


def test_a_cache_that_lies_in_the_run_folder_is_not_read(plain_run, kept_ranks):
    """It may have come with a stranger's run."""
    first = table(plain_run)
    (plain_run / ".cache").mkdir()
    for path in kept_ranks.glob("ranks-*.json"):
        data = read_json(path)
        data["place"] = {k: v + 100 for k, v in data["place"].items()}
        write_json(plain_run / ".cache" / path.name, data)
        path.unlink()
    assert table(plain_run).rows[0].cells["lds"].rank == first.rows[0].cells["lds"].rank


def test_a_cached_board_loads_neither_scipy_nor_torch(plain_run):
    Board.from_runs([plain_run])
    code = (
        "import sys; from pathlib import Path; from tdabench.report.board import Board;"
        f"b = Board.from_runs([Path({str(plain_run)!r})]);"
        "print(len(b.table().rows), 'scipy' in sys.modules, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["6", "False", "False"]


def test_runs_are_merged_and_a_copied_cell_appears_once(make_run, put_cell):
    a = make_run("a", {"x": 1.0, "y": 0.5}, benchmarks=("lds",))
    b = make_run("b", {"x": 1.0, "z": 0.2}, benchmarks=("lds",))
    for r in read_run(a).records:  # both runs hold the very same cell of x
        if r.label == "x":
            put_cell(b, r.data, *r.arrays())
    t = table(a, b)
    assert sorted(rows(t)) == ["x", "y", "z"]
    assert t.one_machine


def test_the_same_label_with_other_parameters_is_shown_twice(make_run):
    def rank_32(record):
        record["method"]["params"] = {"rank": 32}
        record["key"] = "f" * 16

    a = make_run("a", {"x": 1.0}, benchmarks=("lds",))
    b = make_run("b", {"x": 0.3}, benchmarks=("lds",), change=rank_32)
    assert sorted(rows(table(a, b))) == ["x (a)", "x (b)"]


def test_a_run_resumed_with_other_jobs_or_threads_is_one_machine(make_run):
    def other(record):
        record |= {"threads": 1, "concurrent": 2}

    def first(record):
        record |= {"threads": 2, "concurrent": 1}

    a = make_run("a", {"x": 1.0}, benchmarks=("lds",), change=first)
    b = make_run("b", {"y": 0.3}, benchmarks=("lds",), change=other)
    board = Board.from_runs([a, b])
    said = " ".join(board.warnings)
    assert "times come from 2 settings of one machine and are not ranked: " in said
    assert "2 threads per method" in said
    assert "1 thread per method, 2 methods at once" in said
    with pytest.raises(UsageError, match="times from 2 settings of one machine cannot be ranked"):
        board.table().sorted_by("build")


def test_times_of_two_machines_are_not_ranked(make_run):
    def other(record):
        record["hardware"] = {"cpu": "Other", "cores": 64, "gpu": "H200"}
        record["versions"] = {"torch": "2.5.0", "numpy": "2.0.0"}

    a = make_run("a", {"x": 1.0}, benchmarks=("lds",))
    b = make_run("b", {"y": 0.3}, benchmarks=("lds",), change=other)
    board = Board.from_runs([a, b])
    t = board.table()
    for key in ("build", "query", "prepare", "-build"):
        with pytest.raises(UsageError, match="2 machines cannot be ranked"):
            t.sorted_by(key)
    assert [r.label for r in t.sorted_by("bytes").rows] == ["x", "y"]
    notes = [n for n in footnotes(t) if n.startswith("times were measured on: #1 ")]
    assert len(notes) == 1
    assert "; #2 Other" in notes[0]
    assert [machine_mark(t, r.cost.machine) for r in t.rows] == ["#1", "#2"]
    said = " ".join(board.warnings)
    assert "H200" in said
    assert "torch: 2.13.0, 2.5.0" in said
    assert "numpy" not in said


def test_another_truth_is_another_column_and_another_target_another_table(make_run):
    def other_truth(record):
        record["truth"] = "8888"

    def other_target(record):
        record["target"]["fingerprint"] = "dead"

    a = make_run("a", {"x": 1.0}, benchmarks=("lds",))
    b = make_run("b", {"y": 0.5}, benchmarks=("lds",), change=other_truth)
    c = make_run("c", {"z": 0.5}, benchmarks=("lds",), change=other_target)
    board = Board.from_runs([a, b])
    names = [c.name for c in board.table().columns]
    assert names[0] == "lds"
    assert names[1].startswith("lds@")
    assert any("not comparable" in w for w in board.warnings)
    assert len(Board.from_runs([a, c]).tables) == 2
    with pytest.raises(UsageError, match="2 tables"):
        Board.from_runs([a, c]).table()


def test_finding_runs(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="there is no run under runs/"):
        find_runs()
    make_run("old", {"x": 1.0}, benchmarks=("lds",), manifest={"created": "2026-01-01"})
    make_run("new", {"y": 1.0}, benchmarks=("lds",), manifest={"created": "2026-02-01"})
    os.utime(tmp_path / "runs" / "old" / "manifest.json")  # resumed later: created decides
    assert [p.name for p in find_runs()] == ["new"]
    shown = CliRunner().invoke(show, ["--json"], standalone_mode=False, catch_exceptions=False)
    assert {r["method"]["label"] for r in json.loads(shown.output)} == {"y"}
    assert [p.name for p in find_runs([Path("runs")])] == ["old", "new"]
    assert [p.name for p in find_runs([Path("old"), Path("runs/old")])] == ["old"]
    with pytest.raises(UsageError, match="no run folder 'nope'"):
        find_runs([Path("nope")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="contains no run"):
        find_runs([Path("empty")])


def test_a_manifest_that_is_none_is_a_clear_error(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="not a manifest"):
        read_run(tmp_path)


def test_a_run_without_records_has_no_table(make_run):
    board = Board.from_runs([make_run("r", {})])
    assert board.tables == ()
    with pytest.raises(UsageError, match="no records"):
        board.table()
