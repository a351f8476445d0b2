"""Runs whose LDS follows from a truth beside them, and repositories of submissions of them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdabench.io import sha256_file, write_json
from tdabench.report.records import read_run
from tdabench.results.pack import pack

_spec = importlib.util.spec_from_file_location(
    "report_fixtures", Path(__file__).parents[1] / "report" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)

METHODS = {"airrep": 1.6, "logra": 1.0, "bm25": 0.35}


def honest_run(folder: Path, methods: dict[str, float] | None = None, **more: Any) -> Path:
    """A run of a suite that is not installed; its records name the truth beside them."""

    def named(record: dict[str, Any]) -> None:
        record["suite"] = {"name": "trial", "version": 1}
        record["target"]["label"] = "instruct"
        record["method"]["plugin"] = "test 1.0"
        change(record)

    change = more.pop("change", lambda record: None)
    suite = {"suite": {"name": "trial", "version": 1, "fingerprint": "50174e"}}
    _fixtures.write_run(
        folder, methods or METHODS, benchmarks=("lds",), change=named, manifest=suite, **more
    )
    truth = sha256_file(folder / "truth.safetensors")[:16]
    for record in read_run(folder).records:
        write_json(record.path, {**record.data, "truth": truth})
    return folder


def submit(run: Path, to: Path, **more: Any) -> Any:
    truths = more.pop("truths", [run / "truth.safetensors"])
    return pack(read_run(run), to, truths=truths, **more)


@pytest.fixture(scope="session")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("results")
    run = honest_run(folder / "run", failed={"demo": ("oom", "needed 4 GB")})
    submit(run, folder / "repository", by="A. Author")
    return folder / "repository", run


@pytest.fixture
def repository(submitted: tuple[Path, Path], tmp_path: Path) -> Path:
    """A results repository of four methods on one target; the run and truth are beside it."""
    shutil.copytree(submitted[1], tmp_path / "run")
    return Path(shutil.copytree(submitted[0], tmp_path / "repository"))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return lambda name="run", *args, **more: honest_run(tmp_path / name, *args, **more)


@pytest.fixture
def submit_run() -> Callable[..., Any]:
    return submit


@pytest.fixture
def tdabench() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`tdabench("board", …)`: the command as a process."""

    def call(*args: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tdabench", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    return call
