"""Damaged input of every kind: never a traceback, a hang or a silent skip.

A small share of the long mode (`python tests/faults/fuzz.py --inputs 100000`), drawn and shrunk
by hypothesis; TDABENCH_LONG=1 multiplies it by twenty.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import fuzz

MORE = 20 if os.environ.get("TDABENCH_LONG") else 1
INPUTS = {"suite": 150, "corpus": 200, "header": 200, "labels": 150, "records": 60, "cli": 40}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, object]]:
    """Of every kind, a folder and what is whole in it."""
    found = {}
    for name, case in fuzz.CASES.items():
        folder = tmp_path_factory.mktemp(name).resolve()
        found[name] = (folder, case.prepare(folder))
    return found


@pytest.mark.parametrize("kind", INPUTS)
def test_damage_is_read_or_refused_in_one_line(kind: str, whole):
    folder, intact = whole[kind]
    case = fuzz.CASES[kind]

    # Seeds, not st.randoms(): twenty times as quick, and a failing seed is replayed by fuzz.py.
    @settings(
        max_examples=INPUTS[kind] * MORE,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**64))
    def one(seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy on values such as 1e308
            fuzz.once(case, random.Random(seed), folder, intact)

    one()


def test_intact_input_is_read(whole):
    """The cases reject damage, not everything: each reads what it wrote."""
    from tdabench.data.files import read_jsonl
    from tdabench.io import read_arrays
    from tdabench.run import Request, RunFolder, make_plan
    from tdabench.truth.store import Truth

    folder, _ = whole["suite"]
    (folder / "good.toml").write_bytes(fuzz.as_toml(fuzz.SUITE))
    plan = make_plan(Request(str(folder / "good.toml")))
    assert {c.method.label for c in plan.cells} == {"tfidf", "big"}
    assert len(read_jsonl(folder / "corpus.jsonl")) == len(fuzz.ROWS)
    folder, (_, arrays) = whole["header"]
    assert read_arrays(folder / "whole.safetensors")[0].keys() == arrays.keys()
    folder, _ = whole["labels"]
    assert Truth.load(folder / "truth.safetensors").n_seeds == 2
    folder, _ = whole["records"]
    run = RunFolder(folder / "run")
    assert len(list(run.records())) == 2
    assert run.damaged() == []


def test_the_same_of_command_lines_as_processes(tmp_path: Path):
    """A few of them outside this process, where nothing of pytest's is in the way."""
    folder = tmp_path.resolve()
    tree = fuzz.prepare_cli(folder)
    code = "import sys; from tdabench.cli import main; sys.exit(main())"
    for seed in range(4 * MORE):
        arguments = fuzz.draw_arguments(random.Random(f"process-{seed}"), tree)
        arguments = [a for a in arguments if "\0" not in a and a != "--debug"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            cwd=folder / "deep" / "deeper" / "deepest",
            timeout=120,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        fuzz.held(arguments, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_the_long_mode_finds_what_is_planted(tmp_path: Path, monkeypatch, capsys):
    """A reader that trips over one input in some is found, counted and named with its seed."""

    def reader(rng: random.Random, folder: Path, whole: object) -> None:
        assert b"\0" not in fuzz.damage(rng, b"x" * 50), "a byte of nought"

    monkeypatch.setitem(fuzz.CASES, "corpus", fuzz.Case("corpus", fuzz.nothing, reader, 1.0))
    assert fuzz.long_mode(200, 0, "corpus", keep_going=True) > 0
    assert "corpus 0 " in capsys.readouterr().out
