"""LDS of datamodels by number of retrainings, cross-fitted on the groups of one shipped truth.

    OMP_NUM_THREADS=1 python benchmarks/datamodels_folds.py [--truth lds] [--folds 5]

The groups are divided into folds. For each fold, the regression is fitted on some of the other
folds' groups and scored on its predictions for this fold: no group is on both sides. LDS is
Spearman's correlation within a fold, averaged over folds and queries; its interval is a bootstrap
over queries, which does not include the variation between draws of groups.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from tdabench import stats
from tdabench.run.sources import load_suite
from tdabench.truth import Truth


def main() -> None:
    from tdabench_datamodels.regression import lasso, ridge

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="instruct")
    parser.add_argument("--truth", default="lds")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--lasso", action="store_true", help="also by lasso, which is slow")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth query")
    args = parser.parse_args()

    truth = Truth.load(load_suite("pocket").target(args.target).truths[args.truth])
    losses = truth.losses[:, :, :: args.every]  # [group, seed, query]
    n, seeds, queries = losses.shape
    x = truth.groups.membership(np.float64).toarray()
    fold = np.random.default_rng(0).permutation(n) % args.folds
    print(f"{args.target}, {args.truth}: {n} groups of {x[0].sum():.0f}, {queries} queries")
    print(f"{'estimator':10}{'groups':>7}{'seeds':>6}{'retrainings':>12}  LDS [95%]")
    most = n - n // args.folds
    for name in ("ridge", "lasso") if args.lasso else ("ridge",):
        for used, kept in [(most // 4, seeds), (most // 2, seeds), (most, 1), (most, seeds)]:
            per_query = np.zeros(queries)
            for f in range(args.folds):
                rng = np.random.default_rng(f)
                fit = rng.permutation(np.flatnonzero(fold != f))[:used]
                y = -losses[fit, :kept].mean(axis=1, dtype=np.float64)
                found = ridge(x[fit], y) if name == "ridge" else lasso(x[fit], y, rng=rng)
                predicted = found[0] @ x[fold == f].T  # [query, group]
                actual = -losses[fold == f].mean(axis=1).T
                per_query += stats.spearman_rows(
                    predicted.astype(np.float32), actual.astype(np.float32)
                )
            boot = stats.bootstrap_queries(per_query / args.folds)
            low, high = boot.interval() or (np.nan, np.nan)
            print(
                f"{name:10}{used:7}{kept:6}{used * kept:12}  "
                f"{boot.value:.3f} [{low:.3f}, {high:.3f}]",
                flush=True,
            )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
    main()
