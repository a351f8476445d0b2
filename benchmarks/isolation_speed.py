"""Measures what the two processes per method cost.

    python benchmarks/isolation_speed.py               # how long a 400 x 2,000 score crosses
    python benchmarks/isolation_speed.py --against OLD/bin/tdabench      # and a run, side by side

`--against` names the command of another version. Both run `--methods airrep,trak` with nothing
cached, in turn; the ratio of their processor seconds is printed, and that of the clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from tdabench.run.protocol import Channel


def crossing(queries: int = 400, train: int = 2000, times: int = 21) -> float:
    """Returns the median milliseconds in which scores cross from one process's end to another."""
    a, b = (Channel(s) for s in socket.socketpair())
    scores = np.random.default_rng(0).normal(size=(queries, train)).astype(np.float32)
    found = []
    for _ in range(times):
        sender = threading.Thread(target=a.send, args=({}, {"scores": scores}))
        start = time.perf_counter()
        sender.start()
        _, got = b.receive(scores.nbytes)
        found.append(1000 * (time.perf_counter() - start))
        sender.join()
        assert (got["scores"] == scores).all()
    return statistics.median(found)


def measured(command: str) -> tuple[float, float]:
    """Returns wall and processor seconds of one run with nothing cached."""
    with tempfile.TemporaryDirectory() as out:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        asked = [command, "run", "--methods", "airrep,trak", "--quiet", "--out", f"{out}/run"]
        environment = {**os.environ, "TDABENCH_CACHE": f"{out}/cache"}
        subprocess.run(asked, check=True, stdout=subprocess.DEVNULL, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = time.perf_counter() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", help="the tdabench command of another version")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"a 400 x 2,000 score crosses in {crossing():.1f} ms (median of 21)")
    if given.against is None:
        return
    own = os.path.join(os.path.dirname(sys.executable), "tdabench")
    new, old = [], []
    for _ in range(given.rounds):
        old.append(measured(given.against))
        new.append(measured(own))
    for i, what in enumerate(("by the clock", "of the processor")):
        a, b = (statistics.median(r[i] for r in rounds) for rounds in (new, old))
        print(f"run --methods airrep,trak, seconds {what}: {a:.1f} against {b:.1f}: {a / b:.2f}")


if __name__ == "__main__":
    main()
