"""LDS of expensive methods on some of a suite's queries, with other methods on the same queries.

    OMP_NUM_THREADS=1 python benchmarks/few_queries.py magic magic:share=0.25 source ekfac logra

A method is a name, or name:parameter=value,…; other parameters have the suite's tuned values. Every
`--every`th query is used. Scores are kept under `--work` block by block, so that an interrupted run
resumes. Intervals are bootstrapped over queries and groups; differences are paired with the first
method's. `--split tuning` uses the tuning truth, for choosing a parameter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdabench import stats
from tdabench.groups import pool_scores
from tdabench.io import fingerprint, read_arrays, write_arrays
from tdabench.method import Context
from tdabench.registry import registry
from tdabench.run.sources import load_suite
from tdabench.run.suite import Suite, SuiteTarget
from tdabench.run.tune import tuning_truth
from tdabench.truth import Truth

BLOCK = 4  # queries between two writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--suite", default="pocket")
    parser.add_argument("--target", default="instruct")
    parser.add_argument("--split", choices=("test", "tuning"), default="test")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--most", type=int, help="of these, take the first so many only")
    parser.add_argument("--work", type=Path, default=Path("runs/few-queries"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    suite = load_suite(args.suite)
    target = suite.target(args.target)
    queries = list(suite.queries(args.split))[:: args.every]
    if args.split == "tuning":
        truth = tuning_truth(suite, target)
    else:
        truth = Truth.load(target.truths["lds"])
        truth.check(suite.train, target.target)
    most = min(args.most or len(queries), len(queries))
    truth = truth.for_queries([q.id for q in queries[:most]])
    boots: dict[str, stats.Bootstrap] = {}
    print(f"{target.label}, {args.split}: {most} queries, {len(truth.groups)} groups")
    print(f"{'':24} {'LDS [95%]':22} {'less the first [95%]':26} {'processor s':>11}", flush=True)
    for spec in args.methods:
        grouped, seconds = scores(spec, suite, target, queries, truth, args.work)
        tasks = stats.task_codes([q.task for q in queries[:most]])
        boot = boots[spec] = stats.bootstrap_lds(grouped, truth.values, tasks=tasks)
        low, high = boot.interval()
        line = f"{spec:24} {boot.value:6.3f} [{low:.3f}, {high:.3f}]  "
        first = next(iter(boots.values()))
        if boot is not first:
            d = stats.compare(boot, first)
            line += f"{d.effect:+6.3f} [{d.low:+.3f}, {d.high:+.3f}]    "
        else:
            line += " " * 26
        print(f"{line} {seconds:11.1f}", flush=True)


def scores(
    spec: str, suite: Suite, target: SuiteTarget, queries: list[Any], truth: Truth, work: Path
) -> tuple[np.ndarray, float]:
    """Computes a method's group scores [query, group], and processor time of build and scoring."""
    name, _, given = spec.partition(":")
    cls = registry().method(name).cls
    params = dict(suite.method_params.get(name, {}))
    params |= suite.tuned.get(target.label, {}).get(name, {})
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        params[key] = value if not value[:1].isdigit() else float(value)
    method = cls.from_params(params)
    ids = [q.id for q in queries]
    key = fingerprint([name, method.version, str(method.params), target.target.fingerprint, ids])
    path = work / f"{name}-{key[:12]}.safetensors"
    done, meta = read_arrays(path) if path.exists() else ({}, {})
    rows = [*done["scores"]] if done else []
    seconds = float(meta.get("seconds", 0.0))
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(
            target=target.target, scratch=Path(scratch), seed=0, assets=suite.assets_for(target)
        )
        index = None
        step = BLOCK if name == "magic" else len(queries)
        while len(rows) < len(truth.query_ids):
            index = index or method.build(context, suite.train)
            rows += [*index.score(queries[len(rows) : len(rows) + step])]
            spent = seconds + time.process_time() - start
            work.mkdir(parents=True, exist_ok=True)
            write_arrays(path, {"scores": np.stack(rows)}, {"seconds": spent})
        if index is not None:
            seconds = spent
    rows = rows[: len(truth.query_ids)]
    grouped = pool_scores(np.stack(rows), truth.groups, *pooling(method))
    return grouped, seconds


def pooling(method: Any) -> tuple[str, float]:
    return getattr(method, "pooling", "sum"), getattr(method, "temperature", 1.0)


if __name__ == "__main__":
    main()
