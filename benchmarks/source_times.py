"""Scores of SOURCE for longer or shorter training times.

    OMP_NUM_THREADS=1 python benchmarks/source_times.py --target continued [--every 4]

SOURCE weights a direction of curvature h by (1 - exp(-t h)) / h, where t is the training time from
the recipe. Small t h makes it TracIn, large t h an influence function. Here t is multiplied by a
factor. LDS is on the tuning truth (summed scores), so that nothing is chosen by the test truth.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tdabench_influence.source import SOURCE

from tdabench import stats
from tdabench.groups import pool_scores
from tdabench.method import Context
from tdabench.run.sources import load_suite
from tdabench.run.tune import tuning_truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="continued")
    parser.add_argument("--every", type=int, default=4, help="of the tuning queries")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.1, 1, 10, 100, 1000])
    args = parser.parse_args()
    suite = load_suite("pocket")
    target = suite.target(args.target)
    queries = suite.queries("tuning")[:: args.every]
    truth = tuning_truth(suite, target).for_queries([q.id for q in queries])
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target=target.target, scratch=Path(scratch))
        index = SOURCE().build(context, suite.train)
        times = {k: v.copy() for k, v in index.state.items() if k.endswith(".t")}
        th = [
            float(index.state[f"{i}.t"][j]) * index.state[f"{i}.lambda.{layer.name}"].ravel()
            for i in range(index.method.segments)
            for j, layer in enumerate(index.engine.layers)
        ]
        median, top = (np.median([f(x) for x in th]) for f in (np.mean, np.max))
        print(
            f"{args.target}: t h of a layer, median over layers: mean {median:.2g}, top {top:.2g}"
        )
        for factor in args.factors:
            for key, value in times.items():
                index.state[key] = value * factor
            scores = pool_scores(index.score(queries), truth.groups, "sum", 1.0)
            print(f"t x {factor:g}: LDS {stats.lds(scores, truth.values):.3f}", flush=True)


if __name__ == "__main__":
    main()
