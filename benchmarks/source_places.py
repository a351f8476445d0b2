"""Scores of SOURCE with its gradients or its curvature taken before the run instead of along it.

    OMP_NUM_THREADS=1 python benchmarks/source_places.py --target continued [--every 4]

SOURCE takes the query's gradient at the end of the training run, and the training examples'
gradients and the curvature in the middle of each segment; an influence function (EK-FAC) takes all
of them at one checkpoint. Here they move to the base one after another. LDS is on the tuning truth
(summed scores), so that nothing is chosen by the test truth.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tdabench_influence.ekfac import EKFAC
from tdabench_influence.source import SOURCE, _GaussNewton

from tdabench import stats
from tdabench.groups import pool_scores
from tdabench.method import Context, Index
from tdabench.run.sources import load_suite
from tdabench.run.tune import tuning_truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="continued")
    parser.add_argument("--every", type=int, default=4, help="of the tuning queries")
    parser.add_argument("--times", type=float, nargs="+", default=[100, 1000])
    args = parser.parse_args()
    suite = load_suite("pocket")
    target = suite.target(args.target)
    queries = suite.queries("tuning")[:: args.every]
    truth = tuning_truth(suite, target).for_queries([q.id for q in queries])

    def lds(index: Index) -> float:
        return stats.lds(pool_scores(index.score(queries), truth.groups, "sum", 1.0), truth.values)

    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target=target.target, scratch=Path(scratch))
        ekfac = EKFAC(checkpoint="base", damping=0.001).build(context, suite.train)
        print(f"{args.target}: ekfac at the base {lds(ekfac):.3f}", flush=True)
        method = SOURCE()
        index = method.build(context, suite.train)
        times = {k: v.copy() for k, v in index.state.items() if k.endswith(".t")}
        end = index.state["end.theta"]
        parameters = context.target.fresh_model("base").parameters()
        base = torch.cat([p.detach().flatten() for p in parameters]).numpy()
        engine = method.engine_at(context, base)
        curvature = _GaussNewton().fit(context, engine, list(suite.train))

        def row(what: str) -> None:
            found = []
            for time in args.times:
                index.state |= {k: v * time for k, v in times.items()}
                found.append(f"{lds(index):.3f}")
            print(f"{what:55} {'  '.join(found)}", flush=True)

        print(f"{'source with time =':55} {'  '.join(f'{t:5g}' for t in args.times)}")
        row("along the run")
        index.state["end.theta"] = base
        row("query gradients at the base")
        index.state["end.theta"] = end
        segments = range(method.segments)
        index.state |= {f"{i}.theta": base for i in segments}
        row("training gradients at the base")
        index.state |= {f"{i}.{k}": v for i in segments for k, v in curvature.items()}
        row("training gradients and curvature at the base")
        index.state["end.theta"] = base
        row("all at the base")


if __name__ == "__main__":
    main()
