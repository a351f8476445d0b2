"""LDS of `hybrid` by number of retrainings, for several base methods, on one of pocket's targets.

    OMP_NUM_THREADS=1 python benchmarks/hybrid_curve.py ekfac:damping=0.0001 logra tfidf

A base is a name, or name:parameter=value,…; other parameters have the suite's tuned values. The
retrainings are those of the target's truth `datamodels`, whose groups are not those of the test
truth, or those of a truth file (`--bank`). Base scores are kept under `--work`. Intervals are
bootstrapped over queries and groups, and by tasks, for new tasks; differences are paired with the
base's own sums.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
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
from tdabench.truth import Truth


def main() -> None:
    from tdabench_datamodels.hybrid import Hybrid
    from tdabench_datamodels.regression import posterior

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bases", nargs="+")
    parser.add_argument("--target", default="instruct")
    parser.add_argument("--retrainings", type=int, nargs="+", default=[24, 48, 96, 192])
    parser.add_argument("--bank", type=Path, help="A truth of other groups, with the test queries.")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--kernel", default="hidden")
    parser.add_argument("--work", type=Path, default=Path("runs/hybrid-curve"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    suite = load_suite("pocket")
    target = suite.target(args.target)
    queries = list(suite.queries("test"))[:: args.every]
    ids = [q.id for q in queries]
    test = Truth.load(target.truths["lds"]).for_queries(ids)
    bank = Truth.load(args.bank or target.truths["datamodels"]).for_queries(ids)
    member, tasks = (
        bank.groups.membership(np.uint8).toarray(),
        stats.task_codes([q.task for q in queries]),
    )
    method = Hybrid(kernel=args.kernel)
    context = Context(target=target.target, scratch=Path(tempfile.gettempdir()))
    kernel = method._kernel(context, suite.train)
    print(f"{target.label}: {len(ids)} queries; LDS [95%], and minus the base [95%, p]")
    for spec in args.bases:
        scores = base_scores(spec, suite, target, queries, args.work)
        first = None
        for n in [0, *args.retrainings]:
            own = scores
            if n:
                y = -bank.losses[:n].mean(axis=1).T
                own = posterior(member[:n], y, scores, kernel, method.prior)
            grouped = pool_scores(own.astype(np.float32), test.groups, "sum", 1.0)
            boot = stats.bootstrap_lds(grouped, test.values, tasks=tasks)
            low, high = boot.interval() or (np.nan, np.nan)
            line = f"{spec:40} {n:4}  {boot.value:.3f} [{low:.3f}, {high:.3f}]"
            if first is None:
                first = boot
            else:
                d = stats.compare(boot, first)
                line += f"  {d.effect:+.3f} [{d.low:+.3f}, {d.high:+.3f}] p={d.p:.2g}"
            print(line, flush=True)


def base_scores(
    spec: str, suite: Suite, target: SuiteTarget, queries: list[Any], work: Path
) -> np.ndarray:
    """Computes a method's scores [query, train], or reads them from `work`."""
    name, _, given = spec.partition(":")
    cls = registry().method(name).cls
    params = {
        **suite.method_params.get(name, {}),
        **suite.tuned.get(target.label, {}).get(name, {}),
    }
    params |= dict(part.split("=", 1) for part in filter(None, given.split(",")))
    method = cls.from_params(params)
    fields = {k: v for k, v in method.params.items() if k not in ("pooling", "temperature")}
    key = fingerprint([name, method.version, str(fields), target.target.fingerprint,
                       [q.id for q in queries]])  # fmt: skip
    path = work / f"{name}-{key[:12]}.safetensors"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(
                target=target.target, scratch=Path(scratch), assets=suite.assets_for(target)
            )
            scores = method.build(context, suite.train).score(queries)
        work.mkdir(parents=True, exist_ok=True)
        write_arrays(path, {"scores": np.asarray(scores)})
    return read_arrays(path)[0]["scores"]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
    main()
