"""The toy suite of tests/run, and commands as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.run.conftest import make_suite, toy_suite, toys  # noqa: F401  (fixtures)

CODE = "import sys; from tdabench.cli import main; sys.exit(main())"


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-c", CODE, *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


@pytest.fixture
def tdabench(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`tdabench ARGUMENTS` as a process in an empty folder, with its output."""

    def run(*arguments: Any, cwd: Path = tmp_path, **options: Any) -> Any:
        return subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=300,
            env=environment(),
            **options,
        )

    return run


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr of a command that failed as it should."""
    told = [x for x in done.stderr.splitlines() if not x.startswith("tdabench: warning: ")]
    assert done.returncode == code, done.stderr
    assert len(told) == 1, done.stderr
    assert told[0].startswith("tdabench: ")
    assert done.stdout == ""
    return told[0]
