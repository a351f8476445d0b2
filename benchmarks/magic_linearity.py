"""How far the exact derivative of a training run predicts other runs, from near to far.

    OMP_NUM_THREADS=1 python benchmarks/magic_linearity.py [--share 0.25] [--groups 12]

MAGIC's scores are d(-loss_q) / d w_z at w = share for every example. For groups S of the shipped
truth the same run (same start, same batches) is trained again at

    w_z = share + e (1[z in S] - share),

from e near 0, where the derivative must be accurate, to e = 1, where members have weight 1 and all
others zero. Printed for each e are Pearson's correlation over groups between the predicted and the
measured change of -loss, averaged over queries with its standard error, and the ratio of predicted
to measured changes (root mean squares). The last line is the truth itself: models trained on S
alone, in other orders. The same is printed for other methods' plain scores, whose scale is free.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from tdabench.method import Context
from tdabench.registry import registry
from tdabench.run.sources import load_suite
from tdabench.truth import Truth


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="instruct")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--every", type=int, default=50, help="take every so manieth query")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.01, 0.1, 0.3, 1.0])
    parser.add_argument("--others", nargs="*", default=["ekfac", "logra"])
    parser.add_argument("--precision", choices=("float32", "float64"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)

    suite = load_suite("pocket")
    target = suite.target(args.target)
    queries = list(suite.queries())[:: args.every]
    truth = Truth.load(target.truths["lds"]).for_queries([q.id for q in queries])
    members = truth.groups.membership(np.float64).toarray()[: args.groups]  # [group, train]
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(
            target=target.target, scratch=Path(scratch), assets=suite.assets_for(target)
        )
        cls = registry().method("magic").cls
        magic = cls.from_params({"share": args.share, "precision": args.precision})
        index = magic.build(context, suite.train)
        scores = {"magic": index.score(queries).astype(np.float64)}
        for name in args.others:
            params = suite.tuned.get(target.label, {}).get(name, {})
            other = registry().method(name).cls.from_params(params)
            scores[name] = other.build(context, suite.train).score(queries).astype(np.float64)

        run = index.run
        tokens = context.target.tokenize(queries)

        def outcome(weights: np.ndarray) -> np.ndarray:
            """Computes -loss [query] after the run with the given weights of examples."""
            run.weights = torch.from_numpy(weights).to(run.start.theta)
            for state in run.forwards(run.start, 0, len(run)):
                end = state
            return -run.query_losses(end.theta, tokens)

        before = outcome(np.full(run.weights.shape, args.share))
        print(
            f"{target.label}, share {args.share:g}: {len(run)} steps, {len(queries)} queries, "
            f"{len(members)} groups"
        )
        print(f"{'e':>9}  {'predicted/measured':>14}  " + "  ".join(f"{m:>15}" for m in scores))
        for e in args.steps:
            weights = args.share + e * (members - args.share)  # [group, train]
            found = np.stack([outcome(w) - before for w in weights])  # [group, query]
            told = {m: (weights - args.share) @ s.T for m, s in scores.items()}
            ratio = np.sqrt(np.square(told["magic"]).mean() / np.square(found).mean())
            print(f"{e:9.2g}  {ratio:14.2f}  {row(told, found)}", flush=True)
        actual = truth.values.T[: len(members)]
        told = {m: members @ s.T for m, s in scores.items()}
        print(f"{'the truth':>9}  {'':14}  {row(told, actual)}")


def row(told: dict[str, np.ndarray], found: np.ndarray) -> str:
    cells = []
    for values in told.values():
        r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(values.T, found.T)])  # [query]
        cells.append(f"{r.mean():6.3f} ± {r.std(ddof=1) / len(r) ** 0.5:.3f}")
    return "  ".join(f"{c:>15}" for c in cells)


if __name__ == "__main__":
    main()
