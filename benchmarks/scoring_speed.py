"""How long LDS scoring takes: grouped products against a loop and against dattri's metric.

    python benchmarks/scoring_speed.py [--queries 2000] [--train 20000] [--groups 100]

Everything is measured in this one run, on the same scores; ratios are to tdabench's time. The
loop is what one writes first: for every query and group, pool the members' scores, then
scipy.stats.spearmanr a query. dattri's metric sums; it has no other pooling.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from tdabench import stats
from tdabench.groups import Groups, pool_scores


def timed(f: Callable[[], np.ndarray], repeats: int = 1) -> tuple[float, np.ndarray]:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        out = f()
        best = min(best, time.perf_counter() - start)
    return best, out


def ours(scores: np.ndarray, groups: Groups, truth: np.ndarray, pooling: str) -> np.ndarray:
    return stats.spearman_rows(pool_scores(scores, groups, pooling), truth)


def loop(scores: np.ndarray, groups: Groups, truth: np.ndarray, pooling: str) -> np.ndarray:
    from scipy.stats import spearmanr

    members = list(groups)
    out = np.empty(len(scores))
    for q, row in enumerate(scores):
        pooled = np.empty(len(members))
        for g, ids in enumerate(members):
            s = row[ids]
            if pooling == "sum":
                pooled[g] = s.sum()
            else:
                a = np.abs(s)
                w = np.exp(a - a.max())
                pooled[g] = (w * s).sum() / w.sum()
        out[q] = spearmanr(pooled, truth[q])[0]
    return out


def dattri(scores: np.ndarray, groups: Groups, truth: np.ndarray) -> np.ndarray:
    import torch
    from dattri.metric import lds

    indices = torch.from_numpy(np.stack(list(groups)))
    found, _ = lds(torch.from_numpy(scores).T, (torch.from_numpy(truth).T, indices))
    return found.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--train", type=int, default=20000)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--fraction", type=float, default=0.25)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    scores = rng.standard_normal((args.queries, args.train), dtype=np.float32)
    groups = Groups.random(args.groups, args.train, args.fraction, rng)
    truth = rng.standard_normal((args.queries, args.groups))
    print(
        f"{args.queries} queries x {args.train} train x {args.groups} groups of "
        f"{int(groups.sizes[0])}"
    )
    rows: list[tuple[str, float, float, float]] = []
    for pooling in ("sum", "softmax-abs"):
        mine, a = timed(lambda p=pooling: ours(scores, groups, truth, p), 3)  # type: ignore[misc]
        rows.append((f"tdabench, {pooling}", mine, 1.0, 0.0))
        theirs, b = timed(lambda p=pooling: loop(scores, groups, truth, p))  # type: ignore[misc]
        rows.append((f"loop, {pooling}", theirs, theirs / mine, float(np.abs(a - b).max())))
        if pooling == "sum":
            try:
                theirs, b = timed(lambda: dattri(scores, groups, truth))
            except ImportError:
                print("dattri is not installed: pip install dattri")
                continue
            rows.append(("dattri, sum", theirs, theirs / mine, float(np.abs(a - b).max())))
    print(f"{'':24}{'seconds':>10}{'ratio':>9}{'max |difference|':>20}")
    for name, seconds, ratio, difference in rows:
        print(f"{name:24}{seconds:10.2f}{ratio:8.1f}x{difference:20.1e}")


if __name__ == "__main__":
    main()
