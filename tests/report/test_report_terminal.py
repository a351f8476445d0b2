"""The board as text: at several widths, in a pipe, without colour, with hostile strings."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from tdabench.errors import UsageError
from tdabench.report.board import Board
from tdabench.report.compare import compare, print_comparison
from tdabench.report.terminal import hang, print_board, title
from tdabench.report.text import clean, count, milliseconds, number, seconds

HOSTILE = "evil[bold red]\x1b[31m\x1b]0;title\x07\u202egnp.exe\u200b\r\nrank 1 \u009b2J<script>"


def printed(board, width=None, encoding="utf-8", env=None, **more) -> str:
    """What is written: to a terminal of `width`, or into a pipe when there is none."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=stream,
        force_terminal=width is not None,
        width=width,
        _environ={"TERM": "xterm-256color", **(env or {})},
    )
    print_board(board, console, **more)
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture
def board(plain_run):
    return Board.from_runs([plain_run])


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140, 200])
def test_no_line_is_wider_than_the_terminal(board, width):
    lines = plain(printed(board, width)).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    text = "\n".join(lines)
    for label in ("airrep", "logra", "ekfac", "bm25", "random", "demo"):
        assert label in text
    assert "returned NaN" in text


def test_60_columns_keep_rank_method_value_and_share(board):
    text = plain(printed(board, 60))
    assert re.search(r"^ 1 a +airrep +0\.\d\d \[0\.\d\d, 0\.\d\d\] +█+░+ +\d+%", text, re.M)
    assert re.search(r"^ 2–3 b +(logra|ekfac) ", text, re.M)
    assert "Not shown at this width:" in text
    assert "bytes/ex" in text.split("Not shown")[1]


def test_80_columns_show_cost_beside_fidelity(board):
    header = next(line for line in plain(printed(board, 80)).splitlines() if "method" in line)
    for word in ("rank", "LDS [95%]", "of ceiling", "build", "query"):
        assert word in header


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_what_a_column_means_is_said_where_it_is_shown(board, width):
    lines = plain(printed(board, width)).splitlines()
    header = next(line for line in lines if "method" in line)
    notes = " ".join(lines[lines.index(header) :])
    assert ("overall" in header) == ("overall: mean rank" in notes)
    assert ("↓" in header) == ("↓: lower is better" in notes)


def test_140_columns_show_everything(board):
    text = plain(printed(board, 140))
    header = next(line for line in text.splitlines() if "method" in line)
    for word in ("LDS [95%]", "transfer", "selection", "build", "query", "bytes/ex"):
        assert word in header
    assert "Not shown" not in text
    assert "qwen2-1m (instruct) · 200 train · 40 queries · 60 groups" in text
    assert "airrep's prepare phase: 4,800 retrainings, 41 min (once)." in text
    assert "do not differ significantly (5%, paired test" in " ".join(text.split())
    assert "tdabench show demo" in text


def test_a_board_says_whether_it_speaks_of_new_tasks(make_run):
    clustered = Board.from_runs([make_run("tasks", benchmarks=("lds",), tasks=10)])
    text = plain(printed(clustered, 140))
    assert "40 queries of 10 tasks · 60 groups" in text
    assert "Intervals and ranks hold for new tasks (10 tasks, resampled whole)" in text
    for row in clustered.table().rows:
        cell = row.cells["lds"]
        assert cell.high - cell.low >= cell.high_these_tasks - cell.low_these_tasks > 0
    few = Board.from_runs([make_run("few", benchmarks=("lds",), tasks=4)])
    assert "new tasks" not in plain(printed(few, 140))
    assert few.table().column("lds").tasks is None
    found = compare("bm25", "airrep", [clustered.runs[0].folder])
    out = io.StringIO()
    print_comparison(found, Console(file=out, width=140))
    assert "hold for new tasks (10 tasks, resampled whole)" in out.getvalue()


def test_figures_shown_are_those_of_the_board(board):
    row = board.table().rows[0]
    cell = row.cells["lds"]
    line = next(x for x in printed(board).splitlines() if " airrep " in x)
    assert f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}]" in line
    assert f"{row.cells['transfer'].value:.3f}" in line
    assert f"{cell.share * 100:.0f}%" in line


def test_a_pipe_gets_the_whole_table_without_escapes_and_always_the_same(board):
    text = printed(board)
    assert "\x1b" not in text
    assert "bytes/ex" in text
    assert text == printed(board, env={"COLUMNS": "30", "FORCE_COLOR": ""})
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_no_color_leaves_no_colour(board):
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])m")
    assert colour.search(printed(board, 80))
    assert not colour.search(printed(board, 80, env={"NO_COLOR": "1"}))


def test_an_ascii_stream_gets_ascii(board):
    text = printed(board, encoding="ascii")
    assert "###" in text
    assert "airrep" in text


def test_columns_and_sort_and_benchmark(board):
    text = printed(board, columns=["method", "bytes", "family"], sort="bytes")
    lines = text.splitlines()
    assert lines[1].split() == ["method", "bytes/ex", "family"]
    sizes = [int(line.split()[1]) for line in lines[2:7]]
    assert sizes == sorted(sizes)
    assert "ranked by selection" in printed(board, benchmark="selection")
    with pytest.raises(UsageError, match="unknown column 'speed'"):
        printed(board, columns=["speed"])
    with pytest.raises(UsageError, match="unknown benchmark"):
        printed(board, benchmark="nope")


def test_hostile_strings_do_nothing(make_run):
    def spoil(record):
        record["notes"] = [HOSTILE * 100]
        record["target"]["name"] = HOSTILE
        record["method"]["family"] = HOSTILE

    folder = make_run(
        "r",
        {HOSTILE: 1.0, "b[/]": 0.3, "x" * 5000: 0.2},
        failed={f"bad {HOSTILE}": ("failed", HOSTILE + "y" * 3_000_000)},
        change=spoil,
        manifest={"suite": {"name": HOSTILE}},
    )
    board = Board.from_runs([folder])
    for width in (60, 80, 140, None):
        text = printed(board, width)
        assert len(text) < 100_000
        shown = plain(text)
        for bad in ("\x1b", "\x07", "\u202e", "\u200b", "\r", "\x9b"):
            assert bad not in shown
        assert "[bold red]" in shown
        if width:
            assert max(cell_len(line) for line in shown.splitlines()) <= width
        assert not any(line.startswith("rank 1") for line in shown.splitlines())


def test_wide_characters_keep_columns_aligned(make_run):
    folder = make_run("r", {"方法一": 1.0, "b": 0.1}, benchmarks=("lds",))
    lines = plain(printed(Board.from_runs([folder]), 80)).splitlines()
    found = [(line, re.search(r" -?0\.\d", line)) for line in lines]
    at = [cell_len(line[: m.start()]) for line, m in found if m and "[" in line]
    assert len(at) == 2
    assert at[0] == at[1]


def test_an_empty_run_says_what_to_do(make_run):
    assert "tdabench run" in printed(Board.from_runs([make_run("r", {})]))


def test_a_run_where_everything_failed_still_prints(make_run):
    folder = make_run("r", {}, failed={"a": ("oom", "needed 9 GiB"), "b": ("timeout", "")})
    text = printed(Board.from_runs([folder]), 80)
    assert "oom: needed 9 GiB" in plain(text)
    assert "no reason was recorded" in plain(text)


def test_a_cell_that_failed_elsewhere_is_in_a_footnote(make_run, put_cell):
    folder = make_run("r", {"a": 1.0, "b": 0.2}, benchmarks=("lds", "transfer"))

    from tdabench.report.records import read_run

    record = next(
        r for r in read_run(folder).records if (r.label, r.benchmark_name) == ("a", "transfer")
    )
    put_cell(folder, {**record.data, "status": "timeout", "reason": "ran past 60 s"})
    text = printed(Board.from_runs([folder]))
    assert "a on transfer: timeout: ran past 60 s." in text
    assert re.search(r"^ 1 +a .* timeout ", text, re.M)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "–"),
        (0.0, "0 ms"),
        (0.0004, "0.4 ms"),
        (0.0123, "12 ms"),
        (0.9999, "1,000 ms"),
        (3.21, "3.2 s"),
        (59.0, "59 s"),
        (119.0, "119 s"),
        (2460.0, "41 min"),
        (9000.0, "2.5 h"),
    ],
)
def test_durations(value, said):
    assert seconds(value) == said


def test_numbers():
    assert [number(v) for v in (0.384, -0.001, -0.02, None)] == ["0.38", "0.00", "-0.02", "–"]
    assert [count(v) for v in (2000.0, 0.5, 12.4, None)] == ["2,000", "0.5", "12", "–"]
    assert milliseconds(0.03) == "0.03 ms"


def test_clean_escapes_what_cannot_be_seen_and_keeps_what_can():
    assert clean("naïve 方法 🙂 עברית") == "naïve 方法 🙂 עברית"
    assert clean("a\x1b[31m\u202eb\u2028c\ud800") == "a\\x1b[31m\\u202eb\\u2028c\\ud800"
    assert clean("a\r\nb\tc") == "a b c"
    assert clean("a\r\nb", keep_newlines=True) == "a\nb"
    assert clean("x" * 10, limit=4) == "xxxx…"
    assert len(clean("e" + "\u0301" * 1000)) == 5


def test_a_column_names_its_unit(make_run):
    def with_unit(record):
        for m in record["metrics"].values():
            m["unit"] = "nats"

    folder = make_run("r", {"a": 1.0, "b": 0.1}, benchmarks=("removal",), change=with_unit)
    (column,) = Board.from_runs([folder]).table().columns
    assert title(column) == "removal (nats)"


def test_a_hanging_paragraph_has_single_spaces():
    """Where a line is broken first at one width, then at another."""
    text = "the suite's corpus has no training example with the field 'fact'. Give it an asset, "
    text = f"tfidf, hidden and random on tracing: failed: {text}or mark its own (docs/benchmarks)."
    for width in range(40, 90):
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=True, color_system=None)
        hang(console, Text(), Text(text))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert " ".join(line.strip() for line in lines) == text
