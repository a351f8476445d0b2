"""`tdabench check`: exit codes, selection, JSON."""

from __future__ import annotations

import json

import pytest

from tdabench.cli import main
from tdabench.registry import configure

BROKEN = """
from dataclasses import dataclass
import numpy as np
from tdabench.api import RepresentationMethod, hookimpl

@dataclass(frozen=True, kw_only=True)
class Noisy(RepresentationMethod):
    name = "noisy"
    summary = "draws from the global generator"
    width: int = 8
    def encode(self, context, examples, role):
        return np.random.random((len(examples), self.width)).astype(np.float32)

@hookimpl
def tdabench_methods():
    return [Noisy]
"""


@pytest.fixture
def noisy(tmp_path):
    path = tmp_path / "noisy_method.py"
    path.write_text(BROKEN)
    yield str(path)
    configure((), ())


def test_a_broken_law_is_exit_code_1(noisy, capsys):
    laws = ("--law", "same-seed-same-scores", "--law", "described")
    assert main(["check", "noisy", "--plugin", noisy, *laws]) == 1
    out = capsys.readouterr().out
    assert "✗ same-seed-same-scores" in out
    assert "Draw from context.rng(name)" in out
    assert "✓ described" in out
    assert "1 passed, 1 failed" in out


def test_json_and_parameters(noisy, capsys):
    args = ["check", "noisy", "--plugin", noisy, "--law", "prints-nothing", "--json"]
    assert main([*args, "--set", "width=4", "--set", "noisy.width=5"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["method"], row["law"], row["status"]) == ("noisy", "prints-nothing", "passed")
    for wrong, said in (
        (["--set", "widht=4"], "Did you mean 'width'"),
        (["--set", "width"], "KEY=VALUE"),
        (["--set", "other.width=3"], "not one of the"),
        (["--law", "print-nothing"], "Did you mean 'prints-nothing'"),
        (["--asset", "x"], "NAME=PATH"),
    ):
        assert main([*args, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_method_may_ask_for_lighter_settings(noisy, tmp_path, capsys):
    path = tmp_path / "lighter.py"
    path.write_text(
        BROKEN.replace('"noisy"', '"lighter"').replace(
            "    width: int = 8\n",
            '    check_settings = {"width": 3}\n    width: int = 8\n',
        )
    )
    args = ["check", "lighter", "--plugin", str(path), "--law", "prints-nothing"]
    assert main(args) == 0
    assert "lighter (width=3)" in capsys.readouterr().out
    assert main([*args, "--set", "width=4"]) == 0
    assert "width=3" not in capsys.readouterr().out
    assert main([*args, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["settings"] == {"width": 3}


def test_nothing_checked_is_exit_code_2(capsys):
    assert main(["check", "airrep", "--law", "prints-nothing"]) == 2
    captured = capsys.readouterr()
    assert "skipped" in captured.out
    assert "airrep was not checked" in captured.err
    assert main(["check"]) == 2
    assert main(["check", "tfid"]) == 2
    assert "Did you mean 'tfidf'" in capsys.readouterr().err


def test_laws_in_words(capsys):
    assert main(["check", "--laws", "--json"]) == 0
    laws = json.loads(capsys.readouterr().out)
    assert len(laws) == 25
    assert laws["prints-nothing"].startswith("Nothing is printed")
    assert main(["check", "--laws"]) == 0
    assert "group-of-one-equals-score" in capsys.readouterr().out
