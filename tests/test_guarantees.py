"""Every promise of docs/guarantees.md names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
ROWS = [
    line
    for line in PAGE.splitlines()
    if line.startswith("| ")
    and not line.startswith(("| guarantee |", "| the plugin |", "| input |"))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:50])
def test_the_tests_that_show_a_promise_exist(row: str):
    named = re.findall(r"`(tests/[\w/.]+)(?:::(\w+))?`", row)
    assert named, "a promise without a test"
    for file, test in named:
        path = ROOT / file
        assert path.is_file(), f"{file} is gone"
        functions = {n.name for n in ast.walk(ast.parse(path.read_text()))
                     if isinstance(n, ast.FunctionDef)}  # fmt: skip
        assert not test or test in functions, f"{file} has no {test}"
        assert test or any(f.startswith("test_") for f in functions)


def test_every_test_of_a_fault_shows_a_promise():
    """A file of tests/faults that the page does not name shows what nobody was promised."""
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        assert f"tests/faults/{path.name}" in PAGE


def test_the_page_lists_the_steps_of_the_long_check():
    from tests.long_check import steps

    text = PAGE[PAGE.index("## The long check") :].split("\n##")[0]
    named = [x for line in text.splitlines() if line.startswith("- ")
             for x in re.findall(r"`([\w-]+)`", line.partition(":")[0])]  # fmt: skip
    assert sorted(named) == sorted(steps(Path("x")))
