"""Exports carry the board's figures, whatever the labels hold."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from tdabench.cli.leaderboard import command
from tdabench.errors import UsageError
from tdabench.report.board import Board
from tdabench.report.export import FIELDS, export

EVIL = (
    '=cmd|"/c calc"!A1 \\write18{x} & 50% $x_1$ #~^ <img src=x onerror=alert(1)> `a` **b**'
    "\x1b[2J\u202e"
)


@pytest.fixture
def board(plain_run):
    return Board.from_runs([plain_run])


def test_json_holds_every_figure(board):
    data = json.loads(export(board, "json"))
    table = board.table()
    for row, stored in zip(table.rows, data["tables"][0]["rows"], strict=True):
        assert stored["label"] == row.label
        for name, cell in row.cells.items():
            for field in FIELDS:
                assert stored["cells"][name][field] == getattr(cell, field)
        assert stored["cost"]["build_seconds"] == row.cost.build_seconds
    assert data["runs"][0]["hardware"]["cpu"] == "Testor 9"
    assert data["runs"][0]["command"][:2] == ["tdabench", "run"]


def test_csv_round_trips_at_full_precision(board):
    lines = list(csv.DictReader(io.StringIO(export(board, "csv"))))
    for row, line in zip(board.table().rows, lines, strict=True):
        cell = row.cells["lds"]
        assert line["method"] == row.label
        assert line["lds_status"] == cell.status
        if cell.ok:
            assert float(line["lds"]) == cell.value
            assert line["letters"] == line["lds_letters"] == cell.letters
            assert int(line["lds_rank_low"]) == cell.rank_low <= cell.rank <= cell.rank_high
            assert float(line["query_ms"]) == row.cost.query_ms
        else:
            assert (line["lds"], line["lds_reason"]) == ("", cell.reason)


def test_markdown_has_a_row_a_method_and_as_many_cells_as_headers(board):
    text = export(board, "md")
    lines = [x for x in text.splitlines() if x.startswith("|")]
    assert len(lines) == 2 + len(board.table().rows)
    assert len({x.replace("\\|", "").count("|") for x in lines}) == 1
    assert "*failed: returned NaN for 3 queries*" in text
    assert re.search(r"\| 1 a \| airrep \| \*\*0\.\d{3}\*\*", text)


def test_latex_bolds_all_tied_best_and_marks_ties(make_run):
    folder = make_run("r", {"a": 1.0, "b": 0.99, "c": 0.1}, benchmarks=("lds",))
    text = export(Board.from_runs([folder]), "latex")
    assert text.count(r"\textbf{") == 2
    assert r"\label{tab:pocket-qwen2-1m}" in text
    # Both methods that are not told apart from the best, and the one that is.
    assert text.count(r"\textsuperscript{a}") == 2
    assert text.count(r"\textsuperscript{b}") == 1
    rows = [x for x in text.splitlines() if x.endswith(r"\\")]
    assert len({x.count(" & ") for x in rows}) == 1
    assert all(word in text for word in (r"\toprule", r"\midrule", r"\bottomrule"))


def test_latex_prints_notes_and_has_one_minus_sign(make_run):
    failed = {"demo": ("failed", "returned NaN")}
    folder = make_run("r", {"airrep": 1.0, "b": -1.0}, benchmarks=("lds",), failed=failed)
    text = export(Board.from_runs([folder]), "latex")
    assert [x for x in text.splitlines() if x.startswith("%")] == [r"% needs \usepackage{booktabs}"]
    assert "airrep's prepare phase: 4,800 retrainings" in text
    assert "demo: failed, returned NaN." in text
    said = text.split("footnotesize")[1]
    assert not re.search(r"\w (?:demo|airrep|rank|b): ", said)  # sentences end
    (row,) = [x for x in text.splitlines() if x.startswith(tuple("123456789")) and " & b & " in x]
    assert row.count("$-$") == 4  # value, interval, share
    assert "-" not in row.replace("$-$", "").replace("--", "")


def test_latex_bolds_the_smallest_where_less_is_better(make_run):
    def lower(record):
        for m in record["metrics"].values():
            m["higher_is_better"] = False

    folder = make_run("r", {"a": 3.0, "b": 0.0}, benchmarks=("transfer",), change=lower)
    board = Board.from_runs([folder])
    value = min(r.cells["transfer"].value for r in board.table().rows)
    assert rf"\textbf{{{value:.3f}}}".replace("-", "$-$") in export(board, "latex")


@pytest.fixture
def evil_board(make_run):
    def spoil(record):
        record["notes"] = [EVIL]
        record["target"]["name"] = EVIL
        record["method"]["params"] = {EVIL: float("nan")}

    folder = make_run(
        "r", {EVIL: 1.0, "b|c": 0.1}, failed={"d": ("failed", EVIL + "\n")}, change=spoil
    )
    return Board.from_runs([folder])


@pytest.mark.parametrize("form", ["json", "csv", "md", "latex"])
def test_no_format_lets_control_characters_through(evil_board, form):
    text = export(evil_board, form)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_csv_runs_no_formula(evil_board):
    cells = [c for line in csv.reader(io.StringIO(export(evil_board, "csv"))) for c in line]
    assert any("calc" in c for c in cells)
    assert not any(c.startswith(("=", "+", "@")) for c in cells)
    numbers = [c for c in cells if c.startswith("-")]
    assert all(float(c) <= 0 for c in numbers)


def test_markdown_interprets_nothing_of_a_label(evil_board):
    text = export(evil_board, "md")
    assert not re.search(r"(?<!\\)<img", text)
    lines = [x for x in text.splitlines() if x.startswith("|")]
    assert len({re.sub(r"\\.", "", x).count("|") for x in lines}) == 1


def test_latex_interprets_nothing_of_a_label(evil_board):
    text = export(evil_board, "latex")
    body = "\n".join(x for x in text.splitlines() if not x.startswith("%"))
    assert r"\write18" not in body
    assert r"\textbackslash{}write18\{x\}" in body
    for special in ("&", "%", "#"):
        at = [m.start() for m in re.finditer(re.escape(special), body)]
        separators = [i for i in at if special == "&" and body[i - 1 : i + 2] == " & "]
        assert all(body[i - 1] == "\\" for i in at if i not in separators)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(evil_board, tmp_path):
    head = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}"
    text = f"{head}\\begin{{document}}{export(evil_board, 'latex')}\\end{{document}}"
    (tmp_path / "t.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_json_without_nan(evil_board):
    def refuse(word):
        raise AssertionError(word)

    json.loads(export(evil_board, "json"), parse_constant=refuse)


def test_an_unknown_format_is_named(board):
    with pytest.raises(UsageError, match="unknown format 'yaml'"):
        export(board, "yaml")


def test_columns_and_sort_reach_the_reading_formats(board):
    text = export(board, "md", columns=["method", "bytes"], sort="bytes")
    lines = [x for x in text.splitlines() if x.startswith("|")]
    assert lines[0] == "| method | bytes/ex |"
    with pytest.raises(UsageError, match="unknown column"):
        export(board, "latex", columns=["speed"])


@pytest.mark.parametrize("form", ["table", "json", "csv", "md", "latex"])
def test_the_command_prints_each_format(plain_run, form):
    done = CliRunner().invoke(command, [str(plain_run), "--format", form])
    assert done.exit_code == 0, done.output
    assert "airrep" in done.stdout
    assert "\x1b" not in done.stdout
