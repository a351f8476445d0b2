"""What MAGIC saves by taking queries in blocks: a step's replay is shared, its derivative is not.

    OMP_NUM_THREADS=1 python benchmarks/magic_blocks.py [--queries 1 4 8] [--batch 128]

Prints CPU seconds per query of one step backwards, for blocks of different sizes, and the ratio to
the first. Beside it stands the step's gradient, the least that a step can cost.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tdabench_influence.magic import MAGIC
from tdabench_influence.training import State, batch_orders

from tdabench.method import Context
from tdabench.run.sources import load_suite


def seconds(work: Callable[[], object]) -> float:
    """Returns the CPU seconds of the second of two calls."""
    work()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite("pocket")
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target=suite.target("smooth").target, scratch=Path(scratch))
        method = MAGIC(share=1.0, recipe=f"batch_size={args.batch},epochs=1")
        orders = batch_orders(context, suite.train, method.recipe_of(context), 1.0)
        run = method.run(context, suite.train, orders)
        print(f"gradient of a step: {seconds(lambda: run.gradient(run.start.theta, 0)):.2f} s")
        alone = 0.0
        for n in args.queries:
            later = State(*(torch.randn(n, run.dim) for _ in range(3)))
            each = seconds(lambda later=later: run.backwards(run.start, 0, later)) / n  # type: ignore[misc]
            alone = alone or each
            print(f"block of {n}: {each:.2f} s per query, {alone / each:.1f} times as fast")


if __name__ == "__main__":
    main()
