"""Everything once, at length: what the suite samples is done in full. Hours; made for a weekly job.

    python tests/long_check.py                  all steps, in the folder long-check/
    python tests/long_check.py --only fuzz,kills
    python tests/long_check.py --list

Each step is a command of its own with a log. A step that passed is not repeated in the same folder,
so that a check which was stopped goes on; exit status 1 when a step failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q"]
TDABENCH = [PYTHON, "-m", "tdabench"]


def steps(out: Path) -> dict[str, list[str]]:
    """Step -> command. `same` compares what `pocket` and `again` left."""
    everything, page = str(out / "all"), str(out / "all.html")
    methods = "tfidf,bm25,hidden,gradcos,logra,airrep,trak"
    pocket, again, replay = (str(out / name) for name in ("pocket", "again", "replay"))
    chosen = ["--methods", methods, "--benchmarks", "lds", "--out"]
    return {
        "doctor": [*TDABENCH, "doctor"],
        "suite": PYTEST,
        "kills": [*PYTEST, "tests/faults/test_kills.py", "tests/run/test_kill.py"],
        "fuzz": [PYTHON, "tests/faults/fuzz.py", "--inputs", "100000", "--keep-going"],
        "all-methods": [*TDABENCH, "run", "--out", everything, "--log-file", str(out / "log")],
        "verify": [*TDABENCH, "verify", everything],
        "report": [*TDABENCH, "report", everything, "--out", page],
        "truth": [*TDABENCH, "truth", "verify", "pocket", "--units", "4"],
        "pocket": [*TDABENCH, "run", *chosen, pocket, "--jobs", "1", "--threads", "1"],
        "again": [*TDABENCH, "run", *chosen, again, "--jobs", "2", "--threads", "2"],
        "same": [PYTHON, str(Path(__file__)), "--same", pocket, again],
        "replay": [*TDABENCH, "run", "--from", f"{pocket}/manifest.json", "--out", replay],
        "same-replay": [PYTHON, str(Path(__file__)), "--same", pocket, replay],
        "conformance": [*TDABENCH, "check", "all"],
    }  # fmt: skip


TOLERANCE = 2e-3  # of an LDS: other threads sum in another order, and near-ties swap ranks


def same(a: Path, b: Path) -> int:
    """Prints the largest difference of each metric between two runs; 1 when one is too large."""
    boards = []
    for folder in (a, b):
        records = [json.loads(p.read_text()) for p in sorted((folder / "cells").glob("*.json"))]
        boards.append({r["key"]: r for r in records})
    worst = 0.0
    if boards[0].keys() != boards[1].keys():
        print("the runs hold different cells")
        return 1
    for key, record in boards[0].items():
        other = boards[1][key]
        if record["status"] != "ok" or other["status"] != "ok":
            print(f"{record['method']['label']}: {record['status']} and {other['status']}")
            worst = 1.0
            continue
        for name, metric in record["metrics"].items():
            if metric["value"] is None:
                continue
            gap = abs(metric["value"] - other["metrics"][name]["value"])
            worst = max(worst, gap)
            print(
                f"{record['method']['label']} {name}: {metric['value']:.6f}, differs by {gap:.1e}"
            )
    print(f"largest difference {worst:.1e}, tolerance {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


def check(out: Path, only: Sequence[str]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    state = out / "passed.json"
    passed = json.loads(state.read_text()) if state.exists() else {}
    env = {
        **os.environ,
        "TDABENCH_LONG": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
    }
    failed = []
    for name, command in steps(out).items():
        if only and name not in only:
            continue
        if name in passed and not only:
            print(f"{name}: passed before, {passed[name]:.0f} s")
            continue
        start = time.monotonic()
        # The whole suite once at its usual length; the steps after it do the long forms.
        step_env = {k: v for k, v in env.items() if name != "suite" or k != "TDABENCH_LONG"}
        with open(out / f"{name}.log", "wb") as log:
            code = subprocess.run(
                command, cwd=ROOT, env=step_env, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        spent = time.monotonic() - start
        print(f"{name}: {'ok' if code == 0 else f'FAILED ({code})'}, {spent:.0f} s", flush=True)
        if code:
            failed.append(name)
            print("".join((out / f"{name}.log").read_text(errors="replace").splitlines(True)[-15:]))
        else:
            passed[name] = round(spent, 1)
            state.write_text(json.dumps(passed, indent=2))
    if failed:
        print(f"failed: {', '.join(failed)}; logs in {out}")
    return int(bool(failed))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, default=Path("long-check"))
    p.add_argument("--only", default="", help="steps, separated by commas")
    p.add_argument("--list", action="store_true")
    p.add_argument("--same", nargs=2, type=Path, metavar="RUN", help=argparse.SUPPRESS)
    asked = p.parse_args()
    out = asked.out.resolve()
    if asked.same:
        return same(*asked.same)
    if asked.list:
        for name, command in steps(out).items():
            print(f"{name}: {' '.join(command)}")
        return 0
    only = [x for x in asked.only.split(",") if x]
    unknown = set(only) - steps(out).keys()
    if unknown:
        print(f"unknown step {sorted(unknown)[0]!r}; known: {', '.join(steps(out))}")
        return 2
    return check(out, only)


if __name__ == "__main__":
    sys.exit(main())
