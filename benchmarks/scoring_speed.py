"""Speed of LDS scoring: blocked matrix products, a loop, and dattri's metric.

    python benchmarks/scoring_speed.py [--queries 2000] [--train 20000] [--groups 100]
    OMP_NUM_THREADS=1 python benchmarks/scoring_speed.py --processor    # on a busy machine

Everything is measured in one run, on the same scores and the same threads; ratios are relative to
tdabench's time. "AirRep's script" is the loop in scripts/04_evaluate.py of the authors' repository:
for every group and query, the members' scores are pooled in torch, then scipy.stats.spearmanr runs
per query (that script has `softmax` and `sum`; `softmax-abs` is the same loop with the pooling of
the paper). The lean loop is the same in numpy without the copies. dattri's metric sums; it has no
other pooling.

Differences are between group scores, relative to the largest of each query, and between LDS values.
A single query's correlation can differ by about 1e-4 where two groups lie within float32 rounding
of each other and swap ranks; the last column shows by how much.

Memory is the peak resident set of a separate process that pools and ranks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import tdabench  # noqa: F401  # isort: skip  (before numpy, as in the command)

import numpy as np  # isort: skip

from tdabench import stats
from tdabench.groups import Groups, pool_scores, threads

Scored = tuple[np.ndarray, np.ndarray]  # group scores [query, group], LDS per query [query]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--train", type=int, default=20000)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument(
        "--processor", action="store_true", help="processor time of all threads, not wall time"
    )
    parser.add_argument("--poolings", nargs="+", default=["sum", "softmax", "softmax-abs"])
    parser.add_argument("--only-ours", action="store_true", help="no contenders; print memory")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    scores = rng.standard_normal((args.queries, args.train), dtype=np.float32)
    groups = Groups.random(args.groups, args.train, args.fraction, rng)
    truth = rng.standard_normal((args.queries, args.groups))
    if args.only_ours:
        before = resident()
        for pooling in ("sum", "softmax", "softmax-abs"):
            ours(scores, groups, truth, pooling)
        print(json.dumps({"scores": before, "peak": resident()}))
        return

    clock = time.process_time if args.processor else time.perf_counter
    print(
        f"{args.queries} queries x {args.train} train x {args.groups} groups of "
        f"{int(groups.sizes[0])}, {threads()} thread(s)"
    )
    print(f"{'':30}{'seconds':>9}{'ratio':>9}{'scores':>10}{'LDS':>10}{'a query':>10}")
    total: dict[str, float] = {}
    for pooling in args.poolings:
        mine, (pooled, rho) = timed(lambda p=pooling: ours(scores, groups, truth, p), clock, 5)  # type: ignore[misc]
        print(f"{'tdabench, ' + pooling:30}{mine:9.3f}{1.0:8.1f}x")
        for name, run in contenders(pooling).items():
            took, (theirs, theirs_rho) = timed(lambda r=run: r(scores, groups, truth), clock)  # type: ignore[misc]
            error = np.abs(pooled - theirs) / np.abs(theirs).max(axis=1, keepdims=True)
            apart = abs(rho.mean() - theirs_rho.mean()), np.abs(rho - theirs_rho).max()
            print(
                f"{name + ', ' + pooling:30}{took:9.3f}{took / mine:8.1f}x"
                f"{error.max():10.1e}{apart[0]:10.1e}{apart[1]:10.1e}",
                flush=True,
            )
            total[name] = total.get(name, 0.0) + took
        total["tdabench"] = total.get("tdabench", 0.0) + mine
    ratio = total["AirRep's script"] / total["tdabench"]
    print(f"all of these poolings, AirRep's script over tdabench: {ratio:.1f}x")
    command = [sys.executable, __file__, "--only-ours"]
    for name in ("queries", "train", "groups", "fraction"):
        command += [f"--{name}", str(getattr(args, name))]
    memory = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    print(
        f"tdabench, resident at most: {memory['peak'] / 1e6:.0f} MB, of which "
        f"{memory['scores'] / 1e6:.0f} MB are in use before (interpreter, scores)"
    )


def timed(
    f: Callable[[], Scored], clock: Callable[[], float], repeats: int = 1
) -> tuple[float, Scored]:
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        out = f()
        best = min(best, clock() - start)
    return best, out


def resident() -> int:
    """Returns this process's peak memory in bytes (ru_maxrss would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def ours(scores: np.ndarray, groups: Groups, truth: np.ndarray, pooling: str) -> Scored:
    pooled = pool_scores(scores, groups, pooling)
    return pooled, stats.spearman_rows(pooled, truth)


def contenders(pooling: str) -> dict[str, Callable[[np.ndarray, Groups, np.ndarray], Scored]]:
    found = {"AirRep's script": airrep_script(pooling), "lean loop": lean_loop(pooling)}
    if pooling == "sum":
        if importlib.util.find_spec("dattri"):
            found["dattri"] = dattri
        else:
            print("dattri is not installed: left out", file=sys.stderr)
    return found


def airrep_script(pooling: str) -> Callable[[np.ndarray, Groups, np.ndarray], Scored]:
    import torch
    from scipy import stats as scipy_stats

    def aggregate(a: np.ndarray) -> float:
        a = torch.tensor(a)
        if pooling == "sum":
            return a.sum().item()
        attn = (a.abs() if pooling == "softmax-abs" else a).softmax(dim=-1)
        return (attn * a).sum().item()

    def run(scores: np.ndarray, groups: Groups, truth: np.ndarray) -> Scored:
        score = np.asarray(scores, dtype=float)
        subsets = [np.asarray(g, dtype=int) for g in groups]
        sums = np.column_stack(
            [[aggregate(score[i, idx]) for i in range(len(score))] for idx in subsets]
        )
        return sums, np.array([scipy_stats.spearmanr(m, y)[0] for m, y in zip(sums, truth)])

    return run


def lean_loop(pooling: str) -> Callable[[np.ndarray, Groups, np.ndarray], Scored]:
    from scipy.stats import spearmanr

    def run(scores: np.ndarray, groups: Groups, truth: np.ndarray) -> Scored:
        members = list(groups)
        pooled, rho = np.empty((len(scores), len(members))), np.empty(len(scores))
        for q, row in enumerate(scores):
            for g, ids in enumerate(members):
                s = row[ids]
                if pooling == "sum":
                    pooled[q, g] = s.sum()
                else:
                    a = np.abs(s) if pooling == "softmax-abs" else s
                    w = np.exp(a - a.max())
                    pooled[q, g] = (w * s).sum() / w.sum()
            rho[q] = spearmanr(pooled[q], truth[q])[0]
        return pooled, rho

    return run


def dattri(scores: np.ndarray, groups: Groups, truth: np.ndarray) -> Scored:
    import torch
    from dattri.metric import lds

    indices = torch.from_numpy(np.stack(list(groups)))
    found, _ = lds(torch.from_numpy(scores).T, (torch.from_numpy(truth).T, indices))
    pooled = pool_scores(scores, groups, "sum")  # dattri does not return its group scores
    return pooled, found.numpy()


if __name__ == "__main__":
    main()
