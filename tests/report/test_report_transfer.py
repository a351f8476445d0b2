"""The source x target matrix, from records of two sources."""

from __future__ import annotations

import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from tdabench.cli.leaderboard import command
from tdabench.errors import DataError, UsageError
from tdabench.report.board import Board
from tdabench.report.transfer import print_transfer, transfer_matrix

LDS = {"a": {"source": 0.5, "b": 0.3}, "b": {"source": 0.6, "a": 0.2, "c": 0.1}}


@pytest.fixture
def board(make_run):
    def of(source):
        def change(record):
            record["target"] = {"name": source, "label": source, "fingerprint": source}
            if record["benchmark"]["name"] == "transfer":
                for label, value in LDS[source].items():
                    record["metrics"][f"lds[{label}]"] = {"value": value}
                    record["metrics"][f"ceiling[{label}]"] = {"value": 0.9}
                record["metrics"] |= {"truth[c]": {"value": 0.4}, "agnostic[c]": {"value": 0.65}}

        return make_run(f"from-{source}", {"logra": 1.0}, change=change)

    return Board.from_runs([of("a"), of("b")])


def test_the_diagonal_is_in_model_and_every_target_has_its_ceiling(board):
    m = transfer_matrix(board, "logra")
    assert (m.sources, m.targets) == (("a", "b"), ("a", "b", "c"))
    assert m.lds == {("a", "a"): 0.5, ("a", "b"): 0.3, ("b", "b"): 0.6,
                     ("b", "a"): 0.2, ("b", "c"): 0.1}  # fmt: skip
    assert m.ceiling == {"a": 0.9, "b": 0.9, "c": 0.9}
    out = io.StringIO()
    print_transfer(m, Console(file=out, width=80))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[1][-3:] == ["a", "b", "c"]
    assert lines[2] == ["a", "0.500", "0.300", "–"]
    assert lines[3] == ["b", "0.200", "0.600", "0.100"]
    assert lines[4] == ["others'", "truths", "–", "–", "0.400"]
    assert lines[5] == ["knowing", "no", "model", "–", "–", "0.650"]
    assert lines[6] == ["noise", "ceiling", "0.900", "0.900", "0.900"]


def test_what_is_not_there_is_said(board, make_run):
    with pytest.raises(UsageError, match="Did you mean 'logra'"):
        transfer_matrix(board, "lora")
    other = Board.from_runs([make_run("other", {"logra": 1.0}, benchmarks=("lds",))])
    with pytest.raises(DataError, match="no result on transfer"):
        transfer_matrix(other, "logra")


def test_the_command_prints_it(board):
    folders = [str(r.folder) for r in board.runs]
    done = CliRunner().invoke(command, [*folders, "--transfer", "logra", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.output)
    assert data["lds"]["a"] == {"a": 0.5, "b": 0.3, "c": None}
    assert data["ceiling"]["c"] == 0.9
    assert data["truth"]["c"] == 0.4
    assert data["agnostic"]["c"] == 0.65
