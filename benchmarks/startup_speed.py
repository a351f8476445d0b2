"""Waiting time for help, completion and an existing board.

    python benchmarks/startup_speed.py

Each command runs in a new process, best and worst of several; the interpreter alone is shown for
comparison. `torch` says whether the command loaded torch. The board belongs to a complete run,
which is made first in a temporary folder (its time does not count).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

TDABENCH = str(Path(sysconfig.get_path("scripts")) / "tdabench")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    complete = {
        "_TDABENCH_COMPLETE": "bash_complete",
        "COMP_CWORD": "1",
        "COMP_WORDS": "tdabench r",
    }
    option = {**complete, "COMP_CWORD": "3", "COMP_WORDS": "tdabench run --methods tf"}
    methods = "random,length,tfidf"
    with tempfile.TemporaryDirectory() as folder:
        once([TDABENCH, "run", "--methods", methods], {}, folder)
        rows = [
            ("python alone", [sys.executable, "-c", "pass"], {}),
            ("tdabench --help", [TDABENCH, "--help"], {}),
            ("tdabench run --help", [TDABENCH, "run", "--help"], {}),
            ("completion of a command", [TDABENCH], complete),
            ("completion of a method", [TDABENCH], option),
            ("tdabench leaderboard", [TDABENCH, "leaderboard"], {}),
            ("tdabench run, all cached", [TDABENCH, "run", "--methods", methods], {}),
        ]
        print(f"{'':28}{'best s':>8}{'worst s':>9}{'torch':>7}")
        for name, command, env in rows:
            took = [once(command, env, folder) for _ in range(args.rounds)]
            print(
                f"{name:28}{min(took):8.2f}{max(took):9.2f}{loads_torch(command, env, folder):>7}"
            )


def once(command: list[str], env: dict[str, str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        command, env={**os.environ, **env}, cwd=folder, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - start


def loads_torch(command: list[str], env: dict[str, str], folder: str) -> str:
    env = {**os.environ, **env, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    loaded = any(line.endswith("| torch") for line in done.stderr.splitlines())
    return "yes" if loaded else "no"


if __name__ == "__main__":
    main()
