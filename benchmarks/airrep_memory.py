"""Memory of a step of AirRep's training as the pool grows.

    python benchmarks/airrep_memory.py [--dev N] [--pools 1000,2000,4000] [--subsets N]

For each pool size, a separate process takes one full training step (dev examples x subsets of half
the pool, every example of the pool embedded, the gradient of all) on the body of pocket's encoder,
and reports its peak resident memory, and the part that the step added. Gradient caching holds one
chunk's activations for any pool, so doubling the pool should change the peak by less than a tenth.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch


def peak() -> int:
    """Returns the peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(dev: int, pool: int, subsets: int) -> dict[str, float]:
    from tdabench_airrep.labels import Instance, Labels
    from tdabench_airrep.pipeline import Body
    from tdabench_airrep.recipe import TrainConfig
    from tdabench_airrep.train import Trainer

    from tdabench.api import Groups, load_suite, read_jsonl

    torch.set_num_threads(1)
    suite = load_suite("pocket")
    corpus = suite.corpus.train[0]
    train, queries = read_jsonl(corpus, "labels_pool"), read_jsonl(corpus, "labels_dev")
    rng = np.random.default_rng(0)
    members = [rng.choice(pool, pool // 2, replace=False) for _ in range(subsets)]
    losses = rng.standard_normal((subsets, dev)).astype(np.float32)
    instance = Instance(np.arange(dev), Groups.of(members, len(train)), losses)
    body = Body(layers=(0, 1, 2, 3, -1), spans=("response", "error"), normalise=True)
    encoder = body.encoder(suite.target("instruct").target, 0)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(dev=dev, subsets=subsets, holdout=0, probe=len(queries))
        labels = Labels((instance,), len(train), len(queries))
        trainer = Trainer(encoder, train, queries, config, Path(folder), labels=labels)
        problem = trainer.rank_problem(0)
        before = peak()
        trainer.update(problem)
    return {"pool": len(problem.train), "before": before, "peak": peak()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dev", type=int, default=256)
    parser.add_argument("--pools", default="1000,2000,4000")
    parser.add_argument("--subsets", type=int, default=32)
    parser.add_argument("--one", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.dev, args.one, args.subsets)))
        return
    print(f"one step, {args.dev} dev examples x {args.subsets} subsets")
    last = 0.0
    for pool in (int(p) for p in args.pools.split(",")):
        words = [
            __file__,
            "--one",
            str(pool),
            "--dev",
            str(args.dev),
            "--subsets",
            str(args.subsets),
        ]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        now = found["peak"]
        change = f", {100 * (now / last - 1):+.1f}% on the last" if last else ""
        print(
            f"pool of {found['pool']:5}: peak {now / 2**20:6.0f} MiB, "
            f"{(now - found['before']) / 2**20:4.0f} MiB more than before the step{change}"
        )
        last = now


if __name__ == "__main__":
    main()
