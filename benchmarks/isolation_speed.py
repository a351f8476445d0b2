"""Measures what the two processes per method cost.

    python benchmarks/isolation_speed.py               # how long a 400 x 2,000 score crosses
    python benchmarks/isolation_speed.py --run         # and a run against one process per method
    python benchmarks/isolation_speed.py --run --benchmarks all --against OLD/bin/tdabench

`--run` runs `--methods airrep,trak` with nothing cached: as it is, with `--isolation off`, and in
one process per method that plans, builds, saves, loads, scores and computes the same benchmarks,
as before methods had processes of their own. `--against` adds the command of another version. All
take turns; the ratios of processor seconds and of the clock are printed after each round, each of
medians. By default only LDS is measured: the two processes differ in building, loading and scoring,
while other benchmarks add minutes of retraining that are the same in both.
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


ONE_PROCESS = """
import sys, tempfile
from pathlib import Path
from tdabench.benchmark import BenchmarkContext
from tdabench.errors import unknown
from tdabench.method import Context
from tdabench.registry import registry
from tdabench.run.inputs import Inputs, OtherTruths
from tdabench.run.meter import Memory, Meter, MeteredIndex
from tdabench.run.plan import Request, make_plan
from tdabench.run.suite import truth_name
from tdabench.run.top import top_examples
from tdabench.truth.store import Truth

only = tuple(sys.argv[3].split(",")) if sys.argv[3] != "all" else None
target = (sys.argv[4],)
plan = make_plan(Request(methods=(sys.argv[1],), benchmarks=only, targets=target))
work = Path(tempfile.mkdtemp(dir=sys.argv[2]))
for name in ("scratch", "index", "cache"):
    (work / name).mkdir()
for job in plan.jobs(plan.cells):
    suite, declared = plan.suite, job.target
    assets = Inputs(suite, suite.assets_for(declared), "asset")
    method = registry().method(job.method.name).cls.from_params(job.method.params)
    context = Context(declared.target, work / "scratch", job.seed, "cpu", assets)
    method.build(context, suite.train).save(work / "index")
    memory, queries = Memory(), suite.queries()
    index = method.load(context, work / "index")

    def truth(kind):
        if truth_name(kind, "test") not in declared.truths:
            raise unknown("truth", kind, declared.truths)  # as the judge does: LDS goes on without
        path = declared.truths[truth_name(kind, "test")]
        suite.verify(path)
        found = Truth.load(path)
        found.check(suite.train, declared.target, declared.recipe_of(truth_name(kind, "test")))
        return found.for_queries(queries.ids)

    def built(corpus):
        raise SystemExit("a benchmark of this suite builds on other corpora")

    for cell in job.cells:
        metered = MeteredIndex(index, job.method.name, len(suite.train), Meter(), memory)
        others = {t.label: OtherTruths(suite, t, "test") for t in suite.targets
                  if t.label != declared.label and t.truths}
        benchmark = registry().benchmark(cell.benchmark.name).cls.from_params(cell.benchmark.params)
        benchmark.run(BenchmarkContext(
            metered, declared.target, suite.train, queries, truth, work / "scratch", job.seed,
            params=cell.benchmark.params, build=built, other_truths=others, assets=assets,
            cache=work / "cache",
        ))
        if cell.benchmark.headline:
            top_examples(metered, queries)
"""


def spent(commands: list[list[str]], folder: str) -> tuple[float, float]:
    """Returns wall and processor seconds of commands, one after the other."""
    environment = {**os.environ, "TDABENCH_CACHE": f"{folder}/cache"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu


def measured(way: str, benchmarks: str, target: str) -> tuple[float, float]:
    """Returns wall and processor seconds of one run with nothing cached.

    `way` is "auto" or "off" (the isolation), "one process", or the command of another version.
    """
    own = os.path.join(os.path.dirname(sys.executable), "tdabench")
    with tempfile.TemporaryDirectory() as out:
        if way == "one process":
            methods = ("airrep", "trak")
            alone = [sys.executable, "-c", ONE_PROCESS]
            return spent([[*alone, m, out, benchmarks, target] for m in methods], out)
        ours = way in ("auto", "off")
        asked = [own if ours else way, "run", "--methods", "airrep,trak", "--quiet"]
        asked += ["--target", target]
        asked += ["--out", f"{out}/run", *(["--isolation", way] if ours else [])]
        asked += ["--benchmarks", benchmarks] if benchmarks != "all" else []
        return spent([asked], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="also measure whole runs")
    parser.add_argument("--against", help="the tdabench command of another version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default="one process,off,auto", help="in this order")
    parser.add_argument("--target", default="instruct", help="of pocket [default: instruct]")
    parser.add_argument("--benchmarks", default="lds", help="A,B or all [default: lds]")
    given = parser.parse_args()
    print(f"a 400 x 2,000 score crosses in {crossing():.1f} ms (median of 21)")
    if not given.run:
        return
    ways = [*given.ways.split(","), *([given.against] if given.against else [])]
    found: dict[str, list[tuple[float, float]]] = {w: [] for w in ways}
    for n in range(given.rounds):
        for way in ways:
            found[way].append(measured(way, given.benchmarks, given.target))
            wall, cpu = found[way][-1]
            print(f"  {way}: {wall:.1f} s by the clock, {cpu:.1f} of the processor", flush=True)
        print(f"after round {n + 1} of {given.rounds}:")
        show(found)


def show(found: dict[str, list[tuple[float, float]]]) -> None:
    """Prints the ratios of medians so far."""
    for i, what in enumerate(("by the clock", "of the processor")):
        medians = {w: statistics.median(r[i] for r in rounds) for w, rounds in found.items()}
        for way, seconds in medians.items():
            if way != "auto" and "auto" in medians:
                print(
                    f"  run --methods airrep,trak, seconds {what}: {medians['auto']:.1f}, and "
                    f"{seconds:.1f} for {way}: {medians['auto'] / seconds:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
