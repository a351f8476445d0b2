"""kill -9 at random moments: finished cells stay, nothing half written is read, the board is the
same. Two kills by default; a hundred with TDABENCH_LONG=1, or TDABENCH_KILLS."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdabench.io import read_arrays, read_json

TOYS = str(Path(__file__).parent / "toys.py")
ROUNDS = int(os.environ.get("TDABENCH_KILLS", 100 if os.environ.get("TDABENCH_LONG") else 2))


def finished(out: Path) -> dict[str, tuple[str, object]]:
    """When each finished cell was measured, and what came out. Fails on a half-written file."""
    found = {}
    for path in (out / "cells").glob("*.json"):
        record = read_json(path)
        if record["status"] == "ok":
            read_arrays(path.with_suffix(".safetensors"))
            found[record["key"]] = (record["started"], record["metrics"])
    return found


@pytest.mark.slow
def test_killed_at_any_moment_a_rerun_ends_in_the_same_board(toy_suite: Path, tmp_path: Path):
    moments = random.Random(0)
    code = "import sys; from tdabench.cli import main; sys.exit(main(sys.argv[1:]))"
    asked = ["run", "--suite", str(toy_suite), "--plugin", TOYS, "--methods", "toy,prints,slow"]
    command = [sys.executable, "-c", code, *asked, "--threads", "1", "--json", "--out"]

    start = time.monotonic()
    reference = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, check=True)
    longest = time.monotonic() - start
    whole = {c["key"]: c["metrics"] for c in json.loads(reference.stdout)["cells"]}

    out, kills, ends = tmp_path / "killed", 0, 0
    while kills < ROUNDS:
        before = finished(out)
        process = subprocess.Popen(
            [*command, str(out)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        try:
            assert process.wait(moments.uniform(0.2, longest)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        _, err = process.communicate()
        assert b"Traceback" not in err
        after = finished(out)
        assert {k: after.get(k) for k in before} == before, f"kill {kills} lost or redid a cell"
        if len(after) == len(whole):  # the next kill shall meet unfinished work
            ends += 1
            out = tmp_path / f"killed-{ends}"
    done = subprocess.run([*command, str(out)], capture_output=True, check=True)
    assert {c["key"]: c["metrics"] for c in json.loads(done.stdout)["cells"]} == whole
    assert not (out / "work").exists()
    assert [p.name for p in out.rglob(".*")] == [".lock"]
