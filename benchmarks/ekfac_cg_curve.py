"""LDS of `ekfac-cg` after each iteration, on some queries of one of pocket's targets.

    OMP_NUM_THREADS=1 python benchmarks/ekfac_cg_curve.py --target smooth --every 20 --iterations 4

A product with the Gauss-Newton matrix takes a pass over the examples per query, so that few queries
and few dampings are affordable. All iterations come from one solution. `--split tuning` is for
choosing the damping; `--examples` takes the curvature over a random part of the corpus. Groups are
sums. Differences are paired with EK-FAC at the same damping (0 iterations).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tdabench import stats
from tdabench.groups import pool_scores
from tdabench.method import Context
from tdabench.run.sources import load_suite
from tdabench.run.tune import tuning_truth
from tdabench.truth import Truth


def main() -> None:
    from tdabench_influence.preconditioned import EKFACCG

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smooth")
    parser.add_argument("--split", choices=("test", "tuning"), default="test")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.001])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--examples", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)

    suite = load_suite("pocket")
    target = suite.target(args.target)
    queries = list(suite.queries(args.split))[:: args.every]
    truth = (
        tuning_truth(suite, target) if args.split == "tuning" else Truth.load(target.truths["lds"])
    ).for_queries([q.id for q in queries])
    tasks = stats.task_codes([q.task for q in queries])
    print(f"{target.label}, {args.split}: {len(queries)} queries", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target=target.target, scratch=Path(scratch))
        method = EKFACCG(examples=args.examples, damping=args.dampings[0])
        index = method.build(context, suite.train)
        gradients = index.gradients(queries)
        b = torch.cat([g.flatten(1) for g in gradients.values()], dim=1).double()
        chosen = method._chosen(index)
        for damping in args.dampings:
            lam = damping * float(index.state["mean"][0])
            start, first = time.process_time(), None
            for i, x in enumerate(solutions(method, index, b, lam, chosen, args.iterations)):
                parts = {
                    layer.name: x[:, layer.columns].float().view(-1, layer.d_out, layer.d_in)
                    for layer in index.engine.layers
                }
                scores = np.zeros((len(queries), index.n_train), dtype=np.float32)
                for places, block in index.products(parts):
                    scores[:, places] = block
                grouped = pool_scores(scores, truth.groups, "sum", 1.0)
                boot = stats.bootstrap_lds(grouped, truth.values, tasks=tasks)
                first = first or boot
                told = f"damping {damping:g}  iteration {i}  LDS {boot.value:.3f}"
                if boot is not first:
                    d = stats.compare(boot, first)
                    told += f"  minus EK-FAC {d.effect:+.3f}"
                    if d.low is not None:  # too few tasks for an interval
                        told += f" [{d.low:+.3f}, {d.high:+.3f}]"
                print(f"{told}  {time.process_time() - start:.0f} s", flush=True)


def solutions(method, index, b, lam, chosen, iterations):  # type: ignore[no-untyped-def]
    """Yields EK-FAC's solution, then the solution after each iteration of conjugate gradient."""
    x = method._inverse(index, b, lam)
    yield x
    r = b - index.product(x, chosen) - lam * x
    z = method._inverse(index, r, lam)
    p, rz = z.clone(), (r * z).sum(1)
    for _ in range(iterations):
        cp = index.product(p, chosen) + lam * p
        step = (rz / (p * cp).sum(1))[:, None]
        x, r = x + step * p, r - step * cp
        yield x
        z = method._inverse(index, r, lam)
        before, rz = rz, (r * z).sum(1)
        p = z + (rz / before)[:, None] * p


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
    main()
