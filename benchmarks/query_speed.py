"""Time per query of methods that stream over whole gradients: before, now, and the least possible.

    OMP_NUM_THREADS=1 python benchmarks/query_speed.py --methods kfac,ekfac,explicit

Every method is built once on `--train` examples of pocket with the suite's tuned parameters, and
scores `--queries` queries in both ways in the same process. "Before" computes whole gradients of
queries and rotates them into the eigenbasis, with torch's default products; "now" is the method's
own `score`. "Products alone" is the time of multiplying float32 matrices [train, weights] and
[weights, query] with the faster library: no exact method that visits every weight of every pair can
take less. Times are of the processor. Scores are compared relative to a query's largest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdabench.api import Context, Workspace, fast_products, map_batches, per_example
from tdabench.registry import registry
from tdabench.run.sources import load_suite
from tdabench.targets import products

Gradients = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default="kfac,ekfac,explicit")
    parser.add_argument("--target", default="smooth")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=400)
    args = parser.parse_args()
    suite = load_suite("pocket")
    target = suite.target(args.target).target
    train = list(suite.train)[: args.train]
    queries = list(suite.queries("test"))[: args.queries]
    print(
        f"{len(train)} training examples, {len(queries)} queries, {torch.get_num_threads()} threads"
    )
    print("method      build s   before ms     now ms   ratio   products alone ms   difference")
    for name in args.methods.split(","):
        method = registry().method(name).cls.from_params(dict(suite.tuned[args.target][name]))
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(target=target, scratch=Path(scratch), seed=0, device="cpu")
            build, index = timed(method.build, context, train)
            now, scores = timed(index.score, queries)
            before, wanted = timed(score_before, index, queries)
        least = products_alone(index.engine.dim, len(train), len(queries))
        off = np.abs(scores - wanted) / np.abs(wanted).max(1, keepdims=True)
        each = 1000 / len(queries)
        print(
            f"{name:10} {build:8.1f} {before * each:11.1f} {now * each:10.1f} {before / now:6.2f}x "
            f"{least * each:19.1f} {off.max():12.1e}",
            flush=True,
        )


def timed(compute: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.process_time()
    found = compute(*args)
    return time.process_time() - start, found


def score_before(index: Any, queries: list[Any]) -> np.ndarray:
    """Computes the scores of `index` as version 1 of the methods did, with torch's own products."""
    genuine = products.onednn_is_faster
    products.onednn_is_faster = lambda: False  # type: ignore[assignment]
    cls = type(index)
    own = cls.preconditioned, cls.gradients, cls.products
    cls.preconditioned, cls.gradients, cls.products = preconditioned, gradients, inner_products
    try:
        return index.score(queries)
    finally:
        cls.preconditioned, cls.gradients, cls.products = own
        products.onednn_is_faster = genuine


def preconditioned(index: Any, queries: list[Any]) -> Gradients:
    found = gradients(index, queries)
    for layer in index.engine.layers:
        parts = (index.state[f"{k}.{layer.name}"] for k in ("q_a", "q_s", "lambda"))
        q_a, q_s, values = (torch.from_numpy(p) for p in parts)
        damped = values + index.method.damping * float(values.double().mean())
        g = q_s.T @ found[layer.name] @ q_a
        found[layer.name] = q_s @ (g / damped) @ q_a.T
    return found


def gradients(index: Any, queries: list[Any]) -> Gradients:
    layers = index.engine.layers
    out = {a.name: torch.empty(len(queries), a.d_out, a.d_in) for a in layers}
    tokens = index.context.target.tokenize(queries)
    most = max(1, min(256, (256 << 20) // (4 * index.engine.dim)))
    for at, g in map_batches(index.context, tokens, index.engine.gradients, max_examples=most):
        for layer in layers:
            out[layer.name][at] = g[:, layer.columns].view(-1, layer.d_out, layer.d_in)
    return out


def inner_products(index: Any, found: Gradients) -> Any:
    workspace = Workspace()
    flat = {name: g.flatten(1) for name, g in found.items()}
    n = len(next(iter(flat.values())))

    def compute(batch: Any) -> torch.Tensor:
        total = torch.zeros(n, len(batch.input_ids))

        def visit(layer: Any, x: torch.Tensor, delta: torch.Tensor) -> None:
            g = per_example(layer, x, delta, workspace).flatten(1)
            total.addmm_(flat[layer.name], g.T)

        index.engine.backward(batch, visit)
        return total

    for at, total in map_batches(index.context, index.tokens, compute):
        yield at, total.numpy()


def products_alone(weights: int, train: int, queries: int) -> float:
    """Returns seconds of [train, weights] @ [weights, query], from parts of it."""
    a, b = torch.randn(500, 16_384), torch.randn(queries, 16_384)
    times = []
    with fast_products():
        for _ in range(6):
            times.append(timed(torch.matmul, a, b.T)[0])
    return min(times[1:]) * weights / 16_384 * train / 500


if __name__ == "__main__":
    main()
