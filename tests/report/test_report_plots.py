"""The numbers of the plots, and that each plot is drawn from them."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from tdabench.cli.plot import command
from tdabench.errors import DataError, MissingExtra, UsageError
from tdabench.report import figures
from tdabench.report.board import Board
from tdabench.report.plots import KINDS, draw
from tdabench.report.records import read_run


def curves_and_transfer(record):
    """Adds what the selection and transfer benchmarks record."""
    if record["status"] != "ok":
        return
    up = len(record["method"]["label"])
    if record["benchmark"]["name"] == "selection":
        for k in (10, 50, 100):
            value = {"value": 0.001 * k * up, "low": 0.0, "high": 0.002 * k * up}
            record["metrics"][f"f1@{k}"] = value
            record["metrics"][f"f1_random@{k}"] = {"value": 0.001 * k}
        record["metrics"]["f1_full@2000"] = {"value": 0.5}
    if record["benchmark"]["name"] == "transfer":
        record["metrics"]["lds[source]"] = {"value": 0.4}
        record["metrics"]["lds[gpt2-2m]"] = {"value": 0.01 * up}


@pytest.fixture
def board(make_run):
    folder = make_run(
        "r", failed={"demo": ("failed", "no")}, seeds={"random": 2}, change=curves_and_transfer
    )
    return Board.from_runs([folder])


def tasks_of(board):
    return {f"q{i:03d}": f"task {i % 3}" for i in range(40)}


@pytest.mark.parametrize("higher", [True, False])
def test_pareto_is_what_nothing_beats(higher):
    rng = np.random.default_rng(0)
    costs = rng.integers(0, 6, 40).tolist()
    values = rng.integers(0, 6, 40).tolist()
    sign = 1 if higher else -1
    for i, on in enumerate(figures.pareto(costs, values, higher)):
        beaten = [
            j
            for j in range(40)
            if costs[j] <= costs[i]
            and sign * values[j] >= sign * values[i]
            and (costs[j] != costs[i] or values[j] != values[i])
        ]
        assert on == (not beaten)


def test_pareto_edge_cases():
    assert figures.pareto([], []) == []
    assert figures.pareto([1.0, 1.0], [0.5, 0.5]) == [True, True]


def test_cost_points_are_the_boards(board):
    table = board.table()
    points = {p.label: p for p in figures.cost_points(table, "query")}
    assert set(points) == {"airrep", "logra", "ekfac", "bm25", "random"}
    row = table.rows[0]
    assert (points["airrep"].x, points["airrep"].y) == (row.cost.query_ms, row.cells["lds"].value)


def test_a_control_is_drawn_and_forms_no_front(make_run, tmp_path):
    def oracle(record):  # cheapest and best
        if record["method"]["name"] == "oracle":
            record["method"]["family"] = "control"
            record["cost"]["query"]["seconds"] = 1e-6

    folder = make_run("r", {"oracle": 9.0, "a": 1.0, "bb": 0.1}, change=oracle)
    board = Board.from_runs([folder])
    points = {p.label: p for p in figures.cost_points(board.table(), "query")}
    assert points["oracle"].y > points["a"].y > points["bb"].y
    assert {label: p.front for label, p in points.items()} == {
        "oracle": False, "a": True, "bb": False
    }  # fmt: skip
    only = make_run("controls", {"oracle": 9.0}, change=oracle)
    written, _ = draw(Board.from_runs([only]), ["fidelity-query"], tmp_path, form="svg")
    text = written[0].read_text()
    assert "oracle" in text
    assert "Pareto front" not in text


def test_curves_share_their_references(board):
    (found,) = figures.curves(board.table(), "selection")
    assert found.y == "f1"
    lines = {c.label: c for c in found.lines}
    assert lines["airrep"].x == (10, 50, 100)
    assert lines["airrep"].y == pytest.approx((0.06, 0.3, 0.6))
    assert lines["whole pool"].reference
    # The method called random is not what random examples give.
    assert lines["random"].y == pytest.approx((0.06, 0.3, 0.6))
    assert lines["random examples"].y == pytest.approx((0.01, 0.05, 0.1))
    assert figures.curves(board.table(), "lds") == []


def test_transfer_matrix(board):
    matrix = figures.transfer_heatmap(board.table())
    assert matrix.columns == ("qwen2-1m", "gpt2-2m")
    row = matrix.values[matrix.rows.index("bm25")]
    assert row.tolist() == pytest.approx([0.4, 0.04])


def test_by_task_averages_the_stored_values(board):
    matrix = figures.by_task(board, board.table(), tasks_of(board))
    assert matrix.columns == ("task 0", "task 1", "task 2")
    assert matrix.counts == (14, 13, 13)
    record = next(
        r for r in board.runs[0].records if (r.label, r.benchmark_name) == ("bm25", "lds")
    )
    stored = record.arrays()[0]["per_query"]
    got = matrix.values[matrix.rows.index("bm25")]
    assert got.tolist() == pytest.approx([stored[t::3].mean() for t in range(3)])


def test_by_task_without_labels_is_empty(board):
    assert figures.by_task(board, board.table(), {}).empty
    assert figures.by_task(board, board.table(), {"stranger": "t"}).empty


def test_scaling_and_budget_need_two_points(make_run):
    def small(record):
        if record["cost"]:
            record["cost"]["n_train"] = 100
        record["corpus"]["train"] = "5ma11"

    def cheap(record):
        record["method"]["label"] = "airrep few"
        record["cost"]["prepare"] = {"seconds": 1.0, "retrainings": 100}

    a = make_run("a", {"airrep": 1.0}, benchmarks=("lds",))
    b = make_run("b", {"airrep": 0.6}, benchmarks=("lds",), change=small)
    alone, both = Board.from_runs([a]), Board.from_runs([a, b])
    assert figures.scaling(alone, alone.tables[0]) == []
    found = {p.y: p.lines for p in figures.scaling(both, both.tables[0])}
    assert list(found) == ["build (s)", "query (ms per query)", "index (bytes)"]
    assert found["build (s)"][0].x == (100, 200)
    c = make_run("c", {"airrep": 0.6}, benchmarks=("lds",), change=cheap)
    d = make_run("d", {"bm25": 0.5}, benchmarks=("lds",))
    table = Board.from_runs([a, c, d]).table()
    (plot,) = figures.budget(table)
    line, level = plot.lines
    cells = {r.label: r.cells["lds"] for r in table.rows}
    assert (line.label, line.x) == ("airrep", (100, 4800))
    assert line.y == (cells["airrep few"].value, cells["airrep"].value)
    assert line.low == (cells["airrep few"].low, cells["airrep"].low)
    assert (level.label, level.y) == ("no retraining: bm25", (cells["bm25"].value,))


def cost_arrays(folder, put_cell, hardware=None):
    """Writes records of the benchmark `cost` beside those of a run."""
    for record in list(read_run(folder).records):
        data = {**record.data, "key": f"{record.key}c", "primary": "examples_per_second"}
        data["benchmark"] = {"name": "cost", "version": 1, "params": {}}
        data["metrics"] = {"examples_per_second": {"value": 5.0}}
        data["hardware"] = hardware or data["hardware"]
        sizes = np.array([50.0, 100.0, 200.0])
        arrays = {"sizes": sizes, "build_seconds": 0.1 * sizes, "query_seconds": 1e-5 * sizes,
                  "index_bytes": 64 * sizes, "per_query": np.ones(3)}  # fmt: skip
        put_cell(folder, data, arrays, {"query_ids": ["q000", "q001", "q002"]})


def test_scaling_is_what_the_cost_benchmark_measured(make_run, put_cell, tmp_path):
    folder = make_run("a", {"x": 1.0, "y": 0.5}, benchmarks=("lds",))
    cost_arrays(folder, put_cell)
    board = Board.from_runs([folder])
    plots = {p.y: p for p in figures.scaling(board, board.table())}
    query = plots["query (ms per query)"]
    assert query.log
    assert [c.label for c in query.lines] == ["x", "y"]
    assert query.lines[0].x == (50, 100, 200)
    assert query.lines[0].y == pytest.approx((0.5, 1.0, 2.0))
    assert draw(board, ["scaling"], tmp_path)[0]
    # On two machines only the bytes can be compared.
    other = make_run("b", {"z": 1.0}, benchmarks=("lds",))
    cost_arrays(other, put_cell, {"cpu": "Other", "cores": 64})
    board = Board.from_runs([folder, other])
    assert [p.y for p in figures.scaling(board, board.table())] == ["index (bytes)"]


def test_line_plots_of_many_methods_show_those_that_rank_first(make_run, tmp_path):
    names = {f"m{i:02d}": 2.0 - 0.1 * i for i in range(14)}
    folder = make_run("r", names, benchmarks=("lds", "selection"), change=curves_and_transfer)
    board = Board.from_runs([folder])
    (path,), _ = draw(board, ["curves"], tmp_path, form="svg")
    labels = [r.label for r in board.table().rows]
    text = path.read_text()
    assert all(f">{label}<" in text for label in labels[:10])
    assert not any(f">{label}<" in text for label in labels[10:])
    assert "(10 of 14 methods)" in text
    (path,), _ = draw(Board.from_runs([folder], methods=labels[-2:]), ["curves"], tmp_path)
    with pytest.raises(UsageError, match="unknown method 'm99'"):
        Board.from_runs([folder], methods=["m99"])


def test_svg_carries_labels_as_text_and_parses(board, tmp_path):
    written, missing = draw(board, ["fidelity-query"], tmp_path, form="svg")
    text = written[0].read_text()
    ElementTree.fromstring(text)
    assert "airrep" in text
    assert "noise ceiling" in text
    assert not missing


@pytest.mark.parametrize(("form", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_formats(board, tmp_path, form, magic):
    written, missing = draw(board, [], tmp_path, form=form, tasks=tasks_of(board))
    assert {p.stem for p in written} == {
        "fidelity-build",
        "fidelity-query",
        "fidelity-total",
        "fidelity-storage",
        "tasks",
        "transfer",
        "curves",
    }
    assert all(p.read_bytes().startswith(magic) for p in written)
    assert [m.split(" ")[0] for m in missing] == ["scaling", "budget"]


def test_the_same_records_give_the_same_file(board, tmp_path):
    for form in ("svg", "pdf", "png"):
        draw(board, ["fidelity-build"], tmp_path / "a", form=form)
        draw(board, ["fidelity-build"], tmp_path / "b", form=form)
        name = f"fidelity-build.{form}"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("form", ["svg", "pdf", "png"])
def test_a_file_of_others_is_not_written_over(board, tmp_path, form):
    draw(board, ["fidelity-build"], tmp_path, form=form)
    draw(board, ["fidelity-build"], tmp_path, form=form)  # its own is
    place = tmp_path / f"fidelity-build.{form}"
    place.write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a plot of tdabench"):
        draw(board, ["fidelity-build"], tmp_path, form=form)
    assert place.read_text() == "mine"


def test_hostile_labels_are_drawn_as_text(make_run, tmp_path):
    folder = make_run("r", {"$\\frac{1}": 1.0, "<script>\x1b[2J": 0.2}, benchmarks=("lds",))
    written, _ = draw(Board.from_runs([folder]), [], tmp_path, form="svg")
    for path in written:
        ElementTree.fromstring(path.read_text())
        assert "<script" not in path.read_text()


def test_one_kind_that_is_not_there_is_an_error(board, tmp_path):
    with pytest.raises(DataError, match="two label budgets"):
        draw(board, ["budget"], tmp_path)
    with pytest.raises(UsageError, match="unknown plot 'pie'"):
        draw(board, ["pie"], tmp_path)


def test_times_of_two_machines_are_not_plotted_together(make_run, tmp_path):
    def other(record):
        record["hardware"] = {"cpu": "Other", "cores": 64}

    a = make_run("a", {"x": 1.0}, benchmarks=("lds",))
    b = make_run("b", {"y": 0.5}, benchmarks=("lds",), change=other)
    board = Board.from_runs([a, b])
    with pytest.raises(DataError, match="several machines"):
        draw(board, ["fidelity-build"], tmp_path)
    assert draw(board, ["fidelity-storage"], tmp_path)[0]


def test_without_matplotlib_the_extra_is_named(board, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"tdabench\[plots\]"):
        draw(board, ["fidelity-build"], tmp_path)


def test_the_command_lists_what_it_wrote(board, tmp_path):
    args = [str(board.runs[0].folder), "--out", str(tmp_path / "p"), "--format", "svg"]
    done = CliRunner().invoke(command, args)
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "p" / "curves.svg") in done.stdout.splitlines()
    assert "not drawn: scaling" in done.stderr


def test_every_kind_is_in_the_help():
    text = CliRunner().invoke(command, ["--help"]).stdout
    assert all(kind in text for kind in KINDS)


def test_per_query_of_a_damaged_file_is_none(board):
    cells = {r.label: r for r in board.table().rows}["bm25"].cells
    record = next(r for r in board.runs[0].records if r.label == "bm25")
    assert figures.per_query(board, cells[record.benchmark_name]) is not None
    record.arrays_path.write_bytes(b"x")
    assert figures.per_query(board, cells[record.benchmark_name]) is None


def test_labels_do_not_overlap_and_all_methods_have_one():
    """Thirty-three methods, as on the fidelity page, many of them alike."""
    from matplotlib.text import Text

    from tdabench.report import plots

    rng = np.random.default_rng(0)
    cost, value = 10 ** rng.normal(1, 0.7, 33), rng.normal(0.4, 0.05, 33)
    cost[:6], value[:6] = 10.0, 0.42
    points = [
        figures.Point(f"a-method-{i:02d}", "ab"[i % 2], x, y, y - 0.03, y + 0.03, i == 3)
        for i, (x, y) in enumerate(zip(cost.tolist(), value.tolist()))
    ]
    figure = plots._blank(4.8, 4.6)
    axes = plots._axes(figure)
    axes.scatter(cost, value)
    axes.set_ylim(0, 1)
    axes.set_xscale("log")
    plots._name_points(figure, axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(t).shrunk(0.98, 0.9) for t in axes.texts]
    assert len(boxes) == 33
    assert not [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes) if i < j
                and a.overlaps(b)]  # fmt: skip
    # At 400 pixels of width: the figure is 4.8 inches wide.
    assert min(t.get_fontsize() for t in axes.texts) / 72 * 400 / 4.8 > 9


def test_the_cost_of_building_includes_the_preparation(make_run):
    def prepared(record):
        if record["method"]["name"] == "airrep":
            record["cost"]["prepare"] = {"seconds": 348.0, "retrainings": 48}

    board = Board.from_runs([make_run("r", {"airrep": 1.6, "logra": 1.0}, change=prepared)])
    table = board.table()
    cost = {r.label: r.cost for r in table.rows}
    points = {p.label: p for p in figures.cost_points(table, "build")}
    assert points["airrep"].x == cost["airrep"].build_seconds + 348.0
    assert points["logra"].x == cost["logra"].build_seconds + (cost["logra"].prepare_seconds or 0)
    assert figures.COST_LABELS["build"] == "prepare + build (s)"
    total = {p.label: p.x for p in figures.cost_points(table, "total")}
    for label, of in cost.items():
        assert total[label] == points[label].x + of.query_seconds
