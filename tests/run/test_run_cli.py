"""`tdabench run` end to end on the toy suite: exit codes, JSON, dry runs, replay, bars."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tdabench.cli import main
from tdabench.io import read_json
from tdabench.registry import configure

TOYS = str(Path(__file__).parent / "toys.py")


@pytest.fixture(autouse=True)
def _forget_plugins():
    yield
    configure((), ())


@pytest.fixture
def tdabench(toy_suite: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """A function from further arguments to (exit code, stdout, stderr) of `tdabench run`."""

    def run(*arguments: str) -> tuple[int, str, str]:
        common = ["--suite", str(toy_suite), "--plugin", TOYS, "--out", str(tmp_path / "run")]
        code = main(["run", *common, "--threads", "1", *arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_board_is_on_stdout_and_progress_on_stderr(tdabench):
    code, out, err = tdabench("--methods", "toy,raises", "--jobs", "2")
    assert code == 1
    assert "toy · target tiny (cold) · 60 train · 12 queries · 8 groups x 2 seeds" in out
    assert "raises  failed: ZeroDivisionError: one by nought" in out
    assert "[2/2]" in err
    assert "toy · tiny · lds: lds" in err
    code, out, err = tdabench("--methods", "toy", "--json")
    assert code == 0
    assert err == "1 of 1 cells are on disk\n"
    (cell,) = json.loads(out)["cells"]
    assert cell["status"] == "ok"


def test_what_is_cached_loads_no_torch(toy_suite: Path, tmp_path: Path, tdabench):
    tdabench("--methods", "toy")
    arguments = ["run", "--suite", str(toy_suite), "--plugin", TOYS, "--methods", "toy"]
    code = f"""
import sys
from tdabench.cli import main
main({[*arguments, "--out", str(tmp_path / "run")]!r})
print(*[m for m in ("torch", "transformers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
    assert "1 of 1 cells are on disk" in done.stderr


def test_a_dry_run_writes_nothing(tdabench, tmp_path: Path):
    code, out, _ = tdabench("--methods", "toy,shape", "--dry-run")
    assert code == 0
    assert out.count("to run") == 2
    assert not (tmp_path / "run").exists()
    tdabench("--methods", "toy")
    cells = json.loads(tdabench("--methods", "toy,shape", "--dry-run", "--json")[1])["cells"]
    assert [c["state"] for c in cells] == ["on disk", "to run"]


def test_a_manifest_replays_a_run(tdabench, tmp_path: Path):
    tdabench("--methods", "toy", "--set", "toy.size=5", "--seed", "3")
    first = json.loads(
        tdabench("--methods", "toy", "--set", "toy.size=5", "--seed", "3", "--json")[1]
    )
    manifest = tmp_path / "run" / "manifest.json"
    assert read_json(manifest)["request"]["sets"] == ["toy.size=5"]
    again = ["run", "--from", str(manifest), "--plugin", TOYS, "--out", str(tmp_path / "again")]
    assert main([*again, "--quiet"]) == 0
    (record,) = (tmp_path / "again" / "cells").glob("*.json")
    one, other = first["cells"][0], read_json(record)
    assert other["key"] == one["key"]
    assert other["metrics"] == one["metrics"]
    assert other["method"]["label"] == "toy[size=5]"


def test_bars_on_a_terminal(toy_suite: Path, tmp_path: Path):
    pty = pytest.importorskip("pty")
    reader, writer = pty.openpty()
    code = "import sys; from tdabench.cli import main; sys.exit(main(sys.argv[1:]))"
    common = ["--suite", str(toy_suite), "--plugin", TOYS, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", *common, "--methods", "toy,raises"],
        stdout=subprocess.PIPE,
        stderr=writer,
        text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(writer)
    seen = b""
    while True:
        try:
            block = os.read(reader, 4096)
        except OSError:
            break
        if not block:
            break
        seen += block
    out, _ = process.communicate(timeout=120)
    os.close(reader)
    text = seen.decode()
    assert process.returncode == 1
    assert "✓" in text
    assert "✗" in text
    assert "toy on tiny: " in text
    assert "Traceback" not in text
    assert "\x1b" not in out


def test_an_observer_hears_of_every_cell(tdabench, tmp_path: Path):
    heard = tmp_path / "heard.txt"
    observer = tmp_path / "observer.py"
    observer.write_text(
        "from tdabench.api import hookimpl\n"
        "@hookimpl\n"
        "def tdabench_record(record, folder):\n"
        f"    with open({str(heard)!r}, 'a') as f:\n"
        "        f.write(record['method']['label'] + '\\n')\n"
        "    raise ValueError('and then it broke')\n"
    )
    code, _, err = tdabench("--methods", "toy,shape", "--plugin", str(observer))
    assert code == 1
    assert sorted(heard.read_text().split()) == ["shape", "toy"]
    assert "observer.py (--plugin) raised ValueError: and then it broke" in err
