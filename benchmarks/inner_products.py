"""Why inner products of gradients predict retraining poorly: norms, directions, pooling.

    OMP_NUM_THREADS=1 python benchmarks/inner_products.py [--checkpoint base]

Computes projected gradients of pocket's training examples and test queries, and prints the LDS of
their inner products: plain, without norms, without the directions in which training gradients are
largest (which a curvature damps), and with other poolings. It uses the test truth to explain
results, not to choose settings.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from tdabench import stats
from tdabench.groups import pool_scores
from tdabench.method import Context
from tdabench.run.sources import load_suite
from tdabench.toolkit.gradients import GradientEngine, stream_features
from tdabench.truth import Truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="instruct")
    parser.add_argument("--checkpoint", default="base")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite("pocket")
    target = suite.target(args.target)
    queries = suite.queries("test")
    truth = Truth.load(target.truths["lds"]).for_queries(queries.ids)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target=target.target, scratch=Path(scratch), seed=0)
        model = target.target.model(args.checkpoint)
        engine = GradientEngine(model, rank=args.rank, random=context.torch_generator)
        train, query = (
            np.asarray(stream_features(context, list(part), engine.gradients, engine.dim)[:])
            for part in (suite.train, queries)
        )

    def lds(scores: np.ndarray, pooling: str = "sum", spread: float = 1.0) -> float:
        temperature = spread * float(scores.std()) or 1.0
        grouped = pool_scores(scores.astype(np.float32), truth.groups, pooling, temperature)
        return stats.lds(grouped, truth.values)

    def say(label: str, value: float) -> None:
        print(f"{label:58} {value:6.3f}")

    print(f"{args.target}, {args.checkpoint}: {len(train)} x {train.shape[1]} projected gradients")
    norms, sizes = (np.linalg.norm(g, axis=1) for g in (train, query))
    power = np.sort(norms**2)[::-1]
    say("squared norm in the largest 5% of examples", power[: len(power) // 20].sum() / power.sum())
    scores = query @ train.T
    by_query = scores / sizes[:, None]
    common = by_query.mean(0)
    say("variance of scores that all queries share", common.var() / by_query.var(1).mean())
    say("LDS of inner products, summed over a group", lds(scores))
    say("  of what all queries share, alone", lds(np.tile(common, (len(query), 1))))
    cosines = by_query / norms
    say("  of cosines", lds(cosines))
    gram = train @ train.T
    values, vectors = np.linalg.eigh(gram.astype(np.float64))
    for k in (1, 4, 16, 64):
        top = vectors[:, -k:] / np.sqrt(values[-k:])  # train.T @ top: the leading directions
        share = values[-k:].sum() / values.sum()
        rest = scores - (scores @ top) @ (top.T @ gram)
        say(f"  without the {k} largest directions ({share:.0%} of power)", lds(rest))
    taken = []
    for layer in engine.layers:
        g, q = train[:, layer.columns], query[:, layer.columns]
        power = np.square(g).sum(1)
        damping = 0.1 * power.mean() / (layer.d_in * layer.d_out)
        off = (q @ g.T) / (damping + power) @ g / len(g)  # (mean of rank-one inverses - 1) q
        taken.append(np.linalg.norm(off, axis=1) / np.linalg.norm(q, axis=1))
    say("share of a query's gradient that DataInf takes off", float(np.mean(taken)))
    for name, s in (("inner products", scores), ("cosines", cosines)):
        for pooling in ("softmax", "softmax-abs"):
            best = max(lds(s, pooling, t) for t in (0.1, 0.3, 1.0, 3.0))
            say(f"LDS of {name}, {pooling}, best of four", best)


if __name__ == "__main__":
    main()
