"""Memory while an index of 20,000 examples x 16,384 dimensions is built, queried and reopened.

    python benchmarks/index_memory.py [--examples 20000] [--layers 16] [--rank 32] [--device cuda]

LoGra on the target `instruct` of the suite `pocket`, with as many linear layers and a rank that
give 16,384 dimensions; the corpus is pocket's, repeated under new ids. As float32 the features are
1.3 GB, and whitening writes as much again, so both stream through feature stores on disk. Memory is
the peak resident set (VmHWM, reset before each phase), with the anonymous part listed separately;
the rest are file-backed pages, which the system can reclaim when needed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from tdabench.method import Context
from tdabench.run.sources import load_suite


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="for the index; a temporary one by default")
    args = parser.parse_args()
    from tdabench_gradients.logra import LoGra

    from tdabench.toolkit.gradients import select_layers

    suite = load_suite("pocket")
    target = suite.target("instruct").target
    model = target.model("base", args.device)
    names = [name for name, _ in select_layers(model)][: args.layers]
    pattern = "|".join(re.escape(n) for n in names)
    method = LoGra(rank=args.rank, layers=f"^({pattern})$")
    pool = list(suite.train)
    train = [
        replace(pool[i % len(pool)], id=f"{pool[i % len(pool)].id}-{i}")
        for i in range(args.examples)
    ]
    queries = list(suite.queries())[:100]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        context = Context(target=target, scratch=Path(folder), device=args.device)
        print(f"{'':34}{'seconds':>9}{'resident MB':>13}{'own MB':>8}")
        with Phase("before"):
            pass
        with Phase("build") as phase:
            index = method.build(context, train)
            phase.name = f"build {index.rows.shape[0]} x {index.rows.shape[1]}"
        with Phase(f"top-100 of {len(queries)} queries"):
            index.top_k(queries, 100)
        with Phase(f"all scores of {len(queries)} queries"):
            index.score(queries)
        with Phase("save and load"):
            (Path(folder) / "saved").mkdir()
            index.save(Path(folder) / "saved")
            method.load(context, Path(folder) / "saved")
        size = sum(f.stat().st_size for f in (Path(folder) / "saved").rglob("*.bin"))
        print(f"index on disk: {size / 1e6:.0f} MB")


class Phase:
    """Prints the time and the peak resident memory of a phase at its end."""

    def __init__(self, name: str) -> None:
        self.name, self.own = name, 0

    def __enter__(self) -> Phase:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        self.start, self.stop = time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self) -> None:
        while True:
            self.own = max(self.own, field("RssAnon:"))
            if self.stop.wait(0.005):
                return

    def __exit__(self, *exc: object) -> None:
        took = time.perf_counter() - self.start
        self.stop.set()
        self.thread.join()
        peak = field("VmHWM:")
        print(f"{self.name:34}{took:9.1f}{peak / 1e6:13.0f}{self.own / 1e6:8.0f}", flush=True)


def field(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(name)[1].split()[0])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
    main()
